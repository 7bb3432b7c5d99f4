"""Findings about subjects as a table on standard output; what is found is `sites`' business."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.console import printable, standard_output
from sites.finding import Finding


def print_findings(findings: Sequence[Finding]) -> None:
    """A table on standard output; nothing is cut, and without a terminal nothing is wrapped."""
    if not findings:
        return
    from rich.box import ASCII2, ROUNDED
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=ROUNDED if terminal else ASCII2, show_lines=terminal)
    for heading in ("site", "subject", "file", "severity", "what", "what to do"):
        table.add_column(heading, overflow="fold", no_wrap=not terminal)
    for finding in sorted(findings, key=lambda f: (f.severity, f.subject, f.file)):
        colour = "red" if finding.severity == "error" else "yellow"
        table.add_row(
            *(Text(_cell(t)) for t in (finding.site, finding.subject, finding.file)),
            Text(finding.severity, style=colour),
            *(Text(_cell(t)) for t in (finding.what, finding.remedy)),
        )
    standard_output().print(table)


def _cell(text: str) -> str:
    """A file's name may hold a line break, which would break the table."""
    return printable(text).replace("\n", "?")
