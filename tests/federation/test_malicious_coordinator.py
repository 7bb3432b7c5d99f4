"""A coordinator who wants hospitals to run other code than was reviewed: a stock Flower server with
the federation's own certificates, and an app for it that leaves a mark wherever it is run.

The client is told to run it in two ways: openly, as Flower means it, and under the federation's own
id and code hash, forged into the server's database. It does neither, says so, and stays.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.code_hash import code_hash
from common.invitation import read_invitation
from server.coordinator import federation_id

pytestmark = pytest.mark.slow
SITE = "site-01"
BIN = Path(sys.executable).parent
PROJECT = """
[project]
name = "evil"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "coordinator"

[tool.flwr.app.components]
serverapp = "evil.server_app:app"
clientapp = "evil.client_app:app"

[tool.flwr.app.config]
go = ""
answers = ""
"""
CLIENT_APP = """
from pathlib import Path
from flwr.clientapp import ClientApp

Path({mark!r}).write_text("imported")
app = ClientApp()

@app.query()
@app.train()
@app.evaluate()
def run(message, context):
    Path({mark!r}).write_text("run")
    return message
"""
SERVER_APP = """
import json
import time
from pathlib import Path

import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()
SHELL = ConfigRecord({{"command": "touch {mark}", "round": 1}})
PICKLE = Array("object", (1,), "numpy.ndarray", b"cposix\\nsystem\\n(S'touch {mark}'\\ntR.")
WEIGHTS = Array(numpy.zeros(3, "float32"))
TASKS = {{
    "a question": ("query", {{}}),
    "a command": ("query", {{"terms": SHELL}}),
    "Flower's own way": ("train", {{"arrays": ArrayRecord({{"w": WEIGHTS}}), "config": SHELL}}),
    "a pickle": ("train", {{"model": ArrayRecord({{"weights": PICKLE}}), "about": SHELL}}),
    "another function": ("train.other", {{"about": SHELL}}),
    "half a task": ("evaluate", {{"about": SHELL}}),
}}


@app.main()
def main(grid, context):
    while not Path(context.run_config["go"]).exists():
        time.sleep(0.1)
    answers = {{}}
    for name, (kind, records) in TASKS.items():
        message = Message(RecordDict(records), {node}, kind)
        reply = next(iter(grid.send_and_receive([message], timeout=120)), None)
        answers[name] = reply.error.reason if reply and reply.has_error() else repr(reply)
    written = Path(context.run_config["answers"] + ".tmp")
    written.write_text(json.dumps(answers))
    written.rename(context.run_config["answers"])
"""


@dataclass
class Attack:
    federation: Any
    client: Any
    mark: Path
    openly: dict[str, str]
    forged: dict[str, str]


@pytest.fixture(scope="module")
def attack(new_federation, waiting):
    f = new_federation(sites=[SITE])
    stock = f.path / "stock"
    home = stock / "home"
    home.mkdir(parents=True)
    address = read_invitation(f.coordinator.invitation(SITE)).address
    ca = f.coordinator.ca_certificate
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fed"\n[superlink.fed]\naddress = "{address}"\n'
        f'root-certificates = "{ca}"\n'
    )
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    flower = {**quiet, "FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    database = stock / "state.db"
    host, _, port = address.partition(":")
    tls = "--ssl-certfile", str(f.coordinator.server_certificate), "--ssl-keyfile"
    tls = *tls, str(f.coordinator.server_key), "--ssl-ca-certfile", str(ca)
    options = "--enable-supernode-auth", "--disable-runtime-dependency-installation"
    where = "--host", host, "--port", port, "--database", str(database)
    superlink = f.run("flower-superlink", *where, *tls, *options, env=flower)

    def flwr(*arguments: str) -> dict[str, Any]:
        text = f.typed("flwr", *arguments, "--format", "json", env=flower)
        return json.loads(text[text.find("{") :])

    waiting(lambda: is_listening(host, int(port)), "the stock server listens")
    public_key = str(f.hospitals[SITE].public_key)
    registered = flwr("supernode", "register", public_key, "--name", SITE)["node-id"]
    mark, app = stock / "PWNED", stock / "app"
    (app / "evil").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "evil" / "__init__.py").touch()
    (app / "evil" / "client_app.py").write_text(CLIENT_APP.format(mark=str(mark)))
    (app / "evil" / "server_app.py").write_text(SERVER_APP.format(mark=mark, node=registered))
    client = f.join(SITE)
    client.says("connected to")

    def run(name: str) -> tuple[int, Path, Path]:
        go, answers = stock / f"go {name}", stock / f"answers {name}"
        values = f'go="{go}" answers="{answers}"'
        return int(flwr("run", str(app), "-c", values)["run-id"]), go, answers

    def answered(go: Path, answers: Path) -> dict[str, str]:
        go.touch()
        waiting(answers.exists, "the malicious app has its answers")
        return json.loads(answers.read_text())

    _, *open_run = run("openly")
    run_id, *forged_run = run("forged")
    openly = answered(*open_run)
    signed = run_id - 2**64 if run_id >= 2**63 else run_id
    with closing(sqlite3.connect(database, timeout=60)) as link, link:
        changed = link.execute(
            "UPDATE run SET fab_id = ?, fab_hash = ? WHERE run_id = ?",
            (federation_id(f.coordinator), code_hash(), signed),
        )
        assert changed.rowcount == 1
    forged = answered(*forged_run)
    yield Attack(f, client, mark, openly, forged)
    superlink.kill_group()


def is_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_the_code_that_was_sent_never_ran(attack):
    assert not attack.mark.exists()
    home = attack.federation.hospitals[SITE].path
    assert not [path for path in home.rglob("*") if "evil" in path.name]
    # it would have left its mark
    load = [sys.executable, "-c", "import evil.client_app"]
    subprocess.run(load, cwd=attack.mark.parent / "app", check=True)
    assert attack.mark.exists()


def test_the_client_says_what_it_refused_and_stays(attack):
    text = attack.client.text()
    assert f"refused: {SITE}: the task is of another federation (coordinator/evil)" in text
    assert attack.client.process.poll() is None
    attack.client.process.terminate()
    attack.client.ends_well()


def test_the_coordinator_gets_the_reason_in_words(attack):
    assert len(attack.openly) == len(attack.forged) == 6
    for reason in attack.openly.values():
        assert reason == f"{SITE}: the task is of another federation (coordinator/evil)."
    for kind, reason in attack.forged.items():
        assert reason != "None", kind
        assert "Traceback" not in reason


def test_nothing_but_refusals_left(attack):
    assert {row["kind"] for row in attack.federation.left(SITE)} == {"error"}
