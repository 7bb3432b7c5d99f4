"""Reading Flower's records, which come from outside: what is missing or of another type is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict


class BadMessage(ValueError):
    """A message does not have the agreed form; the text says what is wrong."""


def record_of(content: RecordDict, name: str, kind: type) -> Any:
    """The record of that name and kind. Raises BadMessage if there is none."""
    record = content.get(name)
    if not isinstance(record, kind):
        raise BadMessage(f"the message has no {kind.__name__} called {name!r}.")
    return record


def value_of(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of that name and type. Raises BadMessage if there is none."""
    value = record.get(name)
    # bool is an int in Python, not here
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadMessage(f"{name!r} must be of type {kind.__name__}, found {type(value).__name__}.")
    return value
