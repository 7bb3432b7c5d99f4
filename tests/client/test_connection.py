"""A hospital's connection over real TLS: what goes wrong is said in words, and nothing is sent twice."""

from __future__ import annotations

import gzip
import http.server
import random
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import flwr
import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

import client.connection as module
import server.certificates as certificates
from client.connection import (
    AlreadyConnected,
    Connection,
    Refused,
    RunOver,
    TooLarge,
    UnknownKey,
    Unreachable,
)
from common.keys import fingerprint, new_private_key
from server.superlink import begin_run, listening
from tests.link import (
    CODE,
    FEDERATION,
    Authority,
    Link,
    counting,
    reply_to,
    take,
    until,
    without_nonce,
)


def weights(seed: int, arrays: int = 4, size: int = 5000) -> RecordDict:
    noise = random.Random(seed)
    record = {f"t{i}": Array("uint8", (size,), "raw", noise.randbytes(size)) for i in range(arrays)}
    return RecordDict({"weights": ArrayRecord(record)})


def refusal(kind: type[RuntimeError], action: Callable[[], object], address: str) -> str:
    """The text of exactly this kind of failure; it says where."""
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{address}: ")
    return str(caught.value)


def connection_to(address: str, ca: str) -> Connection:
    return Connection(address, ca, new_private_key())


# ------------------------------------------------------------------------------ who is there


def issued(authority: Authority, folder: Path) -> tuple[Path, Path]:
    """A new server certificate of that CA, as `server.certificates` now makes it."""
    folder.mkdir()
    for name in ("ca.key", "ca.crt"):
        shutil.copy2(authority.folder / name, folder)
    files = folder / "server.key", folder / "server.crt"
    ca = folder / "ca.key", folder / "ca.crt"
    certificates.issue_server_certificate(*ca, *files, ["fed.example.org"])
    return files[1], files[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"BACKDATED": timedelta(days=3), "SERVER_DAYS": 2}, "has expired"),
        ({"BACKDATED": timedelta(days=-3)}, "is not valid yet: check this machine's clock"),
        ({"ALWAYS": ("localhost",)}, "is for another name or address"),
    ],
)
def test_a_certificate_that_cannot_be_right_is_refused(
    link, tmp_path, authority, monkeypatch, change, said
):
    for name, value in change.items():
        monkeypatch.setattr(certificates, name, value)
    with listening(link.app, "127.0.0.1", 0, *issued(authority, tmp_path / "other")) as port:
        address = f"127.0.0.1:{port}"
        text = refusal(Refused, link.connection("a", address=address).open, address)
    assert said in text
    if "clock" not in said:
        assert "fed-server renew-certificate" in text
    assert link.grid.contacts()["a"].last is None, "nothing has arrived"


def test_a_server_of_another_authority_hears_nothing(link, tmp_path):
    from tests.link import make_certificates

    other = make_certificates(tmp_path / "other")
    client = link.connection("a", ca=other.ca)
    text = refusal(Refused, client.open, link.address)
    assert "not from the CA in this site's invitation" in text
    assert "Nothing was sent" in text
    assert link.grid.contacts()["a"].last is None


def test_an_unknown_key_is_told_which_it_is_and_what_to_do(link):
    link.keys["c"] = new_private_key()
    text = refusal(UnknownKey, link.connection("c").open, link.address)
    assert fingerprint(link.keys["c"].public_key()) in text
    assert "fed-server admit" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (600, "10 minutes ahead of the coordinator's"),
        (8, "8 s ahead of"),
        (-600, "10 minutes behind the coordinator's"),
        (-345, "6 minutes behind"),
        (90_000, "1500 minutes ahead of"),
    ],
)
def test_a_wrong_clock_is_named(link, monkeypatch, seconds, said):
    apart = timedelta(seconds=seconds)

    class Wrong(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + apart

    monkeypatch.setattr(module, "datetime", Wrong)
    there = "flwr.supernode.node_auth_http_interceptor.now"
    monkeypatch.setattr(there, lambda: datetime.now(UTC) + apart)
    text = refusal(Refused, link.connection("a").open, link.address)
    minutes_or_seconds = text.partition("clock is ")[2]
    expected = {said, said.replace("8 s", "9 s"), said.replace("8 s", "7 s")}
    assert any(minutes_or_seconds.startswith(words) for words in expected), text
    assert "Set the clock (NTP)" in text


def test_a_clock_that_is_a_little_wrong_is_no_obstacle(link, monkeypatch):
    for seconds in (3, -280):
        apart = timedelta(seconds=seconds)
        monkeypatch.setattr(
            "flwr.supernode.node_auth_http_interceptor.now",
            lambda apart=apart: datetime.now(UTC) + apart,
        )
        link.connect("a").close()


def test_a_second_client_with_the_same_key_is_told_so(link):
    first = link.connect("a")
    second = link.connection("a")
    text = refusal(AlreadyConnected, second.open, link.address)
    assert "another client is connected with this site's key" in text
    assert issubclass(AlreadyConnected, Unreachable), "it is worth trying again"
    node = first.node_id
    first.close()
    second.open()
    assert second.node_id == node


# --------------------------------------------------------------------------- who is not there


def test_a_server_that_is_away_is_unreachable(link, authority):
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    text = refusal(Unreachable, connection_to(address, authority.ca).open, address)
    assert "nothing listens there now" in text
    address = "no-such-host.invalid:8443"
    text = refusal(Unreachable, connection_to(address, authority.ca).open, address)
    assert text.endswith("the name cannot be resolved")


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for_for_ever(authority, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", httpx.Timeout(0.3))
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        text = refusal(Unreachable, connection_to(address, authority.ca).open, address)
    assert text.endswith(
        ("the connection stalled", "no answer (a firewall may block the outbound connection)")
    )


def test_every_way_to_fail_has_words():
    assert module._plain(httpx.ConnectTimeout("")).startswith("no answer (a firewall")
    assert module._plain(httpx.ReadTimeout("")) == "the connection stalled"
    assert module._plain(httpx.ReadError("")) == "the connection failed (ReadError)"
    assert module._plain(httpx.ReadError("cut")) == "the connection failed (cut)"


@contextmanager
def answering(
    authority: Authority, status: int, body: bytes, *, tls: bool = True, **headers: str
) -> Iterator[str]:
    """Some other server, with a certificate that is right."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("content-type", "application/protobuf")
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ExitStack() as stack:
        server = stack.enter_context(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*authority.files)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield f"127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (404, b"<html>", Refused, "is not a fedbrats server (HTTP 404); check the address"),
        (403, b"", Refused, "is not a fedbrats server (HTTP 403)"),
        (500, b"oops", Unreachable, "the coordinator has a problem (HTTP 500)"),
        (503, b'{"code": "x"}', Unreachable, "the coordinator has a problem (HTTP 503)"),
        (502, b'{"code": null, "a": [', Unreachable, "(HTTP 502)"),
        (200, b"<html>welcome</html>", Unreachable, "answers in an unknown way"),
        (401, b"", UnknownKey, "does not know this site's key"),
    ],
)
def test_another_server_is_recognised(authority, status, body, kind, said):
    with answering(authority, status, body) as address:
        assert said in refusal(kind, connection_to(address, authority.ca).open, address)


def test_a_server_without_tls_hears_nothing(authority):
    with answering(authority, 200, b"", tls=False) as address:
        text = refusal(Unreachable, connection_to(address, authority.ca).open, address)
    assert "the connection failed (" in text


def test_another_flower_is_refused(authority, monkeypatch):
    monkeypatch.setattr(flwr, "__version__", "1.42.0")
    with pytest.raises(RuntimeError, match=r"needs flwr 1\.41\.0, found 1\.42\.0"):
        connection_to("127.0.0.1:1", authority.ca)


# --------------------------------------------------------------------------------- messages


def test_it_tells_what_run_a_message_is_of(link):
    client = link.connect("a")
    assert client.run(link.run_id) == (FEDERATION, CODE)
    link.state.stop_run(link.run_id)
    for action in (
        lambda: client.run(link.run_id),
        lambda: client._piece(link.run_id, "0" * 64),
    ):
        assert "is over" in refusal(RunOver, action, link.address)
    assert begin_run(link.state, "ee" * 16, CODE) != link.run_id


def pieces_fetched(client: Connection) -> tuple[Message, int]:
    """The next message, and how many pieces of it were fetched."""
    with counting(client, "PullObject") as ids:
        message = take(client)
    without_nonce(message.content)
    return message, len(ids)


def test_pieces_of_the_last_message_are_not_fetched_again(link):
    """A round's model is first trained on, then evaluated by who only evaluates: once is enough."""
    client = link.connect("a")
    every = 1 + len(get_all_nested_objects(weights(1)))
    link.send("a", weights(1), kind="train")
    first, pieces = pieces_fetched(client)
    assert pieces == every
    link.send("a", weights(1), kind="evaluate")
    second, pieces = pieces_fetched(client)
    assert pieces == 1, "only the message's head"
    assert second.metadata.message_type == "evaluate"
    assert second.content == first.content == weights(1)
    link.send("a", weights(2))
    third, pieces = pieces_fetched(client)
    assert pieces == every
    assert third.content == weights(2)
    link.send("a", weights(1))
    assert pieces_fetched(client)[1] == every, "only the last message's are kept"


def test_a_message_that_is_too_large_is_not_fetched_to_its_end(link, monkeypatch):
    client = link.connect("a")
    content = weights(1, arrays=40, size=5000)
    size = sum(len(obj.deflate()) for obj in get_all_nested_objects(content).values())
    monkeypatch.setattr(module, "LARGEST_OVERHEAD", 20_000)
    link.send("a", content)
    with (
        counting(client, "PullObject") as ids,
        pytest.raises(TooLarge, match="more than 30000 bytes of weights"),
    ):
        take(client, 30_000)
    assert len(ids) < 30, "of 122"
    link.send("a", content)
    assert take(client, size).content == content, "the bound is exact enough"
    monkeypatch.setattr(module, "MOST_PIECES", 10)
    link.send("a", weights(3, arrays=20, size=10))
    with pytest.raises(TooLarge):
        take(client, 10**9)
    assert take(client) is None


def test_what_cannot_be_read_is_refused(link, monkeypatch):
    client = link.connect("a")
    link.send("a", weights(1))
    head, tree = client.receive()
    bare = ObjectTree(object_id=tree.object_id)  # without the children
    with pytest.raises(TooLarge, match="cannot be read"):
        client.fetch(head, bare, 10**9)
    (content,) = tree.children
    with pytest.raises(TooLarge, match="not the message that was announced"):
        client.fetch(head, content, 10**9)
    assert client.fetch(head, tree, 10**9).content == weights(1)


def test_a_message_must_be_the_one_that_its_head_announced(link):
    """The head is what is checked before anything is fetched: kind, run and deadline."""
    client = link.connect("a")
    link.send("a", weights(1), kind="train")
    head, tree = client.receive()
    run_id, true = head.metadata.run_id, dict(head.metadata.__dict__)
    client._piece = lambda _, object_id, piece=client._piece: piece(run_id, object_id)
    for name in ("run_id", "src_node_id", "dst_node_id", "created_at", "ttl", "message_type"):
        assert f"_{name}" in true, name
        head.metadata.__dict__[f"_{name}"] = "evaluate" if name == "message_type" else 5
        with pytest.raises(TooLarge, match="not the message that was announced"):
            client.fetch(head, tree, 10**9)
        head.metadata.__dict__.update(true)
    assert client.fetch(head, tree, 10**9).content["weights"] == weights(1)["weights"]


def test_what_is_no_message_at_all_ends_nothing(link):
    """A client must live through whatever a server answers."""
    client = link.connect("a")
    pull = client._client.PullMessages
    for spoil in (
        lambda response: setattr(response.messages_list[0].metadata, "message_type", "rm -rf"),
        lambda response: response.ClearField("message_object_trees"),
    ):
        link.send("a")
        response = pull(PullMessagesRequest(node=client._node))
        spoil(response)
        client._client.PullMessages = lambda request, response=response: response
        assert "in an unknown way" in refusal(Unreachable, client.receive, link.address)
        client._client.PullMessages = pull
    link.send("a")
    assert take(client) is not None


def test_a_message_that_was_given_up_meanwhile_is_over(link):
    client = link.connect("a")
    sent = link.send("a", weights(1))
    head, tree = client.receive()
    link.expire(sent)
    text = refusal(RunOver, lambda: client.fetch(head, tree, 10**9), link.address)
    assert "not offered any more" in text


class Cut:
    """Breaks the client's connection at every `every`-th piece of a reply that it sends."""

    def __init__(self, client: Connection, every: int) -> None:
        self._push, self._every, self.calls = client._client.PushObject, every, 0
        self.pushed: list[str] = []
        client._client.PushObject = self

    def __call__(self, request):
        self.calls += 1
        if self.calls % self._every == 0:
            raise httpx.WriteError("cut")
        self.pushed.append(request.object_id)
        return self._push(request)


def test_sending_goes_on_where_it_was_cut(link):
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client), weights(5, arrays=10))
    cut = Cut(client, every=4)
    attempts = 0
    while True:
        attempts += 1
        try:
            assert client.send(reply) is True
            break
        except Unreachable:
            assert link.pull(sent) is None
    objects = get_all_nested_objects(reply)
    assert sorted(cut.pushed) == sorted(objects), "each once"
    assert attempts == 1 + (len(objects) - 1) // 3
    assert cut.calls == len(objects) + attempts - 1
    assert link.pull(sent).content == weights(5, arrays=10)


def test_an_answer_that_arrived_before_the_connection_broke_is_not_sent_twice(link):
    """The server has all of it, but its last word is lost: sending again finds nothing to do."""
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client), weights(5))
    last = len(get_all_nested_objects(reply))
    push, calls = client._client.PushObject, []

    def pushing(request):
        calls.append(request.object_id)
        answer = push(request)
        if len(calls) == last:
            raise httpx.ReadError("cut")
        return answer

    client._client.PushObject = pushing
    with pytest.raises(Unreachable):
        client.send(reply)
    assert client.send(reply) is True, "it was waited for, and it has arrived"
    assert len(calls) == last
    assert link.pull(sent).content == weights(5)


def test_nobody_waiting_is_false_and_no_error(link):
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client))
    assert link.expire(sent).has_error()
    assert client.send(reply) is False
    assert client.send(reply) is False


# --------------------------------------------------------------------- what it takes no part in


def test_no_redirection_is_followed(link, authority):
    """One address was agreed to."""
    with answering(authority, 302, b"", Location=f"https://{link.address}/health") as address:
        text = refusal(Refused, connection_to(address, authority.ca).open, address)
    assert "a redirection, which is not followed" in text


def test_an_answer_is_neither_packed_nor_endless(authority, monkeypatch):
    bomb = gzip.compress(bytes(10**6))
    with answering(authority, 200, bomb, **{"content-encoding": "gzip"}) as address:
        text = refusal(Unreachable, connection_to(address, authority.ca).open, address)
    assert "the answer is packed" in text
    monkeypatch.setattr(module, "LARGEST_ANSWER", 1000)
    with answering(authority, 200, bytes(2000)) as address:
        text = refusal(Unreachable, connection_to(address, authority.ca).open, address)
    assert "too large or too slow" in text


def test_what_is_under_way_can_be_ended(link):
    """`check` is asked again and again, also between the pieces of one message."""

    class Over(Exception):
        pass

    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) > limit:
            raise Over

    limit = 10**9
    client = Connection(link.address, link.authority.ca, link.keys["a"], check)
    link.clients.append(client)
    client.open()
    link.send("a", weights(1))
    received = client.receive()
    limit = len(asked) + 6
    with pytest.raises(Over):
        client.fetch(*received, 10**9)
    assert len(asked) == limit + 1
    limit = 10**9
    message = client.fetch(*received, 10**9)
    reply = reply_to(client, message, weights(2))
    limit = len(asked) + 6
    with pytest.raises(Over):
        client.send(reply)
    limit = 10**9
    assert client.send(reply) is True


# ---------------------------------------------------------------------------- signs of life


class Impatient(threading.Event):
    """Time flies: waits a hundredth of what it is asked to."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(None if timeout is None else timeout / 100)


def test_it_sends_signs_of_life_by_itself(link: Link):
    client = link.connection("a")
    client._closing = Impatient()
    client.open()
    link.set("a", online_until=time.time() - 1)
    assert not link.grid.contacts()["a"].online
    until(lambda: link.grid.contacts()["a"].online, "a heartbeat")
    spoken = client.last_contact
    until(lambda: client.last_contact > spoken, "another")
    client.close()
    assert not link.grid.contacts()["a"].online, "goodbye was said"
    client._heartbeat.join(timeout=10)
    assert not client._heartbeat.is_alive()


def test_goodbye_to_a_server_that_is_gone_is_quick_and_quiet(tmp_path, authority):
    from tests.link import linked

    with linked(tmp_path, authority, "a") as link:
        client = link.connect("a")
        link.clients.clear()
    begin = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - begin < 10
    assert client.last_contact is not None


def test_last_contact_is_when_the_server_last_answered(link):
    client = link.connection("a")
    assert client.last_contact is None
    begin = datetime.now(UTC)
    client.open()
    assert begin <= client.last_contact <= datetime.now(UTC)
    opened = client.last_contact
    with pytest.raises(RuntimeError):
        client.run(12345)
    assert client.last_contact == opened
    client.receive()
    assert client.last_contact > opened


def test_a_content_of_plain_records_travels_unchanged(link):
    client = link.connect("a")
    about = {"text": "Ä\n", "n": -(2**40), "f": 0.1, "b": True}
    content = RecordDict({"c": ConfigRecord(about)})
    sent = link.send("a", RecordDict({"c": ConfigRecord(about)}))
    message = take(client)
    assert without_nonce(message.content) == content
    client.send(reply_to(client, message, content))
    assert link.pull(sent).content == content
