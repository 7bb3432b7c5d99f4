"""The coordinator's audit log: every message, enrolment and round; and what the sites remember of it."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.error import Error
from typer.testing import CliRunner

from common.audit_heads import Heads, attach_heads, attached_heads
from common.audit_log import EMPTY, Head, LogError, append, told, verified
from common.keys import fingerprint, new_private_key, public_line
from common.terms import Terms
from server import coordinator
from server.audit_trail import Witness
from server.cli import app
from server.coordinator import init_folder, renew_certificate
from server.roll_call import FederationFailed
from tests.link import reply_to, take
from tests.server.test_tables import a_round


@pytest.fixture
def folder(tmp_path, tiny_config):
    return init_folder(tmp_path / "study", tiny_config("name=study"))


@pytest.fixture
def witness(folder, link):
    link.grid._witness = Witness(folder.audit)
    return link.grid._witness


def weights(data: bytes, round_: int = 3) -> RecordDict:
    array = Array("uint8", (len(data),), "safetensors", data)
    about = ConfigRecord({"round": round_})
    return RecordDict({"about": about, "weights": ArrayRecord({"weights": array})})


def one(number: int, digit: str = "a") -> Head:
    return Head(number, digit * 64)


def with_heads(content: RecordDict, mine: Head, yours: Head = EMPTY) -> RecordDict:
    attach_heads(content, Heads(mine, yours))
    return content


def trail(witness: Witness, *kinds: str) -> list[dict[str, Any]]:
    return [{**entry.details, "kind": entry.kind} for entry in told(witness.log, *kinds)]


def exchange(link, client, answer: RecordDict | Error, site: str = "a"):
    """One task and its reply; the task as the site got it."""
    sent = link.send(site, weights(b"model"), kind="train")
    task = take(client)
    assert client.send(reply_to(client, task, answer))
    assert link.pull(sent) is not None
    return task


def test_what_goes_out_and_comes_in_is_an_entry(link, witness):
    client = link.connect("a")
    task = exchange(link, client, with_heads(weights(b"update"), one(9)))
    exchange(link, client, Error(code=2, reason="no Gd"))
    entries = trail(witness)[2:]
    assert [entry["kind"] for entry in entries] == [
        *("task sent", "reply received", "task sent", "no answer")
    ]
    for entry, data in zip(entries, (b"model", b"update"), strict=False):
        assert (entry["site"], entry["task"], entry["round"]) == ("a", "train", 3)
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert entries[1]["heard"] == {"of": "a", "number": 9, "hash": "a" * 64}
    assert entries[3]["why"] == "no Gd"
    assert attached_heads(task.content) == Heads(verified(witness.log).entries[1].head, EMPTY)
    assert link.held() == {}
    assert trail(witness, "problem") == []


def test_each_site_is_told_what_was_heard_of_it_also_after_a_restart(link, witness):
    a, b = link.connect("a"), link.connect("b")
    exchange(link, a, with_heads(weights(b"u"), one(9)))
    exchange(link, b, with_heads(weights(b"u"), one(4, "b")), "b")
    link.grid._witness = Witness(witness.log, _entries=verified(witness.log).entries)
    tasks = [
        exchange(link, client, Error(code=2, reason=""), site)
        for client, site in ((a, "a"), (b, "b"))
    ]
    assert [attached_heads(task.content).yours for task in tasks] == [one(9), one(4, "b")]


def test_its_own_log_that_was_cut_off_is_noticed_by_what_a_site_remembers(link, witness, caplog):
    """Also when the anchor was cut back with it."""
    log = witness.log
    before = log.path.read_bytes(), log.anchor.read_bytes()
    known = append(log, "admitted", {"site": "x", "key": ""}).head
    client = link.connect("a")
    exchange(link, client, with_heads(weights(b"u"), one(9), known))
    assert trail(witness, "problem") == []
    log.path.write_bytes(before[0])
    log.anchor.write_bytes(before[1])
    for number in (10, 11):  # it goes on, and says it once
        exchange(link, client, with_heads(weights(b"u"), one(number), known))
    (problem,) = trail(witness, "problem")
    assert f"a remembers entry {known.number} of this audit log" in problem["what"]
    assert caplog.text.count(problem["what"]) == 1
    assert verified(log)


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (one(8), "8 entries, and it had 9"),
        (one(9, "b"), "another entry 9"),
        (None, "told nothing of its audit log"),
    ],
)
def test_a_site_whose_log_goes_back_is_named(link, witness, caplog, then, said):
    client = link.connect("a")
    exchange(link, client, with_heads(weights(b"u"), one(9)))
    answer = weights(b"u") if then is None else with_heads(weights(b"u"), then)
    exchange(link, client, answer)
    (problem,) = trail(witness, "problem")
    assert said in problem["what"]
    assert problem["what"] in caplog.text


def test_a_site_with_a_new_key_may_begin_a_new_log(link, witness, caplog):
    client = link.connect("a")
    append(witness.log, "admitted", {"site": "a", "key": "old"})
    exchange(link, client, with_heads(weights(b"u"), one(9)))
    append(witness.log, "admitted", {"site": "a", "key": "old"})
    entries = verified(witness.log).entries
    assert Witness(witness.log, _entries=entries)._last("a") == one(9)
    append(witness.log, "admitted", {"site": "a", "key": "new"})
    entries = verified(witness.log).entries
    assert Witness(witness.log, _entries=entries)._last("a") == EMPTY


def test_a_key_that_is_admitted_while_the_server_runs_may_begin_a_new_log(link, witness):
    """The remedy for a lost log, `rotate-key` and `admit --replace`, asks for no restart."""
    client = link.connect("a")
    append(witness.log, "admitted", {"site": "a", "key": "old"})
    exchange(link, client, with_heads(weights(b"u"), one(9)))
    append(witness.log, "admitted", {"site": "b", "key": "other"})
    append(witness.log, "admitted", {"site": "a", "key": "old"})
    task = exchange(link, client, with_heads(weights(b"u"), one(9)))
    assert attached_heads(task.content).yours == one(9), "the same key has the same log"
    append(witness.log, "admitted", {"site": "a", "key": "new"})
    task = exchange(link, client, with_heads(weights(b"u"), one(2, "b")))
    assert attached_heads(task.content).yours == EMPTY
    task = exchange(link, client, with_heads(weights(b"u"), one(3, "c")))
    assert attached_heads(task.content).yours == one(2, "b")
    assert trail(witness, "problem") == []


def test_heads_of_another_form_are_named_and_the_reply_still_counts(link, witness):
    client = link.connect("a")
    strange = weights(b"u")
    strange["audit"] = ConfigRecord({"number": 1, "hash": "x"})
    exchange(link, client, strange)
    assert "reply received" in [entry["kind"] for entry in trail(witness)]
    assert trail(witness, "problem")


def test_a_start_verifies_the_log_and_tells_changed_terms(folder, tiny_config):
    first, second = (Terms("3f" * 16, "c" * 64, tiny_config(f"rounds.number={n}")) for n in (2, 3))
    for terms in (first, first, second):
        Witness(folder.audit).begin(terms, 1)
    kinds = [entry.kind for entry in told(folder.audit)][2:]
    assert kinds == ["server started", "server started", "terms changed", "server started"]
    (changed,) = trail(Witness(folder.audit), "terms changed")
    assert (changed["before"], changed["now"]) == (first.hash(), second.hash())
    folder.audit.path.write_bytes(folder.audit.path.read_bytes().replace(b"study", b"stuDy"))
    with pytest.raises(LogError, match="entry 2 was changed"):
        Witness(folder.audit).begin(second, 1)


def test_rounds_and_the_end_are_entries(folder):
    witness = Witness(folder.audit)
    record = a_round(1, "ab")
    with witness.until_the_end():
        witness.round_done(record)
    for error in (FederationFailed("too few"), KeyboardInterrupt()):
        with pytest.raises(type(error)), witness.until_the_end():
            raise error
    entries = trail(witness)[2:]
    assert [e["kind"] for e in entries] == ["round recorded", "finished", "failed", "stopped"]
    assert entries[0]["sha256"] == record.sha256
    assert entries[0]["contributed"] == [c.site for c in record.contributions if c.trained]
    assert entries[2]["why"] == "too few"


def test_enrolment_and_certificates_are_entries(folder, tmp_path):
    key = new_private_key().public_key()
    sent = tmp_path / "site.pub"
    sent.write_text(public_line(key, "Oslo"))
    where = str(folder.path)
    for arguments in (
        ["admit", where, str(sent), "--name", "Oslo"],
        ["revoke", where, "Oslo"],
        ["renew-certificate", where],
    ):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    entries = trail(Witness(folder.audit))
    assert [entry["kind"] for entry in entries] == [
        *("key", "folder made", "admitted", "revoked"),
        *("key", "certificate renewed"),
    ]
    admitted = {"kind": "admitted", "site": "Oslo", "key": fingerprint(key), "replace": False}
    assert entries[2] == admitted
    assert verified(folder.audit).unvouched() == [], "the old server key vouches for the new one"
    assert not list(folder.path.glob("server.key.*")), "and is then deleted"


def test_a_renewal_that_was_interrupted_is_made_good_by_the_next_entry(folder, monkeypatch):
    """Killed after the key was replaced and before that was noted."""
    with monkeypatch.context() as patch:
        patch.setattr(coordinator, "append", lambda *_, **__: sys.exit())
        with pytest.raises(SystemExit):
            renew_certificate(folder)
    append(folder.audit, "server started", {})
    renew_certificate(folder)
    reading = verified(folder.audit)
    assert len(reading.signers()) == 3
    assert reading.unvouched() == []


def test_a_lost_server_key_is_renewed_and_that_is_told(folder):
    folder.server_key.unlink()
    renew_certificate(folder)
    ((entry, _),) = verified(folder.audit).unvouched()
    assert entry.number == 3
