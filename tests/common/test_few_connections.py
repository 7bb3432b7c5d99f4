"""Strangers' connections never take a server's last place or the process's files: real sockets here."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn

from common.few_connections import SPARE, Accepted, FewConnections
from tests.browser import eventually

MOST = 20


@dataclass
class Server:
    """Answers "hello"; keeps the connection of who asks for /keep."""

    sock: FewConnections
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    async def app(self, scope, receive, send) -> None:
        if scope["path"] == "/keep":
            self.sock.keep(scope["client"])
        headers = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"hello"})


@contextlib.contextmanager
def served(*, seconds: float, most_per_address: int | None = None) -> Iterator[Server]:
    listening = socket.create_server(("127.0.0.1", 0))
    few = FewConnections(listening, most=MOST, seconds=seconds, most_per_address=most_per_address)
    server = Server(few)
    config = uvicorn.Config(
        server.app,
        log_config=None,
        lifespan="off",
        interface="asgi3",
        loop="asyncio",
        ws="none",
        timeout_keep_alive=60,
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [few]}, daemon=True)
    thread.start()
    eventually(lambda: running.started, "the server")
    try:
        yield server
    finally:
        running.should_exit = running.force_exit = True
        thread.join(5)
        few.close()


@contextlib.contextmanager
def idle(port: int, number: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(number):
            made.append(
                stack.enter_context(
                    socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))
                )
            )
        yield made


def says(sock: socket.socket, path: str = "/") -> bytes:
    sock.settimeout(5)
    try:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"hello") and (part := sock.recv(1000)):
            answer += part
    except OSError:
        return b""
    return answer


def asks(port: int, path: str = "/") -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        return says(sock, path)


def closed(sock: socket.socket) -> bool:
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_among_hundreds_of_idle_connections_a_request_is_answered_and_few_files_are_open():
    with served(seconds=60) as server:
        before = files()
        with idle(server.port, 300):
            assert asks(server.port).endswith(b"hello")
            ours = files() - before - 300  # both ends are in this process
            assert ours <= MOST + SPARE
            eventually(lambda: files() - before - 300 <= MOST, "what is in excess to be closed")


def test_where_those_that_gave_way_do_not_go_a_newcomer_is_refused(monkeypatch):
    def only_marked(one: Accepted) -> None:
        if not one.dropped:
            one.dropped, one.dropped_at = True, time.monotonic()

    monkeypatch.setattr(Accepted, "drop", only_marked)
    with served(seconds=60) as server, idle(server.port, MOST + SPARE):
        begin = time.monotonic()
        assert asks(server.port) == b""
        assert time.monotonic() - begin < 4, "refused, not left in the queue"


def test_a_kept_connection_outlives_a_crowd_and_the_time_that_others_have():
    with (
        served(seconds=0.5) as server,
        socket.create_connection(("127.0.0.1", server.port), 5) as kept,
        socket.create_connection(("127.0.0.1", server.port), 5) as other,
    ):
        assert says(kept, "/keep").endswith(b"hello")
        assert says(other).endswith(b"hello")
        with idle(server.port, 3 * MOST) as crowd:
            eventually(lambda: all(closed(one) for one in crowd), "the end of the idle ones")
        eventually(lambda: closed(other), "the end of who is not kept")
        assert not closed(kept)
        assert says(kept).endswith(b"hello")


def test_half_a_request_wins_no_time():
    with served(seconds=0.5) as server, idle(server.port, 1) as (one,):
        one.sendall(b"GET / HTTP/1.1\r\nHost: ")
        begin = time.monotonic()
        eventually(lambda: closed(one), "its end")
        assert time.monotonic() - begin < 3


def test_where_all_places_are_kept_a_new_connection_is_refused():
    with served(seconds=60) as server, idle(server.port, MOST) as kept:
        assert all(says(one, "/keep") for one in kept)
        assert asks(server.port) == b""
        kept[0].close()
        eventually(lambda: asks(server.port), "a free place")
        assert says(kept[1]).endswith(b"hello")


def test_one_address_cannot_take_the_places_of_others():
    with (
        served(seconds=60, most_per_address=5) as server,
        idle(server.port, 2) as ours,
        idle(server.port, 50, source="127.0.0.2") as theirs,
    ):
        eventually(lambda: sum(not closed(one) for one in theirs) <= 5, "their share")
        assert all(says(one).endswith(b"hello") for one in ours)


def test_outside_an_event_loop_it_says_so_and_keeps_nothing():
    with (
        FewConnections(socket.create_server(("127.0.0.1", 0)), most=1, seconds=1) as few,
        pytest.raises(RuntimeError, match="event loop"),
        socket.create_connection(few.getsockname()),
    ):
        few.accept()
