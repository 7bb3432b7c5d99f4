"""A real link for tests of both its ends: Flower's state in SQLite behind a TLS listener on a free
port, and real clients. Everything in one process, so that a test can look at both sides."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.task_identity import TaskIdentity
from sqlalchemy import text

from client.connection import Connection
from common.keys import new_private_key
from server.certificates import issue_server_certificate, make_authority
from server.link_grid import LinkGrid
from server.superlink import begin_run, fleet_app, listening, open_link_state, place_nodes

FEDERATION, CODE = "3f" * 16, "ab" * 32
TABLES = (  # of messages, their pieces, and what Flower notes while pieces are sent
    "message_ins",
    "message_res",
    "objects",
    "object_children",
    "run_objects",
    "object_push_session_roots",
    "object_push_session_pending",
)


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

    database: Path
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

    def rows(self) -> dict[str, int]:
        """How many rows each of the tables has that an exchange fills, if any."""
        with self.state.session() as session:
            counts = {
                table: session.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar()
                for table in TABLES
            }
        return {table: count for table, count in counts.items() if count}

    def set(self, site: str, **columns: object) -> None:
        """Change what the link state knows about a site, as time would."""
        assignments = ", ".join(f"{name} = :{name}" for name in columns)
        with self.state.session() as session:
            session.execute(
                text(f"UPDATE node SET {assignments} WHERE name = :site"), {**columns, "site": site}
            )


@functools.cache
def _empty() -> bytes:
    """A database with all of Flower's tables; its migrations take half a second."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "link.sqlite"
        open_link_state(database).state()
        with closing(sqlite3.connect(database)) as opened:
            opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return database.read_bytes()


def new_link_state(database: Path) -> LinkStateFactory:
    """What `open_link_state` gives for a new file, in a hundredth of the time."""
    database.write_bytes(_empty())
    with mock.patch("flwr.supercore.sql_mixin.run_migrations"):
        return open_link_state(database)


@contextmanager
def linked(
    folder: Path, authority: Authority, *sites: str, return_seconds: float = 60.0
) -> Iterator[Link]:
    """A link in `folder` at which these sites are enrolled."""
    database = folder / "link.sqlite"
    factory = new_link_state(database)
    keys = {site: new_private_key() for site in sites}
    state = factory.state()
    place_nodes(state, {site: key.public_key() for site, key in keys.items()})
    run_id = begin_run(state, FEDERATION, CODE)
    own: set[str] = set()
    grid = LinkGrid(state, run_id, return_seconds=return_seconds, own=own)
    app = fleet_app(factory, own)
    link = Link(database, authority, keys, state, run_id, grid, app)
    with ExitStack() as stack:
        port = stack.enter_context(listening(app, "127.0.0.1", 0, *authority.files))
        link.address = f"127.0.0.1:{port}"
        try:
            yield link
        finally:
            for client in link.clients:
                client.close()


def take(connection: Connection, largest: int = 10**9) -> Message | None:
    """The next message of a client, whole."""
    received = connection.receive()
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
