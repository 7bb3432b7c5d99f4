"""Flower's Grid in one process: hands each message to the ClientApp when its reply is asked for.

Hospitals work strictly in turn, in one process and on one device, so memory does not grow with
their number. The ServerApp and ClientApp are the same objects as in a real deployment. Not a
network: nothing is serialised beyond what Flower's records do themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = SERVER_NODE = 1


class InProcessGrid(Grid):
    """One node per entry of `site_folders`, whose ClientApp sees it as `site-folder`."""

    def __init__(self, client_app: ClientApp, site_folders: Mapping[int, Path]) -> None:
        self._client_app = client_app
        self._contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                node_config={"site-folder": str(folder)},
                state=RecordDict(),
                run_config={},
            )
            for node, folder in site_folders.items()
        }
        self._waiting: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self._run = Run.create_empty(run_id=RUN_ID)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Runs the ClientApp for each message asked for; this is where the work happens."""
        return [self._deliver(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message:
        return self._client_app(_own_copy(message), self._contexts[message.metadata.dst_node_id])


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    run_folder: Path,
    site_folders: Mapping[int, Path],
) -> None:
    """Run one federation to its end; exceptions of the ServerApp pass through."""
    # Message() stamps sender and run from here, as Flower's own simulation does
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE
    context = Context(
        run_id=RUN_ID,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config={"run-folder": str(run_folder), "nodes": len(site_folders)},
    )
    server_app(InProcessGrid(client_app, site_folders), context)


def _own_copy(message: Message) -> Message:
    """Own containers for each client: one RecordDict may be in many messages, and clients may change it.

    The array bytes, which are immutable, stay shared.
    """
    content = RecordDict()
    for name, record in message.content.items():
        shared = isinstance(record, ArrayRecord)
        content[name] = ArrayRecord(dict(record.items())) if shared else deepcopy(record)
    own = copy(message)
    own.__dict__["_content"] = content
    return own
