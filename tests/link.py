"""A real link for tests of both its ends: Flower's state behind a TLS listener on a free
port, and real clients. Everything in one process, so that a test can look at both sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.constant import NodeStatus
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.connection import Connection
from common.keys import new_private_key
from server.certificates import issue_server_certificate, make_authority
from server.link_grid import LinkGrid
from server.link_state import LinkState, new_link_state
from server.superlink import begin_run, fleet_app, listening, place_nodes

FEDERATION, CODE = "3f" * 16, "ab" * 32


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Wait for `condition` and return what it gave; a busy machine may take its time."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"in vain waited for: {what}"
        time.sleep(0.01)
    return found


@dataclass(frozen=True)
class Authority:
    """A CA and the certificate of a server at 127.0.0.1, in a folder."""

    folder: Path

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / "server.crt", self.folder / "server.key"

    @property
    def ca(self) -> str:
        return (self.folder / "ca.crt").read_text()


def make_certificates(folder: Path, *hosts: str) -> Authority:
    folder.mkdir(parents=True, exist_ok=True)
    make_authority(folder / "ca.key", folder / "ca.crt", "test")
    ca = folder / "ca.key", folder / "ca.crt"
    issue_server_certificate(*ca, folder / "server.key", folder / "server.crt", hosts)
    return Authority(folder)


@dataclass
class Link:
    """A coordinator's end, and what a hospital needs to connect to it."""

    pieces: Path
    authority: Authority
    keys: dict[str, ec.EllipticCurvePrivateKey]
    state: LinkState
    run_id: int
    grid: LinkGrid
    app: Any
    address: str = ""
    clients: list[Connection] = field(default_factory=list)

    def connection(self, site: str, *, ca: str = "", address: str = "") -> Connection:
        """A client with the site's key, not yet open."""
        connection = Connection(address or self.address, ca or self.authority.ca, self.keys[site])
        self.clients.append(connection)
        return connection

    def connect(self, site: str) -> Connection:
        connection = self.connection(site)
        connection.open()
        return connection

    def place(self, *sites: str) -> None:
        place_nodes(self.state, {site: self.keys[site].public_key() for site in sites})

    def send(
        self, site: str, content: RecordDict | None = None, *, kind: str = "query", ttl: float = 60
    ) -> str:
        """A message to the site; its id."""
        if content is None:
            content = RecordDict({"c": ConfigRecord({"n": 1})})
        TaskIdentity.task_id = TaskIdentity.run_id = self.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        node = self.grid.contacts()[site].node
        (message_id,) = self.grid.push_messages([Message(content, node, kind, ttl=ttl)])
        assert message_id
        return message_id

    def pull(self, message_id: str) -> Message | None:
        """The reply or the error that the coordinator gets now, if any."""
        return next(iter(self.grid.pull_messages([message_id])), None)

    def expire(self, message_id: str) -> Message:
        """What the coordinator gets when the message's deadline has passed."""
        self.grid._sent[message_id].at -= 10**6
        reply = self.pull(message_id)
        assert reply is not None
        return reply

    def held(self) -> dict[str, int]:
        """How much there is of what an exchange fills: messages, pieces, uploads; if any."""
        state = self.state
        kinds = {
            "messages": state.message_ins_store,
            "replies": state.message_res_store,
            "objects": state.object_store.store,  # type: ignore[attr-defined]
            "files": list(self.pieces.iterdir()),
            "uploads": [s for s in state._object_push_sessions.values() if s.pending_object_ids],
        }
        return {kind: len(things) for kind, things in kinds.items() if things}

    def set(self, site: str, **changes: object) -> None:
        """Change what the link state knows about a site, as time would."""
        (node,) = (
            n
            for n in self.state.nodes.values()
            if n.name == site and n.status != NodeStatus.UNREGISTERED
        )
        for name, value in changes.items():
            setattr(node, name, value)


@contextmanager
def linked(
    folder: Path, authority: Authority, *sites: str, return_seconds: float = 60.0
) -> Iterator[Link]:
    """A link in `folder` at which these sites are enrolled."""
    pieces = folder / "pieces"
    state = new_link_state(pieces)
    keys = {site: new_private_key() for site in sites}
    place_nodes(state, {site: key.public_key() for site, key in keys.items()})
    run_id = begin_run(state, FEDERATION, CODE)
    own: set[str] = set()
    grid = LinkGrid(state, run_id, return_seconds=return_seconds, own=own)
    app = fleet_app(state, own)
    link = Link(pieces, authority, keys, state, run_id, grid, app)
    with ExitStack() as stack:
        port = stack.enter_context(listening(app, "127.0.0.1", 0, *authority.files))
        link.address = f"127.0.0.1:{port}"
        try:
            yield link
        finally:
            for client in link.clients:
                client.close()


def take(connection: Connection, largest: int = 10**9, *, wait: int = 0) -> Message | None:
    """The next message of a client, whole."""
    received = connection.receive(wait)
    return connection.fetch(*received, largest) if received else None


def without_nonce(content: RecordDict) -> RecordDict:
    """A content as it was before the grid made its ids unguessable."""
    for record in content.values():
        if isinstance(record, ConfigRecord) and "nonce" in record:
            del record["nonce"]
    return content


@contextmanager
def counting(connection: Connection, name: str) -> Iterator[list[str]]:
    """The ids of the objects that the client asks this of meanwhile: PullObject or PushObject."""
    ids: list[str] = []
    call = getattr(connection._client, name)

    def counted(request: Any) -> Any:
        answer = call(request)
        ids.append(request.object_id)
        return answer

    setattr(connection._client, name, counted)
    try:
        yield ids
    finally:
        setattr(connection._client, name, call)


def stamp(connection: Connection, run_id: int) -> None:
    """Flower writes sender and run into a new message from a global; set it to this client's."""
    TaskIdentity.task_id = TaskIdentity.run_id = run_id
    TaskIdentity.node_id = connection.node_id


def reply_to(
    connection: Connection, message: Message, content: RecordDict | None = None
) -> Message:
    """A reply as the client would make it."""
    stamp(connection, message.metadata.run_id)
    if content is None:
        content = RecordDict({"c": ConfigRecord({"answer": 2})})
    return Message(content, reply_to=message)


def signed_request(
    link: Link, site: str, path: str, content: Any, *, method: str = "POST", **headers: str
) -> httpx.Request:
    """A request with the site's signature, for what its client would never send."""
    http = link.connection(site)._client._client
    kind = {"content-type": "application/protobuf"}
    request = http.build_request(
        method, f"https://{link.address}{path}", content=content, headers={**kind, **headers}
    )
    signer = NodeAuthHttpInterceptor(link.keys[site], link.keys[site].public_key())
    signer.intercept(SimpleNamespace(request=request), lambda _: None)
    return request
