"""The coordinator's folder: what everything in it is called, how it is made, what hospitals get of it.

Making it can be killed and begun again at any point: `federation.yaml` is written last, and what is
there already, above all keys, is kept. What happens in a run is in `server.checkpoint`'s folder.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.audit_log import AuditLog, append, head, last_entry, verified
from common.code_hash import code_hash
from common.config import FederationConfig
from common.config_file import anchored, commented, load_config
from common.files import locked, write_text_atomically
from common.invitation import Invitation
from common.keys import BadKey, fingerprint, load_signing_key, read_private, write_private
from common.terms import Terms
from server.certificates import (
    Certificate,
    host_name,
    issue_server_certificate,
    make_authority,
    read_certificate,
    renew_server_certificate,
)
from server.enrolment import active, create_registry


class CoordinatorError(RuntimeError):
    """A folder is not a coordinator's, or cannot become one; the text says why and what to do."""


@dataclass(frozen=True)
class CoordinatorFolder:
    """Names of everything that a coordinator keeps of one federation."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "federation.yaml"

    @property
    def identity(self) -> Path:
        """The federation's random id and when it was made."""
        return self.path / "federation.json"

    @property
    def ca_certificate(self) -> Path:
        return self.path / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.path / "ca.key"

    @property
    def server_certificate(self) -> Path:
        return self.path / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.path / "server.key"

    @property
    def audit(self) -> AuditLog:
        """What has happened here, signed with the server's key."""
        return AuditLog(self.path / "audit.log", self.server_key)

    @property
    def enrolled(self) -> Path:
        """`server.enrolment`'s list of sites."""
        return self.path / "enrolled.sqlite"

    @property
    def pieces(self) -> Path:
        """Messages on their way; emptied at every start."""
        return self.path / "pieces"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def status(self) -> Path:
        """What the running server last said of itself and its sites."""
        return self.path / "status.json"

    @property
    def lock(self) -> Path:
        return self.path / "server.lock"

    @property
    def invitations(self) -> Path:
        return self.path / "invitations"

    def invitation(self, site: str) -> Path:
        return self.invitations / f"{site}.fedbrats.json"

    def needed(self) -> tuple[Path, ...]:
        """What a finished folder always holds, in the order in which it is made."""
        return (
            self.identity,
            self.ca_key,
            self.ca_certificate,
            self.server_key,
            self.server_certificate,
            self.enrolled,
            self.config,
        )


def init_folder(
    path: Path, config: FederationConfig, hosts: Iterable[str] = ()
) -> CoordinatorFolder:
    """Make a coordinator's folder, or finish what a killed attempt has begun.

    Args:
        config: a relative `server.init_from` in it is meant from the working directory.
        hosts: further names and addresses of this server, beside `config.server.address`.

    Raises:
        CoordinatorError: the folder is finished already, or holds something else; it is untouched.
        CertificateError, BadKey: a host is none, or a key that is there cannot be used.
        AlreadyInUse: another process is making it.
        LogError, OSError: a file cannot be written.
    """
    folder = CoordinatorFolder(path)
    names = [host_name(host) for host in (config.server.address, *hosts)]
    _refuse_unless_new(folder)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)  # it may have been there, empty
    with locked(folder.lock):
        _refuse_unless_new(folder)
        if not folder.identity.exists():
            identity = {
                "federation": secrets.token_hex(16),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_text_atomically(folder.identity, json.dumps(identity) + "\n")
        if not folder.ca_certificate.exists():
            make_authority(folder.ca_key, folder.ca_certificate, config.name)
        issue_server_certificate(*_certificate_files(folder), names)
        create_registry(folder.enrolled)
        if not verified(folder.audit).entries:  # of a killed attempt
            made = {"name": config.name, "federation": federation_id(folder)}
            append(folder.audit, "folder made", made)
        # last, as it marks the folder as finished; `split` is for simulations
        settled = anchored(config, Path.cwd())
        write_text_atomically(folder.config, commented(settled, omit=("split",)))
    return folder


def _refuse_unless_new(folder: CoordinatorFolder) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise CoordinatorError(f"{folder.path} is a file; give a new folder.")
    present = {entry.name for entry in folder.path.iterdir()} if folder.path.exists() else set()
    if folder.config.name in present:
        if lacking := [path.name for path in folder.needed() if path.name not in present]:
            raise CoordinatorError(
                f"{folder.path} has a federation.yaml, but no {', '.join(lacking)}. Restore that "
                "from a backup, or choose a new folder; `init` writes federation.yaml by itself."
            )
        raise CoordinatorError(
            f"{folder.path} is a coordinator's folder already and stays as it is. Edit "
            "federation.yaml in it to change the federation, or choose a new folder."
        )
    log = folder.audit
    ours = {path.name for path in (*folder.needed(), folder.lock, log.path, log.anchor)}
    foreign = sorted(name for name in present - ours if not name.startswith("."))
    if foreign:
        raise CoordinatorError(
            f"{folder.path} holds something else already ({foreign[0]}); give a new folder."
        )


def load_coordinator(path: Path) -> CoordinatorFolder:
    """The folder, if `init_folder` has made it.

    Raises:
        CoordinatorError: it has not, or not to its end, or a file is gone.
    """
    folder = CoordinatorFolder(path)
    if not folder.identity.exists():
        raise CoordinatorError(
            f"{path} is no coordinator's folder; make one with: fed-server init {path}"
        )
    if not folder.config.exists():
        raise CoordinatorError(f"{path} is not finished; type again: fed-server init {path}")
    for needed in folder.needed():
        if not needed.exists():
            raise CoordinatorError(f"{needed} is missing; restore it from a backup.")
    federation_id(folder)
    return folder


def federation_id(folder: CoordinatorFolder) -> str:
    """The random id of 32 hex digits. Raises CoordinatorError."""
    try:
        identity = json.loads(folder.identity.read_text(encoding="utf-8"))["federation"]
        if isinstance(identity, str) and len(bytes.fromhex(identity)) == 16:
            return identity
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CoordinatorError(f"{folder.identity} is damaged; restore it from a backup.")


def terms(folder: CoordinatorFolder) -> Terms:
    """What hospitals are asked to agree to, by the present federation.yaml and the installed code;
    with secure aggregation also by the present list of enrolled sites.

    Raises:
        ConfigError: federation.yaml cannot be used.
        CoordinatorError: the federation's id is damaged.
        EnrolmentError: the list of enrolled sites cannot be read.
    """
    config = load_config(folder.config)
    roster: tuple[str, ...] = ()
    if config.secure_aggregation:
        roster = tuple(sorted(site.fingerprint for site in active(folder.enrolled)))
    return Terms(federation_id(folder), code_hash(), config, roster)


def invitation(folder: CoordinatorFolder, site: str, key_fingerprint: str) -> Invitation:
    """What to send to the site, by the present state of the folder.

    Raises:
        ConfigError, CoordinatorError: as `terms`.
        OSError: the CA's certificate cannot be read.
    """
    stated = terms(folder)
    return Invitation(
        federation=stated.federation,
        name=stated.config.name,
        address=host_and_port(stated.config),
        site=site,
        key_fingerprint=key_fingerprint,
        ca_certificate=folder.ca_certificate.read_text(encoding="ascii"),
        terms=stated,
    )


def host_and_port(config: FederationConfig) -> str:
    """Where hospitals reach the server; an IPv6 address in brackets."""
    host = config.server.address
    return f"[{host}]:{config.server.port}" if ":" in host else f"{host}:{config.server.port}"


def renew_certificate(folder: CoordinatorFolder, hosts: Iterable[str] = ()) -> Certificate:
    """A new server certificate and key of the same CA; hospitals need nothing new.

    Args:
        hosts: its names and addresses beside `config.server.address`; default: the present ones.

    Raises:
        ConfigError: federation.yaml cannot be used.
        CertificateError, BadKey, LogError, OSError: it cannot be made; the present one stays.
    """
    address = load_config(folder.config).server.address
    others = list(hosts) or read_certificate(folder.server_certificate).hosts
    head(folder.audit)  # which must be good before anything changes
    former = _keep_server_key(folder)
    renewed = renew_server_certificate(*_certificate_files(folder), [address, *others])
    until = renewed.not_after.isoformat(timespec="seconds")
    details = {"hosts": list(renewed.hosts), "until": until}
    append(folder.audit, "certificate renewed", details, lost=True)
    former.unlink(missing_ok=True)
    return renewed


def _keep_server_key(folder: CoordinatorFolder) -> Path:
    """Copy it to where the audit log looks for the key that vouches for the next one.

    After a kill the copy stays until the next renewal. One that is there from then may be of the key
    that signed last; where the present key is, nothing is lost with it.
    """
    former = folder.server_key.with_name(f"{folder.server_key.name}.old")
    last = last_entry(folder.audit)
    with contextlib.suppress(BadKey):  # lost: then nothing vouches for the new one
        present = load_signing_key(folder.server_key)
        if last is None or fingerprint(present.public_key()) == last.key:
            former.unlink(missing_ok=True)
            write_private(former, read_private(folder.server_key))
    return former


def _certificate_files(folder: CoordinatorFolder) -> tuple[Path, Path, Path, Path]:
    return (
        folder.ca_key,
        folder.ca_certificate,
        folder.server_key,
        folder.server_certificate,
    )
