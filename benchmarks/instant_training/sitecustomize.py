"""Put on PYTHONPATH by `round_overhead.py`: fed-client's worker trains in no time, fed-server tells when.

Python imports this module at start by itself. What it changes is what is not overhead: training adds
random numbers about a constant of the site to the weights, evaluation gives fixed scores. All else is
the product's: processes, messages, checks, averaging, checkpoints, records, the hash of the code.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

PROGRAM = " ".join(sys.orig_argv)
STEP = 1e-3  # times the site's number


def train_instantly() -> None:
    from common.environment import prepare_environment

    prepare_environment()
    import torch

    import client.app as hospital
    from client.training import Outcome
    from common.metrics import REGIONS, SubjectMetrics

    def train(
        network: torch.nn.Module, subjects: Any, *_: Any, site: str, round_: int, **__: Any
    ) -> Outcome:
        number = int(site[-1])
        generator = torch.Generator().manual_seed(1000 * round_ + number)
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor += STEP * number * (0.5 + torch.rand(tensor.shape, generator=generator))
        return Outcome(loss=1.0, steps=1, samples=len(subjects), seconds=1e-3)

    def evaluate(network: torch.nn.Module, subjects: Any, *_: Any, **__: Any) -> Any:
        scores = {region: {"dice": 0.5, "iou": 0.3} for region in REGIONS}
        return [SubjectMetrics(subject.id, scores, 0.9, 0.5) for subject in subjects]

    hospital.train, hospital.evaluate = train, evaluate


def tell_when() -> None:
    import server.rounds as rounds

    path = os.environ["BENCHMARK_MARKS"]
    evaluate, record_round = rounds._evaluate, rounds.History.record_round

    def mark(what: str, good: int) -> None:
        with open(path, "a") as file:
            file.write(json.dumps({"what": what, "at": time.time(), "good": good}) + "\n")

    def marking_evaluate(*args: Any, **options: Any) -> Any:
        mark("averaged", 0)
        return evaluate(*args, **options)

    def marking_record(history: Any, record: Any, *more: Any) -> None:
        record_round(history, record, *more)
        mark("round", sum(c.trained for c in record.contributions))

    rounds._evaluate = marking_evaluate
    rounds.History.record_round = marking_record  # type: ignore[method-assign,assignment]


if "client.worker" in PROGRAM:
    train_instantly()
elif "fed-server start" in PROGRAM:
    tell_when()
