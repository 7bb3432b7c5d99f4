"""A hospital's own settings, `site.yaml`: where its scans are, what the machine may use, its policy.

Nobody else reads them and none of them travels; what all sites agree on is in `common.config`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_serializer, field_validator

from client.policy import Policy
from common.config import Section
from common.config_file import read_yaml, validated


class PrivacyBudget(Section):
    """What this site's patients may lose in all federations together: (epsilon, delta)."""

    epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="null: 1/(10 N) for N training patients"
    )
    clip: Annotated[float, Field(ge=1e-6)] | None = Field(
        None, description="largest norm of one patient's gradient; null: as the federation suggests"
    )
    metrics: Literal["withheld", "noised", "exact"] = Field(
        "withheld",
        description="results of held-out patients: never sent, sent with noise inside the budget, "
        "or sent as they are, outside of it",
    )


class SiteConfig(Section):
    """Relative folders are meant from the folder of `site.yaml`; `load_site_config` resolves them."""

    data: Path = Field(description="folder with the subjects, in BraTS layout; only ever read")
    device: str = Field(
        "auto", description="auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:0"
    )
    cache: Path = Field(
        Path("cache"), description="folder for prepared scans; several GB, can be deleted any time"
    )
    patience_hours: PositiveFloat = Field(
        24.0, description="how long join tries to reach the coordinator before it gives up"
    )

    privacy: PrivacyBudget | None = Field(
        None,
        description="off, or this site's budget for differential privacy, for example "
        "{epsilon: 8, metrics: withheld}; see docs/privacy.md",
    )
    privacy_ledger: Path = Field(
        Path("../privacy-ledger.sqlite"),
        description="what was spent of the budget; one file for all of this site's folders",
    )

    policy: Policy = Policy()

    @field_validator("privacy", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return None if value in (False, "off") else value  # YAML reads a bare off as False

    @field_serializer("privacy", when_used="json")
    def _in_words(self, value: PrivacyBudget | None) -> object:
        return "off" if value is None else value.model_dump(mode="json")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
            raise ValueError("must be auto, cpu, cuda, or one GPU by its number, as cuda:0")
        return value


def load_site_config(path: Path) -> SiteConfig:
    """Read `site.yaml`; whether the folders exist is not looked at.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not valid.
    """
    config = validated(SiteConfig, read_yaml(path), str(path))
    folder = path.absolute().parent
    paths = ("data", "cache", "privacy_ledger")
    resolved = {key: folder / getattr(config, key).expanduser() for key in paths}
    return config.model_copy(update=resolved)
