"""What a federation asks a hospital to agree to: which federation, which code, which configuration.

The coordinator states the terms, the hospital accepts them by their hash, and every later change
needs a new acceptance. How they are shown and where an acceptance is kept is the client's business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.config import FederationConfig

FINGERPRINT = r"SHA256:[A-Za-z0-9+/]{43}"  # of a key, as `ssh-keygen -lf` prints it


class BadTerms(ValueError):
    """A document does not state terms that this version understands; the text says why."""


@dataclass(frozen=True)
class Terms:
    """`federation` is the random id that `fed-server init` drew; `code_hash` is `common.code_hash`.

    `roster` is, with secure aggregation, the fingerprints of all enrolled site keys: of whom the sum
    may consist. Without it it is empty: who else takes part is then no part of what a site accepts.
    """

    federation: str
    code_hash: str
    config: FederationConfig
    roster: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The terms as plain JSON types; equal terms give equal documents."""
        return {
            "federation": self.federation,
            "code_hash": self.code_hash,
            "config": self.config.agreed(),
            "roster": sorted(self.roster) if self.config.secure_aggregation else [],
        }

    def hash(self) -> str:
        """sha256 (hex) of the document: what a hospital says yes to."""
        text = json.dumps(self.document(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def terms_from(document: Mapping[str, Any]) -> Terms:
    """The terms that a document of `Terms.document` states.

    Raises:
        BadTerms: a part is missing, or the configuration has keys or values unknown to this version.
    """
    federation, code = document.get("federation"), document.get("code_hash")
    config = document.get("config")
    if not isinstance(federation, str) or not isinstance(code, str) or not isinstance(config, dict):
        raise BadTerms("the terms lack the federation's id, the code hash or the configuration.")
    # both are shown to people, so nothing that could draw over a screen
    if not all(re.fullmatch(r"[0-9a-f]{1,64}", text) for text in (federation, code)):
        raise BadTerms("the federation's id or the code hash is no hexadecimal number.")
    roster = document.get("roster", [])
    if not isinstance(roster, list) or not all(
        isinstance(mark, str) and re.fullmatch(FINGERPRINT, mark) for mark in roster
    ):
        raise BadTerms("the roster is no list of keys' fingerprints.")
    if len(set(roster)) != len(roster):
        raise BadTerms("a key is in the roster twice.")
    try:
        return Terms(federation, code, FederationConfig.model_validate(config), tuple(roster))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(c for c in ".".join(map(str, first["loc"])) if c.isprintable())[:80]
        raise BadTerms(
            f"the configuration cannot be understood by this version ({key}: {first['msg']}); "
            "both sides need the same version of fedbrats."
        ) from error


def changes(before: Terms, after: Terms) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every difference, keys as in `federation.yaml`."""
    old, new = _flat(before.document()), _flat(after.document())
    keys = [*old, *(key for key in new if key not in old)]
    return [
        (key.removeprefix("config."), old.get(key), new.get(key))
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
