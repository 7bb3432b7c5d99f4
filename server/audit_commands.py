"""The commands on this coordinator's audit log: `fed-server audit verify`, `show`, `export`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.audit_commands import audit_app

if TYPE_CHECKING:
    from common.audit_log import AuditLog


def _log(folder: Path) -> AuditLog:
    from server.coordinator import CoordinatorError, CoordinatorFolder

    coordinator = CoordinatorFolder(folder)
    if not coordinator.config.exists():
        raise CoordinatorError(f"{folder} is no coordinator's folder.")
    return coordinator.audit


def _present(folder: Path) -> str | None:
    """The fingerprint of the key in use; None if there is none, with which old entries can be verified."""
    from common.keys import BadKey, fingerprint, load_signing_key
    from server.coordinator import CoordinatorFolder

    try:
        return fingerprint(load_signing_key(CoordinatorFolder(folder).server_key).public_key())
    except BadKey:
        return None


def _foreseen() -> tuple[type[Exception], ...]:
    from common.audit_log import LogError
    from server.coordinator import CoordinatorError

    return (CoordinatorError, LogError)


app = audit_app("fed-server", "coordinator", _log, _present, _foreseen)
