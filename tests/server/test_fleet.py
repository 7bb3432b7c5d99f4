"""A client has a message at once, also one whose delivery was lost, and nothing else is answered."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest

from client.connection import Unreachable
from server import fleet
from server.fleet import HANDLERS, PULL
from tests.link import Link, reply_to, signed_request, take


def seconds(action) -> tuple[float, object]:
    begin = time.monotonic()
    result = action()
    return time.monotonic() - begin, result


def test_a_message_reaches_who_waits_for_it_at_once(link):
    client, other = link.connect("a"), link.connect("b")
    threading.Timer(0.3, lambda: link.send("a")).start()
    waited = threading.Thread(target=lambda: other.receive(wait=2))
    waited.start()
    took, received = seconds(lambda: client.receive(wait=5))
    assert received is not None
    assert 0.25 < took < 2
    assert waited.is_alive(), "another site's message is another's"
    waited.join()


def test_who_does_not_wait_is_answered_at_once(link):
    client = link.connect("a")
    took, received = seconds(client.receive)
    assert received is None
    assert took < 0.5


def test_a_wait_ends_when_it_said_or_when_the_server_has_had_enough(link, monkeypatch):
    client = link.connect("a")
    took, received = seconds(lambda: client.receive(wait=1))
    assert received is None
    assert 0.9 < took < 3
    monkeypatch.setattr(fleet, "LONGEST_WAIT", 0.1)
    took, received = seconds(lambda: client.receive(wait=1000))
    assert received is None
    assert took < 0.9


def test_a_message_that_is_there_already_is_not_waited_for(link):
    client = link.connect("a")
    link.send("a")
    took, received = seconds(lambda: client.receive(wait=5))
    assert received is not None
    assert took < 2


def test_a_message_whose_delivery_was_lost_is_offered_again_to_who_has_nothing_in_hand(link):
    client = link.connect("a")
    sent = link.send("a")
    assert client.receive() is not None
    assert client.receive() is None, "it is at work on it, as far as is known"
    message = take(client, wait=1)
    assert message.metadata.message_id == sent
    client.send(reply_to(client, message))
    assert client.receive(wait=1) is None, "answered, though not yet taken"
    assert link.pull(sent).has_content()


def test_only_the_newest_message_is_offered_again(link):
    client = link.connect("a")
    link.send("a")
    assert take(client) is not None
    newer = link.send("a")
    for _ in range(3):
        assert take(client, wait=1).metadata.message_id == newer


def test_a_message_for_a_request_that_broke_off_comes_with_the_next(link):
    client = link.connect("a")
    http = client._client._client
    before, http.timeout = http.timeout, httpx.Timeout(0.3)
    with pytest.raises(Unreachable, match="stalled"):
        client.receive(wait=2)
    http.timeout = before
    sent = link.send("a")
    time.sleep(0.3)
    assert take(client, wait=1).metadata.message_id == sent


def post(link: Link, path: str, method: str = "POST", **changes) -> int:
    """The status of a request with the site's signature."""
    client = link.connect("a")
    content = changes.get("content", PullMessagesRequest(node=client._node).SerializeToString())
    kind = {"content-type": changes.get("kind", "application/protobuf")}
    request = signed_request(link, "a", path, content, method=method, **kind)
    try:
        return client._client._client.send(request).status_code
    finally:
        client.close()


def test_what_is_no_request_is_refused(link):
    assert post(link, PULL) == 200
    assert post(link, PULL, method="GET") == 405
    assert post(link, "/health") == 405
    for path in HANDLERS:
        assert post(link, path, content=b"\xff\xff") == 400, path
        assert post(link, path, kind="text/html") in (415, 400), path  # 400: by the gate
    assert post(link, PULL, content=b"") == 401, "nobody's node"


def test_a_fault_inside_is_a_500_without_details(link, monkeypatch):
    def broken(*_):
        raise KeyError("a secret")

    monkeypatch.setattr(link.state, "get_message_ins", broken)
    with pytest.raises(Unreachable, match="HTTP 500") as caught:
        link.connect("a").receive()
    assert "secret" not in str(caught.value)
