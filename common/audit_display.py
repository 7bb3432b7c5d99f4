"""The commands on an audit log that both programs have: verify it, show it, export it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from common.console import FAILED, many, plain, printable, standard_output

if TYPE_CHECKING:
    from common.audit_log import AuditLog, Entry, Reading

COLUMNS = "number", "at", "kind", "details", "key", "before", "hash", "signature"
CELL = 200  # characters of an entry's details that are shown


def verify(log: AuditLog, against: Path | None, as_json: bool, present: str | None) -> None:
    """Verify every byte and say what was found; `present` is the fingerprint of the key in use.

    Raises:
        typer.Exit: with code 1 if anything is wrong.
        typer.BadParameter: there is no file `against`.
        LogError: without `as_json`, the first thing that is wrong with one of the logs itself.
    """
    from common.audit_compare import misfits
    from common.audit_log import LogError, verified_copy

    if against is not None and not against.exists():
        raise typer.BadParameter(f"{against} is not there.", param_hint="--against")
    document: dict[str, Any] = {"log": str(log.path), "good": False}
    try:
        reading = _existing(log)
        document |= _about(reading, present)
        wrong = [*_not_present(reading, present), *_unfinished(reading)]
        if against is not None:
            wrong += misfits(reading, verified_copy(against))
            document["against"] = str(against)
    except LogError as error:
        if not as_json:
            raise
        wrong = [str(error)]
    document |= {"good": not wrong, "wrong": wrong}
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        _print(document)
    if wrong:
        raise typer.Exit(FAILED)


def _existing(log: AuditLog) -> Reading:
    from common.audit_log import LogError, verified

    reading = verified(log)
    if not reading.entries:
        raise LogError(f"{log.path}: there is no audit log. Restore it from a backup.")
    return reading


def _about(reading: Reading, present: str | None) -> dict[str, Any]:
    warnings = []
    if present is None:
        warnings.append(
            "there is no present key that can be read, so whose the log is was not seen"
        )
    warnings += [
        f"entry {entry.number}, {entry.at[:19]}: the new key, {entry.key}, is not vouched for by the "
        f"old one, {before}: that was lost, or somebody else wrote from here on"
        for entry, before in reading.unvouched()
    ]
    problems = [e for e in reading.entries if e.kind in ("problem", "repaired")]
    warnings += [f"entry {e.number}, {e.at[:19]}: {e.details.get('what')}" for e in problems]
    return {
        "entries": len(reading.entries),
        "first": reading.entries[0].at,
        "last": reading.entries[-1].at,
        "head": asdict(reading.head),
        "keys": [{"fingerprint": key, "from_entry": number} for key, number in reading.signers()],
        "warnings": warnings,
    }


def _not_present(reading: Reading, present: str | None) -> list[str]:
    last = reading.entries[-1].key
    if present in (None, last):
        return []
    text = (
        f"the last entry is signed by {last}, and the present key is {present}: somebody else wrote it, "
        "or a key was made and the program was interrupted before it was noted (type that command "
        "again)."
    )
    return [text]


def _unfinished(reading: Reading) -> list[str]:
    if not reading.unfinished:
        return []
    text = (
        f"{many(reading.unfinished, 'byte')} after entry {reading.head.number} are no entry and were "
        "never acknowledged: a writing that was interrupted (power cut, full disk), or something "
        "added by hand. The next entry cuts them off and says so; it refuses where they hold "
        "a whole entry of another key."
    )
    return [text]


def _print(document: dict[str, Any]) -> None:
    print(
        f"{document['log']}: {document['entries']} entries from "
        f"{document['first'][:19]} to {document['last'][:19]} UTC"
    )
    print(f"  last entry  {document['head']['number']}  {document['head']['hash']}")
    for key in document["keys"]:
        print(f"  signed by   {key['fingerprint']} from entry {key['from_entry']} on")
    for warning in document["warnings"]:
        print(f"  warning     {printable(warning)}")
    for text in document["wrong"]:
        print(f"  WRONG       {printable(text)}")
    if document["good"]:
        beside = f", and fits {document['against']}" if "against" in document else ""
        print(f"Every byte is as it was written{beside}.")


def show(log: AuditLog, last: int | None) -> None:
    """A table of what happened, newest last.

    Raises:
        LogError: after the table, if the log was changed, cut off or damaged.
    """
    from rich.box import ASCII2, ROUNDED
    from rich.table import Table
    from rich.text import Text

    from common.audit_log import told, verified

    entries = list(told(log))
    console = standard_output()
    table = Table(box=ROUNDED if console.is_terminal else ASCII2)
    for heading in ("entry", "UTC", "what", "details"):
        table.add_column(heading, overflow="fold")
    for entry in entries[-last:] if last else entries:
        when = entry.at[:19].replace("T", " ")
        details = Text(plain(in_words(entry), CELL))
        table.add_row(str(entry.number), when, Text(plain(entry.kind)), details)
    console.print(table)
    verified(log)


def in_words(entry: Entry) -> str:
    """The details of an entry in a line: hashes shortened, the tensors' names counted."""
    return ", ".join(
        f"{name} {text}" for name, value in entry.details.items() if (text := _shown(name, value))
    )


def _shown(name: str, value: Any) -> str:
    if value in (None, "", [], {}) or name in ("details", "public_key"):
        return ""  # all numbers of a reply: in the export
    if isinstance(value, dict):
        inner = (f"{key} {_shown(key, part)}" for key, part in value.items())
        return f"({', '.join(inner)})"
    if name == "names":
        return f"of {many(len(value), 'tensor')}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "bytes":
        return f"{value:,}"
    text = str(value)
    whole = len(text) != 64 or set(text) - set("0123456789abcdef")
    return text if whole else text[:12]


def export(log: AuditLog, out: Path) -> None:
    """Write all entries, verified, as CSV or JSON by the file's ending.

    Raises:
        typer.BadParameter: it has another ending.
        LogError: the log was changed, or there is such a file already.
        OSError: the file cannot be written.
    """
    from common.audit_log import LogError
    from common.files import write_text_atomically

    if out.suffix not in (".csv", ".json"):
        raise typer.BadParameter(f"{out} must end in .csv or .json.", param_hint="FILE")
    if out.exists() or out.is_symlink():
        raise LogError(f"{out} exists already and is not overwritten; name a new file.")
    rows = [{name: asdict(entry)[name] for name in COLUMNS} for entry in _existing(log).entries]
    if out.suffix == ".json":
        write_text_atomically(out, json.dumps({"entries": rows}, indent=1) + "\n")
    else:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "details": json.dumps(row["details"])} for row in rows)
        write_text_atomically(out, table.getvalue())
    print(f"{out}: {len(rows)} entries.")
