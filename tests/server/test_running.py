"""`fed-server start`, `status`, `stop`, `export` as typed: exit codes and words in every state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from common.files import AlreadyInUse, lock_holder, locked
from server.checkpoint import RunFolder
from server.cli import app
from server.coordinator import init_folder
from server.history import History
from server.roll_call import FederationFailed
from server.start import Stopped
from server.superlink import CannotListen
from server.tables import Verdict
from tests.server.test_tables import a_round, metrics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("undisturbed_log")


@pytest.fixture
def folder(tmp_path, tiny_config):
    return init_folder(tmp_path / "study", tiny_config("name=study"))


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rounds_done(folder, *, complete: bool) -> None:
    RunFolder(folder.run).path.mkdir(exist_ok=True)
    with History(RunFolder(folder.run).history) as history:
        history.record_round(a_round(1, "ab"))
        history.record_round(a_round(2, "a", "b"))
        if complete:
            history.record_final(2, {"a": metrics(2), "b": metrics(2)}, {})


# ------------------------------------------------------------------------------------- start


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (Verdict(True, 2, {}, ()), 0, ""),
        (Verdict(False, 2, {}, ()), 1, ""),
        (FederationFailed("1 of 2 needed sites came."), 1, "fed-server: 1 of 2 needed sites came."),
        (CannotListen("Cannot listen on x."), 1, "fed-server: Cannot listen on x."),
        (AlreadyInUse("in use by number 5."), 1, "fed-server: in use by number 5."),
        (Stopped("stopped; the same command continues."), 1, "fed-server: stopped; the same"),
        (OSError(28, "No space left", "/x/y"), 1, "fed-server: /x/y: No space left."),
        (KeyboardInterrupt(), 130, "fed-server: interrupted."),
    ],
)
def test_how_it_ended_is_the_exit_code(folder, monkeypatch, outcome, code, said):
    rounds_done(folder, complete=code == 0)

    def serve(coordinator):
        assert coordinator == folder
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr("server.start.start", serve)
    result = command("start", folder.path)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    verdict = "complete" if code == 0 else "NOT complete"
    assert f"Training {verdict}: 2 rounds." in result.stdout, "also after a failure"
    assert "a contributed to every round." in result.stdout
    assert "Round 2: without b: b was off" in result.stdout
    if code == 0:
        assert "Model of round 2" in result.stdout
        assert f"fed-server export {folder.path} OUT" in result.stdout


def test_what_cannot_be_started_is_said(folder, tmp_path):
    assert command("start", tmp_path / "none").exit_code == 1
    assert "fed-server admit" in command("start", folder.path).stderr, "nobody is enrolled"
    settings = folder.config.read_text()
    folder.config.write_text(settings.replace("init_from: null", "init_from: model.safetensors"))
    result = command("start", folder.path)
    assert result.exit_code == 2
    assert f"{folder.path / 'model.safetensors'} is no file" in result.stderr, "beside the settings"
    folder.config.write_text("trainig: {}")
    result = command("start", folder.path)
    assert (result.exit_code, "did you mean `training`" in result.stderr) == (2, True)


def test_two_servers_on_one_folder_are_refused(folder):
    with locked(folder.lock):
        result = command("start", folder.path)
    assert result.exit_code == 1
    assert f"in use by another process (number {os.getpid()})" in result.stderr


# ------------------------------------------------------------------------------------ status


TOLD = {
    "name": "study",
    "state": "training",
    "rounds": 3,
    "rounds_done": 2,
    "sites": {
        "a": {
            "state": "training",
            "last_contact": "2026-11-24T10:00:00+00:00",
            "round": 2,
            "loss": 0.25,
            "dice": 0.5,
            "iou": 0.375,
            "seconds": 12.34,
            "bytes": 100,
            "absent": None,
        },
        "b": {
            "state": "offline",
            "last_contact": None,
            "round": None,
            "loss": None,
            "dice": None,
            "iou": None,
            "seconds": None,
            "bytes": 0,
            "absent": "it has never connected.",
        },
    },
}


def document(folder) -> tuple[int, dict]:
    result = command("status", folder.path, "--json")
    return result.exit_code, json.loads(
        result.stdout, parse_constant=lambda name: pytest.fail(name)
    )


def test_status_in_every_state(folder):
    code, told = document(folder)
    assert (code, told) == (1, {"running": False, "state": "stopped", "results": None})
    folder.status.write_text(json.dumps(TOLD))
    rounds_done(folder, complete=False)
    code, told = document(folder)
    assert (code, told["state"], told["running"]) == (1, "stopped", False)
    assert [r["round"] for r in told["results"]["rounds"]] == [1, 2]
    with locked(folder.lock):
        code, told = document(folder)
        assert (code, told["state"], told["running"]) == (0, "training", True)
        assert told["sites"] == TOLD["sites"]
        folder.status.unlink()
        code, told = document(folder)
        assert (code, told["state"]) == (0, "starting")
    rounds_done_finally(folder)
    code, told = document(folder)
    assert (code, told["state"], told["running"]) == (0, "complete", False)


def rounds_done_finally(folder) -> None:
    with History(RunFolder(folder.run).history) as history:
        history.record_final(2, {"a": metrics(2), "b": metrics(2)}, {})


def test_status_as_a_person_reads_it(folder):
    folder.status.write_text(json.dumps(TOLD))
    rounds_done(folder, complete=False)
    with locked(folder.lock):
        running = command("status", folder.path)
    assert running.exit_code == 0
    assert "Federation study: training, 2 of 3 rounds done" in running.stdout
    (a,) = [line for line in running.stdout.splitlines() if "2026-11-24T10:00:00+00:00" in line]
    for cell in ("training", "2", "0.250", "0.500", "0.375", "12.3"):
        assert cell in a.split() or f" {cell} " in a
    assert "it has never connected." in running.stdout
    assert "Training NOT complete: 2 rounds." in running.stdout
    stopped = command("status", folder.path)
    assert stopped.exit_code == 1
    assert "Federation study: stopped, 2 of 3 rounds done" in stopped.stdout
    (a,) = [line for line in stopped.stdout.splitlines() if "2026-11-24T10:00:00+00:00" in line]
    assert "training" not in a, "nobody trains any more"


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"sites": 5}', '{"sites": {"a": {}}}', "\0"])
def test_a_status_file_that_cannot_be_used_is_none(folder, text):
    folder.status.write_text(text)
    with locked(folder.lock):
        assert command("status", folder.path).exit_code == 0
        assert document(folder)[1]["running"] is True


# -------------------------------------------------------------------------------------- stop


HOLDING = """
import signal, sys, time
from pathlib import Path
from common.files import locked
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holding(folder) -> Iterator:
    """A function: starts a process that holds the folder's lock as a server does."""
    processes: list[subprocess.Popen[str]] = []

    def start(manner: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, str(folder.lock), manner],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_stopping(folder, holding, monkeypatch):
    nothing = command("stop", folder.path)
    assert (nothing.exit_code, nothing.stdout) == (0, "The server does not run.\n")
    process = holding()
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    stopped = command("stop", folder.path)
    reaper.join(timeout=60)
    assert stopped.exit_code == 0
    assert "continues after the last complete round" in stopped.stdout
    assert process.returncode == -signal.SIGTERM
    assert lock_holder(folder.lock) is None

    monkeypatch.setattr("server.running.STOP_SECONDS", 0.3)
    holding("stubborn")
    refused = command("stop", folder.path)
    assert refused.exit_code == 1
    assert "The server did not stop within" in refused.stderr


# ------------------------------------------------------------------------------------ export


def test_export_says_where_or_why_not(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = command("export", folder.path, out)
    assert result.exit_code == 1
    assert "the federation is not complete" in result.stderr
    asked = []

    def export_model(coordinator, path, *, worst_site):
        asked.append((coordinator, path, worst_site))
        return path / "model.safetensors", path / "MODEL-CARD.md"

    monkeypatch.setattr("server.export.export_model", export_model)
    for options, worst in (((), False), (("--worst-site",), True)):
        result = command("export", folder.path, out, *options)
        assert result.exit_code == 0
        assert result.stdout.splitlines() == [
            f"Model: {out / 'model.safetensors'}",
            f"Card: {out / 'MODEL-CARD.md'}",
        ]
        assert asked[-1] == (folder, out, worst)
    assert command("export", folder.path).exit_code == 2
