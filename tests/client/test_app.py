"""The ClientApp as the server sees it: what it answers, what it refuses, and what never leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.site import write_site
from common.config import FederationConfig
from common.config_file import dump_config
from common.messages import (
    BadMessage,
    EvaluateTask,
    TrainTask,
    pack_evaluate_task,
    pack_train_task,
    unpack_site_card,
    unpack_site_report,
    unpack_site_update,
    weight_bytes,
)
from common.model import initial_weights
from common.weights import Weights
from common.wire import encode_change
from sites.cache import Preparation, load_entry
from sites.finding import Finding

SECRET = "BraTS20_Training"  # begins every subject's id, file and cache entry


@pytest.fixture
def config(tiny_config: Callable[..., FederationConfig]) -> FederationConfig:
    return tiny_config()


@pytest.fixture
def site(prepared: Preparation, config: FederationConfig, tmp_path: Path) -> Path:
    """A site's folder with three training and two held-out subjects, which a test may spoil."""
    return site_in(tmp_path, prepared, config)


def site_in(folder: Path, prepared: Preparation, config: FederationConfig) -> Path:
    ready = [
        load_entry(Path(shutil.copytree(entry.folder, folder / "cache" / entry.folder.name)))
        for entry in prepared.ready[:5]
    ]
    write_site(
        folder / "site-01",
        name="site-01",
        trains=True,
        config_text=dump_config(config),
        training=ready[:3],
        held_out=ready[3:],
        findings=[Finding("site-01", f"{SECRET}_999", "", "error", "c", "what", "remedy")],
    )
    return folder / "site-01"


def ask(site: Path, kind: str, content: RecordDict) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(1, 2, {"site-folder": str(site)}, RecordDict(), {})
    return app(Message(content, 2, kind), context)


def train_task(config: FederationConfig, weights: Weights | None = None, **more) -> RecordDict:
    about = {"round": 1, "config_fingerprint": config.fingerprint(), "learning_rate": 0.01} | more
    return pack_train_task(TrainTask(**about, weights=weights or initial_weights(config)))


def evaluate_task(config: FederationConfig, *, surface_distances=False, **more) -> RecordDict:
    about = {"round": 1, "config_fingerprint": config.fingerprint()} | more
    return pack_evaluate_task(
        EvaluateTask(**about, surface_distances=surface_distances, weights=initial_weights(config))
    )


def everything_in(reply: Message) -> str:
    """Every text and number of a reply but the weights' own values."""
    if reply.has_error():
        return reply.error.reason
    return " ".join(
        " ".join(record) if isinstance(record, ArrayRecord) else repr(dict(record.items()))
        for record in reply.content.values()
    )


# --------------------------------------------------------------------------------------- answers


def test_the_roll_call_says_how_many_and_not_who(site, config):
    reply = ask(site, MessageType.QUERY, RecordDict())
    card = unpack_site_card(reply.content)
    assert (card.site, card.trains) == ("site-01", True)
    assert (card.n_training, card.n_held_out, card.n_left_out) == (3, 2, 1)
    assert card.config_fingerprint == config.fingerprint()
    assert SECRET not in everything_in(reply)


def test_training_answers_with_other_weights_and_no_subject(site, config):
    start = initial_weights(config)
    reply = ask(site, MessageType.TRAIN, train_task(config, start, round=3))
    update = unpack_site_update(reply.content, since=start)
    assert (update.site, update.round, update.n_training) == ("site-01", 3, 3)
    assert update.seconds > 0
    assert update.samples_per_second == pytest.approx(3 / update.seconds, rel=0.01)
    assert update.weights.keys() == start.keys()
    convolutions = [name for name in start if "conv" in name and name.endswith("weight")]
    assert convolutions
    assert not any(torch.equal(update.weights[name], start[name]) for name in convolutions)
    assert SECRET not in everything_in(reply)
    assert str(site.parent) not in everything_in(reply)


def test_a_task_is_answered_the_same_whatever_was_asked_before(site, config):
    """The network and the site are kept between messages; neither may carry anything over."""
    start = initial_weights(config)
    first = unpack_site_update(ask(site, MessageType.TRAIN, train_task(config)).content, start)
    ask(site, MessageType.TRAIN, train_task(config, first.weights, round=2))
    ask(site, MessageType.EVALUATE, evaluate_task(config))
    again = unpack_site_update(ask(site, MessageType.TRAIN, train_task(config)).content, start)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert first.loss == again.loss


def test_an_update_is_the_fp16_change_or_the_whole_weights_as_agreed(
    prepared, tiny_config, tmp_path
):
    contents, updates = {}, {}
    start = initial_weights(tiny_config())
    for agreed in ("fp16", "fp32"):
        config = tiny_config(f"rounds.updates={agreed}")
        site = site_in(tmp_path / agreed, prepared, config)
        contents[agreed] = ask(site, MessageType.TRAIN, train_task(config, start)).content
        updates[agreed] = unpack_site_update(contents[agreed], since=start)
    assert tiny_config().rounds.updates == "fp16", "by default"
    with pytest.raises(BadMessage, match="came as a change"):
        unpack_site_update(contents["fp16"])
    whole = unpack_site_update(contents["fp32"]).weights
    assert weight_bytes(contents["fp16"]) < weight_bytes(contents["fp32"])
    assert updates["fp16"].loss == updates["fp32"].loss, "the same training"
    same = []
    for name, exact in whole.items():
        change = (exact - start[name]).abs()
        bound = torch.maximum(2.0**-11 * change, 2.0**-39 * change.max()) + 2.0**-23 * exact.abs()
        assert ((updates["fp16"].weights[name] - exact).abs() <= bound).all(), name
        same.append(torch.equal(updates["fp16"].weights[name], exact))
    assert not all(same), "it did travel as fp16"


def test_weights_that_cannot_travel_are_an_answer_in_words(site, config, monkeypatch):
    """Training refuses them before; this is what is said if it should not."""
    name = next(iter(initial_weights(config)))
    spoilt = initial_weights(config)
    spoilt[name] = spoilt[name] * torch.inf
    monkeypatch.setattr("client.app.weights_of", lambda network: spoilt)
    reply = ask(site, MessageType.TRAIN, train_task(config))
    assert reply.error.reason == f"tensor {name} holds values that are not finite."


def test_a_task_as_a_change_is_refused(site, config):
    start = initial_weights(config)
    content = train_task(config)
    block = encode_change(start, start)
    array = Array("uint8", (len(block),), "safetensors", block)
    content["weights"] = ArrayRecord({"weights": array})
    assert "came as a change" in ask(site, MessageType.TRAIN, content).error.reason


def test_evaluation_sends_means_and_keeps_the_subjects_at_the_site(site, config):
    reply = ask(site, MessageType.EVALUATE, evaluate_task(config, round=3))
    report = unpack_site_report(reply.content)
    assert (report.site, report.round, report.metrics.n) == ("site-01", 3, 2)
    assert SECRET not in everything_in(reply)
    kept = json.loads((site / "evaluation" / "round-0003.json").read_text())
    assert len({subject["subject"] for subject in kept}) == 2
    assert all(subject["subject"].startswith(SECRET) for subject in kept)
    for region in ("WT", "TC", "ET"):
        mean = np.mean([subject["scores"][region]["dice"] for subject in kept])
        assert report.metrics.means[f"dice/{region}"] == pytest.approx(mean)
    mean = np.mean([subject["loss"] for subject in kept])
    assert report.metrics.means["loss"] == pytest.approx(mean)
    assert "hd95/WT" not in report.metrics.means


def test_surface_distances_come_when_asked_for(site, config):
    reply = ask(site, MessageType.EVALUATE, evaluate_task(config, surface_distances=True))
    assert unpack_site_report(reply.content).metrics.means["hd95/WT"] > 0
    assert (site / "evaluation" / "final.json").exists()


def test_what_a_site_keeps_is_json_that_any_program_reads(site, config):
    """Undefined scores, such as the precision of what was never predicted, have no JSON number."""
    weights = initial_weights(config)
    weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}  # background
    task = EvaluateTask(1, config.fingerprint(), False, weights)
    ask(site, MessageType.EVALUATE, pack_evaluate_task(task))
    text = (site / "evaluation" / "round-0001.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_site_prepared_again_is_read_again(site, config):
    ask(site, MessageType.QUERY, RecordDict())
    manifest = json.loads((site / "site.json").read_text())
    manifest["trains"] = False
    (site / "site.json").write_text(json.dumps(manifest))
    os.utime(site / "site.json", (2e9, 2e9))
    card = unpack_site_card(ask(site, MessageType.QUERY, RecordDict()).content)
    assert (card.trains, card.n_training) == (False, 0)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_task_for_another_configuration_is_refused(site, config, kind):
    task = {MessageType.TRAIN: train_task, MessageType.EVALUATE: evaluate_task}[kind]
    reply = ask(site, kind, task(config, config_fingerprint="0" * 64))
    assert reply.has_error()
    assert "another configuration" in reply.error.reason
    assert not (site / "evaluation").exists()


def test_a_site_that_only_evaluates_does_not_train(site, config):
    manifest = json.loads((site / "site.json").read_text()) | {"trains": False}
    (site / "site.json").write_text(json.dumps(manifest))
    reply = ask(site, MessageType.TRAIN, train_task(config))
    assert reply.error.reason == "site-01 only evaluates."
    assert not ask(site, MessageType.EVALUATE, evaluate_task(config)).has_error()


@pytest.mark.parametrize("spoil", ["shape", "nan", "missing"])
def test_weights_that_do_not_fit_are_refused_and_named(site, config, spoil):
    weights = initial_weights(config)
    name = next(iter(weights))
    if spoil == "shape":
        weights[name] = weights[name][:1]
    elif spoil == "nan":
        weights[name] = weights[name] * torch.nan
    else:
        del weights[name]
    reply = ask(site, MessageType.TRAIN, train_task(config, weights))
    assert name in reply.error.reason
    assert not ask(site, MessageType.TRAIN, train_task(config)).has_error(), "no lasting harm"


def test_a_message_of_another_form_is_refused(site, config):
    content = train_task(config)
    del content["weights"]
    assert "weights" in ask(site, MessageType.TRAIN, content).error.reason
    assert "about" in ask(site, MessageType.EVALUATE, RecordDict()).error.reason


@pytest.mark.parametrize("rate", [0.0201, 1e30, 0.0, -0.01, float("nan"), float("inf")])
def test_a_learning_rate_above_the_agreed_one_is_refused(site, config, rate):
    """The coordinator may lower it from round to round, not raise it."""
    assert config.training.learning_rate == 0.02
    reply = ask(site, MessageType.TRAIN, train_task(config, learning_rate=rate))
    assert reply.error.reason == (
        f"site-01: the task's learning rate is {rate:g}; agreed is at most 0.02."
    )


@pytest.mark.parametrize("round_", [0, -1, 4, 2**40])
def test_a_round_that_was_not_agreed_is_refused(site, config, round_):
    for kind, task in ((MessageType.TRAIN, train_task), (MessageType.EVALUATE, evaluate_task)):
        reply = ask(site, kind, task(config, round=round_))
        assert reply.error.reason == (
            f"site-01: the task is for round {round_}; agreed are 3 rounds."
        )


def test_a_diverged_training_is_an_answer_in_words(prepared, tiny_config, tmp_path):
    config = tiny_config("training.learning_rate=1e30")
    site = site_in(tmp_path, prepared, config)
    reply = ask(site, MessageType.TRAIN, train_task(config, learning_rate=1e30))
    assert "not finite" in reply.error.reason
    assert "training.learning_rate" in reply.error.reason


# --------------------------------------------------------------------------- what must not get out


def test_of_an_unforeseen_failure_only_the_type_gets_out(site, config, log):
    manifest = json.loads((site / "site.json").read_text())
    entry = Path(next(iter(manifest["training"].values())))
    size = (entry / "image.npy").stat().st_size
    (entry / "image.npy").write_bytes(b"patient name: Doe".ljust(size))
    reply = ask(site, MessageType.TRAIN, train_task(config))
    assert "ValueError" in reply.error.reason
    for secret in (SECRET, str(site.parent), "Doe", "pickle"):
        assert secret not in reply.error.reason
    assert any("Traceback" in line for line in log), "the site's own log says all"


def test_a_subject_gone_from_the_cache_is_said_without_its_name(site, config, log):
    manifest = json.loads((site / "site.json").read_text())
    entry = Path(next(iter(manifest["training"].values())))
    (entry / "labels.npy").unlink()
    for kind in (MessageType.QUERY, MessageType.TRAIN):
        reply = ask(site, kind, train_task(config))
        assert "missing or damaged" in reply.error.reason
        assert SECRET not in reply.error.reason
        assert str(site.parent) not in reply.error.reason
    assert any(entry.name in line for line in log), "the site's own log says which"
