"""What of an answer may leave under a policy: the answer is built anew from what is listed here.

`ANSWERS` is the whole of it. A record or key that it does not name never leaves, whoever put it
there; a value that is not of the listed kind is left out as if it were not there. What of it this
site's policy holds back is in `permitted`. Error texts are made for both sides and are only cut to
one short line; nothing here can tell what a weight reveals.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.blocks import UnknownBlock, rebuilt
from client.policy import Policy
from client.refusals import Refusal, trains
from common.audit_heads import RECORD as AUDIT
from common.brats import STRUCTURES
from common.console import plain
from common.messages import BLOCK, EXACT, MOST_SUBJECTS, NOISED, STYPE, WITHHELD
from common.metrics import REGIONS
from common.statement import RECORD, BadStatement, read_statement
from common.terms import FINGERPRINT

METRICS = frozenset(
    {"loss", "voxel_accuracy"}
    | {
        f"{family}/{structure}"
        for family in ("dice", "iou", "hd95", "sensitivity", "specificity", "precision")
        for structure in STRUCTURES
    }
)
CHOOSING = tuple(f"dice/{region}" for region in REGIONS)  # without them a report counts as none
LONGEST_SIGNATURE = 200  # bytes; of P-384 about 104
UNKNOWN_BLOCK = "the site's update holds something that cannot be accounted for."
KEY_LINE = r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{100,300}={0,2}"


class NotPermitted(RuntimeError):
    """An answer may not leave; the text says why, and may leave itself."""


def _count(value: Any) -> Any:
    return value if type(value) is int and 0 <= value <= MOST_SUBJECTS else None


def _flag(value: Any) -> Any:
    return value if type(value) is bool else None


def _number(value: Any) -> Any:
    return value if type(value) is float else None


def _words(value: Any) -> Any:
    return plain(value) if type(value) is str else None


def _hex(value: Any) -> Any:
    return value if type(value) is str and re.fullmatch("[0-9a-f]{0,64}", value) else None


def _way(value: Any) -> Any:
    return value if value in (EXACT, NOISED, WITHHELD) else None


def _emptied(value: Any) -> Any:
    """A signature is made for what leaves, by whoever holds the key (`client.outbound`)."""
    return b""


def _statement(value: Any) -> Any:
    """Only what a statement has: it is read and written anew."""
    try:
        return read_statement(value).text() if type(value) is str else None
    except BadStatement:
        return None


def _mean(value: Any) -> Any:
    return float(value) if type(value) in (int, float) else None


def _length(value: Any) -> Any:
    return value if type(value) is int and value >= 0 else None


def _signature(value: Any) -> Any:
    return value if type(value) is bytes and len(value) <= LONGEST_SIGNATURE else None


def _advert(value: Any) -> Any:
    """Signed as it is, so it may leave unchanged or not at all."""
    document = _canonical(value)
    good = isinstance(document, dict) and document.keys() == ADVERT.keys()
    return (
        value if good and all(ADVERT[name](document[name]) is not None for name in ADVERT) else None
    )


def _shares(value: Any) -> Any:
    document = _canonical(value)
    good = isinstance(document, dict) and all(
        re.fullmatch(FINGERPRINT, site)
        and type(share) is str
        and re.fullmatch("[0-9a-f]{64,160}", share)
        for site, share in document.items()
    )
    return value if good else None


def _canonical(value: Any) -> Any:
    """What a text says, if it is written in the one way in which this program writes it."""
    try:
        document = json.loads(value) if type(value) is str else None
        return document if json.dumps(document, sort_keys=True) == value else None
    except (ValueError, RecursionError):
        return None


def _key_line(value: Any) -> Any:
    return value if type(value) is str and re.fullmatch(KEY_LINE, value) else None


Kind = Callable[[Any], Any]  # the value as it may leave, or None
SITE: Kind = _words  # and only this site's own name
STATEMENT: dict[str, Kind] = {"statement": _statement, "signature": _emptied}
WEIGHTS, MASKED = "weights", "masked"
ADVERT: dict[str, Kind] = {  # a site's keys of a round of secure aggregation
    "federation": _hex,
    "round": _count,
    "session": _hex,
    "task": _hex,
    "roster": _hex,
    "sites": _count,
    "key": _key_line,
    "sealing": _hex,
    "masking": _hex,
    "seed_hash": _hex,
}
HEADS: dict[str, Kind] = {
    "number": _length,
    "hash": _hex,
    "heard_number": _length,
    "heard_hash": _hex,
}
STAGE: dict[str, Kind] = {"round": _count, "session": _hex}
ANSWERS: dict[str, dict[str, dict[str, Kind]]] = {
    # an answer is what the first of these records that is in it says
    "card": {
        "card": {
            "site": SITE,
            "trains": _flag,
            "n_training": _count,
            "n_held_out": _count,
            "n_left_out": _count,
            "config_fingerprint": _hex,
            "resting": _words,
            "shows_name": _flag,
        },
    },
    "farewell": {"farewell": {"received": _flag}},
    "means": {
        "about": {"site": SITE, "round": _count, "seconds": _number, "released": _way},
        "means": dict.fromkeys(sorted(METRICS), _mean),
        "defined": {"n": _count, **dict.fromkeys(sorted(METRICS), _count)},
        RECORD: STATEMENT,
    },
    WEIGHTS: {
        "about": {
            "site": SITE,
            "round": _count,
            "n_training": _count,
            "loss": _number,
            "seconds": _number,
            "samples_per_second": _number,
        },
        WEIGHTS: {},  # one block of safetensors, see `_block`
        RECORD: STATEMENT,
    },
    "keys": {
        "about": {
            "site": SITE,
            "round": _count,
            "loss": _number,
            "seconds": _number,
            "samples_per_second": _number,
        },
        "keys": {"advert": _advert, "signature": _signature},
        RECORD: STATEMENT,
    },
    "sealed": {"about": STAGE, "sealed": {"json": _shares}},
    "revealed": {"about": STAGE, "revealed": {"json": _shares}},
    MASKED: {"about": STAGE, MASKED: {}},
}
BLOCKS = WEIGHTS, MASKED
RECORDS = {
    "means": MetricRecord,
    "defined": MetricRecord,
    WEIGHTS: ArrayRecord,
    MASKED: ArrayRecord,
}
SECURE = "sealed", "revealed", MASKED
TRAINING_NUMBERS = "loss", "seconds", "samples_per_second"

Values = dict[str, dict[str, Any]]


def permitted(content: RecordDict, policy: Policy, site: str, n_training: int) -> RecordDict:
    """A new answer with what of `content` may leave. What comes out comes out again unchanged.

    `n_training`: this site's number of training subjects, where the answer does not tell it.

    A report of which the Dice means may not leave withholds all its means, as a private site's does.

    Raises:
        NotPermitted: nothing may; the text names the rule.
    """
    answer = next((name for name in ANSWERS if _is_there(content, name)), None)
    if answer is None:
        raise NotPermitted("the site's answer is none of those that may leave it.")
    listed = {**ANSWERS[answer], AUDIT: HEADS}
    values = {name: _values(content, name, kinds, site) for name, kinds in listed.items()}
    for name, value in values.get("about", {}).items():
        if name in TRAINING_NUMBERS:
            values["about"][name] = _rounded(value, policy)
    if not policy.training_numbers and "about" in values:
        values["about"] = {k: v for k, v in values["about"].items() if k not in TRAINING_NUMBERS}
    for name, whole in ((RECORD, STATEMENT), (AUDIT, HEADS)):  # all of it or none
        if values.get(name, {}).keys() != whole.keys():
            values.pop(name, None)
    if answer == "card":
        _restrict_card(values["card"], policy, n_training)
    elif answer == "means":
        _restrict_report(values, policy)
    elif answer == WEIGHTS:
        _require_update(values, policy, values["about"].get("n_training", 0), masked=False)
    elif answer == "keys":
        _require_update(values, policy, n_training, masked=True)
    elif answer in SECURE and not policy.send_updates:
        raise NotPermitted(str(Refusal("send_updates", "no model update leaves this site")))
    made = RecordDict()
    for name in listed:
        if name in BLOCKS:
            made[name] = ArrayRecord({BLOCK: _block(content, name)})
        elif name in values:
            kind = RECORDS.get(name, ConfigRecord)
            made[name] = kind(values[name])
    return made


def _restrict_card(card: dict[str, Any], policy: Policy, n_training: int) -> None:
    card["shows_name"] = policy.show_name
    if not trains(policy, card.get("n_training", n_training)):
        card |= {"trains": False, "n_training": 0, "resting": ""}


def _restrict_report(values: Values, policy: Policy) -> None:
    about, means, defined = values["about"], values["means"], values["defined"]
    n = defined.get("n", 0)
    kept = {
        name: _rounded(mean, policy)
        for name, mean in means.items()
        if name.partition("/")[0] in policy.metrics
        and _behind(mean, defined.get(name), n) >= policy.min_subjects
    }
    if about.get("released") == WITHHELD or any(name not in kept for name in CHOOSING):
        kept = {}
        about["released"] = WITHHELD
        if RECORD in values:  # who says otherwise beside it would be taken for a liar
            stated = read_statement(values[RECORD]["statement"])
            values[RECORD]["statement"] = replace(stated, metrics=WITHHELD).text()
    values["means"] = kept
    values["defined"] = {"n": n, **{name: defined[name] for name in kept}}


def _behind(mean: float, defined: int | None, n: int) -> int:
    """Over how many subjects a mean is; that it is undefined is said about all of them."""
    if defined is None or defined > n:
        return 0
    return n if defined == 0 and math.isnan(mean) else defined


def _require_update(values: Values, policy: Policy, n: int, *, masked: bool) -> None:
    """Of an update over `n` subjects, or of the keys with which a masked one begins.

    Raises:
        NotPermitted
    """
    statement = values.get(RECORD, {}).get("statement")
    refusal = None
    if not policy.send_updates:
        refusal = Refusal("send_updates", "no model update leaves this site")
    elif n < policy.min_subjects:
        refusal = Refusal("min_subjects", f"no update of fewer than {policy.min_subjects} leaves")
    elif policy.require_privacy and not (statement and read_statement(statement).private):
        refusal = Refusal("require_privacy", "the update is not protected")
    elif policy.require_secure_aggregation and not masked:
        refusal = Refusal("require_secure_aggregation", "the update is not masked")
    if refusal is not None:
        raise NotPermitted(str(refusal))


def _is_there(content: RecordDict, name: str) -> bool:
    return isinstance(content.get(name), RECORDS.get(name, ConfigRecord))


def _values(content: RecordDict, name: str, kinds: dict[str, Kind], site: str) -> dict[str, Any]:
    if name in BLOCKS or not _is_there(content, name):
        return {}
    record = content[name]
    found = {key: kind(record[key]) for key, kind in kinds.items() if key in record}
    if found.get("site") not in (None, site):
        raise NotPermitted("the site's answer has another site's name.")
    return {key: value for key, value in found.items() if value is not None}


def _block(content: RecordDict, name: str) -> Array:
    """The block of weights, or of a masked vector, if there is nothing in it but tensors.

    Raises:
        NotPermitted: it is no safetensors, or holds something beside them.
    """
    array = content[name].get(BLOCK)
    if not isinstance(array, Array) or array.stype != STYPE or type(array.data) is not bytes:
        raise NotPermitted(UNKNOWN_BLOCK)
    try:
        data = rebuilt(array.data, masked=name == MASKED)
    except UnknownBlock as error:
        raise NotPermitted(UNKNOWN_BLOCK) from error
    return Array("uint8", (len(data),), STYPE, data)


def _rounded(value: float, policy: Policy) -> float:
    return value if policy.decimals is None else round(value, policy.decimals)
