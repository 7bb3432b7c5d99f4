"""A local page answers its own user and nobody else: every request here goes over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from common.local_page import (
    SAME_PLACE,
    NotServed,
    Place,
    new_token,
    require_safe,
    serving,
)
from server.certificates import issue_server_certificate, make_authority
from tests.browser import chromium, complaints, eventually

TOKEN = "a-token"


def page() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.written = 0

    @app.api_route("/", methods=["GET", "HEAD"])
    def home() -> dict[str, str]:
        return {"says": "hello"}

    @app.post("/write")
    def write() -> dict[str, int]:
        app.state.written += 1
        return {"written": app.state.written}

    @app.get("/events")
    async def events() -> StreamingResponse:
        async def forever() -> AsyncIterator[str]:
            for number in range(10_000):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0.2)

        return StreamingResponse(forever(), media_type="text/event-stream")

    @app.get("/broken")
    def broken() -> None:
        raise ValueError("Jane Doe")

    return app


class Answer:
    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.text = answer.status, answer.headers, answer.read().decode()


def ask(address: str, path: str = "/", method: str = "GET", **headers: str) -> Answer:
    """Python names with `_` for `-`; `Host` is what the address says unless it is given."""
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=5)
    with contextlib.closing(connection):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=given)
        return Answer(connection.getresponse())


@pytest.fixture
def open_page() -> Iterator[str]:
    with serving(page(), Place()) as address:
        yield address


@pytest.fixture
def closed_page() -> Iterator[str]:
    with serving(page(), Place(token=TOKEN)) as address:
        yield address


def test_on_loopback_nobody_is_asked_for_a_token_that_there_is_not(open_page):
    answer = ask(open_page)
    assert (answer.status, answer.text) == (200, '{"says":"hello"}')
    assert answer.headers["Content-Security-Policy"] == SAME_PLACE
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] is None
    assert ask(open_page, method="HEAD").status == 200


@pytest.mark.parametrize(
    "name",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[2001:db8::1]"],
)
def test_a_name_that_was_bound_to_this_machine_from_outside_is_refused(open_page, name):
    assert ask(open_page, Host=name).status == 403


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:8050", "127.0.0.1:1", "[::1]:8050", "[::1]"]
)
def test_the_machines_own_names_are_served_so_that_a_tunnel_works(open_page, name):
    assert ask(open_page, Host=name).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null"])
def test_a_foreign_page_cannot_write(origin):
    app = page()
    with serving(app, Place()) as address:
        assert ask(address, "/write", "POST", Origin=origin).status == 403
        assert app.state.written == 0
        own = address.rstrip("/")
        assert ask(address, "/write", "POST", Origin=own).status == 200


def test_a_foreign_page_cannot_hold_the_event_stream_open_but_can_link_here(open_page):
    for site in ("cross-site", "same-site"):  # another port of this machine is the same site
        told = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "no-cors"}
        assert ask(open_page, "/events", **told).status == 403
        assert ask(open_page, **{**told, "Sec_Fetch_Mode": "navigate"}).status == 200


def test_the_token_is_taken_once_from_the_address_and_then_from_a_cookie(closed_page):
    assert closed_page.endswith(f"/?token={TOKEN}")
    assert ask(closed_page).status == 401
    assert ask(closed_page, "/?token=wrong").status == 401
    assert ask(closed_page, "/?token=").status == 401
    assert ask(closed_page, "/?token=%ff%00").status == 401
    assert ask(closed_page, f"/write?token={TOKEN}", "POST").status == 401

    first = ask(closed_page, f"/?a=1&token={TOKEN}&a=2")
    assert (first.status, first.headers["Location"]) == (303, "/?a=1&a=2")
    name, _, rest = first.headers["Set-Cookie"].partition("=")
    assert rest.startswith(f"{TOKEN};")
    assert "HttpOnly" in rest
    assert "secure" not in rest.lower()
    assert ask(closed_page, Cookie=f"{name}={TOKEN}").status == 200
    assert ask(closed_page, Cookie=f"{name}=wrong").status == 401
    assert ask(closed_page, Cookie=f"other={TOKEN}").status == 401


def test_the_redirect_leads_to_this_server_only(closed_page):
    answer = ask(closed_page, f"//evil.example/x?token={TOKEN}")
    assert answer.headers["Location"] == "/evil.example/x"


def test_two_pages_of_one_machine_do_not_take_each_others_cookie():
    """Browsers send a cookie to every port."""
    with serving(page(), Place(token="one")) as one, serving(page(), Place(token="two")) as two:
        names = {
            ask(at, f"/?token={token}").headers["Set-Cookie"].split("=")[0]
            for at, token in ((one, "one"), (two, "two"))
        }
    assert len(names) == 2


def test_tokens_are_long_and_differ():
    assert len({new_token() for _ in range(50)}) == 50
    assert len(new_token()) >= 32


def test_ipv6_is_served():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with serving(page(), Place(host="::1", token=TOKEN)) as address:
        assert address.startswith("http://[::1]:")
        assert ask(address, f"/?token={TOKEN}").status == 303
        assert ask(address, f"/?token={TOKEN}", Host="evil.example").status == 403


def test_what_others_can_reach_needs_a_token_and_tls(tmp_path):
    require_safe(Place(), insecure=False)
    require_safe(Place(host="localhost"), insecure=False)
    require_safe(Place(host="::1"), insecure=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "name.example"):
        with pytest.raises(NotServed, match="token"):
            require_safe(Place(host=host), insecure=True)
        with pytest.raises(NotServed, match="SSH tunnel"):
            require_safe(Place(host=host, token=TOKEN), insecure=False)
        require_safe(Place(host=host, token=TOKEN), insecure=True)
        files = tmp_path / "crt", tmp_path / "key"
        require_safe(Place(host, 0, TOKEN, *files), insecure=False)


def test_every_address_is_served_under_the_machines_name():
    with serving(page(), Place(host="0.0.0.0", token=TOKEN)) as address:
        at = urlsplit(address)
        assert at.hostname == socket.gethostname().lower()
        assert ask(f"http://127.0.0.1:{at.port}", f"/?token={TOKEN}", Host="any.name").status == 303


def test_a_port_that_is_taken_is_said_in_words(open_page):
    port = urlsplit(open_page).port
    with (
        pytest.raises(NotServed, match=rf"port {port} .*--port; 0"),
        serving(page(), Place(port=port)),
    ):
        pass
    assert ask(open_page).status == 200
    with pytest.raises(NotServed, match=r"no\.such\.host"), serving(page(), Place("no.such.host")):
        pass


def test_tls_with_a_real_certificate(tmp_path):
    ca = tmp_path / "ca.key", tmp_path / "ca.crt"
    certificate, own_key = tmp_path / "server.crt", tmp_path / "server.key"
    make_authority(*ca, "test")
    issue_server_certificate(*ca, own_key, certificate, ["localhost", "127.0.0.1"])
    place = Place(token=TOKEN, certificate=certificate, key=own_key)
    with serving(page(), place) as address:
        at = urlsplit(address)
        assert at.scheme == "https"
        trust = ssl.create_default_context(cafile=ca[1])
        connection = http.client.HTTPSConnection(at.hostname, at.port, timeout=5, context=trust)
        with contextlib.closing(connection):
            connection.request("GET", f"/?token={TOKEN}")
            cookie = connection.getresponse().headers["Set-Cookie"]
        assert "secure" in cookie.lower()
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(f"http://{at.netloc}")
    bad = tmp_path / "bad.key"
    bad.write_text("no key")
    for key in (bad, tmp_path / "none.key", None):
        with pytest.raises(NotServed, match=r"cannot be used|needs both"):
            serving(page(), Place(certificate=certificate, key=key)).__enter__()


def first_event(address: str) -> http.client.HTTPResponse:
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=5)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    assert answer.fp.readline().strip()  # a chunk's length, or the event itself
    return answer


def test_events_arrive_at_once_and_an_open_stream_does_not_hold_the_end_up():
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving(page(), Place()))
        begin = time.monotonic()
        open_streams = [first_event(address) for _ in range(3)]
        assert time.monotonic() - begin < 1.5
        begin = time.monotonic()
        stack.close()
        assert time.monotonic() - begin < 2
        assert open_streams
    with pytest.raises(OSError, match="refused"):
        ask(address)


def test_a_websocket_is_refused(open_page):
    answer = ask(
        open_page,
        Connection="Upgrade",
        Upgrade="websocket",
        Sec_WebSocket_Version="13",
        Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==",
    )
    assert answer.status != 101


def test_a_fault_of_the_page_is_one_line_without_data(open_page, undisturbed_log, caplog, capfd):
    log = logging.getLogger("fedbrats")
    log.propagate = True
    answer = ask(open_page, "/broken")
    assert answer.status == 500
    eventually(lambda: "ValueError at test_local_page.py" in caplog.text, "the line")
    assert "Jane" not in answer.text + caplog.text + "".join(capfd.readouterr())
    assert ask(open_page).status == 200


def test_nothing_is_logged_and_signals_stay_the_programs(capfd, caplog):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with caplog.at_level(logging.WARNING), serving(page(), Place()) as address:
        assert {number: signal.getsignal(number) for number in before} == before
        ask(address, "/nowhere")
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as raw:
            raw.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            raw.recv(100)
        kept = first_event(address)
    assert kept
    assert {number: signal.getsignal(number) for number in before} == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.text


@pytest.mark.slow
def test_a_browser_follows_the_address_may_write_and_another_page_may_not(tmp_path):
    app = page()
    fetched = """
        const [address, done] = arguments;
        fetch(address, {method: 'POST', credentials: 'include', mode: 'no-cors'})
            .then(r => done(r.type + r.status), e => done('failed'));
    """
    with (
        serving(app, Place(token=TOKEN)) as address,
        serving(page(), Place()) as other,
        chromium(tmp_path / "profile") as browser,
    ):
        browser.get(address)
        eventually(lambda: "hello" in browser.page_source, "the page")
        assert "token" not in browser.current_url
        write = f"{address.split('?')[0]}write"
        assert browser.execute_async_script(fetched, write) == "basic200"
        assert app.state.written == 1
        assert [c for c in complaints(browser) if "favicon" not in c] == []
        browser.get(other)  # same machine, other port: the cookie goes there too
        browser.execute_async_script(fetched, write)
        assert app.state.written == 1
