"""What the server tells a site beside its tasks: the terms, with the roll call, and the farewell.

Apart from `common.messages` so that a client's connection can read them without loading torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from common.records import BadMessage, record_of, value_of
from common.terms import BadTerms, Terms, terms_from


@dataclass(frozen=True)
class Farewell:
    """The last message of a run: nothing is left to do. `verdict` is for people."""

    complete: bool
    verdict: str


def is_farewell(content: RecordDict) -> bool:
    return "farewell" in content


def pack_roll_call(terms: Terms) -> RecordDict:
    return RecordDict({"terms": ConfigRecord({"document": json.dumps(terms.document())})})


def unpack_roll_call(content: RecordDict) -> Terms:
    """Raises:
    BadMessage: there are no terms, or none that this version understands.
    """
    text = value_of(record_of(content, "terms", ConfigRecord), "document", str)
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise BadMessage("the terms are not a JSON object.")
        return terms_from(document)
    except (BadTerms, ValueError, RecursionError) as error:
        raise BadMessage(str(error)) from error


def pack_farewell(farewell: Farewell) -> RecordDict:
    return RecordDict({"farewell": ConfigRecord(dict(vars(farewell)))})


def unpack_farewell(content: RecordDict) -> Farewell:
    record = record_of(content, "farewell", ConfigRecord)
    return Farewell(value_of(record, "complete", bool), value_of(record, "verdict", str))
