"""What secure aggregation costs: one round of 10 sites and 5 M parameters, sites' and server's work.

    python benchmarks/secure_aggregation.py [--sites 10] [--millions 5] [--repeats 3] [--dropouts 0]

Three ways to make the same mean from the same updates, one after the other in one process, without
network or training: plain (the fp16 change, as hospitals send it by default), our secure aggregation,
and Flower's SecAgg+ (its own client mod and server workflow, every site masking towards every other,
the same threshold). Seconds are CPU time of all parties together; the sites work in parallel in
reality. Bytes are what one site sends up. Best of `--repeats`, and all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.typing import Code
from flwr.compat.common.recorddict_compat import (
    fitres_to_recorddict,
    parameters_to_arrayrecord,
)
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

from client.secure_round import answer_stage, answer_task
from client.site import Site
from common.config import FederationConfig, Rounds
from common.keys import fingerprint, new_private_key, save_private_key
from common.masking import most_dropouts, threshold
from common.messages import (
    SiteCard,
    SiteUpdate,
    TrainTask,
    pack_site_update,
    task_hash,
    unpack_site_update,
    unpack_train_task,
)
from common.secure_messages import AGREE, MASKED, STAGES, UNMASK, pack_trained, session_of
from common.weights import Weights
from server.average import add, mean
from server.checkpoint import RunFolder
from server.roll_call import Roll
from server.secure_round import gather_secure_sum
from simulation.grid import _own_copy

TENSORS = 40
Parts = list[tuple[int, Weights]]


class MemoryGrid:
    """Every message is answered at once by `answer(node, message)`; None: the site has vanished."""

    def __init__(self, answer: Callable[[int, Message], RecordDict | None]) -> None:
        self._answer = answer
        self._waiting: dict[str, Message] = {}
        self.sent_up: dict[int, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = str(id(message)) + str(len(self._waiting))
            self._waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._reply(self._waiting.pop(name)) for name in ids]

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None):
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        answer = self._answer(node, message)
        if answer is None:
            reply = Message(Error(2, "vanished"), reply_to=message)
        else:
            self.sent_up[node] = self.sent_up.get(node, 0) + size_of(answer)
            reply = Message(answer, reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


def size_of(content: RecordDict) -> int:
    """Of what is large: arrays, bytes and texts."""

    def weigh(value: object) -> int:
        if isinstance(value, list):
            return sum(map(weigh, value))
        if isinstance(value, Array):
            return len(value.data)
        return len(value) if isinstance(value, bytes | str) else 8

    return sum(weigh(value) for record in content.values() for value in record.values())


def plain(base: Weights, parts: Parts, gone: int) -> tuple[Weights, int]:
    running, sent = None, 0
    for number, (n, weights) in enumerate(parts):
        content = pack_site_update(SiteUpdate(f"site-{number}", 1, n, weights), since=base)
        if number >= gone:
            sent = size_of(content)
            weights = unpack_site_update(content, since=base).weights
            running = add(running, weights, n, base)
    assert running is not None
    return mean(running, base), sent


def ours(base: Weights, parts: Parts, gone: int, folder: Path) -> tuple[Weights, int]:
    config = FederationConfig(secure_aggregation=True, rounds=Rounds(min_sites=3))
    keys = [new_private_key() for _ in parts]
    roster = tuple(sorted(fingerprint(key.public_key()) for key in keys))
    sites = []
    for number, key in enumerate(keys):
        home = folder / f"site-{number}"
        home.mkdir()
        save_private_key(home / "site.key", key)
        fixed = {"training": (), "held_out": (), "left_out": {}, "patients": {}}
        sites.append(
            Site(home.name, home, True, config, **fixed, key=home / "site.key", roster=roster)
        )

    def answer(node: int, message: Message) -> RecordDict | None:
        stage, content = message.metadata.message_type, message.content
        if node < gone and stage in (MASKED, AGREE, UNMASK):
            return None
        site = sites[node]
        if stage in STAGES:
            return answer_stage(site, stage, content)
        session = session_of(content)
        assert session is not None
        n, weights = parts[node]
        task = unpack_train_task(content)
        update = SiteUpdate(site.name, 1, n, weights)
        return pack_trained(answer_task(site, task, task_hash(content), session, lambda: update))

    nodes = {site.name: number for number, site in enumerate(sites)}
    cards = {name: SiteCard(name, True, None, 0, 0, "") for name in nodes}
    run = RunFolder(folder / "run")
    run.path.mkdir()
    grid = MemoryGrid(answer)
    roll = Roll(cards, nodes, roster=roster)
    gathered = gather_secure_sum(grid, config, run, roll, TrainTask(1, "", 0.01, base))  # type: ignore[arg-type]
    assert gathered.weights is not None, [c.reason for c in gathered.contributions]
    return gathered.weights, grid.sent_up[len(parts) - 1]


def flowers(base: Weights, parts: Parts, gone: int) -> tuple[Weights, int]:
    """SecAgg+ as its user would set it: changes clipped to +-1, as ours are, weights up to 1024."""
    contexts = [
        Context(run_id=1, node_id=n, node_config={}, state=RecordDict(), run_config={})
        for n in range(len(parts))
    ]

    def train(message: Message, context: Context) -> Message:
        n, weights = parts[context.node_id]
        changes = [(weights[name] - w).numpy() for name, w in base.items()]
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(changes), n, {})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)

    calls = [0] * len(parts)

    def answer(node: int, message: Message) -> RecordDict | None:
        calls[node] += 1
        if node < gone and calls[node] > 2:
            return None
        own = _own_copy(message)  # it changes what it is given
        return secaggplus_mod(own, contexts[node], train).content

    class Proxy:
        def __init__(self, node: int) -> None:
            self.node_id = node

    class Strategy(FedAvg):
        def configure_fit(self, server_round, parameters, client_manager):
            return [(Proxy(n), FitIns(parameters, {})) for n in range(len(parts))]

    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    empty = ndarrays_to_parameters([w.numpy() for w in base.values()])
    state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(empty, True)
    context = LegacyContext(
        Context(run_id=1, node_id=0, node_config={}, state=state, run_config={}),
        strategy=Strategy(),
    )
    sites = len(parts)
    workflow = SecAggPlusWorkflow(
        num_shares=sites,
        reconstruction_threshold=threshold(sites),
        max_weight=1024.0,
        clipping_range=1.0,
        quantization_range=2**22,
        modulus_range=2**32,
    )
    grid = MemoryGrid(answer)
    workflow(grid, context)
    from flwr.compat.common.recorddict_compat import arrayrecord_to_parameters

    record: ArrayRecord = context.state.array_records[MAIN_PARAMS_RECORD]
    changes = parameters_to_ndarrays(arrayrecord_to_parameters(record, True))
    result = {
        name: (w.double() + torch.from_numpy(np.asarray(change, np.float64))).float()
        for (name, w), change in zip(base.items(), changes, strict=True)
    }
    return result, grid.sent_up[sites - 1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--sites", type=int, default=10)
    options.add_argument("--millions", type=float, default=5.0)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--dropouts", type=int, default=0, help="vanish before the masked update")
    options.add_argument("--json")
    chosen = options.parse_args()
    if not 0 <= chosen.dropouts <= most_dropouts(chosen.sites):
        options.error(f"of {chosen.sites} sites at most {most_dropouts(chosen.sites)} may vanish")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    make = torch.Generator().manual_seed(1)
    size = int(chosen.millions * 1e6) // TENSORS
    base = {f"layer{i:02d}": torch.randn(size, generator=make) * 0.1 for i in range(TENSORS)}
    parts: Parts = [
        (
            4 + (37 * s) % 126,
            {k: w + 1e-3 * torch.randn(size, generator=make) for k, w in base.items()},
        )
        for s in range(chosen.sites)
    ]
    kept = parts[chosen.dropouts :]
    total = sum(n for n, _ in kept)
    exact = {k: sum(n * w[k].double() for n, w in kept) / total for k in base}
    ways: dict[str, Callable[[Path], tuple[Weights, int]]] = {
        "plain": lambda _: plain(base, parts, chosen.dropouts),
        "fedbrats": lambda folder: ours(base, parts, chosen.dropouts, folder),
        "Flower SecAgg+": lambda _: flowers(base, parts, chosen.dropouts),
    }
    results: dict[str, dict[str, object]] = {name: {"seconds": []} for name in ways}
    for _ in range(chosen.repeats):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.process_time()
                got, sent = way(Path(folder))
                results[name]["seconds"].append(time.process_time() - begin)  # type: ignore[attr-defined]
            error = max(float((got[k].double() - exact[k]).abs().max()) for k in base)
            results[name] |= {"error": error, "mb_up": sent / 1e6}
    fastest = {name: min(r["seconds"]) for name, r in results.items()}  # type: ignore[call-overload]
    print(f"{chosen.sites} sites, {chosen.millions:g} M parameters, {chosen.dropouts} dropouts")
    print(f"{'':16} {'CPU s':>7} {'ratio':>7} {'MB up':>7} {'largest error':>14}   all runs")
    for name, r in results.items():
        runs = " ".join(f"{s:.2f}" for s in r["seconds"])  # type: ignore[attr-defined]
        ratio = fastest[name] / fastest["plain"]
        print(
            f"{name:16} {fastest[name]:7.2f} {ratio:7.2f} {r['mb_up']:7.1f} {r['error']:14.1e}   {runs}"
        )
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
