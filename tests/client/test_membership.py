"""`fed-client join`, `review`, `status`, `leave` as typed: exit codes, words, and what stays undone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner, Result

from client import consent, outbound
from client.cli import app
from client.permitted import Own
from client.policy import Policy
from client.site_config import load_site_config
from common.audit_log import told as told_by
from common.files import lock_holder, locked
from common.invitation import Invitation, read_invitation, write_invitation
from common.keys import fingerprint, new_private_key
from tests.link import make_certificates, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("undisturbed_log")


@pytest.fixture
def runs(monkeypatch) -> list[Any]:
    """Instead of taking part: the memberships that were begun; what they do is `next_run`."""
    begun: list[Any] = []

    def membership(hospital, settings, invited, shown):
        def run() -> bool:
            with pytest.raises(Exception, match="in use"), locked(hospital.lock):
                pass
            begun.append(SimpleNamespace(hospital=hospital, settings=settings, invited=invited))
            outcome = next_run.pop(0) if next_run else True
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return SimpleNamespace(run=run, stop=lambda *_: None)

    next_run: list[Any] = []
    monkeypatch.setattr("client.join.Membership", membership)
    begun_with = SimpleNamespace(begun=begun, next=next_run)
    return begun_with


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def written(path: Path, invitation: Invitation) -> Path:
    write_invitation(path, invitation)
    return path


@pytest.fixture
def letter(tmp_path, invitation) -> Path:
    """The coordinator's file as it came by mail."""
    return written(tmp_path / "oslo.json", invitation)


def is_unchanged(hospital) -> bool:
    names = {path.name for path in hospital.path.iterdir()}
    return not names & {"accepted.json", "proposed.json", "status.json"}


# ------------------------------------------------------------------------------------------ join


def test_without_an_invitation_it_says_how_to_get_one(hospital, runs):
    result = command("join", hospital.path)
    assert result.exit_code == 1
    assert f"Send {hospital.public_key} to the coordinator" in result.stderr
    assert "--invitation FILE" in result.stderr
    assert is_unchanged(hospital)
    assert not runs.begun


def test_without_a_terminal_nothing_begins_before_the_hash_is_given(
    hospital, letter, invitation, terms, runs
):
    result = command("join", hospital.path, "--invitation", letter)
    assert result.exit_code == 1
    assert consent.sheet(terms, invitation, load_site_config(hospital.config)) in result.stdout
    to_type = f"fed-client join {hospital.path} --accept {terms.hash()}"
    assert "Nothing has left this building" in result.stderr
    assert to_type in result.stderr
    assert not runs.begun
    assert is_unchanged(hospital)
    assert read_invitation(hospital.invitation) == invitation, "kept: it is needed once only"

    result = command(*to_type.split()[1:])
    assert result.exit_code == 0
    assert f"Accepted: {terms.hash()}" in result.stdout
    assert "What has left this building so far:\n  nothing" in result.stdout
    (run,) = runs.begun
    assert run.invited == invitation
    assert run.settings.device == "cpu"
    assert consent.accepted_terms(hospital) == terms

    result = command("join", hospital.path)
    assert result.exit_code == 0
    assert "CONSENT" not in result.stdout, "asked once, holds until the terms change"
    assert len(runs.begun) == 2


def test_a_wrong_hash_is_no_yes(hospital, letter, terms, runs):
    other = "0" * 64
    result = command("join", hospital.path, "--invitation", letter, "--accept", other)
    assert result.exit_code == 1
    assert f"The hash {other} is not that of these terms ({terms.hash()})" in result.stderr
    assert not runs.begun
    assert is_unchanged(hospital)


def test_terms_for_other_code_are_not_even_asked_about(hospital, tmp_path, invitation, terms, runs):
    other = replace(terms, code_hash="c0de" * 16)
    letter = written(tmp_path / "other.json", replace(invitation, terms=other))
    result = command(
        "join", hospital.path, "--invitation", letter, "--accept", other.hash()
    )  # fmt: skip
    assert result.exit_code == 1
    assert "Nothing but the installed code ever runs here" in result.stderr
    assert not runs.begun
    assert consent.accepted_terms(hospital) is None


def test_the_end_of_it_is_the_exit_code(accepted, letter, runs):
    from client.join import JoinFailed, Stopped

    finding = {
        "site": "Oslo",
        "subject": "S1",
        "file": "a.nii",
        "severity": "error",
        "code": "c",
        "what": "is damaged",
        "remedy": "mend it",
    }
    runs.next[:] = [True, False, Stopped(), JoinFailed("no data", [finding]), OSError(28, "full")]
    outcomes = [command("join", accepted.path, "--invitation", letter) for _ in range(5)]
    assert [result.exit_code for result in outcomes] == [0, 1, 0, 1, 1]
    assert "Stopped. The same command joins again." in outcomes[2].stdout
    assert outcomes[3].stderr.splitlines()[-1] == "fed-client: no data"
    assert "is damaged" in outcomes[3].stdout
    assert outcomes[4].stderr.splitlines()[-1] == (
        "fed-client: full. Free disk space, then type the same again."
    )
    assert all("What has left this building so far:" in result.stdout for result in outcomes)
    assert json.loads(accepted.status.read_text())["state"] == "stopped"


def test_two_clients_on_one_folder_are_refused(accepted, letter, runs):
    with locked(accepted.lock):
        result = command("join", accepted.path, "--invitation", letter)
    assert result.exit_code == 1
    assert f"in use by another process (number {os.getpid()})" in result.stderr
    assert not runs.begun


def test_settings_that_cannot_be_used_are_wrong_usage(accepted, letter, runs):
    accepted.config.write_text("data: x\ndevise: cpu\n")
    result = command("join", accepted.path, "--invitation", letter)
    assert result.exit_code == 2
    assert "did you mean `device`" in result.stderr
    assert not runs.begun


# ----------------------------------------------------------------------------- invitations


def refused(hospital, path: Path, runs) -> str:
    before = hospital.invitation.read_bytes() if hospital.invitation.exists() else None
    result = command("join", hospital.path, "--invitation", path)
    assert result.exit_code == 1
    assert not runs.begun
    after = hospital.invitation.read_bytes() if hospital.invitation.exists() else None
    assert after == before
    return result.stderr


def test_an_invitation_for_another_key_is_refused(hospital, tmp_path, invitation, runs):
    key = fingerprint(new_private_key().public_key())
    path = written(tmp_path / "x.json", replace(invitation, key_fingerprint=key))
    text = refused(hospital, path, runs)
    assert key in text
    assert invitation.key_fingerprint in text
    assert f"Send {hospital.public_key} to the coordinator" in text


def test_an_invitation_of_another_federation_is_refused(
    accepted, letter, tmp_path, invitation, terms, runs
):
    command("join", accepted.path, "--invitation", letter)
    runs.begun.clear()
    other = replace(terms, federation="ee" * 16)
    path = written(
        tmp_path / "x.json", replace(invitation, federation="ee" * 16, terms=other)
    )  # fmt: skip
    assert "One folder is for one federation" in refused(accepted, path, runs)


def test_another_authority_is_not_taken_over(accepted, letter, tmp_path, invitation, runs):
    command("join", accepted.path, "--invitation", letter)
    runs.begun.clear()
    forged = make_certificates(tmp_path / "forged").ca
    false = replace(invitation, ca_certificate=forged, address="evil.example.org:443")
    path = written(tmp_path / "x.json", false)
    text = refused(accepted, path, runs)
    assert "it may be forged" in text
    assert false.ca_digits() in text
    assert f"delete {accepted.invitation}" in text
    accepted.invitation.unlink()  # what the text says
    assert command("join", accepted.path, "--invitation", path).exit_code == 0
    assert runs.begun[0].invited == false


def test_an_invitation_that_is_taken_is_in_the_audit_log_once(accepted, letter, invitation, runs):
    command("join", accepted.path, "--invitation", letter)
    command("join", accepted.path, "--invitation", letter)
    (taken,) = told_by(accepted.audit, "invitation taken")
    assert taken.details["site"] == invitation.site
    assert taken.details["ca"] == invitation.ca_fingerprint()
    assert taken.details["terms"] == invitation.terms.hash()


def test_a_new_address_or_name_is_taken_over(accepted, letter, tmp_path, invitation, runs):
    command("join", accepted.path, "--invitation", letter)
    moved = replace(invitation, address="new.example.org:8443", site="Oslo-2")
    path = written(tmp_path / "x.json", moved)
    assert command("join", accepted.path, "--invitation", path).exit_code == 0
    assert command("join", accepted.path).exit_code == 0
    assert [run.invited.address for run in runs.begun[1:]] == ["new.example.org:8443"] * 2


def test_what_is_no_invitation_is_refused(hospital, tmp_path, runs):
    (tmp_path / "x.json").write_text("[]")
    assert "is no invitation" in refused(hospital, tmp_path / "x.json", runs)
    assert "cannot be read" in refused(hospital, tmp_path / "gone.json", runs)


def test_a_folder_that_is_none_is_refused(tmp_path, runs):
    for name in ("join", "review", "status", "leave"):
        result = command(name, tmp_path / "none")
        assert result.exit_code == 1
        assert "fed-client init" in result.stderr
        assert command(name).exit_code == 2


# ------------------------------------------------------------------------------------- review


@pytest.fixture
def invited(hospital, invitation):
    write_invitation(hospital.invitation, invitation)
    return hospital


def test_review_shows_what_waits_and_what_changed(invited, invitation, terms, tiny_config):
    path = invited.path
    first = command("review", path)
    assert first.exit_code == 1
    assert consent.sheet(terms, invitation, load_site_config(invited.config)) in first.stdout
    assert "Changed since" not in first.stdout
    assert f"fed-client review {path} --accept {terms.hash()}" in first.stderr

    assert command("review", path, "--accept", terms.hash()).exit_code == 0
    settled = command("review", path)
    assert settled.exit_code == 0
    assert "These terms are accepted; nothing else awaits an answer." in settled.stdout

    assert command("review", path, "--accept", terms.hash()).exit_code == 0

    other = replace(terms, config=tiny_config("rounds.number=9"))
    early = command("review", path, "--accept", other.hash())
    assert early.exit_code == 1
    assert "No terms await an answer here" in early.stderr
    consent.propose(invited, other)
    changed = command("review", path)
    assert changed.exit_code == 1
    assert "Changed since the last yes:\n  rounds.number: 3 -> 9\n" in changed.stdout
    assert consent.sheet(other, invitation, load_site_config(invited.config)) in changed.stdout
    assert consent.accepted_terms(invited) == terms
    wrong = command("review", path, "--accept", terms.hash())
    assert wrong.exit_code == 1, "the old terms' hash is no yes to the new ones"
    done = command("review", path, "--accept", other.hash())
    assert (done.exit_code, consent.accepted_terms(invited)) == (0, other)
    assert consent.proposed_terms(invited) is None


def test_join_goes_on_under_the_old_terms_until_the_new_are_accepted(
    accepted, letter, terms, tiny_config, runs
):
    other = replace(terms, config=tiny_config("rounds.number=9"))
    consent.propose(accepted, other)
    result = command("join", accepted.path, "--invitation", letter)
    assert result.exit_code == 0
    assert consent.accepted_terms(accepted) == terms
    result = command("join", accepted.path, "--accept", other.hash())
    assert result.exit_code == 0
    assert consent.accepted_terms(accepted) == other


def test_proposed_terms_of_other_code_can_be_read_and_not_accepted(invited, terms):
    other = replace(terms, code_hash="c0de" * 16)
    consent.propose(invited, other)
    result = command("review", invited.path, "--accept", other.hash())
    assert result.exit_code == 1
    assert "c0dec0dec0de" in result.stdout
    assert "same version" in result.stderr
    assert consent.proposed_terms(invited) == other


def with_policy(hospital, text: str) -> None:
    hospital.config.write_text(hospital.config.read_text() + f"policy: {{{text}}}\n")


def test_terms_against_the_policy_cannot_be_accepted(invited, terms, runs):
    """Every rule is told, and nothing leaves."""
    with_policy(invited, "max_rounds: 1, networks: [dynunet]")
    for name in ("join", "review"):
        result = command(name, invited.path, "--accept", terms.hash())
        assert result.exit_code == 1
        assert "policy rule `max_rounds`: found 3, allowed at most 1" in result.stderr
        assert "policy rule `networks`: found unet, allowed dynunet" in result.stderr
    assert consent.accepted_terms(invited) is None
    assert runs.begun == []
    assert outbound.departures(invited.audit) == []


def test_a_policy_that_came_after_the_yes_holds_too(invited, terms, runs):
    consent.accept(invited, terms, terms.hash())
    with_policy(invited, "require_privacy: true")
    result = command("join", invited.path)
    assert result.exit_code == 1
    assert "policy rule `require_privacy`" in result.stderr
    assert runs.begun == []


def typed(folder: Path, name: str, answer: str) -> tuple[int, str]:
    """The command on a terminal, with what a person types; exit code and what is on the screen."""
    reading, writing = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "200"}
    program = f"import sys; sys.argv = ['fed-client', {name!r}, {str(folder)!r}]\n"
    program += "from client.cli import main; main()"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=writing,
            stdout=writing,
            stderr=writing,
            env=environment,
            start_new_session=True,
        )
        screen = ""
        while "Type yes: " not in screen:
            screen += os.read(reading, 10_000).decode(errors="replace")
        os.write(reading, answer.encode())
        code = process.wait(timeout=100)
        os.set_blocking(reading, False)
        return code, screen + os.read(reading, 100_000).decode(errors="replace")
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ("yes\n", 0, "Accepted: "),
        ("Yes \n", 0, "Accepted: "),
        ("y\n", 1, "Not accepted"),
        ("\n", 1, "Not accepted"),
        ("\x04", 1, "Aborted"),
    ],
)
def test_on_a_terminal_a_person_says_yes(invited, terms, answer, code, said):
    result, screen = typed(invited.path, "review", answer)
    assert said in screen
    assert result == code
    assert consent.accepted_terms(invited) == (terms if code == 0 else None)


# ------------------------------------------------------------------------------------- status


def sent(hospital) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    asked = Message(RecordDict(), 2, "train")
    gate = outbound.Gate(hospital.audit, Policy(), Own("Oslo"), str.encode)
    outbound.release(Message(Error(code=2, reason="no Gd"), reply_to=asked), asked, gate)


def told(hospital) -> tuple[int, dict[str, Any]]:
    result = command("status", hospital.path, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_status_before_anything_has_happened(hospital):
    code, document = told(hospital)
    assert code == 1
    assert document == {
        "running": False,
        "state": "not running",
        "accepted": None,
        "proposed": None,
        "left": ["nothing"],
        "departures": [],
    }
    result = command("status", hospital.path)
    assert result.exit_code == 1
    assert "not running" in result.stdout
    assert "nothing" in result.stdout


def test_status_of_a_client_that_runs(accepted, terms, tiny_config):
    from client.display import display
    from common.progress import Progress

    other = replace(terms, config=tiny_config("rounds.number=9"))
    consent.propose(accepted, other)
    sent(accepted)
    with locked(accepted.lock), display(accepted.status, site="Oslo", coordinator="x:1") as shown:
        shown.set(n_training=12, n_held_out=5)
        shown.state("training", "round 2: training", round=2, trouble="away for a while")
        shown._written = 0.0
        shown.progress(Progress("round 2, Oslo: training", 3, 9, "batches", 6.0, "loss 0.5"))
        code, document = told(accepted)
        result = command("status", accepted.path)
    assert (code, result.exit_code) == (0, 0)
    assert (document["running"], document["state"], document["round"]) == (True, "training", 2)
    assert document["progress"]["done"] == 3
    assert (document["accepted"], document["proposed"]) == (terms.hash(), other.hash())
    assert document["left"] == ["1 error text"]
    assert document["departures"][0]["details"] == {"code": 2, "reason": "no Gd"}
    for text in (
        "Oslo: training",
        "round 2, Oslo: training: 3/9, 12 s left, loss 0.5",
        "coordinator: x:1",
        "last trouble: away for a while",
        "training subjects: 12",
        f"fed-client review {accepted.path}",
        "1 error text",
    ):
        assert text in result.stdout, text
    code, document = told(accepted)
    assert (code, document["state"]) == (1, "not running"), "killed or stopped, the lock is gone"


def test_a_status_file_that_cannot_be_read_is_none(accepted):
    for text in ("", "{", "\x00", "[]", "5", "[1]"):
        accepted.status.write_text(text)
        assert told(accepted)[1]["accepted"] is not None


# -------------------------------------------------------------------------------------- leave


def test_who_leaves_is_asked_again(invited, terms, runs):
    consent.accept(invited, terms, terms.hash())
    sent(invited)
    result = command("leave", invited.path)
    assert result.exit_code == 0
    for text in ("This site has left", "1 error text", "fed-server revoke DIR NAME"):
        assert text in result.stdout
    assert consent.accepted_terms(invited) is None
    assert outbound.departures(invited.audit), "the account stays"
    kinds = [entry.kind for entry in told_by(invited.audit)]
    assert kinds[2:] == ["terms accepted", "sent", "terms withdrawn", "left"]
    assert command("join", invited.path).exit_code == 1
    assert not runs.begun
    assert command("leave", invited.path).exit_code == 0


HOLDING = """
import signal, sys, time
from pathlib import Path
from common.files import locked
signal.signal(signal.SIGTERM, eval(sys.argv[2]))
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def holding(lock: Path, on_term: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(lock), on_term],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_leaving_stops_the_client_that_runs(accepted):
    process = holding(accepted.lock, "signal.SIG_DFL")
    try:
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        assert command("leave", accepted.path).exit_code == 0
        reaper.join(timeout=30)
        assert process.returncode == -signal.SIGTERM
        assert lock_holder(accepted.lock) is None
    finally:
        process.kill()
        process.wait()


def test_a_client_that_does_not_stop_is_told_and_the_yes_is_withdrawn_all_the_same(
    accepted, monkeypatch
):
    monkeypatch.setattr("client.membership.STOP_SECONDS", 0.3)
    process = holding(accepted.lock, "signal.SIG_IGN")
    try:
        result = command("leave", accepted.path)
        assert result.exit_code == 1
        assert "did not stop within" in result.stderr
        assert consent.accepted_terms(accepted) is None, "it takes no further part"
    finally:
        process.kill()
        process.wait()
    until(lambda: lock_holder(accepted.lock) is None, "the lock")
