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
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.blocks import UnknownBlock, rebuilt
from client.policy import Policy
from client.refusals import Refusal, trains
from common.audit_heads import RECORD as AUDIT
from common.brats import STRUCTURES
from common.console import plain
from common.message_words import BLOCK, EXACT, MOST_SUBJECTS, NOISED, STYPE, WITHHELD
from common.metrics import REGIONS
from common.statement import RECORD, BadStatement, Statement, read_statement
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
STATED = {  # of a privacy statement, what is text; its numbers are numbers
    "federation": "[0-9a-f]{0,64}",
    "code": "[0-9a-f]{0,64}",
    "at": "[0-9TZ:.+-]{0,40}",
    "metrics": f"{EXACT}|{NOISED}|{WITHHELD}",
    "accountant": "[A-Za-z0-9 .,;:()'+-]{0,200}",
    "ledger": "[0-9a-f]{0,64}",
    "head": "[0-9a-f]{0,64}",
}
PROTECTION = "epsilon", "delta", "budget", "noise_multiplier", "sampling_rate", "clip", "steps"
LONGEST_LOG = 2**53  # entries
LONGEST_SIGNATURE = 200  # bytes; of P-384 about 104
OTHER_NAME = "the site's answer has another site's name."
UNKNOWN_BLOCK = "the site's update holds something that cannot be accounted for."
KEY_LINE = r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{100,300}={0,2}"


class NotPermitted(RuntimeError):
    """An answer may not leave; the text says why, and may leave itself. `by_policy`: by a rule of it."""

    def __init__(self, why: str | Refusal) -> None:
        super().__init__(str(why))
        self.by_policy = isinstance(why, Refusal)


@dataclass(frozen=True)
class Own:
    """What the gate knows of its own site by itself, whatever an answer says.

    `privacy` is how a site with a privacy budget releases its metrics (`privacy.metrics`), None where
    there is no budget. Scans are subjects here; several can be of one patient.
    """

    site: str
    n_training: int = 0
    training_patients: int = 0
    held_out_patients: int = 0
    privacy: str | None = None

    @property
    def trained_on(self) -> int:
        """What `min_subjects` is held against: as many subjects, of as many patients."""
        return min(self.n_training, self.training_patients)


def _count(value: Any) -> Any:
    return value if type(value) is int and 0 <= value <= MOST_SUBJECTS else None


def _flag(value: Any) -> Any:
    return value if type(value) is bool else None


def _number(value: Any) -> Any:
    """There are many NaN, and which of them it is could say something."""
    if type(value) is not float:
        return None
    return math.nan if math.isnan(value) else value


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
    """Only what a statement has: it is read and written anew. Whose it is, is asked later."""
    try:
        stated = read_statement(value) if type(value) is str else None
    except BadStatement:
        return None
    good = stated is not None and all(
        re.fullmatch(form, getattr(stated, name)) for name, form in STATED.items()
    )
    return stated.text() if stated and good and stated.entries >= 0 else None


def _mean(value: Any) -> Any:
    whole = type(value) is int and abs(value) <= MOST_SUBJECTS
    return float(value) if whole else _number(value)


def _length(value: Any) -> Any:
    return value if type(value) is int and 0 <= value <= LONGEST_LOG else None


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
        },
        "keys": {"advert": _advert, "signature": _signature},
        RECORD: STATEMENT,
    },
    "sealed": {"about": STAGE, "sealed": {"json": _shares}},
    "revealed": {"about": STAGE, "revealed": {"json": _shares}},
    "agreed": {"about": STAGE, "agreed": {"signature": _signature}},
    MASKED: {"about": STAGE, MASKED: {}, "present": {"signature": _signature}},
}
BLOCKS = WEIGHTS, MASKED
RECORDS = {
    "means": MetricRecord,
    "defined": MetricRecord,
    WEIGHTS: ArrayRecord,
    MASKED: ArrayRecord,
}
SECURE = "sealed", "agreed", "revealed", MASKED
TRAINING_NUMBERS = "loss", "seconds", "samples_per_second"

Values = dict[str, dict[str, Any]]


def permitted(content: RecordDict, policy: Policy, own: Own) -> RecordDict:
    """A new answer with what of `content` may leave. What comes out comes out again unchanged.

    A report of which the Dice means may not leave withholds all its means, as a private site's does.

    Raises:
        NotPermitted: nothing may; the text names the rule.
    """
    try:
        return _permitted(content, policy, own)
    except NotPermitted:
        raise
    except Exception as error:  # whatever it is that nobody thought of, it does not leave
        raise NotPermitted("the site's answer cannot be accounted for.") from error


def _permitted(content: RecordDict, policy: Policy, own: Own) -> RecordDict:
    answer = next((name for name in ANSWERS if _is_there(content, name)), None)
    if answer is None:
        raise NotPermitted("the site's answer is none of those that may leave it.")
    listed = {**ANSWERS[answer], AUDIT: HEADS}
    values = {name: _values(content, name, kinds, own.site) for name, kinds in listed.items()}
    for name, value in values.get("about", {}).items():
        if name in TRAINING_NUMBERS:
            values["about"][name] = _rounded(value, policy)
    # with a budget they would be told outside of it, for they depend on the patients
    if "about" in values and (not policy.training_numbers or own.privacy is not None):
        _drop_training_numbers(values)
    for name, whole in ((RECORD, STATEMENT), (AUDIT, HEADS)):  # all of it or none
        if values.get(name, {}).keys() != whole.keys():
            values.pop(name, None)
    stated = read_statement(values[RECORD]["statement"]) if RECORD in values else None
    if stated is not None and stated.site != own.site:
        raise NotPermitted(OTHER_NAME)
    if answer == "card":
        _restrict_card(values["card"], policy, own)
    elif answer == "means":
        _restrict_report(values, policy, own)
    elif answer == WEIGHTS:
        n = min(values["about"].get("n_training", 0), own.trained_on)
        _require_update(policy, n, masked=False, protected=own.privacy and _is_protected(stated))
    elif answer == "keys":
        protected = own.privacy and _is_protected(stated)
        _require_update(policy, own.trained_on, masked=True, protected=protected)
    elif answer in SECURE:  # the update of which these speak was stated before
        _require_update(policy, own.trained_on, masked=True, protected=own.privacy)
    made = RecordDict()
    for name in listed:
        if name in BLOCKS:
            made[name] = ArrayRecord({BLOCK: _block(content, name)})
        elif name in values:
            kind = RECORDS.get(name, ConfigRecord)
            made[name] = kind(values[name])
    return made


def _drop_training_numbers(values: Values) -> None:
    values["about"] = {k: v for k, v in values["about"].items() if k not in TRAINING_NUMBERS}


def _restrict_card(card: dict[str, Any], policy: Policy, own: Own) -> None:
    card["shows_name"] = policy.show_name
    card.setdefault("trains", False)
    if not trains(policy, min(card.get("n_training", own.trained_on), own.trained_on)):
        card |= {"trains": False, "n_training": 0, "resting": ""}


def _restrict_report(values: Values, policy: Policy, own: Own) -> None:
    about, means, defined = values["about"], values["means"], values["defined"]
    n = defined.get("n", 0)
    kept = {
        name: _rounded(mean, policy)
        for name, mean in means.items()
        if name.partition("/")[0] in policy.metrics
        and min(_behind(mean, defined.get(name), n), own.held_out_patients) >= policy.min_subjects
    }
    if own.privacy == NOISED:
        kept = {name: mean for name, mean in kept.items() if name in CHOOSING}
    hidden = own.privacy == WITHHELD or (own.privacy == NOISED and about.get("released") != NOISED)
    if hidden or about.get("released") == WITHHELD or any(name not in kept for name in CHOOSING):
        kept = {}
        about["released"] = WITHHELD
        _drop_training_numbers(values)  # how long it took depends on the patients too
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


def _require_update(policy: Policy, n: int, *, masked: bool, protected: object) -> None:
    """Of an update over `n` subjects, or of a step with which a masked one is made.

    Raises:
        NotPermitted
    """
    refusal = None
    if not policy.send_updates:
        refusal = Refusal("send_updates", "no model update leaves this site")
    elif n < policy.min_subjects:
        refusal = Refusal("min_subjects", f"no update of fewer than {policy.min_subjects} leaves")
    elif policy.require_privacy and not protected:
        refusal = Refusal("require_privacy", "the update is not protected")
    elif policy.require_secure_aggregation and not masked:
        refusal = Refusal("require_secure_aggregation", "the update is not masked")
    if refusal is not None:
        raise NotPermitted(refusal)


def _is_protected(stated: Statement | None) -> bool:
    """Does a statement say by how much? That it says `private` alone is no protection."""
    return (
        stated is not None
        and stated.private
        and all((getattr(stated, name) or 0) > 0 for name in PROTECTION)
    )


def _is_there(content: RecordDict, name: str) -> bool:
    return isinstance(content.get(name), RECORDS.get(name, ConfigRecord))


def _values(content: RecordDict, name: str, kinds: dict[str, Kind], site: str) -> dict[str, Any]:
    if name in BLOCKS or not _is_there(content, name):
        return {}
    record = content[name]
    found = {key: kind(record[key]) for key, kind in kinds.items() if key in record}
    if found.get("site") not in (None, site):
        raise NotPermitted(OTHER_NAME)
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
