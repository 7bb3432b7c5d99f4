"""The dashboard is served as it should be: to whom, what, how soon, and never at the run's cost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from common.local_page import Place
from server import dashboard
from server.cli import app as server_cli
from server.coordinator import init_folder
from server.dashboard import Observer, View, dashboard_app, serving_dashboard
from server.history import History
from server.source import Source
from tests.server.test_dashboard_state import a_round, metrics

WEB = Path(dashboard.__file__).parent / "web"
pytestmark = pytest.mark.usefixtures("undisturbed_log")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    with History(folder / "history.sqlite") as history:
        history.record_round(a_round(1, {"a": metrics(0.5, 0.5, 0.5)}))
    return folder


@contextlib.contextmanager
def asked(address: str, path: str) -> Iterator[http.client.HTTPResponse]:
    """What a browser is answered that has opened the address; the path is below that of the page."""
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", f"{at.path}?{at.query}")
        let_in = connection.getresponse()
        let_in.read()
        cookie = let_in.headers["Set-Cookie"].split(";")[0]
        connection.request("GET", at.path + path, headers={"Cookie": cookie})
        yield connection.getresponse()


def next_event(answer: http.client.HTTPResponse) -> tuple[str, str]:
    """The next that is no mere sign of life."""
    while True:
        kind = answer.readline().decode().removeprefix("event: ").strip()
        data = answer.readline().decode().removeprefix("data: ").strip()
        answer.readline()
        if kind != "alive":
            return kind, data


def test_a_new_round_reaches_an_open_page_within_seconds(run):
    with serving_dashboard(run, Place()) as address, asked(address, "api/events") as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = dict(next_event(answer) for _ in range(2))
        assert json.loads(events["recorded"])["rounds"] == [1]
        assert json.loads(events["live"])["state"] == "stopped"
        with History(run / "history.sqlite") as history:
            history.record_round(a_round(2, {"a": metrics(0.6, 0.6, 0.6)}))
        begin = time.monotonic()
        kind, data = next_event(answer)
        assert (kind, json.loads(data)["rounds"]) == ("recorded", [1, 2])
        assert time.monotonic() - begin < 5
        with asked(address, "api/state") as whole:
            told = json.load(whole)
        assert told["recorded"] == json.loads(data)
        assert set(told["live"]) == {"running", "state", "alerts", "sites"}


def test_serving_waits_for_no_file_of_the_run(run, monkeypatch):
    """A federation starts beside it, whatever becomes of its picture."""
    held = threading.Event()
    before = dashboard.recorded
    monkeypatch.setattr(dashboard, "recorded", lambda *of: held.wait(20) and before(*of))
    begin = time.monotonic()
    with serving_dashboard(run, Place()) as address, asked(address, "api/events") as answer:
        assert time.monotonic() - begin < 3
        held.set()
        assert json.loads(next_event(answer)[1])["rounds"] == [1]


def test_many_pages_cost_one_read(run, monkeypatch):
    reads = []
    before = dashboard.recorded
    monkeypatch.setattr(dashboard, "recorded", lambda *of: reads.append(1) or before(*of))
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving_dashboard(run, Place()))
        for _ in range(10):
            assert next_event(stack.enter_context(asked(address, "api/events")))[0] == "recorded"
        time.sleep(1.5)
    assert len(reads) == 1


def test_silence_is_broken_so_that_a_page_can_tell_a_lost_connection(run, monkeypatch):
    monkeypatch.setattr(dashboard, "ALIVE_SECONDS", 0.3)
    observer = Observer(Source(run), view=View("{}", "{}", (1, 1)))

    async def first_two() -> list[str]:
        events = dashboard.stream(observer)
        return [await anext(events), await anext(events)]

    first, second = asyncio.run(first_two())
    assert first.startswith("event: recorded")
    assert second.startswith("event: alive")


def test_the_page_needs_nothing_from_elsewhere_and_offers_nothing_else(run):
    with serving_dashboard(run, Place()) as address:
        with asked(address, "") as answer:
            page = answer.read().decode()
        wanted = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(wanted) == 5
        for path in wanted:
            assert path.startswith("static/")
            with asked(address, path) as answer:
                assert (answer.status, bool(answer.read())) == (200, True)
        for path in ("docs", "openapi.json", "static/../dashboard.py", "static/%2e%2e/cli.py"):
            with asked(address, path) as answer:
                assert answer.status == 404
    ours = [p for p in WEB.iterdir() if p.suffix in (".html", ".css", ".js")]
    assert len(ours) == 3
    for path in ours:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML\s*=|insertAdjacentHTML|style=|onclick=", text), (
            path
        )


def test_vendored_files_are_those_that_are_listed():
    listed = dict(
        re.findall(r"`(vendor/[^`]+)` \| `([0-9a-f]{64})`", (WEB / "VENDORED.md").read_text())
    )
    found = {
        f"vendor/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (WEB / "vendor").iterdir()
    }
    assert listed == found


def test_every_route_only_reads(run):
    methods = {
        m
        for route in dashboard_app(Observer(Source(run))).routes
        for m in getattr(route, "methods", ())
    }
    assert methods == {"GET", "HEAD"}


# ------------------------------------------------------------------------------- as it is typed


def test_others_are_served_over_tls_and_with_a_token_only(tmp_path, tiny_config, monkeypatch):
    """In this process, so that the certificate's own authority is trusted."""
    folder = init_folder(tmp_path / "study", tiny_config("name=study"), ["127.0.0.1"])
    served = []

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def serving(path: Path, place: Place) -> Iterator[str]:
        with serving_dashboard(path, place) as address:
            at = urlsplit(address)
            context = ssl.create_default_context(cafile=folder.ca_certificate)
            connection = http.client.HTTPSConnection("127.0.0.1", at.port, context=context)
            for query in ("", f"?{at.query}"):
                connection.request("GET", f"{at.path}api/state{query}")
                answer = connection.getresponse()
                answer.read()
                served.append((at.scheme, at.hostname, answer.status))
            yield address

    monkeypatch.setattr("server.dashboard.serving_dashboard", serving)
    monkeypatch.setattr("server.dashboard_commands._wait_for_ever", ctrl_c)
    arguments = ["dashboard", str(folder.path), "--host", "0.0.0.0", "--port", "0"]
    result = CliRunner().invoke(server_cli, arguments)
    assert result.exit_code == 0, "Ctrl-C is how it ends"
    assert served == [("https", "localhost", 401), ("https", "localhost", 303)]
    assert "?token=" in result.stdout


def test_what_cannot_be_served_is_said(run, tmp_path):
    from simulation.cli import app as sim_cli

    def said(*arguments: str, code: int) -> str:
        result = CliRunner().invoke(sim_cli, ["dashboard", *arguments], env={"COLUMNS": "300"})
        assert result.exit_code == code
        return result.stderr

    assert "holds no run" in said(str(tmp_path / "none"), code=2)
    assert "SSH tunnel" in said(str(run), "--host", "0.0.0.0", code=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} (Address already in use)" in said(str(run), "--port", port, code=1)
    result = CliRunner().invoke(server_cli, ["dashboard", str(run)])
    assert (result.exit_code, "no coordinator's folder" in result.stderr) == (1, True)


@pytest.mark.parametrize("screen", [True, False])
def test_open_needs_a_screen_and_a_path_need_not_be_text(run, tmp_path, monkeypatch, screen):
    """Without a screen a text browser could start in the terminal."""
    from simulation.cli import app as sim_cli

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    opened: list[str] = []
    monkeypatch.setattr("common.local_page.sys.platform", "linux")
    monkeypatch.setattr("common.local_page.webbrowser.open", opened.append)
    monkeypatch.setattr("server.dashboard_commands._wait_for_ever", ctrl_c)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0" if screen else "")
    named = run.rename(tmp_path / os.fsdecode(b"r\xe9seau"))
    result = CliRunner().invoke(sim_cli, ["dashboard", str(named), "--port", "0", "--open"])
    assert result.exit_code == 0, result.output
    assert f"Dashboard of {tmp_path}/r?seau: http://127.0.0.1:" in result.stdout
    assert len(opened) == screen


def test_start_serves_it_beside_and_goes_on_where_it_cannot(tmp_path, tiny_config, monkeypatch):
    folder = init_folder(tmp_path / "study", tiny_config("name=study"))
    begun = []

    def serve(coordinator: object) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/api/state")
            begun.append(connection.getresponse().status)
        raise KeyboardInterrupt

    monkeypatch.setattr("server.start.start", serve)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = ["start", str(folder.path), "--dashboard", "--dashboard-port", str(port)]
    result = CliRunner().invoke(server_cli, start)
    assert (result.exit_code, begun) == (130, [401])
    assert re.search(
        rf"dashboard: http://127\.0\.0\.1:{port}/\S{{16}}/\?token=\S{{32}}", result.stderr
    )
    with serving_dashboard(folder.path, Place(port=port)):  # by another command, say
        result = CliRunner().invoke(server_cli, start)
    assert (result.exit_code, begun) == (130, [401] * 2), "the federation began all the same"
    assert "there is no dashboard: Cannot serve a page" in result.stderr
