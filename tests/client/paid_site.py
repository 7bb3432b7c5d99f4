"""Oslo with a privacy budget: prepared, rounds paid for in its ledger, and replies on record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import outbound
from client.budget import pay_for_training, record_done
from client.hospital import HospitalFolder
from client.permitted import Own
from client.policy import Policy
from client.site import Site, load_site, write_site
from client.site_config import PrivacyBudget
from common.config import FederationConfig
from common.config_file import dump_config
from common.message_words import WITHHELD
from common.messages import SiteUpdate, pack_site_update
from common.model import initial_weights
from common.statement import Signed
from sites.cache import CachedSubject
from tests.client.conftest import FEDERATION

OTHER = "b2" * 16  # another federation's id
N_TRAINING = 12


def prepared_site(
    hospital: HospitalFolder,
    subjects: Sequence[CachedSubject],
    config: FederationConfig,
    federation: str = FEDERATION,
    budget: float | None = 8.0,
    metrics: str = WITHHELD,
) -> Site:
    """Oslo as prepared for a federation; site.yaml says the same."""
    text = hospital.config.read_text().split("privacy:")[0]
    if budget is not None:
        text += f"privacy: {{epsilon: {budget}, metrics: {metrics}}}\n"
    hospital.config.write_text(text)
    write_site(
        hospital.state,
        name="Oslo",
        trains=True,
        config_text=dump_config(config),
        training=subjects[:N_TRAINING],
        held_out=subjects[N_TRAINING:],
        findings=(),
        federation=federation,
        budget=None if budget is None else PrivacyBudget(epsilon=budget, metrics=metrics),
        ledger=ledger_of(hospital),
    )
    return load_site(hospital.state)


def ledger_of(hospital: HospitalFolder) -> Path:
    return hospital.path.parent / "privacy-ledger.sqlite"


def trained(site: Site, *rounds: int) -> None:
    """Each paid for and carried through."""
    for number in rounds:
        record_done(site, pay_for_training(site, number))


def sent(hospital: HospitalFolder, content: RecordDict) -> None:
    """On record as having left."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    question = Message(content=RecordDict(), message_type="train", dst_node_id=1)
    own = Own("Oslo", N_TRAINING, N_TRAINING, N_TRAINING)
    gate = outbound.Gate(hospital.audit, Policy(min_subjects=1), own, str.encode)
    outbound.release(Message(content, reply_to=question), question, gate)


def send_update(hospital: HospitalFolder, site: Site, text: str, loss: float | None = None) -> None:
    """An update of round 1 with this statement."""
    weights = initial_weights(site.config)
    update = SiteUpdate("Oslo", 1, N_TRAINING, weights, loss, statement=Signed(text))
    sent(hospital, pack_site_update(update))
