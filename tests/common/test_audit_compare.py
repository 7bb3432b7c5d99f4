"""Whether two sides' logs fit together: one that was cut off or rewritten shows, however well signed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.audit_compare import misfits
from common.audit_heads import COORDINATOR
from common.audit_log import AuditLog, Head, LogError, append, head, verified_copy
from common.keys import fingerprint, load_signing_key, new_private_key, save_private_key


def made(folder: Path) -> AuditLog:
    folder.mkdir()
    save_private_key(folder / "key", new_private_key())
    return AuditLog(folder / "audit.log", folder / "key")


def heard(whom: str, head: Head) -> dict[str, Any]:
    return {"of": whom, "number": head.number, "hash": head.hash}


@dataclass
class Two:
    oslo: AuditLog
    coordinator: AuditLog

    def round(self, number: int, site: str = "Oslo") -> None:
        """A model there, an update back, as the two programs write it."""
        update, model = f"{number:064x}", f"{number + 100:064x}"
        theirs = head(self.coordinator)
        append(self.coordinator, "task sent", {"site": site, "sha256": model})
        append(self.oslo, "task received", {"sha256": model, "heard": heard(COORDINATOR, theirs)})
        ours = head(self.oslo)
        append(self.oslo, "sent", {"sha256": update})
        details = {"site": site, "sha256": update, "heard": heard(site, ours)}
        append(self.coordinator, "reply received", details)

    def misfits(self) -> list[str]:
        one, other = (verified_copy(log.path) for log in (self.oslo, self.coordinator))
        found = misfits(one, other)
        assert misfits(other, one) == found
        return found


@pytest.fixture
def two(tmp_path: Path) -> Two:
    both = Two(made(tmp_path / "oslo"), made(tmp_path / "server"))
    append(both.oslo, "invitation taken", {"site": "Oslo"})
    key = fingerprint(load_signing_key(both.oslo.key).public_key())
    append(both.coordinator, "admitted", {"site": "Oslo", "key": key})
    for number in (1, 2, 3):
        both.round(number)
    return both


def again(log: AuditLog, keep: int, instead: int = 0) -> None:
    """Its owner writes it anew: the first entries as they were, then others, all signed."""
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.unlink()
    log.anchor.unlink()
    kept = log.path.with_name("kept.log")
    kept.write_bytes(b"".join(lines[:keep]))
    for entry in verified_copy(kept).entries:
        if entry.kind != "key":
            append(log, entry.kind, entry.details)
    for _ in range(instead):
        append(log, "sent", {"sha256": "f" * 64})


def test_logs_that_belong_together_fit(two):
    assert two.misfits() == []


@pytest.mark.parametrize("whose", ["oslo", "coordinator"])
@pytest.mark.parametrize("instead", [0, 9], ids=["cut off", "rewritten"])
def test_a_log_that_its_owner_wrote_anew_does_not_fit(two, whose, instead):
    log = getattr(two, whose)
    again(log, keep=4, instead=instead)
    found = two.misfits()
    whose_log = "Oslo's log lacks" if whose == "oslo" else "the coordinator's log lacks"
    assert any(text.startswith(whose_log) for text in found), found


def test_an_update_that_was_not_sent_is_named(two):
    append(two.coordinator, "reply received", {"site": "Oslo", "sha256": "e" * 64})
    append(two.oslo, "task received", {"sha256": "d" * 64})
    update, model = two.misfits()
    assert "eeeeeeeeeeee" in update
    assert update.startswith("an update of Oslo's")
    assert "dddddddddddd" in model


def test_what_is_about_others_does_not_matter(two):
    details = {"site": "Bergen", "sha256": "e" * 64, "heard": heard("Bergen", Head(7, "e" * 64))}
    append(two.coordinator, "reply received", details)
    assert two.misfits() == []


def test_a_new_folder_with_a_new_key_is_not_held_against_the_old_log(two, tmp_path):
    two.oslo = made(tmp_path / "new")
    append(two.oslo, "invitation taken", {"site": "Oslo"})
    key = fingerprint(load_signing_key(two.oslo.key).public_key())
    append(two.coordinator, "admitted", {"site": "Oslo", "key": key})
    two.round(4)
    assert two.misfits() == []


def test_a_log_that_was_written_anew_with_another_key_does_not_fit(two, tmp_path):
    """One that the coordinator never enrolled: it has nothing in common with the coordinator's."""
    two.oslo = made(tmp_path / "new")
    append(two.oslo, "invitation taken", {"site": "Oslo"})
    append(two.oslo, "sent", {"sha256": "f" * 64})
    (said,) = two.misfits()
    assert "nothing in common" in said
    assert fingerprint(load_signing_key(two.oslo.key).public_key()) in said


def test_a_log_that_was_written_anew_under_another_name_does_not_fit(two):
    two.oslo.path.unlink()
    two.oslo.anchor.unlink()
    append(two.oslo, "invitation taken", {"site": "Nowhere"})
    found = two.misfits()
    assert "was invited as Nowhere; the coordinator enrolled its key as Oslo" in found[0]
    assert found[1].startswith("Oslo's log lacks")


@pytest.mark.parametrize("vouched", [True, False])
def test_a_key_that_was_never_enrolled_cannot_have_taken_part(two, vouched):
    old = two.oslo.key.rename(two.oslo.key.with_name("key.old"))
    if not vouched:
        old.unlink()
    save_private_key(two.oslo.key, new_private_key())
    append(two.oslo, "key rotated", {}, lost=True)
    if vouched:  # it waits for the coordinator to admit it
        assert two.misfits() == []
        append(two.oslo, "sent", {"sha256": "f" * 64})
    (said,) = two.misfits()
    key = fingerprint(load_signing_key(two.oslo.key).public_key())
    assert f"signed by {key}" in said
    append(two.coordinator, "admitted", {"site": "Oslo", "key": key})
    assert two.misfits() == []


def test_two_logs_of_one_kind_cannot_be_compared(two, tmp_path):
    shutil.copy(two.oslo.path, tmp_path / "copy")
    with pytest.raises(LogError, match="not those of a hospital"):
        misfits(verified_copy(two.oslo.path), verified_copy(tmp_path / "copy"))
