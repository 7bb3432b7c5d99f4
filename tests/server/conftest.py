"""A federation whose hospitals answer from a script, over the real in-process grid and messages.

Training adds noise that depends on the site, the round and the rate; evaluation measures numbers
that depend on the weights. So every result is known without a scan, and a wrong order, weight, rate
or starting point shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.config import FederationConfig
from common.messages import (
    SiteCard,
    SiteReport,
    SiteUpdate,
    pack_site_card,
    pack_site_report,
    pack_site_update,
    unpack_evaluate_task,
    unpack_train_task,
)
from common.metrics import SiteMetrics
from common.seeds import derive_seed
from common.weights import Weights
from server.checkpoint import RunFolder
from server.history import History, RoundRecord
from server.roll_call import Roll
from server.rounds import run_rounds
from simulation.grid import run_in_process

QUERY, TRAIN, EVALUATE, FINAL = "query", "train", "evaluate", "final"
Spoil = Callable[[Any], Any]
Pack = Callable[[Any], RecordDict]
FIXED = (
    "network.name=residual_unet",
    "network.channels=[2, 4]",
    "network.norm=batch",
    "rounds.updates=fp32",  # so that results are known exactly; some tests take fp16
)


def trained(weights: Weights, site: str, round_: int, rate: float) -> Weights:
    """What the scripted site makes of the global weights."""
    generator = torch.Generator().manual_seed(derive_seed("noise", site, round_))
    sizes = {name: weights[name].numel() for name in sorted(weights)}  # whatever order they have
    parts = torch.randn(sum(sizes.values()), generator=generator).split(list(sizes.values()))
    noise = dict(zip(sizes, parts, strict=True))
    return {
        name: tensor + rate * noise[name].view(tensor.shape)
        if tensor.is_floating_point()
        else tensor + len(site)
        for name, tensor in weights.items()
    }


def measured(weights: Weights, site: str, n: int, *, final: bool) -> SiteMetrics:
    """Scripted metrics: between 0 and 1, different for every site and all weights."""
    total = math.fsum(float(t.double().sum()) for t in weights.values())
    dice = 0.5 + 0.4 * math.sin(total + derive_seed(site) % 7)
    means = {"loss": 1 - dice, "voxel_accuracy": 0.9}
    for region in ("WT", "TC", "ET"):
        means |= {f"dice/{region}": dice, f"iou/{region}": dice / (2 - dice)}
        if final:
            means[f"hd95/{region}"] = math.nan if region == "ET" else 10 * (1 - dice)
    return SiteMetrics(n, means, {key: 0 if math.isnan(v) else n for key, v in means.items()})


@dataclass
class Federation:
    """`spoil` maps (task, site, round) to a function of the good answer. It may give a changed
    answer, a text (an error reply), a RecordDict (sent as it is), an Error, or raise."""

    config: FederationConfig
    folder: RunFolder
    sites: dict[str, SiteCard]
    spoil: dict[tuple[str, str, int], Spoil] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    rates: dict[int, float] = field(default_factory=dict)

    def run(
        self,
        on_round: Callable[[RoundRecord], None] = lambda record: None,
        *,
        nodes: Mapping[int, str] | None = None,
        attend: Callable[[History, int], Roll] | None = None,
        attempts: int = 1,
    ) -> None:
        self.serve(
            lambda grid: run_rounds(
                grid, self.config, self.folder, on_round, attend=attend, attempts=attempts
            ),
            nodes=nodes,
        )

    def serve(
        self, serve: Callable[[Grid], object], *, nodes: Mapping[int, str] | None = None
    ) -> None:
        """Run `serve` as the ServerApp; `nodes` maps Flower node ids to sites."""
        server_app = ServerApp()
        server_app.main()(lambda grid, context: serve(grid))
        placed = nodes or dict(enumerate(self.sites, start=1))
        folders = {node: Path(site) for node, site in placed.items()}
        run_in_process(server_app, self._client_app(), self.folder.path, folders)

    def rounds(self) -> list[RoundRecord]:
        with History(self.folder.history) as history:
            return history.rounds()

    def _client_app(self) -> ClientApp:
        app = ClientApp()
        app.query()(self._query)
        app.train()(self._train)
        app.evaluate()(self._evaluate)
        return app

    def _query(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["site-folder"])
        return self._reply(message, QUERY, site, 0, self.sites[site], pack_site_card)

    def _train(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["site-folder"])
        task = unpack_train_task(message.content)
        assert task.config_fingerprint == self.config.fingerprint()
        self.rates[task.round] = task.learning_rate
        weights = trained(task.weights, site, task.round, task.learning_rate)
        n = self.sites[site].n_training
        update = SiteUpdate(site, task.round, n, weights, 0.25, 1.5, n / 1.5)
        since = task.weights if self.config.rounds.updates == "fp16" else None
        return self._reply(
            message, TRAIN, site, task.round, update, lambda u: pack_site_update(u, since)
        )

    def _evaluate(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["site-folder"])
        task = unpack_evaluate_task(message.content)
        assert task.config_fingerprint == self.config.fingerprint()
        kind = FINAL if task.surface_distances else EVALUATE
        n = self.sites[site].n_held_out
        metrics = measured(task.weights, site, n, final=task.surface_distances)
        report = SiteReport(site, task.round, metrics, 0.5)
        return self._reply(message, kind, site, task.round, report, pack_site_report)

    def _reply(
        self, message: Message, kind: str, site: str, round_: int, answer: Any, pack: Pack
    ) -> Message:
        self.asked.append((kind, site, round_))
        spoilt = self.spoil.get((kind, site, round_), lambda good: good)(answer)
        if isinstance(spoilt, str):
            spoilt = Error(code=2, reason=spoilt)
        if isinstance(spoilt, Error):
            return Message(spoilt, reply_to=message)
        if not isinstance(spoilt, RecordDict):
            spoilt = pack(spoilt)
        return Message(spoilt, reply_to=message)


@pytest.fixture
def federation(tmp_path, tiny_config) -> Callable[..., Federation]:
    """A function: further `section.key=value` texts -> a federation of three sites, a, b and c."""

    def make(*assign: str, folder: str = "run", sites: Mapping[str, SiteCard] | None = None):
        config = tiny_config(*FIXED, *assign)
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        if sites is None:
            numbers = {"a": (3, 2), "bb": (10, 1), "ccc": (1, 4)}
            sites = {
                name: SiteCard(name, True, training, held_out, 0, config.fingerprint())
                for name, (training, held_out) in numbers.items()
            }
        return Federation(config, RunFolder(path), dict(sites))

    return make
