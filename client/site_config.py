"""A hospital's own settings, `site.yaml`: where its scans are and what the machine may use.

Nobody else reads them and none of them travels; what all sites agree on is in `common.config`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, PositiveFloat, field_validator

from common.config import Section
from common.config_file import read_yaml, validated


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
    resolved = {key: folder / getattr(config, key).expanduser() for key in ("data", "cache")}
    return config.model_copy(update=resolved)
