"""Stock FedAvg over all sites, training and evaluation in each round; tells when each part is done."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class MarkingFedAvg(FedAvg):
    marks: Path

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        self._good = sum(reply.has_content() for reply in replies)
        averaged = super().aggregate_train(server_round, replies)
        self._mark("averaged")
        return averaged

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        metrics = super().aggregate_evaluate(server_round, list(replies))
        self._mark("round")
        return metrics

    def _mark(self, what: str) -> None:
        with self.marks.open("a") as file:
            file.write(json.dumps({"what": what, "at": time.time(), "good": self._good}) + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    sites = int(settings["sites"])
    initial = safetensors.torch.load_file(str(settings["initial"]))
    strategy = MarkingFedAvg(
        fraction_train=1.0,
        fraction_evaluate=1.0,
        min_train_nodes=sites,
        min_evaluate_nodes=sites,
        min_available_nodes=sites,
    )
    strategy.marks = Path(str(settings["marks"]))
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(initial), num_rounds=int(settings["rounds"])
    )
    final = result.arrays.to_torch_state_dict()
    name = max(initial, key=lambda name: initial[name].numel())
    moved = float((final[name] - initial[name]).mean())
    with strategy.marks.open("a") as file:
        file.write(json.dumps({"what": "done", "at": time.time(), "moved": moved}) + "\n")
