"""What a site does: add random numbers about its constant; evaluate to a fixed score."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

STEP = 1e-3  # times the site's number
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    weights = message.content["arrays"].to_torch_state_dict()
    number = int(context.node_config["number"])
    round_ = int(message.content["config"]["server-round"])
    generator = torch.Generator().manual_seed(1000 * round_ + number)
    changed = {
        name: tensor + STEP * number * (0.5 + torch.rand(tensor.shape, generator=generator))
        for name, tensor in weights.items()
    }
    metrics = MetricRecord({"num-examples": 3, "loss": 1.0})
    return Message(
        RecordDict({"arrays": ArrayRecord(changed), "metrics": metrics}), reply_to=message
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    message.content["arrays"].to_torch_state_dict()
    metrics = MetricRecord({"num-examples": 3, "dice": 0.5, "loss": 0.5})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
