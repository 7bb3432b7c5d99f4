"""A local page answers its own user and nobody else: every request here goes over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from common import local_page
from common.few_connections import SPARE
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


def ask(address: str, path: str = "", method: str = "GET", **headers: str) -> Answer:
    """A request of nobody in particular. Python names with `_` for `-`; `Host` is what the address
    says unless it is given; a path that begins with `/` is the machine's, else below the page's."""
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=5)
    with contextlib.closing(connection):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path if path.startswith("/") else at.path + path, headers=given)
        return Answer(connection.getresponse())


def cookie_of(address: str) -> str:
    return ask(address, f"?{urlsplit(address).query}").headers["Set-Cookie"].split(";")[0]


def ask_again(address: str, path: str = "", method: str = "GET", **headers: str) -> Answer:
    """What a browser asks that has opened the address."""
    return ask(address, path, method, Cookie=cookie_of(address), **headers)


@pytest.fixture
def served() -> Iterator[str]:
    with serving(page(), Place(token=TOKEN)) as address:
        yield address


def test_who_was_let_in_gets_the_page_and_what_protects_it(served):
    answer = ask_again(served)
    assert (answer.status, answer.text) == (200, '{"says":"hello"}')
    assert answer.headers["Content-Security-Policy"] == SAME_PLACE
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] is None
    assert ask_again(served, method="HEAD").status == 200


@pytest.mark.parametrize(
    "name",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[2001:db8::1]"],
)
def test_a_name_that_was_bound_to_this_machine_from_outside_is_refused(served, name):
    assert ask_again(served, Host=name).status == 403


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:8050", "127.0.0.1:1", "[::1]:8050", "[::1]"]
)
def test_the_machines_own_names_are_served_so_that_a_tunnel_works(served, name):
    assert ask_again(served, Host=name).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null"])
def test_a_foreign_page_cannot_write(origin):
    app = page()
    with serving(app, Place()) as address:
        assert ask_again(address, "write", "POST", Origin=origin).status == 403
        assert app.state.written == 0
        at = urlsplit(address)
        own = f"{at.scheme}://{at.netloc}"
        assert ask_again(address, "write", "POST", Origin=own).status == 200


def test_a_foreign_page_cannot_hold_the_event_stream_open_but_can_link_here(served):
    for site in ("cross-site", "same-site"):  # another port of this machine is the same site
        told = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "no-cors"}
        assert ask_again(served, "events", **told).status == 403
        assert ask_again(served, **{**told, "Sec_Fetch_Mode": "navigate"}).status == 200


def test_the_token_is_taken_once_from_the_address_and_then_from_a_cookie(served):
    root = urlsplit(served).path
    assert served.endswith(f"{root}?token={TOKEN}")
    assert len(root) >= 18, "nobody guesses it"
    for path in ("", "?token=wrong", "?token=", "?token=%ff%00", "?token=\x41", "events"):
        refused = ask(served, path)
        assert (refused.status, refused.headers["Connection"]) == (401, "close")
    assert ask(served, f"write?token={TOKEN}", "POST").status == 401

    first = ask(served, f"?a=1&token={TOKEN}&a=2")
    assert (first.status, first.headers["Location"]) == (303, f"{root}?a=1&a=2")
    cookie, *rest = first.headers["Set-Cookie"].split("; ")
    assert TOKEN not in cookie
    assert {"HttpOnly", f"Path={root}", "SameSite=lax"} <= {*rest}
    assert "secure" not in "".join(rest).lower()
    name = cookie.split("=")[0]
    assert ask(served, Cookie=cookie).status == 200
    assert ask(served, Cookie=f"{name}=wrong").status == 401
    assert ask(served, Cookie=f"{name}={TOKEN}").status == 401
    assert ask(served, Cookie=f"other={cookie.split('=')[1]}").status == 401


def test_outside_its_own_path_there_is_nothing_even_for_who_has_token_and_cookie(served):
    cookie = cookie_of(served)
    outside = ("/", "/events", f"/?token={TOKEN}", f"/x{urlsplit(served).path}?token={TOKEN}")
    for path in (*outside, urlsplit(served).path.rstrip("/")):
        assert ask(served, path, Cookie=cookie).status == 401, path


def test_the_redirect_leads_to_this_server_only(served):
    root = urlsplit(served).path
    answer = ask(served, f"/evil.example/x?token={TOKEN}".replace("/evil", f"{root}//evil", 1))
    assert answer.headers["Location"].startswith(f"{root}/")
    assert ask(served, f"//evil.example{root}?token={TOKEN}").status == 401


def test_two_pages_of_one_machine_have_other_paths_and_cookies():
    with serving(page(), Place()) as one, serving(page(), Place()) as two:
        assert urlsplit(one).path != urlsplit(two).path
        assert ask(two, Cookie=cookie_of(one)).status == 401


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
        assert ask_again(address).status == 200
        assert ask(address, f"?token={TOKEN}", Host="evil.example").status == 403


def test_what_others_can_reach_needs_tls(tmp_path):
    require_safe(Place(), insecure=False)
    require_safe(Place(host="localhost"), insecure=False)
    require_safe(Place(host="::1"), insecure=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "name.example"):
        with pytest.raises(NotServed, match="SSH tunnel"):
            require_safe(Place(host=host, token=TOKEN), insecure=False)
        require_safe(Place(host=host, token=TOKEN), insecure=True)
        files = tmp_path / "crt", tmp_path / "key"
        require_safe(Place(host, 0, TOKEN, *files), insecure=False)


def test_every_address_is_served_under_the_machines_name():
    with serving(page(), Place(host="0.0.0.0", token=TOKEN)) as address:
        at = urlsplit(address)
        assert at.hostname == socket.gethostname().lower()
        assert (
            ask(f"http://127.0.0.1:{at.port}", f"{at.path}?{at.query}", Host="any.name").status
            == 303
        )


def test_a_port_that_is_taken_is_said_in_words(served):
    port = urlsplit(served).port
    with (
        pytest.raises(NotServed, match=rf"port {port} .*--port; 0"),
        serving(page(), Place(port=port)),
    ):
        pass
    assert ask_again(served).status == 200
    with pytest.raises(NotServed, match=r"no\.such\.host"), serving(page(), Place("no.such.host")):
        pass


def certified(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine and its key."""
    ca = folder / "ca.key", folder / "ca.crt"
    certificate, own_key = folder / "server.crt", folder / "server.key"
    make_authority(*ca, "test")
    issue_server_certificate(*ca, own_key, certificate, ["localhost", "127.0.0.1"])
    return certificate, own_key


def test_tls_with_a_real_certificate(tmp_path):
    certificate, own_key = certified(tmp_path)
    place = Place(token=TOKEN, certificate=certificate, key=own_key)
    with serving(page(), place) as address:
        at = urlsplit(address)
        assert at.scheme == "https"
        trust = ssl.create_default_context(cafile=tmp_path / "ca.crt")
        connection = http.client.HTTPSConnection(at.hostname, at.port, timeout=5, context=trust)
        with contextlib.closing(connection):
            connection.request("GET", f"{at.path}?{at.query}")
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
    connection.request("GET", f"{at.path}events", headers={"Cookie": cookie_of(address)})
    answer = connection.getresponse()
    assert answer.fp.readline().strip()  # a chunk's length, or the event itself
    return answer


def goes_on(stream: http.client.HTTPResponse, *, seconds: float) -> None:
    """Does an open stream of events bring more of them, for so long?"""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert stream.fp.readline(), "the stream was cut off"


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


def test_a_websocket_is_refused(served):
    answer = ask_again(
        served,
        Connection="Upgrade",
        Upgrade="websocket",
        Sec_WebSocket_Version="13",
        Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==",
    )
    assert answer.status != 101


def test_a_fault_of_the_page_is_one_line_without_data(served, undisturbed_log, caplog, capfd):
    log = logging.getLogger("fedbrats")
    log.propagate = True
    answer = ask_again(served, "broken")
    assert answer.status == 500
    eventually(lambda: "ValueError at test_local_page.py" in caplog.text, "the line")
    assert "Jane" not in answer.text + caplog.text + "".join(capfd.readouterr())
    assert ask_again(served).status == 200


def test_nothing_is_logged_and_signals_stay_the_programs(capfd, caplog):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with caplog.at_level(logging.WARNING), serving(page(), Place()) as address:
        assert {number: signal.getsignal(number) for number in before} == before
        ask_again(address, "nowhere")
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
        browser.get(other)  # same machine, other port
        browser.execute_async_script(fetched, write)
        assert app.state.written == 1


@contextlib.contextmanager
def another_accounts_server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and all that browsers said to it."""
    heard: list[str] = []

    class Listening(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(f"{self.path} {self.headers}")
            body = b"<p>hello</p>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listening) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", heard
        finally:
            server.shutdown()


@pytest.mark.slow
def test_another_port_visited_in_the_same_browser_gets_nothing_that_opens_the_page(tmp_path):
    with (
        another_accounts_server() as (other, heard),
        serving(page(), Place()) as address,
        chromium(tmp_path / "profile") as browser,
    ):
        browser.get(address)
        eventually(lambda: "hello" in browser.page_source, "the page")
        cookie = browser.get_cookie("fedbrats-page")["value"]
        at = urlsplit(address)
        browser.execute_script("location.href = arguments[0]", f"{other}from-the-page")
        eventually(lambda: "from-the-page" in "".join(heard), "the visit")
        browser.get("data:text/html,<a id=x href='" + other + "from-afar'>see</a>")
        browser.find_element("id", "x").click()
        eventually(lambda: "from-afar" in "".join(heard), "the visit")
        said = "".join(heard)
        for secret in (cookie, at.path.strip("/"), str(at.query).removeprefix("token=")):
            assert secret not in said
        assert "Cookie" not in said
        browser.get(f"{address.split('?')[0]}")  # and the page itself still opens
        assert "hello" in browser.page_source


def status_in_the_crowd(at: SplitResult) -> int:
    """Of the page, asked for again while those that gave way for it are still being closed."""
    trust = ssl._create_unverified_context()
    for _ in range(50):
        connection = http.client.HTTPSConnection(at.hostname, at.port, timeout=5, context=trust)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError, ssl.SSLError):
            connection.request("GET", f"{at.path}?{at.query}")
            return connection.getresponse().status
        time.sleep(0.1)
    raise AssertionError("the page did not answer")


def test_hundreds_of_idle_connections_cost_neither_the_page_nor_the_process_its_files(tmp_path):
    """Counted before TLS, of which an idle connection says nothing."""
    certificate, own_key = certified(tmp_path)
    for place in (Place(), Place(certificate=certificate, key=own_key)):
        with serving(page(), place) as address, contextlib.ExitStack() as stack:
            at = urlsplit(address)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(300):
                stack.enter_context(socket.create_connection((at.hostname, at.port), 5))
            if place.certificate is None:
                stream = first_event(address)
                assert ask_again(address).status == 200
                goes_on(stream, seconds=0.5)
            else:
                assert status_in_the_crowd(at) == 303
            ours = len(os.listdir("/proc/self/fd")) - before - 300
            assert ours <= local_page.MOST_CONNECTIONS + SPARE + 5


def test_who_shows_no_token_soon_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(local_page, "SECONDS", 0.3)
    with serving(page(), Place()) as address:
        stream = first_event(address)
        at = urlsplit(address)
        with socket.create_connection((at.hostname, at.port), 5) as idle:
            idle.sendall(b"GET / HTTP/1.1\r\nHost: ")
            assert idle.recv(1) == b""
        goes_on(stream, seconds=1.0)
        assert ask_again(address).status == 200


def test_the_browser_is_given_the_token_in_a_private_file(tmp_path, monkeypatch):
    """A command line, and so a token in it, can be read by every account."""
    opened: list[str] = []
    monkeypatch.setattr(local_page.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    local_page.open_in_browser("http://127.0.0.1:1/r/?token=a&b", tmp_path)
    assert "token" not in opened[0]
    text = Path(opened[0].removeprefix("file://")).read_text()
    assert "url=http://127.0.0.1:1/r/?token=a&amp;b" in text
