"""The in-process Grid against Flower's own contract, with small apps written for the purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from simulation.grid import run_in_process

FOLDERS = {1: Path("/site-a"), 2: Path("/site-b"), 3: Path("/site-c")}


def serve(work: Callable[[Grid], None], client: ClientApp, folders=FOLDERS) -> None:
    server = ServerApp()
    seen = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append(context.run_config["run-folder"])
        work(grid)

    run_in_process(server, client, Path("/run"), folders)
    assert seen == ["/run"]


def answering(answer: Callable[[Message, Context], RecordDict]) -> ClientApp:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    return client


def messages(grid: Grid, content: RecordDict) -> list[Message]:
    return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]


def test_each_node_is_its_own_site_and_answers_its_own_message():
    def who(message: Message, context: Context) -> RecordDict:
        return RecordDict({"who": ConfigRecord({"folder": context.node_config["site-folder"]})})

    def work(grid: Grid) -> None:
        assert list(grid.get_node_ids()) == [1, 2, 3]
        sent = messages(grid, RecordDict())
        replies = list(grid.send_and_receive(sent))
        assert [r.content["who"]["folder"] for r in replies] == ["/site-a", "/site-b", "/site-c"]
        assert [r.metadata.src_node_id for r in replies] == [1, 2, 3]
        assert [r.metadata.reply_to_message_id for r in replies] == [
            m.metadata.message_id for m in sent
        ]

    serve(work, answering(who))


def test_what_one_client_does_to_its_message_nobody_else_sees():
    """Strategies put one RecordDict into every message, and clients' mods take things out of it."""

    def vandal(message: Message, context: Context) -> RecordDict:
        about, weights = message.content["about"], message.content["weights"]
        found = RecordDict(
            {"found": ConfigRecord({"about": repr(dict(about)), "weights": sorted(weights)})}
        )
        about["secret"] = context.node_id
        about["list"].append(context.node_id)
        weights.pop("w")
        message.content["left behind"] = ConfigRecord({"by": context.node_id})
        return found

    def work(grid: Grid) -> None:
        content = RecordDict(
            {
                "about": ConfigRecord({"round": 1, "list": [0]}),
                "weights": ArrayRecord([np.zeros(3)]),
            }
        )
        content["weights"]["w"] = content["weights"].pop("0")
        replies = list(grid.send_and_receive(messages(grid, content)))
        found = [dict(reply.content["found"]) for reply in replies]
        assert found == [{"about": "{'round': 1, 'list': [0]}", "weights": ["w"]}] * 3
        assert list(content) == ["about", "weights"]
        assert dict(content["about"]) == {"round": 1, "list": [0]}
        assert list(content["weights"]) == ["w"]

    serve(work, answering(vandal))


def test_sites_work_one_after_the_other_and_only_when_asked_for():
    events: list[str] = []

    def note(message: Message, context: Context) -> RecordDict:
        events.append(f"node {context.node_id} works")
        return RecordDict()

    def work(grid: Grid) -> None:
        ids = list(grid.push_messages(messages(grid, RecordDict())))
        events.append("pushed")
        for message_id in reversed(ids):
            (reply,) = grid.pull_messages([message_id])
            events.append(f"node {reply.metadata.src_node_id} answered")
        assert list(grid.pull_messages(ids)) == [], "each reply is handed out once"
        assert list(grid.pull_messages(["unknown"])) == []

    serve(work, answering(note))
    expected = ["pushed"]
    for node in (3, 2, 1):
        expected += [f"node {node} works", f"node {node} answered"]
    assert events == expected


def test_a_nodes_state_lasts_and_is_its_own():
    def count(message: Message, context: Context) -> RecordDict:
        seen = context.state.get("seen", ConfigRecord({"n": 0}))["n"]
        context.state["seen"] = ConfigRecord({"n": seen + context.node_id})
        return RecordDict({"seen": context.state["seen"]})

    def work(grid: Grid) -> None:
        for times in (1, 2):
            replies = grid.send_and_receive(messages(grid, RecordDict()))
            assert [r.content["seen"]["n"] for r in replies] == [times, 2 * times, 3 * times]

    serve(work, answering(count))


def test_a_failure_of_the_server_is_not_swallowed():
    class Bang(Exception):
        pass

    def work(grid: Grid) -> None:
        raise Bang

    with pytest.raises(Bang):
        serve(work, ClientApp())
