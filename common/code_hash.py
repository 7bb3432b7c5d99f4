"""Which code runs here: one hash over the sources of the installed fedbrats packages.

Both sides compute it from their own installation and compare; code itself is never sent. It covers
what fedbrats does, not its dependencies, whose exact versions are in the constraints file.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

PACKAGES = ("client", "common", "server", "sites")  # what takes part in a federation
ROOT = Path(__file__).resolve().parent.parent


@functools.lru_cache(maxsize=4)
def code_hash(root: Path = ROOT) -> str:
    """sha256 (hex) over the names and contents of all .py and .csv files of the packages in `root`.

    Line endings do not count, so that a checkout on Windows is the same code.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*"), key=lambda p: p.as_posix()):
            if path.suffix in (".py", ".csv") and path.is_file():
                name = path.relative_to(root).as_posix()
                content = path.read_bytes().replace(b"\r\n", b"\n")
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
