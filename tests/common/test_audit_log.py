"""The audit log: whatever is changed, taken out, put in or cut off shows; an interruption does not."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

import common.audit_log as module
from common import files
from common.audit_lines import ORDER, canonical, introduction, signed
from common.audit_log import (
    EMPTY,
    AuditLog,
    Head,
    LogError,
    append,
    head,
    holds,
    told,
    verified,
    verified_copy,
)
from common.keys import fingerprint, new_private_key, parse_public_key, save_private_key

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    save_private_key(tmp_path / "site.key", new_private_key())
    return AuditLog(tmp_path / "audit.log", tmp_path / "site.key")


def filled(log: AuditLog, count: int = 3) -> bytes:
    """So many entries, after the one with the key."""
    for number in range(count):
        append(log, "sent", {"round": number, "why": "größer", "loss": 0.5})
    return log.path.read_bytes()


def wrong(log: AuditLog, content: bytes) -> str:
    """What is said of the log with this content in place of its own."""
    with log.path.open("r+b") as file:  # not emptied first: thousands of times, that takes seconds
        file.write(content)
        file.truncate()
    try:
        reading = verified(log)
    except LogError as error:
        return str(error)
    # the command says so and fails, `join` goes on
    assert reading.unfinished, "nobody would notice"
    return f"{reading.unfinished} bytes at the end are no entry"


# --------------------------------------------------------------------------- what it is made of


def test_the_chain_and_the_signatures_can_be_recomputed_by_hand(log):
    filled(log)
    lines = log.path.read_bytes().splitlines(keepends=True)
    before = "0" * 64
    for number, line in enumerate(lines, start=1):
        entry = json.loads(line)
        assert entry["number"] == number
        assert entry["before"] == before
        before = hashlib.sha256(line).hexdigest()
        if number == 1:
            key = parse_public_key(entry["details"]["public_key"]).key
        assert entry["key"] == fingerprint(key)
        text, _, signature = line.rpartition(b',"signature":"')
        signature = bytes.fromhex(signature.removesuffix(b'"}\n').decode())
        key.verify(signature, text + b"}", ec.ECDSA(hashes.SHA384()))
    assert head(log) == Head(4, before) == verified(log).head
    assert [entry.kind for entry in verified(log).entries] == ["key", "sent", "sent", "sent"]
    assert verified(log).entries[1].details == {"round": 0, "why": "größer", "loss": 0.5}


def test_nothing_there_is_an_empty_log_and_looking_leaves_nothing(log):
    assert verified(log).entries == []
    assert head(log) == EMPTY
    assert list(told(log)) == []
    assert not log.path.exists()
    assert holds(log, EMPTY)


def test_only_its_owner_may_read_it(log):
    filled(log)
    assert log.path.stat().st_mode & 0o077 == 0


def test_told_gives_the_kinds_that_are_asked_for(log):
    append(log, "sent", {"kind": "refused"})
    append(log, "refused", {})
    assert [entry.number for entry in told(log, "refused")] == [3]
    assert [entry.number for entry in told(log)] == [1, 2, 3]


def test_what_json_cannot_hold_is_not_written(log):
    before = filled(log)
    with pytest.raises(LogError, match="cannot be told as JSON"):
        append(log, "sent", {"loss": float("nan")})
    assert log.path.read_bytes() == before


def another_key(log: AuditLog, *, kept: bool) -> None:
    """In place of the present one, which is kept beside it or not."""
    if kept:
        log.key.rename(log.key.with_name("site.key.old-2026-01-01"))
    else:
        log.key.unlink()
    save_private_key(log.key, new_private_key())


def test_a_new_key_is_introduced_and_old_entries_stay_good(log):
    filled(log)
    another_key(log, kept=True)
    append(log, "rotated", {})
    reading = verified(log)
    assert [entry.kind for entry in reading.entries[-2:]] == ["key", "rotated"]
    assert [number for _, number in reading.signers()] == [1, 5]
    assert reading.unvouched() == []
    introduced = reading.entries[-2]
    word = {"before": introduced.before, "next_key": introduced.key, "number": 5}
    parse_public_key(reading.entries[0].details["public_key"]).key.verify(
        bytes.fromhex(introduced.details["vouched"]), canonical(word), ec.ECDSA(hashes.SHA384())
    )


def test_a_key_that_comes_back_is_told_as_such(log):
    filled(log, 1)
    first = log.key.read_bytes()
    another_key(log, kept=True)
    append(log, "sent", {})
    log.key.rename(log.key.with_name("site.key.old-2"))
    log.key.write_bytes(first)
    log.key.chmod(0o600)
    append(log, "sent", {})
    (a, _), (b, _), (c, number) = verified(log).signers()
    assert (a, number) == (c, 5)
    assert a != b


def test_a_lost_key_is_replaced_only_by_who_says_so(log):
    content = filled(log)
    before = verified(log).entries[-1].key
    another_key(log, kept=False)
    with pytest.raises(LogError, match="the last entry is signed by") as caught:
        append(log, "sent", {})
    assert before in str(caught.value)
    assert log.path.read_bytes() == content
    append(log, "rotated", {}, lost=True)
    ((entry, old),) = verified(log).unvouched()
    assert (entry.number, old) == (5, before)
    append(log, "sent", {})
    assert len(verified(log).unvouched()) == 1


def test_the_word_of_another_key_or_for_another_place_is_none(log, tmp_path):
    """Who has seen a good word cannot use it elsewhere, and who has no key cannot give one."""
    filled(log, 1)
    key = module.load_signing_key(log.key)
    stranger, head_ = new_private_key(), head(log)
    for former, place in ((stranger, head_), (key, replace(head_, number=1)), (key, EMPTY)):
        details = introduction(place, stranger.public_key(), former)
        _, line = signed(head_, "key", details, stranger)
        copy = tmp_path / "copy.log"
        copy.write_bytes(log.path.read_bytes() + line)
        with pytest.raises(LogError, match="entry 3 was changed: its signature"):
            verified_copy(copy)
    _, line = signed(head_, "key", introduction(head_, stranger.public_key(), key), stranger)
    copy.write_bytes(log.path.read_bytes() + line)
    assert len(verified_copy(copy).entries) == 3


def strangers_lines(before: Head) -> tuple[bytes, bytes, Head]:
    key = new_private_key()
    entry, first = signed(before, "key", introduction(before, key.public_key(), None), key)
    entry, second = signed(entry.head, "terms accepted", {}, key)
    return first, second, entry.head


@pytest.mark.parametrize("begun", [True, False])
def test_a_strangers_entries_behind_the_anchor_are_not_taken_on(log, begun):
    content = filled(log) if begun else b""
    if not begun:
        module.write_anchor(log, module.START)
    first, second, _ = strangers_lines(head(log) if begun else EMPTY)
    log.path.write_bytes(content + first + second)
    if begun:
        assert verified(log).unfinished == len(first + second)
    for _ in range(2):
        with pytest.raises(LogError, match="that this log's key has not signed"):
            append(log, "sent", {})
    assert log.path.read_bytes() == content + first + second


def test_on_a_strangers_end_nobody_goes_on(log):
    """Who writes on the disk, without any private key, cuts the log and goes on with a key of its own."""
    filled(log)
    lines = log.path.read_bytes().splitlines(keepends=True)[:2]
    first, second, last = strangers_lines(Head(2, hashlib.sha256(lines[1]).hexdigest()))
    content = b"".join(lines) + first + second
    log.path.write_bytes(content)
    begin, end = len(content) - len(second), len(content)
    module.write_anchor(log, module.Anchor(last.number, last.hash, begin, end))
    with pytest.raises(LogError, match="somebody else wrote it"):
        append(log, "sent", {})
    assert [entry.number for entry, _ in verified(log).unvouched()] == [3]


def test_a_rotation_that_was_interrupted_counts(log):
    """The entries were written, and neither the anchor nor, before that, the old key's last one."""
    filled(log)
    before = log.anchor.read_text()
    append(log, "sent", {"round": 7})
    another_key(log, kept=True)
    append(log, "rotated", {})
    log.anchor.write_text(before)
    append(log, "sent", {"round": 8})
    assert [entry.kind for entry in told(log)][-4:] == ["sent", "key", "rotated", "sent"]
    assert verified(log).unvouched() == []


# --------------------------------------------------------------------------------- what shows


def test_every_change_of_a_single_byte_of_the_anchor_shows(log):
    filled(log, 2)
    content = log.anchor.read_bytes()
    for position, byte in enumerate(content):
        for value in {byte ^ 1, byte ^ 0x20, 10, ord("0"), ord(" ")} - {byte}:
            log.anchor.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
            with pytest.raises(LogError):
                verified(log)
    for changed in (content[:-1], content + b" ", content.replace(b"{", b"{ ")):
        log.anchor.write_bytes(changed)
        with pytest.raises(LogError):
            verified(log)


def test_a_signature_is_written_in_one_way_only(log, tmp_path):
    """ECDSA takes (r, n - s) for (r, s), and hexadecimal numbers may have capitals."""
    content = filled(log, 1)
    text, _, rest = content.rpartition(b'"signature":"')
    signature = rest.removesuffix(b'"}\n').decode()
    r, s = decode_dss_signature(bytes.fromhex(signature))
    other = encode_dss_signature(r, ORDER - s)
    key = module.load_signing_key(log.key).public_key()
    line = content.splitlines(keepends=True)[-1].rpartition(b',"signature"')[0] + b"}"
    key.verify(other, line, ec.ECDSA(hashes.SHA384()))
    for written in (other.hex(), signature.upper(), signature[:2] + " " + signature[2:]):
        (tmp_path / "copy").write_bytes(text + b'"signature":"' + written.encode() + b'"}\n')
        with pytest.raises(LogError, match="its signature is not good"):
            verified_copy(tmp_path / "copy")


def test_every_change_of_a_single_byte_shows(log):
    content = filled(log, 2)
    for position, byte in enumerate(content):
        for value in {byte ^ 1, byte ^ 0x20, 10, ord("0")} - {byte}:
            wrong(log, content[:position] + bytes([value]) + content[position + 1 :])
    log.path.write_bytes(content)
    assert len(verified(log).entries) == 3


def test_every_truncation_deletion_and_insertion_of_a_byte_shows(log):
    content = filled(log, 2)
    for position in range(len(content)):
        wrong(log, content[:position])
        wrong(log, content[:position] + content[position + 1 :])
        for value in (b" ", content[position : position + 1]):
            wrong(log, content[:position] + value + content[position:])
    for more in (b"\n", b" ", b"{", b"\0", content):
        wrong(log, content + more)


def test_every_line_taken_out_repeated_or_moved_shows(log):
    content = filled(log, 4)
    lines = content.splitlines(keepends=True)
    for first in range(len(lines)):
        said = wrong(log, b"".join(lines[:first] + lines[first + 1 :]))
        assert f"entry {first + 1} " in said or "its end is missing" in said
        wrong(log, b"".join([*lines[:first], lines[first], *lines[first:]]))
        for second in range(first):
            moved = lines.copy()
            moved[first], moved[second] = moved[second], moved[first]
            assert f"entry {second + 1} " in wrong(log, b"".join(moved))


def test_a_copy_without_anchor_shows_all_but_a_missing_end(log, tmp_path):
    content = filled(log)
    copy = tmp_path / "copy.log"
    lines = content.splitlines(keepends=True)
    copy.write_bytes(b"".join(lines[:-1]))
    assert len(verified_copy(copy).entries) == 3
    for content in (b"".join(lines[1:]), b"".join(lines)[:-1], lines[0] + lines[2]):
        copy.write_bytes(content)
        with pytest.raises(LogError):
            verified_copy(copy)
    with pytest.raises(LogError, match="cannot be read"):
        verified_copy(tmp_path / "none")


def test_an_entry_of_somebody_elses_key_shows(log, tmp_path):
    """Also one that names the right key, and also behind the anchor."""
    content = filled(log)
    save_private_key(tmp_path / "other.key", new_private_key())
    entry = verified(log).entries[-1]
    forged, line = signed(entry.head, "sent", {}, module.load_signing_key(tmp_path / "other.key"))
    wrong(log, content + line)
    named = json.loads(line) | {"key": entry.key}
    wrong(log, content + canonical(named) + b"\n")
    assert forged.number == 5


def test_a_number_that_was_left_out_shows_though_its_owner_signed(log):
    content = filled(log)
    last = verified(log).head
    _, line = signed(
        replace(last, number=last.number + 1), "sent", {}, module.load_signing_key(log.key)
    )
    said = wrong(log, content + line)
    assert "bytes at the end are no entry" in said
    copy = log.path.with_name("copy")
    copy.write_bytes(content + line)
    with pytest.raises(LogError, match="entry 5 is missing"):
        verified_copy(copy)


@pytest.mark.parametrize("what", ["shorter", "changed", "gone", "no anchor", "bad anchor"])
def test_over_a_damaged_end_nothing_is_written(log, what):
    content = filled(log)
    if what == "shorter":
        log.path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])
    elif what == "changed":
        log.path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif what == "gone":
        log.path.unlink()
    elif what == "no anchor":
        log.anchor.unlink()
    else:
        log.anchor.write_text("{}")
    before = log.path.read_bytes() if log.path.exists() else b""
    for action in (lambda: append(log, "sent", {}), lambda: head(log), lambda: verified(log)):
        with pytest.raises(LogError) as caught:
            action()
        assert str(log.path.parent) in str(caught.value)
    assert (log.path.read_bytes() if log.path.exists() else b"") == before


def test_it_is_known_which_entries_it_holds(log, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 700)  # bytes, of lines of about 400
    filled(log)
    assert len(list(told(log))) == 4
    heads = [entry.head for entry in verified(log).entries]
    assert all(holds(log, one) for one in heads)
    assert not holds(log, Head(5, heads[-1].hash))
    assert not holds(log, replace(heads[1], number=1))
    assert not holds(log, Head(0, heads[1].hash))


# ---------------------------------------------------------------------------- interruptions


def test_what_an_interruption_left_is_cut_off_and_that_is_an_entry(log):
    content = filled(log)
    append(log, "sent", {"round": 9})
    whole = log.path.read_bytes()[len(content) :]
    for length in (1, 20, len(whole) - 1):
        for path in (log.path, log.anchor):
            path.unlink()
        content = filled(log)
        log.path.write_bytes(content + whole[:length])
        assert verified(log).unfinished == length
        append(log, "sent", {"round": 4})
        repaired, sent = verified(log).entries[-2:]
        assert repaired.kind == "repaired"
        assert repaired.details["bytes"] == length
        assert repaired.details["sha256"] == hashlib.sha256(whole[:length]).hexdigest()
        assert sent.details == {"round": 4}
        assert log.path.read_bytes().startswith(content)


def test_an_entry_whose_anchor_was_not_written_any_more_counts(log):
    filled(log)
    before = log.anchor.read_text()
    kept = append(log, "sent", {"round": 7})
    log.anchor.write_text(before)
    assert verified(log).head == kept.head
    append(log, "sent", {"round": 8})
    assert [entry.details["round"] for entry in told(log, "sent")] == [0, 1, 2, 7, 8]
    assert not list(told(log, "repaired"))


WRITER = """
import sys
from pathlib import Path
from common.audit_log import AuditLog, append
folder = Path(sys.argv[1])
log = AuditLog(folder / "audit.log", folder / "site.key")
for number in range(int(sys.argv[3])):
    append(log, "sent", {"by": sys.argv[2], "number": number, "filling": "x" * 5000})
    print(number, flush=True)
"""


def writer(log: AuditLog, name: str, count: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", WRITER, str(log.path.parent), name, str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT)


def test_two_processes_may_write_at_once(log):
    both = [writer(log, name, 25) for name in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    by: dict[str, list[int]] = {"a": [], "b": []}
    for entry in verified(log).entries[1:]:
        by[entry.details["by"]].append(entry.details["number"])
    assert by == {"a": list(range(25)), "b": list(range(25))}


def test_killed_at_any_moment_it_holds_what_was_acknowledged(log):
    known = 0
    for wait in (0.001, 0.003, 0.007, 0.013, 0.02):
        process = writer(log, "a", 10_000)
        assert process.stdout
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        known += 1 + len(process.stdout.read().splitlines())
        process.wait()
        process.stdout.close()
        kept = len(list(told(log, "sent")))
        assert kept in (known, known + 1), "at most the one in hand was not told of"
        known = kept
        append(log, "after", {})
        assert verified(log).unfinished == 0


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_it_says_so_and_goes_on_afterwards(log):
    written = 0
    with full_disk(10_000), suppress(LogError):
        while written < 1000:
            append(log, "sent", {"number": written})
            written += 1
        pytest.fail("the disk is not full")
    with full_disk(10_000), pytest.raises(LogError, match="Free disk space"):
        append(log, "sent", {"number": written})
    assert len(verified(log).entries) == written + 1
    append(log, "sent", {"number": written})
    assert [entry.details["number"] for entry in told(log, "sent")] == list(range(written + 1))
    with full_disk(0), pytest.raises(LogError):
        append(replace(log, path=log.path.with_name("new.log")), "sent", {})


def test_if_the_anchor_cannot_be_written_the_entry_is_taken_back(log, monkeypatch):
    content = filled(log)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_anchor", fail)
        with pytest.raises(LogError, match="No space left"):
            append(log, "sent", {})
    assert log.path.read_bytes() == content
    append(log, "sent", {})


def test_if_only_the_folder_cannot_be_synced_the_log_goes_on(log, monkeypatch):
    """The anchor has been replaced then: what it says must stay."""
    filled(log)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", fail)
        with pytest.raises(LogError, match="Input/output error"):
            append(log, "sent", {"round": 7})
    assert verified(log).entries[-1].details == {"round": 7}
    append(log, "sent", {"round": 8})
    assert [entry.details["round"] for entry in told(log, "sent")] == [0, 1, 2, 7, 8]


def test_to_look_for_a_late_entry_the_whole_log_is_not_read(log, monkeypatch):
    known = [append(log, "sent", {"round": number}).head for number in range(30)][-2]
    monkeypatch.setattr(module, "BLOCK", 1000)
    read, between = 0, module.between

    def counted(file: object, begin: int, end: int) -> bytes:
        nonlocal read
        read += end - begin
        return between(file, begin, end)

    monkeypatch.setattr(module, "between", counted)
    follower = module.Follower(log, ("sent",))
    assert len(follower.entries()) == 30
    read = 0
    assert holds(log, known)
    append(log, "sent", {"round": 30})
    assert len(follower.entries()) == 31
    assert 0 < read < os.path.getsize(log.path) / 4


def test_what_was_read_is_read_again_where_another_log_is_there(log):
    follower = module.Follower(log, ("sent",))
    filled(log)
    assert len(follower.entries()) == 3
    log.path.unlink()
    assert follower.entries() == []
    log.anchor.unlink()
    append(log, "sent", {"round": 9})
    assert [entry.details["round"] for entry in follower.entries()] == [9]
    append(log, "refused", {})
    append(log, "sent", {"round": 10})
    log.path.unlink()
    log.anchor.unlink()
    filled(log, 9)
    assert [entry.details["round"] for entry in follower.entries()] == list(range(9))


def test_to_append_the_whole_log_is_not_read(log, monkeypatch):
    filled(log, 20)
    read = 0
    between = module.between

    def counted(file: object, begin: int, end: int) -> bytes:
        nonlocal read
        read += end - begin
        return between(file, begin, end)

    monkeypatch.setattr(module, "between", counted)
    append(log, "sent", {})
    assert 0 < read < 3 * os.path.getsize(log.path) / 20
