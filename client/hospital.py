"""The hospital's folder: what everything in it is called, how it is made, and its key pair.

Making it can be killed and begun again at any point: `site.yaml` is written last, and a key that is
there is kept. The private key never leaves the folder. What `join` does with it all is not here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.ledger import LedgerError, anchor_in, create_ledger
from client.site_config import SiteConfig, load_site_config
from common.audit_log import AuditLog, append, head, verified
from common.config_file import commented
from common.files import locked, write_text_atomically
from common.keys import (
    BadKey,
    fingerprint,
    load_private_key,
    new_private_key,
    public_line,
    read_public_key,
    save_private_key,
    write_private,
)
from common.site_names import site_name


class HospitalError(RuntimeError):
    """A folder is not a hospital's, or cannot become one; the text says why and what to do."""


@dataclass(frozen=True)
class HospitalFolder:
    """Names of everything that a hospital keeps of one federation."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "site.yaml"

    @property
    def private_key(self) -> Path:
        return self.path / "site.key"

    @property
    def public_key(self) -> Path:
        return self.path / "site.pub"

    @property
    def invitation(self) -> Path:
        """The coordinator's answer, as it came."""
        return self.path / "invitation.json"

    @property
    def accepted(self) -> Path:
        """The terms that the hospital has said yes to."""
        return self.path / "accepted.json"

    @property
    def proposed(self) -> Path:
        """The terms that wait for its yes."""
        return self.path / "proposed.json"

    @property
    def state(self) -> Path:
        """`client.site`'s folder."""
        return self.path / "state"

    @property
    def cache(self) -> Path:
        """Where prepared scans are unless `site.yaml` says otherwise."""
        return self.path / "cache"

    @property
    def lock(self) -> Path:
        return self.path / "client.lock"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def audit(self) -> AuditLog:
        """What has happened here, and what has left the building."""
        return AuditLog(self.path / "audit.log", self.private_key)


def init_hospital(path: Path, name: str, data: Path) -> HospitalFolder:
    """Make a hospital's folder with a key pair, or finish what a killed attempt has begun.

    Raises:
        HospitalError: the folder is finished already, or holds something else; it is untouched.
        BadName: `name` cannot be a site's.
        BadKey: a key that is there already cannot be used.
        AlreadyInUse: another process is making it.
        LogError, OSError: a file cannot be written.
    """
    folder = HospitalFolder(path)
    site_name(name)
    _refuse_unless_new(folder)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)  # it may have been there, empty
    with locked(folder.lock):
        _refuse_unless_new(folder)
        if not folder.private_key.exists():
            save_private_key(folder.private_key, new_private_key())
        _write_public_key(folder, name)
        if not verified(folder.audit).entries:  # of a killed attempt
            append(folder.audit, "folder made", {"name": name, "key": _fingerprint(folder)})
        config = SiteConfig(data=data.expanduser().absolute())
        write_text_atomically(folder.config, commented(config))  # last: the folder is finished
        ledger = load_site_config(folder.config).privacy_ledger
        # where another folder remembers one, it was lost, and a new one would forget what was spent
        if not ledger.exists() and not anchors_beside(ledger):
            with contextlib.suppress(LedgerError):  # needed, and asked for, with a budget only
                create_ledger(ledger)
    return folder


def anchors_beside(ledger: Path) -> list[Path]:
    """Of the hospital's folders that lie beside `ledger`: each remembers a ledger it was paid from."""
    try:
        beside = [HospitalFolder(path) for path in sorted(ledger.parent.resolve().iterdir())]
    except OSError:  # then nothing lies there
        return []
    return [anchor for folder in beside if (anchor := anchor_in(folder.state)).is_file()]


def _refuse_unless_new(folder: HospitalFolder) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise HospitalError(f"{folder.path} is a file; give a new folder.")
    present = {entry.name for entry in folder.path.iterdir()} if folder.path.exists() else set()
    if folder.config.name in present:
        raise HospitalError(
            f"{folder.path} is a hospital's folder already and stays as it is. Edit site.yaml in it "
            "to change the settings; for a new key pair: fed-client rotate-key "
            f"{folder.path}"
        )
    log = folder.audit
    files = folder.private_key, folder.public_key, folder.lock, log.path, log.anchor
    ours = {path.name for path in files}
    foreign = sorted(name for name in present - ours if not name.startswith("."))
    if foreign:
        raise HospitalError(
            f"{folder.path} holds something else already ({foreign[0]}); give a new folder. "
            "The scans' folder is named with --data."
        )


def load_hospital(path: Path) -> HospitalFolder:
    """The folder, if `init_hospital` has made it and its two keys belong together.

    Raises:
        HospitalError: it has not, or not to its end.
        BadKey: a key is missing, cannot be used, or can be read by others.
    """
    folder = HospitalFolder(path)
    if not folder.config.exists():
        raise HospitalError(
            f"{path} is no hospital's folder; make one with: "
            f"fed-client init {path} --name NAME --data FOLDER"
        )
    key = load_private_key(folder.private_key).public_key()
    if read_public_key(folder.public_key).key != key:
        raise BadKey(
            f"{folder.public_key} does not belong to {folder.private_key}; make a new pair with: "
            f"fed-client rotate-key {path}"
        )
    return folder


def rotate_key(folder: HospitalFolder) -> Path | None:
    """Make a new key pair, also if the old private key is lost, damaged or was open to others.

    Returns the file that the old private key is kept in, None if there was none.

    Raises:
        HospitalError: it is no hospital's folder.
        BadKey: the name of the site cannot be read from `site.pub`.
        AlreadyInUse: the client is running.
        LogError: the audit log is damaged or cannot be written.
        OSError: a file cannot be written.
    """
    if not folder.config.exists():
        raise HospitalError(f"{folder.path} is no hospital's folder.")
    with locked(folder.lock):
        name = read_public_key(folder.public_key).comment
        head(folder.audit)  # which must be good before anything changes
        before = _fingerprint(folder)
        old = None
        if folder.private_key.exists():
            old = _unused(folder.private_key, f"old-{datetime.now(UTC):%Y-%m-%d}")
            write_private(old, folder.private_key.read_bytes())
        # beside the old one until it is whole, so that at no time there is no key
        new = folder.private_key.with_name("site.key.new")
        new.unlink(missing_ok=True)
        save_private_key(new, new_private_key())
        new.replace(folder.private_key)
        _write_public_key(folder, name)
        # the old key, kept beside, vouches there for the new one; if it is lost, nobody does
        rotated = {"old": before, "new": _fingerprint(folder)}
        append(folder.audit, "key rotated", rotated, lost=True)
    return old


def _write_public_key(folder: HospitalFolder, name: str) -> None:
    key = load_private_key(folder.private_key).public_key()
    write_text_atomically(folder.public_key, public_line(key, name) + "\n")


def _fingerprint(folder: HospitalFolder) -> str:
    return fingerprint(read_public_key(folder.public_key).key)


def _unused(path: Path, mark: str) -> Path:
    """`path` with `mark` at its end, and a number too if there is such a file already."""
    candidate, number = path.with_name(f"{path.name}.{mark}"), 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{mark}-{number}")
    return candidate
