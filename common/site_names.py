"""What a site may be called: the name becomes a folder's name and appears in tables and files."""

from __future__ import annotations

import re

PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class BadName(ValueError):
    """The text cannot be a site's name; it says what a name looks like."""


def site_name(text: str) -> str:
    """`text` itself. Raises BadName."""
    if not PATTERN.fullmatch(text):
        raise BadName(
            f"{text!r} cannot be a site's name: use 1 to 64 of the letters A-Z a-z, digits and . _ - "
            "and begin with a letter or digit, for example Oslo-1."
        )
    return text
