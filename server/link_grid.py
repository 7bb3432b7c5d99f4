"""Flower's Grid on the link state of this process: messages to hospitals and their replies.

Adds what a stock grid lacks: a reply is taken only when all of it has arrived; a site whose client
was started anew in mid-task gets the task again; and every message ends, with a reply or with an
error that says in words why none came (deadline, lost contact, key revoked).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_PATIENCE, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.constant import NodeStatus
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.console import plain
from common.message_words import NONCE
from server.audit_trail import Witness
from server.gate import MOST_PIECES
from server.link_state import LinkState

LARGEST_REPLY = 2**31  # bytes
SECONDS_BETWEEN_LOOKS = 1.0
WORK = {
    MessageType.QUERY: "answering",
    MessageType.TRAIN: "training",
    MessageType.EVALUATE: "evaluating",
}


@dataclass(frozen=True)
class Contact:
    """A site's connection: `last` is its last sign of life (once it is offline: when it was given up),
    `activated` when its client started."""

    node: int
    site: str
    online: bool
    last: datetime | None
    activated: datetime | None


@dataclass
class _Sent:
    message: Message  # without its content
    site: str
    at: float  # by this process's clock
    refused: str = ""


class LinkGrid(Grid):
    """One run on a link state; sites are nodes named after them (`server.superlink.place_nodes`)."""

    def __init__(
        self,
        state: LinkState,
        run_id: int,
        *,
        return_seconds: float,
        largest_reply: int = LARGEST_REPLY,
        own: set[str] | None = None,
        witness: Witness | None = None,
    ) -> None:
        """`largest_reply` in bytes; `own` is given the ids of all objects that are sent; the
        `witness` sees every message and reply."""
        self._state = state
        self._run_id = run_id
        self._return_seconds = return_seconds
        self._largest_reply = largest_reply
        self._own = set() if own is None else own
        self._witness = witness
        self._sent: dict[str, _Sent] = {}
        self._away: dict[str, float] = {}  # since when a site is offline, by this process's clock
        self._looked = 0.0
        # so that nobody can know an object's id before it is sent, and claim it (server.gate)
        self._nonce = secrets.token_hex(16)
        # Message() stamps sender and run from here
        TaskIdentity.task_id, TaskIdentity.run_id = run_id, run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def contacts(self) -> dict[str, Contact]:
        """Every enrolled site's connection, by site name."""
        found = {}
        for node in self._state.get_node_info():
            if node.status == NodeStatus.UNREGISTERED:
                continue
            patience = HEARTBEAT_PATIENCE * node.heartbeat_interval
            online = node.status == NodeStatus.ONLINE
            last = (node.online_until or 0.0) - (patience if online else 0)
            found[node.name] = Contact(
                node=node.node_id,
                site=node.name,
                online=online,
                last=datetime.fromtimestamp(last, UTC) if last > 0 else None,
                activated=_time(node.last_activated_at),
            )
        return found

    def doing(self) -> dict[str, str]:
        """What each site that owes a reply does: called, answering, training, evaluating, sending."""
        state = {}
        with self._state.lock:
            for message_id, sent in list(self._sent.items()):
                metadata = sent.message.metadata
                work = WORK.get(metadata.message_type, "aggregating")  # securely: train.something
                delivered = work if metadata.delivered_at else "called"
                state[sent.site] = "sending" if self._reply_id(message_id) else delivered
        return state

    # ------------------------------------------------------------------- what a Flower Grid must do

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("the run is chosen when the grid is made")

    @property
    def run(self) -> Run:
        return cast(Run, self._state.get_run_info(run_ids=[self._run_id])[0])

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
        return [contact.node for contact in self.contacts().values() if contact.online]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Ids of the messages in order; "" for one whose site is no longer enrolled."""
        sites = {contact.node: contact.site for contact in self.contacts().values()}
        ids = []
        for message in messages:
            site = sites.get(message.metadata.dst_node_id)
            if site is not None and self._witness is not None:
                self._witness.sending(message, site)
            ids.append(self._push(message, site) if site is not None else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, and error replies for messages that will have none.

        Raises:
            OSError: the disk is full, so that no reply can come.
            LogError: as the witness.
        """
        self._state.pieces.check()
        self._look_around()
        replies = []
        for message_id in message_ids:
            reply = self._reply(message_id) or self._given_up(message_id)
            if reply is not None:
                if self._witness is not None:
                    sent = self._sent[message_id]
                    self._witness.received(sent.message, sent.site, reply)
                self._forget(message_id)
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("fedbrats takes replies one at a time (server.exchange)")

    # ------------------------------------------------------------------------------------- sending

    def _push(self, message: Message, site: str) -> str:
        for record in message.content.values():
            if isinstance(record, ConfigRecord):
                record[NONCE] = self._nonce
        # under one lock: a site must not see the message before all of it is there
        with no_object_id_recompute(), self._state.lock:
            message.metadata.__dict__["_message_id"] = message_id = message.object_id
            objects = get_all_nested_objects(message)
            self._own.update(objects)
            tree = get_object_tree(message)
            bare = remove_content_from_message(message)
            session = self._state.start_session(self._run_id)
            self._drop_claims(objects.keys())
            stored, missing = self._state.store_message_and_object_tree(bare, tree, session)
            if not stored:
                return ""
            for object_id in missing:
                content = objects[object_id].deflate()
                if not self._state.store_object(self._run_id, session, object_id, content):
                    self._state._cleanup_push_session(session, cleanup_messages=True)
                    self._state.pieces.check()
                    raise RuntimeError("Flower did not keep a piece of a message that is new")
        self._sent[message_id] = _Sent(bare, site, time.monotonic())
        self._state.tell(bare.metadata.dst_node_id)
        return message_id

    def _drop_claims(self, own: Collection[str]) -> None:
        """Refuse replies that name objects which are about to be sent.

        A model may be known to a site from before a restart. Its pieces, announced in a reply with
        other contents, would be in the way.
        """
        for message_id, sent in self._sent.items():
            reply_id = self._reply_id(message_id)
            if reply_id is None or sent.refused:
                continue
            with contextlib.suppress(NoObjectInStoreError):
                tree = self._state.object_store.get_object_tree(reply_id)
                if any(piece.object_id in own for piece in iterate_object_tree(tree)):
                    self._delete_reply(message_id)
                    sent.refused = "its reply names an object of the server."

    def _reply_id(self, message_id: str) -> str | None:
        return self._state.message_ins_id_to_message_res_id.get(message_id)

    # ----------------------------------------------------------------------------------- receiving

    def _reply(self, message_id: str) -> Message | None:
        """The whole reply, if all of it is there."""
        with self._state.lock:
            reply_id = self._reply_id(message_id)
            if reply_id is None:
                return None
            bare = self._state.message_res_store[reply_id]
        if bare.has_error():
            return self._error(message_id, plain(bare.error.reason or ""))
        if not self._state.get_object(self._run_id, reply_id):
            return None  # our client sends this piece last
        try:
            tree = self._state.object_store.get_object_tree(reply_id)
        except NoObjectInStoreError:
            return None
        contents: dict[str, bytes] = {}
        size = 0
        for number, piece in enumerate(iterate_object_tree(tree)):
            content = self._state.get_object(self._run_id, piece.object_id)
            size += len(content or b"")
            if size > self._largest_reply or number > MOST_PIECES:
                return self._error(message_id, "its reply is larger than any answer can be.")
            if not content:
                return None  # still on its way
            contents[piece.object_id] = content
        try:
            reply = cast(Message, inflate_object_from_contents(reply_id, contents))
            answers = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        except Exception as error:  # from outside: whatever is wrong with it, the round goes on
            reply = None
            reason = f"its reply cannot be read ({type(error).__name__})."
        else:
            reason = "its reply is to another message."
        sent = self._sent[message_id].message.metadata
        if reply is None or answers != (message_id, sent.dst_node_id):
            return self._error(message_id, reason)
        return reply

    def _given_up(self, message_id: str) -> Message | None:
        """An error reply if none can come any more.

        By this process's clock: one that was suspended, or whose date was set, has not waited.
        """
        sent = self._sent[message_id]
        metadata = sent.message.metadata
        contact = self.contacts().get(sent.site)
        now = time.monotonic()
        if sent.refused:
            return self._error(message_id, sent.refused)
        if contact is None or contact.node != metadata.dst_node_id:
            return self._error(message_id, "its key was revoked or replaced.")
        if now - sent.at > metadata.ttl:
            minutes = metadata.ttl / 60
            return self._error(message_id, f"it did not answer within {minutes:g} minutes.")
        if contact.online:
            return None
        if now - self._away.get(sent.site, now) > self._return_seconds:
            since = f"{contact.last:%H:%M:%S} UTC" if contact.last else "long ago"
            minutes = self._return_seconds / 60
            return self._error(
                message_id,
                f"its connection was lost ({since}) and did not return within {minutes:g} minutes.",
            )
        return None

    def _look_around(self) -> None:
        """Note which sites are away, and offer tasks again whose sites have started anew.

        Of all sites, not only of the one whose reply is waited for.
        """
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        contacts = self.contacts()
        away = [site for site, contact in contacts.items() if not contact.online]
        self._away = {site: self._away.get(site, now) for site in away}
        self._offer_again(contacts)

    def _offer_again(self, contacts: Mapping[str, Contact]) -> None:
        """Offer a task again whose site has started its client anew since it took it.

        What the dead client had sent of a reply is deleted, as it would be in the way of the new one;
        a whole reply is kept.
        """
        for message_id, sent in self._sent.items():
            contact = contacts.get(sent.site)
            if contact is None or contact.activated is None:
                continue
            with self._state.lock:
                taken = _time(sent.message.metadata.delivered_at)
                if taken is None or taken >= contact.activated:
                    continue
                if self._reply(message_id) is None:
                    self._delete_reply(message_id)
                    sent.message.metadata.delivered_at = ""
                    self._state.tell(contact.node)

    def _error(self, message_id: str, reason: str) -> Message:
        error = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason)
        return Message(error, reply_to=self._sent[message_id].message)

    def _forget(self, message_id: str) -> None:
        """Delete the message and its reply, of which only a part may have arrived."""
        self._sent.pop(message_id, None)
        with self._state.lock:
            self._delete_reply(message_id)
            self._state.delete_messages({message_id})
            self._state.object_store.delete(message_id)

    def _delete_reply(self, message_id: str) -> None:
        with self._state.lock:
            reply_id = self._state.message_ins_id_to_message_res_id.pop(message_id, None)
            if reply_id is None:
                return
            self._state.message_res_store.pop(reply_id, None)
            upload = self._state._object_push_session_by_root.get(reply_id)
            if upload is not None:
                self._state._cleanup_push_session(upload, cleanup_messages=False)
            self._state.object_store.delete(reply_id)


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
