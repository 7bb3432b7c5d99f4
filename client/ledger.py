"""What every patient's privacy has been spent on: append-only, hash-chained, synced before it counts.

One ledger serves all of a hospital's folders on a machine, so that spending adds up over the same
patients whatever federation, model or folder it was for. A patient is recognised by id or by any
scan's voxels (fingerprints, stored as hashes): whoever shares one is the same person. A scan that
was changed *and* renamed counts as a new patient.

Each entry holds the hash of the one before it, and each hospital's folder keeps an anchor, the
number and hash of the last entry it wrote or saw: a changed, shortened or lost ledger stops
training. Somebody who replaces the ledger and every anchor deceives the hospital itself; the
coordinator's copy of the signed statements still tells. What may be spent is `client.budget`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import sync_folder, write_text_atomically

SCHEMA = """
CREATE TABLE ledger (id TEXT NOT NULL);
CREATE TABLE patients (hash TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE entries (number INTEGER PRIMARY KEY, document TEXT NOT NULL, hash TEXT NOT NULL);
"""
APPEND_ONLY = "".join(
    f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} BEGIN "
    "SELECT RAISE(ABORT, 'the privacy ledger is append-only'); END;"
    for table in ("ledger", "patients", "entries")
    for verb in ("UPDATE", "DELETE")
)
PLAN, TRAINING, METRICS, DONE, UNPROTECTED = "plan", "training", "metrics", "done", "unprotected"
SPENDS = TRAINING, METRICS
WAIT_SECONDS = 600.0  # for another process that is writing

Patient = frozenset[str]  # everything that a person can be recognised by, hashed


def anchor_in(folder: Path) -> Path:
    """Where a site's folder remembers how far its ledger went."""
    return folder / "ledger-anchor.json"


class LedgerError(RuntimeError):
    """The ledger is missing, damaged or not the one it was; the text says what to do."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `patients` is the hash of the group that it is about.

    kind plan: `noise_multiplier` is what following rounds of this federation use.
    kind training, metrics: a spend, written before it happens; `epsilon` is what the most affected
    patient of the group has spent in all with it, at `delta`, of `budget`.
    kind done: entry `of` was carried through; without it, it was interrupted, and counts the same.
    kind unprotected: a round without differential privacy.
    """

    number: int
    at: str
    kind: str
    federation: str
    site: str
    round: int
    patients: str
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    clip: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None
    recipe: str = ""  # of a plan: what it was calibrated for
    of: int | None = None
    hash: str = ""


def identity(ids: Iterable[str], fingerprints: Iterable[str]) -> Patient:
    """What a person is recognised by, from all ids and the digests of all scans' voxels."""
    marks = {*(f"id {i}" for i in ids), *(f"voxels {digest}" for digest in fingerprints)}
    return frozenset(hashlib.sha256(mark.encode()).hexdigest()[:32] for mark in marks)


def create_ledger(path: Path) -> None:
    """Make an empty ledger.

    Raises:
        LedgerError: there is a file already, or it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(0o600)
        with contextlib.closing(sqlite3.connect(temporary)) as database:
            database.executescript(f"BEGIN; {SCHEMA} {APPEND_ONLY} COMMIT;")
            with database:
                database.execute("INSERT INTO ledger VALUES (?)", (secrets.token_hex(16),))
        path.hardlink_to(temporary)  # never over an existing one
        sync_folder(path.parent)
    except FileExistsError as error:
        raise LedgerError(f"{path} exists already and stays as it is.") from error
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"{path}: a privacy ledger cannot be made there ({error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Ledger:
    """An open, verified ledger."""

    path: Path
    id: str
    entries: list[Entry]
    groups: dict[str, tuple[Patient, ...]]
    _database: sqlite3.Connection

    @property
    def head(self) -> str:
        return self.entries[-1].hash if self.entries else self.id

    def append(self, entry: Entry, patients: Sequence[Patient]) -> Entry:
        """Add an entry about a group; it is on the disk once the `open_ledger` block has ended.

        Number, time and hashes are filled in here.

        Raises:
            LedgerError: it cannot be written.
        """
        group, document = _group(patients)
        if group not in self.groups:
            self._execute("INSERT INTO patients VALUES (?, ?)", group, document)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry = replace(entry, number=len(self.entries) + 1, at=at, patients=group, hash="")
        text = _document(entry)
        entry = replace(entry, hash=_chained(self.head, text))
        self._execute("INSERT INTO entries VALUES (?, ?, ?)", entry.number, text, entry.hash)
        self.groups[group] = tuple(patients)
        self.entries.append(entry)
        return entry

    def entries_about(self, patient: Patient) -> list[Entry]:
        """Every entry whose group holds this person, under whatever id or scan."""
        counts = self.records_of(patient)
        return [entry for entry in self.entries if counts[entry.patients]]

    def records_of(self, patient: Patient) -> dict[str, int]:
        """In each group, how many of its patients are this one person: more than one where that was
        not known yet when the group was trained on."""
        marks = self.person(patient)
        return {
            group: sum(not marks.isdisjoint(member) for member in members)
            for group, members in self.groups.items()
        }

    def person(self, patient: Patient) -> Patient:
        """All marks of a person: two of them in one record make both the same person's."""
        marks = set(patient)
        members = [member for group in self.groups.values() for member in group]
        while True:
            more = set().union(*(m for m in members if not marks.isdisjoint(m))) - marks
            if not more:
                return frozenset(marks)
            marks |= more

    def _execute(self, statement: str, *values: object) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error


@contextmanager
def open_ledger(path: Path, anchor: Path | None, *, write: bool = True) -> Iterator[Ledger]:
    """The ledger, verified from its first entry to its last.

    What the block appends is on the disk, and the anchor behind it, when the block has ended; all
    of it, or nothing if the block raises.

    Args:
        anchor: where this hospital's folder remembers the last entry; None: it does not. Only
            writing makes it: who merely looks does not vouch for a ledger.
        write: no other process can write meanwhile.

    Raises:
        LedgerError: it is missing, damaged, changed, shorter than the anchor says, or cannot be
            written.
    """
    if not path.exists():
        raise LedgerError(
            f"{path}: the privacy ledger is missing, so what was spent before is unknown. Restore it "
            "from a backup, or correct `privacy_ledger` in site.yaml. Only if no patient of this "
            "site was ever trained on with privacy: fed-client privacy-ledger DIR --create"
        )
    try:
        database = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    with contextlib.closing(database):  # which undoes what was not committed
        try:
            database.execute("PRAGMA synchronous = EXTRA")
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            ledger = _verified(path, database)
        except sqlite3.Error as error:
            raise _unusable(path, error) from error
        before = ledger.head
        if anchor is not None:
            _compare(ledger, anchor)
        yield ledger
        ledger._execute("COMMIT")
        if write and anchor is not None and (ledger.head != before or not anchor.exists()):
            write_anchor(anchor, ledger)


def write_anchor(path: Path, ledger: Ledger) -> None:
    """Remember how far the ledger goes."""
    known = {"ledger": ledger.id, "entries": len(ledger.entries), "head": ledger.head}
    write_text_atomically(path, json.dumps(known) + "\n")


def _verified(path: Path, database: sqlite3.Connection) -> Ledger:
    ids = database.execute("SELECT id FROM ledger").fetchall()
    if len(ids) != 1:
        raise _tampered(path, "its id is missing")
    groups = {}
    for hash_, document in database.execute("SELECT hash, document FROM patients"):
        try:
            if hashlib.sha256(document.encode()).hexdigest() != hash_:
                raise ValueError("another hash")
            groups[hash_] = tuple(frozenset(member) for member in json.loads(document))
        except (AttributeError, TypeError, ValueError) as error:
            raise _tampered(path, "a group of patients was changed") from error
    ledger = Ledger(path, ids[0][0], [], groups, database)
    rows = database.execute("SELECT number, document, hash FROM entries ORDER BY number")
    for number, (stored, text, hash_) in enumerate(rows, start=1):
        if stored != number or _chained(ledger.head, text) != hash_:
            raise _tampered(path, f"entry {number} was changed, added or removed")
        try:
            entry = replace(Entry(**json.loads(text)), hash=hash_)
        except (ValueError, TypeError) as error:
            raise _tampered(path, f"entry {number} is not one of this version") from error
        if entry.number != number or entry.patients not in groups:
            raise _tampered(path, f"entry {number} is not in its place")
        ledger.entries.append(entry)
    return ledger


def _compare(ledger: Ledger, anchor: Path) -> None:
    if not anchor.exists():
        return
    try:
        known = json.loads(anchor.read_text(encoding="utf-8"))
        id_, entries, head = known["ledger"], known["entries"], known["head"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{anchor} is damaged; restore it from a backup.") from error
    chain = [ledger.id, *(entry.hash for entry in ledger.entries)]
    if id_ != ledger.id:
        raise _tampered(ledger.path, "it is another ledger than before")
    if not isinstance(entries, int) or not 0 <= entries < len(chain):
        raise LedgerError(
            f"{ledger.path}: the privacy ledger holds {len(chain) - 1} entries and held {entries} "
            f"before, so what was spent since is unknown and nothing is trained. Restore a backup "
            f"that holds them all. Only if there is none, and the hospital answers for what is "
            f"missing: delete {anchor} by hand."
        )
    if chain[entries] != head:
        raise _tampered(ledger.path, f"entry {entries} or one before it was changed")


def _tampered(path: Path, what: str) -> LedgerError:
    return LedgerError(
        f"{path}: the privacy ledger was tampered with or damaged ({what}), so nothing is trained. "
        "Restore it from a backup."
    )


def _unusable(path: Path, error: sqlite3.Error) -> LedgerError:
    return LedgerError(
        f"{path}: the privacy ledger cannot be used ({error}), so nothing is trained. Free disk "
        "space, check who may write there, or restore it from a backup."
    )


def _group(patients: Sequence[Patient]) -> tuple[str, str]:
    """A group's hash and document, whatever the order of its members."""
    document = json.dumps(sorted(sorted(member) for member in patients), separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest(), document


def _document(entry: Entry) -> str:
    values: dict[str, Any] = {k: v for k, v in asdict(entry).items() if k != "hash"}
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _chained(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
