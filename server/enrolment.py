"""Which hospitals may take part: their names and public keys, in SQLite in the coordinator's folder.

A name has at most one key that counts, a key at most one name. Keys that no longer count are kept
with the time from which they do not. Several processes may use the file at once: a server reads it
while `fed-server admit` writes. What a hospital is told is in `common.invitation`.
"""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from common.keys import fingerprint, parse_public_key, public_line
from common.site_names import BadName, site_name

SCHEMA = """
CREATE TABLE IF NOT EXISTS enrolled (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE, public_key TEXT NOT NULL,
    fingerprint TEXT NOT NULL, admitted_at TEXT NOT NULL, revoked_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_key_a_name ON enrolled (name) WHERE revoked_at IS NULL;
CREATE UNIQUE INDEX IF NOT EXISTS one_name_a_key ON enrolled (fingerprint) WHERE revoked_at IS NULL;
"""
COLUMNS = "name, public_key, fingerprint, admitted_at, revoked_at"
PATIENCE = 30  # seconds that one process waits for another's transaction


class EnrolmentError(RuntimeError):
    """A hospital cannot be enrolled or revoked so; the text says why and what to do."""


@dataclass(frozen=True)
class EnrolledSite:
    """One site and its key. Times are ISO texts in UTC; `revoked_at` is None while the key counts."""

    name: str
    public_key: str
    fingerprint: str
    admitted_at: str
    revoked_at: str | None

    @property
    def active(self) -> bool:
        return self.revoked_at is None

    def key(self) -> ec.EllipticCurvePublicKey:
        return parse_public_key(self.public_key).key


def create_registry(path: Path) -> None:
    """Make the file, unless it is there already. Raises EnrolmentError."""
    with _open(path, create=True) as database:
        database.executescript(f"BEGIN; {SCHEMA} COMMIT;")


def admit(
    path: Path, name: str, key: ec.EllipticCurvePublicKey, *, replace: bool = False
) -> EnrolledSite:
    """Enrol a site by its public key; the same site with the same key again changes nothing.

    Args:
        replace: the site has another key now, which counts from here on in place of the old one.

    Raises:
        EnrolmentError: the name cannot be one, or has another key (and not `replace`), or the key is
            another site's.
    """
    try:
        site_name(name)
    except BadName as error:
        raise EnrolmentError(str(error)) from error
    mark = fingerprint(key)
    with _transaction(path) as database:
        for known in _read(database, "WHERE name = ?", name):
            if known.name != name:  # some file systems take both for one folder
                raise EnrolmentError(
                    f"{name} differs from the site {known.name} by capital letters only; "
                    f"write {known.name}, or choose another name."
                )
        sites = _read(database, "WHERE revoked_at IS NULL")
        same_name = next((site for site in sites if site.name == name), None)
        same_key = next((site for site in sites if site.fingerprint == mark), None)
        if same_key is not None:
            if same_key.name == name:
                return same_key
            raise EnrolmentError(
                f"This key is already enrolled as {same_key.name}; a site needs a key of its own. "
                f"If {same_key.name} shall be called {name} from now on, revoke it first."
            )
        if same_name is not None and not replace:
            raise EnrolmentError(
                f"{name} is already enrolled with another key ({same_name.fingerprint}). If the "
                "hospital says by telephone that it has a new key, type the same with --replace; "
                "the old key then no longer counts."
            )
        now = _now()
        _revoke(database, name, now)
        database.execute(
            f"INSERT INTO enrolled ({COLUMNS}) VALUES (?, ?, ?, ?, NULL)",
            (name, public_line(key, name), mark, now),
        )
        return EnrolledSite(name, public_line(key, name), mark, now, None)


def revoke(path: Path, name: str) -> EnrolledSite:
    """The site's key no longer counts. Of a site that is revoked already, nothing changes.

    Raises:
        EnrolmentError: no site of that name was ever enrolled.
    """
    with _transaction(path) as database:
        _revoke(database, name, _now())
        found = _read(database, "WHERE name = ? COLLATE BINARY ORDER BY id DESC LIMIT 1", name)
        if not found:
            names = [site.name for site in _read(database, "ORDER BY id")]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise EnrolmentError(f"No site called {name} is enrolled.{hint}")
        return found[0]


def active(path: Path) -> list[EnrolledSite]:
    """The sites whose keys count, by name. Raises EnrolmentError."""
    with _open(path) as database:
        return _read(database, "WHERE revoked_at IS NULL ORDER BY name")


def all_sites(path: Path) -> list[EnrolledSite]:
    """Every site that was ever enrolled, with its last key, by name. Raises EnrolmentError."""
    with _open(path) as database:
        last = "WHERE id IN (SELECT MAX(id) FROM enrolled GROUP BY name) ORDER BY name"
        return _read(database, last)


def keys_of_all(path: Path) -> dict[str, list[ec.EllipticCurvePublicKey]]:
    """Every key that each site was ever enrolled with, by name. Raises EnrolmentError."""
    keys: dict[str, list[ec.EllipticCurvePublicKey]] = {}
    with _open(path) as database:
        for site in _read(database, "ORDER BY id"):
            keys.setdefault(site.name, []).append(site.key())
    return keys


def _revoke(database: sqlite3.Connection, name: str, now: str) -> None:
    database.execute(
        "UPDATE enrolled SET revoked_at = ? WHERE name = ? COLLATE BINARY AND revoked_at IS NULL",
        (now, name),
    )


def _read(database: sqlite3.Connection, which: str, *values: object) -> list[EnrolledSite]:
    rows = database.execute(f"SELECT {COLUMNS} FROM enrolled {which}", values)
    return [EnrolledSite(*row) for row in rows]


@contextmanager
def _transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """All or nothing, and no other writer from the first look on."""
    with _open(path) as database:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        finally:
            if database.in_transaction:
                database.execute("ROLLBACK")


@contextmanager
def _open(path: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    try:
        if create:
            path.touch(0o600)
        # "rw": a registry that is gone must not come back empty, which would shut everybody out
        address = f"{path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)
        with closing(connection) as database:
            database.execute("PRAGMA synchronous = FULL")
            yield database
    except sqlite3.DatabaseError as error:
        raise EnrolmentError(
            f"{path}: the list of enrolled sites cannot be read or written ({error}). Free disk "
            "space, or restore the file from a backup."
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
