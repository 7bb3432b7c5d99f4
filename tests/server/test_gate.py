"""An outsider costs nothing, and a hostile site's reply touches nothing that is not its own."""

from __future__ import annotations

import contextlib
import math
import random
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.common.serde import recorddict_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree

from client.connection import Connection, RunOver, Unreachable
from common.few_connections import Accepted, FewConnections
from server import gate, superlink
from server.gate import DEEPEST, LONGEST_REASON, MOST_PIECES, reply_problem
from tests.link import Link, linked, reply_to, signed_request, take, until

HASH = "ab" * 32


@pytest.fixture(scope="module")
def honest(tmp_path_factory, authority) -> bytes:
    """What an honest client announces as its reply, as it goes over the line."""
    seen: list[PushMessagesRequest] = []
    with linked(tmp_path_factory.mktemp("link"), authority, "a") as link:
        client = link.connect("a")
        link.send("a")
        reply = reply_to(client, take(client))
        push = client._client.PushMessages
        client._client.PushMessages = lambda request: seen.append(request) or push(request)
        assert client.send(reply)
    return seen[0].SerializeToString()


@pytest.fixture
def announced(honest: bytes) -> PushMessagesRequest:
    """The same, to be spoilt."""
    return PushMessagesRequest.FromString(honest)


def chain(depth: int, name: str = "cd" * 32) -> ObjectTree:
    tree = ObjectTree(object_id=name)
    for _ in range(depth):
        tree = ObjectTree(object_id="cd" * 32, children=[tree])
    return tree


def test_an_honest_reply_passes(announced):
    assert reply_problem(announced.SerializeToString(), set()) == ""
    announced.messages_list[0].error.reason = "x" * LONGEST_REASON
    assert reply_problem(announced.SerializeToString(), set()) == ""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r.ClearField("messages_list"), "not exactly one message"),
        (lambda r: r.messages_list.append(r.messages_list[0]), "not exactly one message"),
        (lambda r: r.ClearField("message_object_trees"), "not exactly one message"),
        (lambda r: r.message_object_trees.add(), "not exactly one message"),
        (lambda r: r.messages_list[0].metadata.ClearField("reply_to_message_id"), "to nothing"),
        (lambda r: setattr(r.messages_list[0].metadata, "src_node_id", 5), "another node's name"),
        (lambda r: r.node.ClearField("node_id"), "another node's name"),
        (lambda r: setattr(r.messages_list[0].metadata, "ttl", math.nan), "no time"),
        (lambda r: setattr(r.messages_list[0].metadata, "ttl", math.inf), "no time"),
        (lambda r: setattr(r.messages_list[0].metadata, "ttl", -1.0), "no time"),
        (lambda r: setattr(r.messages_list[0].metadata, "ttl", 1e12), "no time"),
        (
            lambda r: setattr(r.messages_list[0].error, "reason", "x" * (LONGEST_REASON + 1)),
            "too long",
        ),
        (lambda r: setattr(r.message_object_trees[0], "object_id", "A" * 64), "no hash"),
        (lambda r: setattr(r.message_object_trees[0], "object_id", "../x"), "no hash"),
        (lambda r: r.message_object_trees[0].children.add(), "no hash"),
        (lambda r: r.message_object_trees[0].CopyFrom(chain(DEEPEST + 1)), "too many pieces"),
        (
            lambda r: r.message_object_trees[0].children.extend([chain(0)] * (MOST_PIECES + 1)),
            "too many pieces",
        ),
        (lambda r: r.message_object_trees[0].CopyFrom(chain(3, HASH)), "an object of the server"),
        (lambda r: setattr(r.messages_list[0].metadata, "message_id", "cd" * 32), "its pieces"),
    ],
)
def test_what_no_honest_site_sends_is_refused(announced, spoil, said):
    spoil(announced)
    assert said in reply_problem(announced.SerializeToString(), {HASH})


def test_a_head_that_holds_content_is_refused(announced):
    content = recorddict_to_proto(RecordDict({"x": ConfigRecord({"a": 1}), "y": ArrayRecord()}))
    announced.messages_list[0].content.CopyFrom(content)
    assert "holds content" in reply_problem(announced.SerializeToString(), set())


def test_any_bytes_at_all_are_judged(honest):
    noise = random.Random(3)
    outcomes = set()
    for _ in range(500):
        spoilt = bytearray(honest)
        spoilt[noise.randrange(len(spoilt))] = noise.randrange(256)
        whole = noise.randrange(5)
        end = len(spoilt) if whole else noise.randrange(1, len(spoilt))
        outcomes.add(reply_problem(bytes(spoilt[:end]), set()))
    assert "it is no protobuf message" in outcomes
    assert len(outcomes) > 3
    assert reply_problem(noise.randbytes(1000), set()) != ""


def test_a_deep_tree_is_judged_without_being_walked_to_its_end():
    body = PushMessagesRequest(message_object_trees=[chain(60)]).SerializeToString()
    assert reply_problem(body, set()) != ""


def test_an_objects_name_that_the_server_has_sent_cannot_be_claimed(link):
    """Its pieces would be replaced, or deleted with the reply, for all sites."""
    a, b = link.connect("a"), link.connect("b")
    link.send("a")
    sent = link.send("b")
    task = take(a)
    reply = reply_to(a, task, task.content)  # its pieces are the server's own
    with pytest.raises(RunOver, match="HTTP 400"):
        a.send(reply)
    assert take(b).content == task.content
    with pytest.raises(RunOver, match="HTTP 400"):
        b.send(reply_to(b, task))  # nor does b answer for a
    assert link.pull(sent) is None


def test_an_error_reply_of_a_site_passes_the_gate(link):
    client = link.connect("a")
    sent = link.send("a")
    task = take(client)
    reply_to(client, task)
    assert client.send(Message(Error(code=2, reason="x" * LONGEST_REASON), reply_to=task))
    assert link.pull(sent).has_error()
    link.send("a")
    task = take(client)
    reply_to(client, task)
    with pytest.raises(RunOver, match="HTTP 400"):
        client.send(Message(Error(code=2, reason="x" * (LONGEST_REASON + 1)), reply_to=task))


# --------------------------------------------------------------------------------- connections


def tls(link: Link) -> ssl.SSLSocket:
    host, _, port = link.address.rpartition(":")
    context = ssl.create_default_context(cadata=link.authority.ca)
    plain = socket.create_connection((host, int(port)), timeout=20)
    return context.wrap_socket(plain, server_hostname=host)


def ends(sock: socket.socket) -> bool:
    """Does the other side close it, within the socket's patience?"""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        return sock.recv(100) == b""
    return True


@contextlib.contextmanager
def narrow_link(folder, authority, monkeypatch, **limits) -> Iterator[Link]:
    for name, value in limits.items():
        monkeypatch.setattr(superlink, name, value)
    with linked(folder, authority, "a", "b") as link:
        yield link


@pytest.fixture
def seen(monkeypatch) -> list[Accepted]:
    """Every connection that a server of this process accepts, in order."""
    accepted: list[Accepted] = []
    accept = FewConnections.accept

    def noting(listening: FewConnections):
        connection, address = accept(listening)
        accepted.append(connection)
        return connection, address

    monkeypatch.setattr(FewConnections, "accept", noting)
    return accepted


def test_a_connection_that_asks_nothing_is_closed(tmp_path, authority, monkeypatch, seen):
    with narrow_link(tmp_path, authority, monkeypatch, FIRST_SECONDS=0.5) as link:
        begin = time.monotonic()
        with tls(link) as silent:
            assert ends(silent)
        host, _, port = link.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as without_tls:
            assert ends(without_tls)
        assert time.monotonic() - begin < 15
        with tls(link) as slow:
            slow.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n")
            assert ends(slow), "half a request is none"
        before = len(seen)
        client = link.connect("a")
        time.sleep(0.7)
        assert client.receive() is None
        (own,) = seen[before:]  # who asks is served, and on the same connection
        assert own.kept
        assert not own.dropped


def test_a_flood_without_a_key_costs_no_files_and_disturbs_no_hospital(
    tmp_path, authority, monkeypatch
):
    limits = {"MOST_PER_ADDRESS": 4, "FIRST_SECONDS": 60.0}
    with (
        narrow_link(tmp_path, authority, monkeypatch, **limits) as link,
        contextlib.ExitStack() as stack,
    ):
        host, _, port = link.address.rpartition(":")
        client = link.connect("a")
        files = len(list(Path("/proc/self/fd").iterdir()))
        flood = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            for _ in range(60)
        ]
        until(lambda: sum(map(closed, flood)) >= 57, "all but three were closed")

        def servers_files() -> int:  # the server is in this process
            return len(list(Path("/proc/self/fd").iterdir())) - files - len(flood)

        until(lambda: servers_files() <= 4, "their files are closed too")
        assert client.receive() is None
        late = link.connection("b")
        until(lambda: opened(late), "a newer connection has a place")
        assert late.receive() is None


def closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def opened(client: Connection) -> bool:
    with contextlib.suppress(Unreachable):
        client.open()
        return True
    return False


def test_a_body_that_does_not_come_is_not_waited_for(link, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    client = link.connect("a")

    def half() -> Iterator[bytes]:
        yield b"x" * 10
        time.sleep(1.5)
        yield b"x" * 90

    length = {"content-length": "100"}
    request = signed_request(link, "a", "/v1/fleet/push-object", half(), **length)
    assert client._client._client.send(request).status_code == 408
    assert client.receive() is None, "whose connection is as good as new"
