"""The ledger remembers what it was told, recognises patients, and notices every change."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from client.ledger import (
    TRAINING,
    Entry,
    LedgerError,
    create_ledger,
    identity,
    open_ledger,
)

ANNA = identity(["Anna"], ["aa", "ab"])
BO = identity(["Bo"], ["ba"])


def spend(round_: int = 1, **more) -> Entry:
    values = {"noise_multiplier": 2.0, "sampling_rate": 1.0, "steps": 1, "epsilon": 0.5} | more
    return Entry(0, "", TRAINING, "fed", "Oslo", round_, "", **values)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    create_ledger(tmp_path / "ledger.sqlite")
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    return tmp_path / "anchor.json"


def write(path: Path, anchor: Path | None, *entries: Entry, patients=(ANNA, BO)) -> None:
    with open_ledger(path, anchor) as book:
        for entry in entries:
            book.append(entry, patients)


def test_entries_come_back_in_order_with_the_group_they_are_about(ledger, anchor):
    write(ledger, anchor, spend(1), spend(2))
    write(ledger, anchor, spend(3, steps=4), patients=[ANNA])
    with open_ledger(ledger, anchor, write=False) as book:
        assert [(e.number, e.round, e.steps) for e in book.entries] == [
            (1, 1, 1),
            (2, 2, 1),
            (3, 3, 4),
        ]
        assert set(book.groups[book.entries[0].patients]) == {ANNA, BO}
        assert [e.round for e in book.entries_about(ANNA)] == [1, 2, 3]
        assert [e.round for e in book.entries_about(BO)] == [1, 2]
        assert book.entries_about(identity(["Cleo"], ["ca"])) == []
        assert book.entries[0].at.endswith("+00:00")


def test_a_patient_is_recognised_by_id_or_by_any_scan(ledger):
    write(ledger, None, spend(1))
    with open_ledger(ledger, None) as book:
        for same in (identity(["Anna"], []), identity(["renamed"], ["ab", "zz"])):
            assert [e.round for e in book.entries_about(same)] == [1]
        # seen once under both names, so both are one person from now on, in either direction
        book.append(spend(2), [identity(["A-17"], ["ab"])])
        for same in (identity(["A-17"], []), identity(["Anna"], []), identity(["x"], ["aa"])):
            assert [e.round for e in book.entries_about(same)] == [1, 2]
        assert [e.round for e in book.entries_about(BO)] == [1]


def test_no_id_and_no_voxel_is_legible_in_the_file(ledger):
    write(ledger, None, spend(1))
    assert b"Anna" not in ledger.read_bytes()


def test_nothing_stays_of_a_block_that_failed(ledger, anchor):
    write(ledger, anchor, spend(1))
    kept = anchor.read_text()
    with pytest.raises(ValueError, match=r"Out of range|not JSON"):
        write(ledger, anchor, spend(2), spend(3, epsilon=float("nan")))
    with open_ledger(ledger, anchor) as book:
        assert [e.round for e in book.entries] == [1]
    assert anchor.read_text() == kept


def test_two_writers_take_turns(ledger):
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with open_ledger(ledger, None) as book:
            order.append(("second sees", len(book.entries)))
            book.append(spend(2), [ANNA])

    other = threading.Thread(target=second)
    other.start()
    with open_ledger(ledger, None) as book:
        inside.set()
        other.join(0.5)
        book.append(spend(1), [ANNA])
        order.append(("first wrote", len(book.entries)))
    other.join()
    assert order == [("first wrote", 1), ("second sees", 1)]
    with open_ledger(ledger, None) as book:
        assert [e.round for e in book.entries] == [1, 2]


# ------------------------------------------------------------------------------------- what is wrong


def test_a_missing_ledger_is_said_with_what_to_do(tmp_path):
    with (
        pytest.raises(LedgerError, match=r"missing.*Restore it from a backup.*--create"),
        open_ledger(tmp_path / "none.sqlite", None),
    ):
        pass
    assert not (tmp_path / "none.sqlite").exists()


def test_an_existing_ledger_is_never_replaced(ledger, anchor):
    write(ledger, anchor, spend(1))
    before = ledger.read_bytes()
    with pytest.raises(LedgerError, match="exists already"):
        create_ledger(ledger)
    assert ledger.read_bytes() == before
    assert [p.name for p in ledger.parent.iterdir() if p.suffix == ".tmp"] == []
    with pytest.raises(LedgerError, match="cannot be made there"):
        create_ledger(ledger.parent / "no" / "ledger.sqlite")


def test_it_is_its_owners_alone(ledger):
    assert ledger.stat().st_mode & 0o777 == 0o600


def test_sqlite_itself_refuses_to_change_or_delete(ledger):
    write(ledger, None, spend(1))
    with sqlite3.connect(ledger) as database:
        for statement in ("DELETE FROM entries", "UPDATE entries SET hash = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                database.execute(statement)


def tampered(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in names:
            database.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            database.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE entries SET document = replace(document, '"steps":1', '"steps":0') WHERE number = 2""",
        "UPDATE entries SET hash = replace(hash, substr(hash, 1, 1), 'x') WHERE number = 3",
        "DELETE FROM entries WHERE number = 1",
        "DELETE FROM entries WHERE number = 2",
        "UPDATE entries SET number = 9 WHERE number = 3",
        "UPDATE patients SET document = '[]'",
        "DELETE FROM patients",
        "DELETE FROM ledger",
        "UPDATE ledger SET id = 'x'",
        "INSERT INTO entries SELECT 4, document, hash FROM entries WHERE number = 3",
    ],
)
def test_every_change_is_noticed_without_an_anchor(ledger, statement):
    write(ledger, None, spend(1), spend(2), spend(3))
    tampered(ledger, statement)
    with (
        pytest.raises(LedgerError, match=r"tampered with or damaged.*Restore it"),
        open_ledger(ledger, None),
    ):
        pass


def test_a_shortened_replaced_or_rewritten_ledger_is_noticed_by_the_anchor(
    ledger, anchor, tmp_path
):
    write(ledger, anchor, spend(1))
    shorter = shutil.copy(ledger, tmp_path / "backup.sqlite")
    write(ledger, anchor, spend(2))
    shutil.copy(shorter, ledger)
    with (
        pytest.raises(LedgerError, match="holds 1 entries and held 2 before"),
        open_ledger(ledger, anchor),
    ):
        pass
    ledger.unlink()
    create_ledger(ledger)
    with (
        pytest.raises(LedgerError, match="another ledger than before"),
        open_ledger(ledger, anchor),
    ):
        pass
    # a chain that is whole in itself, but not the one that was
    shutil.copy(shorter, ledger)
    write(ledger, None, spend(2, steps=9))
    with pytest.raises(LedgerError, match="entry 2 or one before"), open_ledger(ledger, anchor):
        pass
    anchor.write_text("{")
    with pytest.raises(LedgerError, match=r"anchor.json is damaged"), open_ledger(ledger, anchor):
        pass


def test_who_only_looks_vouches_for_no_ledger(ledger, anchor):
    with open_ledger(ledger, anchor, write=False):
        pass
    assert not anchor.exists()
    write(ledger, anchor, spend(1))
    assert json.loads(anchor.read_text())["entries"] == 1


@pytest.mark.parametrize("document", [b"\xff", 5, "5", "[5]"])
def test_a_group_of_patients_that_is_none_is_tampering(ledger, document):
    write(ledger, None, spend(1))
    with sqlite3.connect(ledger) as database:
        database.execute("DROP TRIGGER patients_UPDATE")
        hash_ = hashlib.sha256(str(document).encode()).hexdigest()
        database.execute("UPDATE patients SET document = ?, hash = ?", (document, hash_))
    with pytest.raises(LedgerError, match="group of patients"), open_ledger(ledger, None):
        pass


def test_entries_that_another_folder_wrote_are_no_tampering(ledger, anchor, tmp_path):
    write(ledger, anchor, spend(1))
    write(ledger, tmp_path / "other.json", spend(2))
    write(ledger, anchor, spend(3))
    assert json.loads(anchor.read_text())["entries"] == 3


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_ledger_stops_in_words(ledger, content):
    ledger.write_bytes(content)
    with pytest.raises(LedgerError, match=r"privacy ledger"), open_ledger(ledger, None):
        pass
