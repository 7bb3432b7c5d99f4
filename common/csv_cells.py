"""CSV tables that hold names from outside: a spreadsheet shows them and computes nothing.

Numbers stay numbers. Where commas separate is the format's business; a spreadsheet that is told to
separate by something else may still read a part of a name as a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from common.console import printable

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # full-width ones too, for Japanese Excel


def csv_text(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in CSV; every text in `rows` goes through `csv_cell`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(headings)
    table.writerows([csv_cell(v) if isinstance(v, str) else v for v in row] for row in rows)
    return text.getvalue()


def csv_cell(text: str) -> str:
    """One line without control characters or half-decoded bytes; one that a spreadsheet would take
    for a formula gets an apostrophe."""
    line = printable(text).replace("\n", "?")
    return f"'{line}" if line.lstrip().startswith(FORMULA) else line
