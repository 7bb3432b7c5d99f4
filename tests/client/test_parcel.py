"""What one process packs, the other unpacks: the same message, weights and all, with its id."""

from __future__ import annotations

import os

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from client.parcel import pack, unpack


@pytest.fixture
def task() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 5, 5, 1
    block = os.urandom(12_000_000)  # of more than one of Flower's pieces
    message = Message(
        RecordDict(
            {
                "about": ConfigRecord({"round": 3, "names": ["a", "b"], "key": b"\x00\xff"}),
                "means": MetricRecord({"loss": 0.1}),
                "weights": ArrayRecord(
                    {"weights": Array("uint8", (len(block),), "safetensors", block)}
                ),
            }
        ),
        77,
        "train",
        ttl=600,
        group_id="3",
    )
    message.metadata.__dict__["_message_id"] = "ab" * 32
    return message


def test_a_message_arrives_as_it_was(task):
    there = unpack(pack(task))
    assert there.content == task.content
    assert vars(there.metadata) == vars(task.metadata)
    reply = Message(RecordDict(), reply_to=there)
    assert reply.metadata.reply_to_message_id == "ab" * 32


def test_an_error_arrives_as_it_was(task):
    there = unpack(pack(Message(Error(3, "no such scan: Ø"), reply_to=task)))
    assert there.has_error()
    assert (there.error.code, there.error.reason) == (3, "no such scan: Ø")
    assert there.metadata.reply_to_message_id == "ab" * 32
