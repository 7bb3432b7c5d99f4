"""The commands on this hospital's audit log: `fed-client audit verify`, `show`, `export`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common.audit_commands import audit_app

if TYPE_CHECKING:
    from common.audit_log import AuditLog


def _log(folder: Path) -> AuditLog:
    from client.hospital import HospitalError, HospitalFolder

    hospital = HospitalFolder(folder)
    if not hospital.config.exists():
        raise HospitalError(f"{folder} is no hospital's folder.")
    return hospital.audit


def _present(folder: Path) -> str | None:
    """The fingerprint of the key in use; None if there is none, with which old entries can be verified."""
    from client.hospital import HospitalFolder
    from common.keys import BadKey, fingerprint, load_private_key, read_public_key

    hospital = HospitalFolder(folder)
    with suppress(BadKey):  # first: who cannot sign can replace the public one
        return fingerprint(load_private_key(hospital.private_key).public_key())
    with suppress(BadKey):
        return fingerprint(read_public_key(hospital.public_key).key)
    return None


def _foreseen() -> tuple[type[Exception], ...]:
    from client.hospital import HospitalError
    from common.audit_log import LogError

    return (HospitalError, LogError)


app = audit_app("fed-client", "hospital", _log, _present, _foreseen)
