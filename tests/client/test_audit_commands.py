"""`fed-client audit` as typed: what is shown, exported, and said of a log that was changed."""

from __future__ import annotations

import csv
import json

import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner, Result

from client import outbound
from client.cli import app
from client.hospital import rotate_key
from client.permitted import Own
from client.policy import Policy
from common.audit_log import AuditLog, append, told
from common.keys import (
    fingerprint,
    load_private_key,
    new_private_key,
    read_public_key,
    save_private_key,
)
from server.cli import app as server_app
from server.coordinator import init_folder

pytestmark = pytest.mark.usefixtures("undisturbed_log")


@pytest.fixture
def oslo(accepted):
    """With something that has left."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    asked = Message(RecordDict(), 2, "train")
    gate = outbound.Gate(accepted.audit, Policy(), Own("Oslo"), str.encode)
    outbound.release(Message(Error(code=2, reason="no, ähm: Gd"), reply_to=asked), asked, gate)
    return accepted


def command(*arguments: object, program=app) -> Result:
    result = CliRunner().invoke(program, ["audit", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_good_log_is_verified_and_the_key_named(oslo):
    result = command("verify", oslo.path)
    assert result.exit_code == 0
    assert "4 entries" in result.output
    key = fingerprint(read_public_key(oslo.public_key).key)
    assert f"signed by   {key} from entry 1 on" in result.output
    assert "Every byte is as it was written." in result.output
    document = json.loads(command("verify", oslo.path, "--json").stdout)
    assert document["good"] is True
    assert document["entries"] == 4
    assert document["keys"] == [{"fingerprint": key, "from_entry": 1}]
    assert document["wrong"] == document["warnings"] == []


def test_a_changed_log_fails_and_the_entry_is_named(oslo):
    content = oslo.audit.path.read_bytes()
    oslo.audit.path.write_bytes(content.replace(b"no, ", b"No, "))
    result = command("verify", oslo.path)
    assert result.exit_code == 1
    assert "entry 4 was changed" in result.output
    result = command("verify", oslo.path, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["good"] is False
    assert "entry 4 was changed" in document["wrong"][0]
    result = command("export", oslo.path, oslo.path / "out.csv")
    assert result.exit_code == 1
    assert not (oslo.path / "out.csv").exists()


def test_a_missing_or_unfinished_log_fails(oslo, tmp_path):
    with oslo.audit.path.open("ab") as file:
        file.write(b'{"at":"20')
    result = command("verify", oslo.path)
    assert result.exit_code == 1
    assert "9 bytes after entry 4 are no entry" in result.output
    append(oslo.audit, "left", {})
    result = command("verify", oslo.path)
    assert result.exit_code == 0
    assert "an interrupted writing was cut off" in result.output
    oslo.audit.path.unlink()
    oslo.audit.anchor.unlink()
    result = command("verify", oslo.path)
    assert (result.exit_code, "there is no audit log" in result.output) == (1, True)
    result = command("verify", tmp_path)
    assert (result.exit_code, "is no hospital's folder" in result.output) == (1, True)


def test_a_rotated_key_is_named_and_another_one_warned_of(oslo):
    rotate_key(oslo)
    result = command("verify", oslo.path)
    assert result.output.count("signed by") == 2
    assert "warning" not in result.output
    (oslo.path / "site.key").unlink()
    save_private_key(oslo.private_key, new_private_key())
    result = command("verify", oslo.path)
    present = fingerprint(load_private_key(oslo.private_key).public_key())
    assert result.exit_code == 1
    assert f"and the present key is {present}" in result.output
    oslo.private_key.unlink()
    assert command("verify", oslo.path).exit_code == 0, "then the public key tells"
    oslo.public_key.unlink()
    assert "no present key" in command("verify", oslo.path).output


def test_a_key_that_was_lost_vouches_for_no_other_and_that_is_said(oslo):
    old = fingerprint(load_private_key(oslo.private_key).public_key())
    oslo.private_key.unlink()
    rotate_key(oslo)
    new = fingerprint(load_private_key(oslo.private_key).public_key())
    result = command("verify", oslo.path)
    assert result.exit_code == 0
    said = f"entry 5, {list(told(oslo.audit))[4].at[:19]}: the new key, {new}, is not vouched for"
    assert said in result.output
    assert old in result.output.split(said)[1].splitlines()[0]
    assert len(json.loads(command("verify", oslo.path, "--json").stdout)["warnings"]) == 1


def test_an_export_takes_the_place_of_nothing(oslo):
    before = oslo.accepted.read_bytes()
    result = command("export", oslo.path, oslo.accepted)
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert oslo.accepted.read_bytes() == before


def test_what_cannot_be_compared_is_said_in_words(oslo, tmp_path):
    append(oslo.audit, "invitation taken", {"site": "Oslo"})
    assert command("verify", oslo.path, "--against", tmp_path / "none").exit_code == 2
    folder = command("verify", oslo.path, "--against", tmp_path)
    assert (folder.exit_code, "is no file" in folder.output) == (1, True)
    assert "disk space" not in folder.output
    save_private_key(tmp_path / "key", new_private_key())
    head = {"of": "Oslo", "number": 1, "hash": "a" * 64}
    for number, (kind, details) in enumerate(
        (
            ("admitted", {"site": "Oslo"}),
            ("admitted", {"site": ["Oslo"], "key": "x"}),
            ("admitted", {"site": "Oslo", "key": {}}),
            ("task sent", {"site": {}}),
            ("task sent", {"site": "Oslo", "sha256": {}}),
            ("reply received", {"site": "Oslo", "sha256": 5}),
            ("reply received", {"site": "Oslo", "heard": 5}),
            ("reply received", {"site": "Oslo", "heard": {**head, "number": "x"}}),
            ("reply received", {"site": "Oslo", "heard": {"of": "Oslo"}}),
            ("reply received", {"site": "Oslo", "heard": {**head, "of": []}}),
        )
    ):
        hostile = AuditLog(tmp_path / f"{number}.log", tmp_path / "key")
        append(hostile, kind, details)
        result = command("verify", oslo.path, "--against", hostile.path)
        assert result.exit_code == 1, details
        assert "does not hold what such an entry holds" in " ".join(result.output.split()), details


def test_what_happened_is_shown_newest_last(oslo):
    lines = command("show", oslo.path).output
    assert lines.index("folder made") < lines.index("terms accepted") < lines.index("error")
    few = command("show", oslo.path, "--last", 1).output
    assert "folder made" not in few
    assert "kind error" in few
    assert command("show", oslo.path, "--last", 0).exit_code == 2


def test_the_export_holds_every_entry(oslo, tmp_path):
    entries = list(told(oslo.audit))
    for ending in ("csv", "json"):
        assert command("export", oslo.path, tmp_path / f"out.{ending}").exit_code == 0
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["number"], row["details"] = int(row["number"]), json.loads(row["details"])
    assert rows == json.loads((tmp_path / "out.json").read_text())["entries"]
    assert rows == [vars(entry) for entry in entries]
    assert rows[-1]["details"]["details"]["reason"] == "no, ähm: Gd"
    assert command("export", oslo.path, tmp_path / "out.txt").exit_code == 2


def test_a_log_that_does_not_fit_the_other_sides_fails(oslo, tmp_path, tiny_config):
    server = init_folder(tmp_path / "study", tiny_config())
    append(oslo.audit, "invitation taken", {"site": "Oslo"})
    heard = {"of": "Oslo", "number": 4, "hash": list(told(oslo.audit))[3].hash}
    key = fingerprint(read_public_key(oslo.public_key).key)
    append(server.audit, "admitted", {"site": "Oslo", "key": key})
    append(server.audit, "reply received", {"site": "Oslo", "sha256": "", "heard": heard})
    sides = (
        (app, oslo.path, server.audit.path),
        (server_app, server.path, oslo.audit.path),
    )
    for program, folder, other in sides:
        result = command("verify", folder, "--against", other, program=program)
        assert result.exit_code == 0
        assert "and fits" in result.output
    append(server.audit, "reply received", {"site": "Oslo", "heard": {**heard, "number": 9}})
    for program, folder, other in sides:
        result = command("verify", folder, "--against", other, program=program)
        assert result.exit_code == 1
        assert "Oslo's log lacks entry 9" in result.output


def test_the_coordinators_log_is_shown_and_exported_too(tmp_path, tiny_config):
    server = init_folder(tmp_path / "study", tiny_config("name=study"))
    assert command("verify", server.path, program=server_app).exit_code == 0
    assert "name study" in command("show", server.path, program=server_app).output
    out = tmp_path / "out.json"
    assert command("export", server.path, out, program=server_app).exit_code == 0
    assert len(json.loads(out.read_text())["entries"]) == 2
    assert command("show", tmp_path, program=server_app).exit_code == 1
