"""Flower's link state, in memory, with what a coordinator of hospitals needs of it.

It lives and dies with the process. What a federation needs to go on after a restart is elsewhere, on
disk: who is enrolled (`server.enrolment`) and what was reached (`server.history`). A site's node is the
same one again, its run is over. Flower can keep the state in SQLite, at a price in every round
(docs/measurements.md) and for messages that nobody waits for any more.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.run import RunStatus
from flwr.superlink.federation import NoOpFederationManager

from common.flower import require_flower
from server.pieces import PieceStore


class LinkState(InMemoryLinkState):
    """Nodes, runs and messages, with one order of their locks, and a bell for who waits for a message.

    Flower takes the lock of its messages before that of its uploads, but the other way round when a
    piece shows that its upload has expired: two such requests at once would wait for each other.
    """

    def __init__(self, pieces: PieceStore) -> None:
        super().__init__(NoOpFederationManager(), pieces)
        self.pieces = pieces
        self._waiting: dict[int, list[Callable[[], object]]] = {}

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """As Flower's, but a tree that contradicts what is known of its pieces is refused: it could
        keep another site's pieces from arriving, or its own for ever."""
        with self.lock:
            if self.pieces.contradicts(object_tree):
                stored, missing = False, list[str]()
            else:
                stored, missing = super().store_message_and_object_tree(
                    message, object_tree, session_id
                )
            if not stored:  # as when a site answers twice: nothing is to be uploaded
                self._object_push_sessions.pop(session_id, None)
            return stored, missing

    def store_object(
        self, run_id: int, session_id: str, object_id: str, object_content: bytes
    ) -> bool:
        with self.lock:
            return super().store_object(run_id, session_id, object_id, object_content)

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        with self.lock:
            return super().get_object(run_id, object_id)

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """Also of runs that an earlier process drove: they are over."""
        over = RunStatus(Status.FINISHED, SubStatus.STOPPED, "")
        return dict.fromkeys(run_ids, over) | super().get_run_status(run_ids)

    def place_node(self, public_key: bytes, name: str) -> None:
        """A node whose id follows from its key, so that it is the same after a restart."""
        node_id = int.from_bytes(hashlib.sha256(public_key).digest()[:8], "big") >> 1
        with self.lock:
            self.nodes[node_id] = NodeInfo(
                node_id=node_id,
                owner_aid=NOOP_FLWR_AID,
                owner_name=NOOP_ACCOUNT_NAME,
                status=NodeStatus.REGISTERED,
                registered_at=now().isoformat(),
                public_key=public_key,
                name=name,
            )
            self.node_public_key_to_node_id[public_key] = node_id

    def _check_stored_messages(self, message_ids: set[str], run_id: int | None = None) -> None:
        """Flower deletes what is past its deadline here, at any site's question, and whole replies that
        came in time with it. The grid ends every message, by a clock that nobody sets."""

    def offer_again(self, node: int) -> None:
        """Offer a node that has nothing in hand what it was sent: its delivery was lost on the way.

        Only the newest: it replaces what came before.
        """
        with self.lock:
            mine = [
                (message_id, message)
                for message_id, message in self.message_ins_store.items()
                if message.metadata.dst_node_id == node
            ]
            for message_id, message in mine[-1:]:
                if message_id not in self.message_ins_id_to_message_res_id:
                    message.metadata.delivered_at = ""

    def tell(self, node: int) -> None:
        """Wake who waits for a message to this node."""
        for wake in list(self._waiting.get(node, ())):
            with contextlib.suppress(RuntimeError):  # its server has just ended
                wake()

    @contextlib.contextmanager
    def told(self, node: int, wake: Callable[[], object]) -> Iterator[bool]:
        """While the block runs, `wake` is called when a message comes; yields whether one is there.

        Takes no lock, as it is called where nothing may block.
        """
        self._waiting.setdefault(node, []).append(wake)
        try:
            yield any(
                message.metadata.dst_node_id == node and not message.metadata.delivered_at
                for message in list(self.message_ins_store.values())
            )
        finally:
            self._waiting[node].remove(wake)


def new_link_state(pieces: Path) -> LinkState:
    """A link state of this process, which knows no node and no run; message pieces lie in a folder.

    Raises:
        WrongFlower: another version of Flower is installed than this module was written for.
        OSError: the folder cannot be made or emptied.
    """
    require_flower()
    return LinkState(PieceStore(pieces))
