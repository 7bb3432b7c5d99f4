"""The Flower ClientApp that runs inside a hospital: answers roll call, train and evaluate.

The node's configuration names the site's folder (`client.site`); nothing else about the site comes
from outside. A task for another configuration than the accepted one is refused.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client.budget import BudgetSpent, may_train, record_unprotected, statement
from client.device import best_device, use_threads
from client.evaluation import evaluate
from client.ledger import LedgerError
from client.privacy import NotProtectable
from client.private_answers import private_report, private_update
from client.secure_round import RoundRefused, answer_stage, answer_task
from client.site import Site, load_site
from client.thrift import GpuTooSmall
from client.training import TrainingDiverged, train
from common.config import FederationConfig
from common.files import write_text_atomically
from common.masking import BadRound
from common.message_words import BUDGET_SPENT
from common.messages import (
    BadMessage,
    EvaluateTask,
    SiteCard,
    SiteReport,
    SiteUpdate,
    TrainTask,
    pack_site_card,
    pack_site_report,
    pack_site_update,
    task_hash,
    unpack_evaluate_task,
    unpack_train_task,
)
from common.metrics import summarise
from common.model import network_for
from common.secure_messages import STAGES, action_of, pack_trained, session_of
from common.statement import Signed
from common.weights import BadWeights, check_update, weights_of
from sites.cache import CacheError

LOG = logging.getLogger("fedbrats")
app = ClientApp()
Handler = Callable[[Message, Context], Message]


class TaskRefused(RuntimeError):
    """The site will not do this task; the text is sent to the server."""


FOR_BOTH_SIDES = (
    TaskRefused,
    TrainingDiverged,
    GpuTooSmall,
    BudgetSpent,
    NotProtectable,
    RoundRefused,
    BadRound,
)


def answering(handler: Handler) -> Handler:
    """Turn a failure into an error reply whose text is fit to leave the site.

    The errors below are written for the other side; of any other only the type is sent, because its
    text may hold paths or data. The whole of it goes to the site's own log.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        try:
            return handler(message, context)
        except (*FOR_BOTH_SIDES, BadMessage, BadWeights) as error:
            LOG.warning(str(error))
            reason = str(error)
            if isinstance(error, BudgetSpent):
                code = BUDGET_SPENT
        except LedgerError as error:  # names a file
            LOG.warning(str(error))
            reason = "its privacy ledger cannot be used, so it does not train; its log says more."
        except CacheError as error:  # names a folder and a subject: for the site's eyes only
            LOG.warning(str(error))
            reason = "a prepared subject is missing or damaged at the site; its log says more."
        except Exception as error:
            LOG.exception("the task failed")
            reason = f"the task failed at the site ({type(error).__name__}); its log says more."
        return Message(Error(code=code, reason=reason), reply_to=message)

    return answer


@app.query()
@answering
def answer_roll_call(message: Message, context: Context) -> Message:
    site = _site(context)
    spent = may_train(site) if site.trains and site.budget is not None else ""
    if spent:
        LOG.warning(f"{site.name}: {spent}")
    card = SiteCard(
        site=site.name,
        trains=site.trains and not spent,
        n_training=_told_number(site),
        n_held_out=len(site.held_out),
        n_left_out=len(site.left_out),
        config_fingerprint=site.config.fingerprint(),
        resting=spent,
    )
    return _reply(message, pack_site_card(card))


@app.train()
@answering
def answer_train(message: Message, context: Context) -> Message:
    site = _site(context)
    task = unpack_train_task(message.content)
    if not site.trains:
        raise TaskRefused(f"{site.name} only evaluates.")
    agreed = site.config.training.learning_rate
    if not 0 < task.learning_rate <= agreed:
        raise TaskRefused(
            f"{site.name}: the task's learning rate is {task.learning_rate:g}; "
            f"agreed is at most {agreed:g}."
        )
    network = _ready_network(site, task)

    def update() -> SiteUpdate:
        if site.budget is not None:
            return private_update(site, task, message.content, network, best_device())
        return _update(site, task, network)

    session = session_of(message.content)
    if (session is not None) != site.config.secure_aggregation:
        raise TaskRefused(f"{site.name}: the task is not for the agreed kind of aggregation.")
    if session is not None:
        trained = answer_task(site, task, task_hash(message.content), session, update)
        return _reply(message, pack_trained(trained))
    since = task.weights if site.config.rounds.updates == "fp16" else None
    return _reply(message, pack_site_update(update(), since))


for _stage in STAGES:

    @app.train(action_of(_stage))
    @answering
    def answer_later_stage(message: Message, context: Context) -> Message:
        stage = message.metadata.message_type
        return _reply(message, answer_stage(_site(context), stage, message.content))


@app.evaluate()
@answering
def answer_evaluate(message: Message, context: Context) -> Message:
    site = _site(context)
    task = unpack_evaluate_task(message.content)
    network = _ready_network(site, task)
    begin = time.monotonic()
    results = evaluate(
        network,
        site.held_out,
        site.config,
        what=f"round {task.round}, {site.name}: evaluating",
        surface_distances=task.surface_distances,
        device=best_device(),
    )
    # per-subject results stay at the site; only their means leave
    stage = "final" if task.surface_distances else f"round-{task.round:04d}"
    path = site.folder / "evaluation" / f"{stage}.json"
    path.parent.mkdir(exist_ok=True)
    kept = [_with_null(asdict(result)) for result in results]
    write_text_atomically(path, json.dumps(kept, allow_nan=False))
    if site.budget is not None:
        return _reply(
            message, pack_site_report(private_report(site, task, message.content, results))
        )
    seconds = time.monotonic() - begin
    stated = _stated(site, task.round)
    report = SiteReport(site.name, task.round, summarise(results), seconds, statement=stated)
    return _reply(message, pack_site_report(report))


def _update(site: Site, task: TrainTask, network: torch.nn.Module) -> SiteUpdate:
    """Without differential privacy."""
    record_unprotected(site, task.round)
    outcome = train(
        network,
        site.training,
        site.config,
        site=site.name,
        round_=task.round,
        learning_rate=task.learning_rate,
        device=best_device(),
    )
    return SiteUpdate(
        site=site.name,
        round=task.round,
        n_training=len(site.training),
        loss=outcome.loss,
        seconds=outcome.seconds,
        samples_per_second=outcome.samples / max(outcome.seconds, 1e-9),
        weights=weights_of(network),
        statement=_stated(site, task.round),
    )


def _told_number(site: Site) -> int | None:
    """Under secure aggregation the number of training subjects is hidden in the sum, too."""
    if not site.trains:
        return 0
    return None if site.config.secure_aggregation else len(site.training)


def _stated(site: Site, round_: int) -> Signed | None:
    """That nothing protects this round; a simulation has nobody to tell."""
    return Signed(statement(site, round_).text()) if site.federation else None


def _site(context: Context) -> Site:
    folder = Path(str(context.node_config["site-folder"]))
    return _load_site(folder, (folder / "site.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _load_site(folder: Path, written: int) -> Site:
    return load_site(folder)


def _ready_network(site: Site, task: TrainTask | EvaluateTask) -> torch.nn.Module:
    """The process's network with the task's weights; built once, as hospitals may take turns in it."""
    if task.config_fingerprint != site.config.fingerprint():
        raise TaskRefused(
            f"{site.name}: the task is for another configuration than the accepted one."
        )
    if not 1 <= task.round <= site.config.rounds.number:
        raise TaskRefused(
            f"{site.name}: the task is for round {task.round}; agreed are "
            f"{site.config.rounds.number} rounds."
        )
    use_threads(site.config.training)
    network = _network(site.config)
    check_update(task.weights, network.state_dict())
    network.load_state_dict(task.weights)
    return network


@functools.lru_cache(maxsize=1)
def _network(config: FederationConfig) -> torch.nn.Module:
    # convolutions over channels-last volumes are the fast ones on CPU and GPU alike
    return network_for(config).to(best_device()).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def _with_null(value: Any) -> Any:
    """JSON has no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: _with_null(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reply(message: Message, content: RecordDict) -> Message:
    return Message(content, reply_to=message)
