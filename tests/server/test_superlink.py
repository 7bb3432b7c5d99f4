"""Nothing is served that is not allowed, and nobody who is not enrolled: on real sockets, over TLS."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import stat
from datetime import UTC, datetime, timedelta

import flwr
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import Status
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import in_memory_linkstate
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.routers.runtime.router import router as runtime_router
from flwr.superlink.routers.control.router import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router

from client.connection import Refused, RunOver, Unreachable
from common.keys import new_private_key
from server.gate import ALLOWED, LARGEST_HEAD, LARGEST_REQUEST
from server.link_state import new_link_state
from server.superlink import (
    CannotListen,
    begin_run,
    fleet_app,
    listening,
    place_nodes,
)
from tests.link import Link, make_certificates, reply_to, take

PROTOBUF = "application/protobuf"
PUSH = "/v1/fleet/push-messages"
SERVED = {  # written down again, so that nothing is added to `ALLOWED` unnoticed
    "/health",
    "/v1/fleet/activate-node",
    "/v1/fleet/deactivate-node",
    "/v1/fleet/send-node-heartbeat",
    "/v1/fleet/pull-messages",
    "/v1/fleet/push-messages",
    "/v1/fleet/get-run",
    "/v1/fleet/push-object",
    "/v1/fleet/pull-object",
}


def request(link: Link, method: str, path: str, body: bytes | None = b"", **headers: str) -> int:
    """The status that somebody outside gets who has only the CA certificate."""
    host, _, port = link.address.rpartition(":")
    context = ssl.create_default_context(cadata=link.authority.ca)
    with contextlib.closing(http.client.HTTPSConnection(host, int(port), context=context)) as https:
        https.request(method, path, body, headers)
        return https.getresponse().status


def paths_of(router) -> set[str]:
    paths: set[str] = set()
    for route in router.routes:
        inner = getattr(route, "original_router", None)  # how FastAPI keeps an included one
        paths |= paths_of(inner) if inner is not None else {route.path}
    return paths


# ------------------------------------------------------------------------------ what is served


def test_what_is_allowed_is_this_and_no_more():
    assert ALLOWED == SERVED
    assert paths_of(fleet_router) >= SERVED - {"/health"}


def test_no_other_route_of_flower_is_there(link):
    """Whoever reaches the port can start, list or stop no run, and register no node."""
    stock = paths_of(fleet_router) | paths_of(control_router) | paths_of(runtime_router)
    assert len(stock) > 70, "Flower has more to offer than it is let"
    others = stock - SERVED
    assert "/v1/control/start-run" in others
    assert "/v1/fleet/register-node" in others
    others |= {"/", "/docs", "/redoc", "/openapi.json", "/v1/control/no-such", "/healthz"}
    for path in sorted(others):
        for method in ("GET", "POST"):
            assert request(link, method, path) == 404, (method, path)


def test_a_path_cannot_be_written_so_that_it_passes(link):
    for path in (
        "//v1/control/list-runs",
        "/health/../v1/control/list-runs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/V1/FLEET/activate-node",
        "/v1/fleet/activate-node/",
    ):
        assert request(link, "POST", path) == 404, path
    assert request(link, "POST", "/health?x=/v1/control") == 405


def test_all_but_health_is_for_enrolled_keys_only(link):
    assert request(link, "GET", "/health", None) == 200
    for path in sorted(SERVED - {"/health"}):
        for kind in (PROTOBUF, "text/html"):
            assert request(link, "POST", path, b"", **{"content-type": kind}) == 401, path
        assert request(link, "GET", path, None) == 401, path
    link.keys["stranger"] = new_private_key()
    stranger = link.connection("stranger")
    with pytest.raises(Refused, match="does not know this site's key"):
        stranger.open()
    for node in (0, link.grid.contacts()["a"].node):  # it signs, but as itself
        stranger._node = Node(node_id=node)
        message = Message(RecordDict(), 1, "query")
        for step in (
            stranger.receive,
            lambda: stranger.run(link.run_id),
            lambda message=message: stranger.send(message),
            lambda: stranger._piece(link.run_id, "0" * 64),
        ):
            with pytest.raises((Refused, Unreachable)):
                step()
    stranger._node = None
    insider = link.connect("b")
    insider._node = Node(node_id=link.grid.contacts()["a"].node)
    with pytest.raises(Refused, match="does not know this site's key"):
        insider.receive()  # enrolled, but as another
    insider._node = Node(node_id=link.grid.contacts()["b"].node)
    insider.close()
    assert not any(contact.online for contact in link.grid.contacts().values())


def test_what_one_request_may_hold_is_bounded(link):
    path = "/v1/fleet/push-object"
    host, _, port = link.address.rpartition(":")
    context = ssl.create_default_context(cadata=link.authority.ca)
    with contextlib.closing(http.client.HTTPSConnection(host, int(port), context=context)) as https:
        for largest, path_ in ((LARGEST_REQUEST, path), (LARGEST_HEAD, PUSH)):
            https.putrequest("POST", path_)  # announced, not sent: refused before it is read
            https.putheader("content-length", str(largest + 1))
            https.endheaders()
            assert https.getresponse().status == 413, path_
            https.close()
        https.putrequest("POST", path)  # nor is what is not too large read of a stranger
        https.putheader("content-length", str(LARGEST_REQUEST))
        https.endheaders()
        assert https.getresponse().status == 401
    with contextlib.closing(http.client.HTTPSConnection(host, int(port), context=context)) as https:
        chunked = {"transfer-encoding": "chunked"}
        https.request("POST", path, iter([b"x"]), chunked, encode_chunked=True)
        assert https.getresponse().status == 411
    for host_ in ("", "a b", "x/y", "h" * 300):
        assert request(link, "GET", "/health", None, host=host_) == 400, host_


def test_only_tls_of_today_is_spoken(link):
    host, _, port = link.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"200" not in plain.recv(1000)
    context = ssl.create_default_context(cadata=link.authority.ca)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        socket.create_connection((host, int(port)), timeout=10) as old,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(old, server_hostname=host)


# --------------------------------------------------------------------------------- whose keys


def refused(link: Link, site: str) -> str:
    with pytest.raises(Refused) as caught:
        link.connect(site)
    return str(caught.value)


def test_keys_are_enrolled_revoked_and_enrolled_again(link):
    first = link.connect("a")
    node = first.node_id
    link.place("b")
    assert link.grid.contacts().keys() == {"b"}
    with pytest.raises(Refused, match="does not know this site's key"):
        first.receive()
    first.close()
    assert "site.pub" in refused(link, "a")
    link.place("a", "b")
    again = link.connect("a")
    assert again.node_id == node, "the same key is the same node"
    assert link.grid.contacts()["a"].online
    assert link.grid.contacts()["b"].last is None, "nobody else was touched"


def test_a_rotated_key_takes_the_name_over(link):
    old = link.connect("a")
    before = link.grid.contacts()["a"]
    old_key, link.keys["a"] = link.keys["a"], new_private_key()
    link.place("a", "b")
    contacts = link.grid.contacts()
    assert contacts.keys() == {"a", "b"}
    assert contacts["a"].node != before.node
    assert not contacts["a"].online, "the old key's client is not the new one's"
    with pytest.raises(Refused, match="does not know"):
        old.receive()
    old.close()
    assert link.connect("a").node_id == contacts["a"].node
    link.keys["a"] = old_key
    assert "does not know" in refused(link, "a")


def test_a_renamed_site_keeps_its_node(link):
    node = link.grid.contacts()["a"].node
    place_nodes(link.state, {"Oslo": link.keys["a"].public_key()})
    assert {name: c.node for name, c in link.grid.contacts().items()} == {"Oslo": node}


def test_placing_the_same_changes_nothing(link):
    link.connect("a")
    before = link.grid.contacts()
    link.place("a", "b")
    assert link.grid.contacts() == before


# ----------------------------------------------------------------------------- the link state


BIG = RecordDict({"c": ConfigRecord({"x": b"y" * 10**6})})


def test_after_a_restart_a_site_is_the_same_node_and_its_old_run_is_over(link, tmp_path):
    with listening(link.app, "127.0.0.1", 0, *link.authority.files) as port:
        client = link.connection("a", address=f"127.0.0.1:{port}")
        client.open()
        link.send("a")
        head, tree = client.receive()
        reply = reply_to(client, client.fetch(head, tree, 0))
    fresh = new_link_state(tmp_path / "fresh")
    place_nodes(fresh, {site: key.public_key() for site, key in link.keys.items()})
    run_id = begin_run(fresh, "ff" * 16, "cc" * 32)
    assert [run.status.status for run in fresh.get_run_info()] == [Status.RUNNING]
    with listening(fleet_app(fresh), "127.0.0.1", port, *link.authority.files):
        assert client.receive() is None, "it goes on where it was"
        for action in (lambda: client.send(reply), lambda: client._piece(link.run_id, "ab" * 32)):
            with pytest.raises(RunOver, match="is over"):
                action()
        assert client.run(run_id) == ("ff" * 16, "cc" * 32)
        (node,) = (n for n in fresh.get_node_info() if n.node_id == client.node_id)
        assert node.status == "registered"
        client._sign_of_life()
        assert node.status == "online", "by its next sign of life"
        client.close()


def test_pieces_of_an_earlier_process_are_cleared_away(link):
    client = link.connect("a")
    link.send("a", BIG)
    assert take(client)
    assert link.held()["files"]
    assert new_link_state(link.pieces).get_run_info() == []
    assert list(link.pieces.iterdir()) == []


def test_a_run_does_not_end_by_itself(link, monkeypatch):
    """Flower ends a run whose process sends it no signs of life; this one is the process."""
    later = datetime.now(UTC) + timedelta(days=30)
    for module in (in_memory_corestate, in_memory_linkstate):
        monkeypatch.setattr(module, "now", lambda: later)
    (run,) = link.state.get_run_info()
    assert run.status.status == Status.RUNNING


def test_the_pieces_are_their_owners_alone(link):
    assert stat.S_IMODE(link.pieces.stat().st_mode) & 0o077 == 0


def test_another_flower_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flwr, "__version__", "1.42.0")
    with pytest.raises(RuntimeError, match=r"needs flwr 1\.41\.0, found 1\.42\.0"):
        new_link_state(tmp_path / "pieces")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- listening


def cannot_listen(link: Link, host: str, port: int, *files) -> str:
    with (
        pytest.raises(CannotListen) as caught,
        listening(link.app, host, port, *(files or link.authority.files)),
    ):
        raise AssertionError("it listens")
    return str(caught.value)


def test_where_it_cannot_listen_is_said_in_words(link, tmp_path, authority):
    port = int(link.address.rpartition(":")[2])
    taken = cannot_listen(link, "127.0.0.1", port)
    assert f"Cannot listen on 127.0.0.1 port {port} (Address already in use" in taken
    assert "federation.yaml" in taken
    foreign = cannot_listen(link, "192.0.2.7", 0)
    assert "Cannot assign requested address" in foreign
    assert "server.listen" in foreign
    assert "no-such-host.invalid" in cannot_listen(link, "no-such-host.invalid", 0)

    other = make_certificates(tmp_path / "other")
    (certificate, _), (_, key) = authority.files, other.files
    unfit = cannot_listen(link, "127.0.0.1", 0, certificate, key)
    assert str(certificate) in unfit
    assert str(key) in unfit
    assert "fed-server renew-certificate" in unfit
    gone = tmp_path / "gone.crt"
    assert str(gone) in cannot_listen(link, "127.0.0.1", 0, gone, key)
    damaged = tmp_path / "damaged.crt"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert "renew-certificate" in cannot_listen(link, "127.0.0.1", 0, damaged, key)


def test_at_the_end_of_the_block_nobody_listens_any_more(link):
    with listening(link.app, "127.0.0.1", 0, *link.authority.files) as port:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    with listening(link.app, "127.0.0.1", port, *link.authority.files) as again:
        assert again == port, "and the port is free again at once"


def test_a_renewed_certificate_is_served_from_the_next_start_on(link, tmp_path, authority):
    """Of the same CA: hospitals need nothing new."""
    from server.certificates import renew_server_certificate

    for path in authority.folder.iterdir():
        shutil.copy2(path, tmp_path)
    names = ("ca.key", "ca.crt", "server.key", "server.crt")
    renew_server_certificate(*(tmp_path / name for name in names), [])
    files = tmp_path / "server.crt", tmp_path / "server.key"
    with listening(link.app, "127.0.0.1", 0, *files) as port:
        renewed = link.connection("a", address=f"127.0.0.1:{port}")
        renewed.open()
        message_id = link.send("a")
        assert isinstance(take(renewed), Message)
        assert message_id in link.state.get_message_ids_from_run_id(link.run_id)
        renewed.close()
