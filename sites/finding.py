"""What a check found: one thing, in one file, with what to do about it.

Only the record. Who finds what is in `sites.subject` and `sites.checks`; how it is shown is the
command line's business. A finding travels in logs and to screens at other hospitals, so its texts
never hold voxel values or anything read from a header's free-text fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning"]

Report = Callable[[str, Severity, str, str, str], None]
"""How a check hands over what it found in a known subject: file, severity, code, what, remedy."""


@dataclass(frozen=True)
class Finding:
    """`error`: the subject cannot be used. `warning`: it is used, but a person should look."""

    site: str
    subject: str  # "" where the finding is about the whole site
    file: str  # name without folder; "" where no single file is meant
    severity: Severity
    code: str  # stable, kebab-case, one per kind of finding
    what: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """The finding as plain JSON types, in the order of the fields."""
        return asdict(self)
