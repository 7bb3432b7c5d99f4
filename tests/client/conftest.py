"""A hospital's folder as `fed-client init` and an accepted invitation leave it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from client.hospital import HospitalFolder
    from common.config import FederationConfig
    from common.invitation import Invitation
    from common.terms import Terms
    from tests.link import Authority

FEDERATION = "3f" * 16


@pytest.fixture
def terms(tiny_config: Callable[..., FederationConfig]) -> Terms:
    """Terms that this installation can accept."""
    from common.code_hash import code_hash
    from common.terms import Terms

    return Terms(FEDERATION, code_hash(), tiny_config())


@pytest.fixture
def hospital(tmp_path: Path, cohort_data: Path, cohort_cache: Path) -> HospitalFolder:
    """The folder of the hospital Oslo: keys and settings, nothing accepted, data prepared already."""
    from client.hospital import init_hospital

    folder = init_hospital(tmp_path / "oslo", "Oslo", cohort_data)
    settings = f"data: {cohort_data}\ncache: {cohort_cache}\ndevice: cpu\npatience_hours: 0.5\n"
    folder.config.write_text(settings)
    return folder


@pytest.fixture
def invitation(hospital: HospitalFolder, terms: Terms, authority: Authority) -> Invitation:
    """The coordinator's answer to Oslo; not yet in its folder."""
    from common.invitation import Invitation
    from common.keys import fingerprint, read_public_key

    return Invitation(
        federation=terms.federation,
        name=terms.config.name,
        address="127.0.0.1:1",
        site="Oslo",
        key_fingerprint=fingerprint(read_public_key(hospital.public_key).key),
        ca_certificate=authority.ca,
        terms=terms,
    )


@pytest.fixture
def accepted(hospital: HospitalFolder, terms: Terms) -> HospitalFolder:
    """The same hospital, after its yes to the terms."""
    from client.consent import accept

    accept(hospital, terms, terms.hash())
    return hospital
