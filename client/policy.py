"""A hospital's own policy: what may leave it, what it will do, and who may ask; `policy:` in site.yaml.

Only what the policy says and when training may run. What breaks it is in `client.refusals`, what it
lets through in `client.permitted`, and in plain words in `client.policy_words`. It goes beyond the
yes to the terms (`client.consent`): a yes is for one federation's terms, a policy holds whatever
terms are proposed.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from common.config import Network, Preprocess, Section

Family = Literal[
    "dice", "iou", "hd95", "loss", "sensitivity", "specificity", "precision", "voxel_accuracy"
]
FAMILIES: tuple[str, ...] = get_args(Family)
NETWORKS: tuple[str, ...] = get_args(Network.model_fields["name"].annotation)
RECIPES: tuple[str, ...] = get_args(Preprocess.model_fields["mode"].annotation)
DAYS = "mon", "tue", "wed", "thu", "fri", "sat", "sun"
WINDOW = re.compile(r"([a-z,-]+) ([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")
DAY_MINUTES = 24 * 60
ANY: Literal["any"] = "any"


class Policy(Section):
    """What may leave this site, what it will do, who may ask: fed-client policy explain DIR."""

    send_updates: bool = Field(
        True, description="false: no model update leaves, this site only evaluates"
    )
    metrics: tuple[Family, ...] = Field(
        ("dice", "iou", "hd95", "loss"),
        description=f"which means over held-out subjects leave, of {', '.join(FAMILIES)}; [] for "
        "none. Noised instead: privacy.metrics",
    )
    decimals: Annotated[int, Field(ge=0, le=15)] | None = Field(
        3, description="to how many every metric and training number is rounded; null: not rounded"
    )
    training_numbers: bool = Field(
        True, description="whether training loss, seconds and throughput leave"
    )
    min_subjects: PositiveInt = Field(
        5,
        description="no mean over fewer held-out subjects leaves, and no update trained on fewer; as "
        "many patients are needed, for several scans can be one patient's",
    )
    show_name: bool = Field(
        False,
        description="whether other sites may read this site's name; the coordinator always does",
    )
    federation: str | None = Field(
        None, description="id of the only federation that may ask; null: the invitation's"
    )
    coordinator: str | None = Field(
        None,
        description="fingerprint or 40 digits of the only CA that may ask; null: the invitation's",
    )
    networks: tuple[str, ...] | Literal["any"] = Field(
        ANY, description=f"any, or a list of {', '.join(NETWORKS)}"
    )
    recipes: tuple[str, ...] | Literal["any"] = Field(
        ANY,
        description=f"of preprocessing (preprocess.mode): any, or a list of {', '.join(RECIPES)}",
    )
    max_rounds: PositiveInt | None = Field(None, description="null: no limit but the terms'")
    max_epochs: PositiveInt | None = Field(None, description="of one round; null: as above")
    max_hours: PositiveFloat | None = Field(
        None, description="longest that one task may run; null: the terms' deadline"
    )
    max_gpu_memory_gb: PositiveFloat | None = Field(
        None, description="that training may take of the GPU's memory, in 10^9 bytes; null: all"
    )
    train_when: tuple[str, ...] = Field(
        (),
        description='when training may run, local time, for example ["mon-fri 20:00-06:00", '
        '"sat,sun 00:00-24:00"]; []: always',
    )
    require_privacy: bool = Field(
        False, description="true: no update leaves without differential privacy (`privacy` above)"
    )
    require_secure_aggregation: bool = Field(
        False, description="true: no update leaves that the coordinator could read by itself"
    )

    @field_validator("metrics")
    @classmethod
    def _with_dice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and "dice" not in value:
            raise ValueError(
                "must hold dice, or be empty: the federation chooses its model by it, and a report "
                "without it counts as none"
            )
        return value

    @field_validator("networks", "recipes")
    @classmethod
    def _known(cls, value: tuple[str, ...] | str, info: object) -> tuple[str, ...] | str:
        if value == ANY:
            return value
        known = NETWORKS if getattr(info, "field_name", "") == "networks" else RECIPES
        unknown = [name for name in value if name not in known]
        if unknown or not value:
            raise ValueError(f"must be any, or a list of {', '.join(known)}")
        return value

    @field_validator(
        "decimals",
        "min_subjects",
        "max_rounds",
        "max_epochs",
        "max_hours",
        "max_gpu_memory_gb",
        mode="before",
    )
    @classmethod
    def _a_number(cls, value: object) -> object:
        if isinstance(value, bool):  # YAML takes yes for a truth, and that counts as 1
            raise ValueError("must be a number, not yes or no")
        return value

    @field_validator("federation", "coordinator", mode="before")
    @classmethod
    def _in_quotes(cls, value: object) -> object:
        if isinstance(value, (int, float)):  # YAML takes digits for a number, and drops zeros
            raise ValueError('must be text: write it in quotes, as "0123"')
        return value

    @field_validator("federation")
    @classmethod
    def _is_an_id(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-f]{32}", value):
            raise ValueError("must be the federation's id, 32 of 0-9 a-f, or null")
        return value

    @field_validator("coordinator")
    @classmethod
    def _is_a_fingerprint(cls, value: str | None) -> str | None:
        if value is None:
            return None
        bare = re.sub(r"[ :]", "", value).upper()
        if not re.fullmatch(r"[0-9A-F]{64}|[0-9]{40}", bare):
            raise ValueError("must be the CA's SHA-256 fingerprint, its 40 digits, or null")
        return bare

    @field_validator("train_when")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            read_window(text)
        return value


def read_window(text: str) -> tuple[frozenset[int], int, int]:
    """Days (0 is Monday) and the minutes of a day between which a window is open.

    A window that ends before it begins crosses midnight; then it belongs to the day it begins on.

    Raises:
        ValueError: the text is not of the form `mon-fri 20:00-06:00`.
    """
    found = WINDOW.fullmatch(text)
    problem = f'{text!r} is not of the form "mon-fri 20:00-06:00" or "sat,sun 00:00-24:00"'
    if found is None:
        raise ValueError(problem)
    days: set[int] = set()
    for part in found[1].split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{problem}: days are {', '.join(DAYS)}")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days |= {(begin + step) % 7 for step in range((end - begin) % 7 + 1)}
    hours = [int(found[n]) for n in (2, 4)]
    minutes = [int(found[n]) for n in (3, 5)]
    start, stop = (60 * hour + minute for hour, minute in zip(hours, minutes, strict=True))
    if max(minutes) > 59 or start >= DAY_MINUTES or stop > DAY_MINUTES or start == stop:
        raise ValueError(f"{problem}: times are from 00:00 to 24:00 and differ")
    return frozenset(days), start, stop


def may_train_at(policy: Policy, now: datetime) -> bool:
    """Is this local time within one of the windows? Always, where there are none."""
    minute = 60 * now.hour + now.minute
    today, yesterday = now.weekday(), (now - timedelta(days=1)).weekday()
    for days, start, stop in map(read_window, policy.train_when):
        if start < stop:
            is_open = today in days and start <= minute < stop
        else:
            is_open = (today in days and minute >= start) or (yesterday in days and minute < stop)
        if is_open:
            return True
    return not policy.train_when
