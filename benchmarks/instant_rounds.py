"""A federation in one process whose training takes no time: what is left is the engine.

The product's ServerApp, ClientApp and in-process grid, unchanged. `client.training.train` is replaced
by adding a constant of the site to every weight, `client.evaluation.evaluate` by fixed scores. One tiny
phantom is prepared, and every site has it. Used by `engine_overhead.py` and `growth.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP = 1e-3  # times the site's number


@dataclass
class InstantFederation:
    """`training_seconds`: spent inside what stands for training and evaluation."""

    folder: Path
    sites: dict[int, Path]
    rounds: int
    training_seconds: float = 0.0
    ends: list[float] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)  # of each round, so far
    _site_cpu: float = 0.0
    _bytes: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0, "spool": 0})
    _has: dict[int, int] = field(default_factory=dict)

    def run(self) -> list[float]:
        """The moments (of the monotonic clock) at which each round was recorded."""
        import server.rounds as rounds
        from client.app import app as client_app
        from server.app import app as server_app
        from simulation.grid import run_in_process

        self._count()
        record_round = rounds.History.record_round

        def marking(history: Any, record: Any, *args: Any) -> None:
            assert sum(c.trained for c in record.contributions) == len(self.sites), record
            record_round(history, record, *args)
            self.ends.append(time.monotonic())
            mine = time.process_time() - self._site_cpu
            self.costs.append({"server_cpu": mine, "site_cpu": self._site_cpu, **self._bytes})

        rounds.History.record_round = marking  # type: ignore[method-assign]
        self._train_instantly()
        try:
            run_in_process(server_app, client_app, self.folder / "run", self.sites)
        finally:
            rounds.History.record_round = record_round  # type: ignore[method-assign]
        return self.ends

    def last_checkpoint(self) -> Path:
        from server.checkpoint import RunFolder

        return RunFolder(self.folder / "run").checkpoint(self.rounds)

    def _count(self) -> None:
        """CPU seconds of the sites, weights that travel, and the updates kept on disk at a time.

        A model that a site was sent last is not counted again: hospitals do not fetch it again.
        """
        import server.updates as updates
        from simulation.grid import InProcessGrid

        deliver, compare = InProcessGrid._deliver, updates._compare

        def counting(grid: Any, message: Any) -> Any:
            node = message.metadata.dst_node_id
            for block in blocks(message.content):
                if self._has.get(node) != hash(block):
                    self._bytes["down"] += len(block)
                    self._has[node] = hash(block)
            begin = time.process_time()
            reply = deliver(grid, message)
            self._site_cpu += time.process_time() - begin
            self._bytes["up"] += sum(len(block) for block in blocks(reply.content))
            return reply

        def weighing(kept: Any, *args: Any) -> Any:
            self._bytes["spool"] += sum(k.path.stat().st_size for k in kept)
            return compare(kept, *args)

        InProcessGrid._deliver = counting  # type: ignore[method-assign]
        updates._compare = weighing

    def _train_instantly(self) -> None:
        import torch

        import client.app as hospital
        from client.training import Outcome
        from common.metrics import REGIONS, SubjectMetrics

        def train(network: Any, subjects: Any, *_: Any, site: str, **__: Any) -> Outcome:
            begin = time.perf_counter()
            with torch.no_grad():
                for tensor in network.state_dict().values():
                    if tensor.is_floating_point():
                        tensor += STEP * int(site.rpartition("-")[2])
            self.training_seconds += time.perf_counter() - begin
            return Outcome(loss=1.0, steps=1, samples=len(subjects), seconds=1e-3)

        def evaluate(network: Any, subjects: Any, *_: Any, **__: Any) -> Any:
            scores = {region: {"dice": 0.5, "iou": 0.3} for region in REGIONS}
            return [SubjectMetrics(subject.id, scores, 0.9, 0.5) for subject in subjects]

        hospital.train, hospital.evaluate = train, evaluate  # type: ignore[assignment]


def blocks(content: Any) -> list[bytes]:
    return [array.data for record in content.array_records.values() for array in record.values()]


def instant_federation(
    folder: Path, sites: int, rounds: int, settings: Sequence[str] = ()
) -> InstantFederation:
    """With the settings of `round_overhead.py`, and those given."""
    from common.environment import prepare_environment

    prepare_environment()
    from round_overhead import TINY

    from client.site import write_site
    from common.config_file import dump_config, load_config
    from sites.patients import patients_of
    from sites.phantom_cohort import write_cohort
    from sites.site_cohort import prepare_site
    from sites.subject import discover

    assign = [*TINY, f"rounds.number={rounds}", *settings]
    config = load_config(preset="quick", assign=assign)
    data = write_cohort(folder / "data", sites=2, subjects_per_site=2, shape=(32, 32, 20), seed=1)
    found = discover(data, modalities=config.modalities, site="").subjects
    patients = patients_of(found, data)
    one = prepare_site(
        "site", found, {}, patients, config, folder / "cache", only_evaluates=False, min_subjects=2
    )
    prepared = (*one.training, *one.held_out)
    (folder / "run").mkdir()
    (folder / "run" / "federation.yaml").write_text(dump_config(config))
    folders = {}
    for number in range(1, sites + 1):
        folders[number] = folder / "run" / "sites" / f"site-{number}"
        write_site(
            folders[number],
            name=f"site-{number}",
            trains=True,
            config_text=dump_config(config),
            training=prepared[:1],
            held_out=prepared[1:2],
            findings=(),
        )
    return InstantFederation(folder, folders, rounds)
