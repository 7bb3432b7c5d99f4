"""The dashboard of a run: one page, which an event stream keeps up to date. It shows and changes nothing.

One thread looks at the run's files about once a second, however many pages are open.
`common.local_page` decides who may see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from common.audit_log import Follower, LogError
from common.console import plain
from common.files import lock_holder
from common.local_page import Place, serving
from server.background import every
from server.dashboard_alerts import (
    ERROR,
    LEVELS,
    WARNING,
    alert,
    recorded_alerts,
    slow_alerts,
    status_alerts,
)
from server.dashboard_state import Document, recorded, site_states, state, status_of
from server.source import Source, stamp

WEB = Path(__file__).parent / "web"
LOOK_SECONDS = 1.0
STREAM_SECONDS = 0.25  # between looks at whether there is something to send
ALIVE_SECONDS = 5.0  # the page takes longer silence for a lost connection
LOW_DISK_GB = 1.0
MOST_PROBLEMS = 5


@dataclass(frozen=True)
class View:
    """What pages are told, as JSON; each number grows when its text changes."""

    recorded: str = "{}"
    live: str = "{}"
    numbers: tuple[int, int] = (0, 0)


@dataclass
class Observer:
    """Looks at a run: `look` in one thread at a time, `view` in any."""

    source: Source
    now: Callable[[], float] = time.time
    view: View = View()
    _known: Document = field(default_factory=dict)
    _seen: tuple[Any, ...] = ()
    _problems: Follower | None = None

    def look(self) -> None:
        """Read what has changed. Raises nothing: what goes wrong is shown."""
        try:
            known, live = self._look()
        except Exception as defect:  # of a damaged file that no one foresaw
            where = traceback.extract_tb(defect.__traceback__)[-1]
            place = f"{type(defect).__name__} at {Path(where.filename).name}:{where.lineno}"
            text = f"The run's files cannot be understood ({place})."
            known, live = self._known, {"state": "unknown", "alerts": [alert(ERROR, text)]}
        before, (first, second) = self.view, self.view.numbers
        told, now = (json.dumps(part, allow_nan=False) for part in (known, live))
        numbers = first + (told != before.recorded), second + (now != before.live)
        self.view = View(told, now, numbers)

    def _look(self) -> tuple[Document, Document]:
        source = self.source
        if not source.path.is_dir():
            text = f"The folder {source.path} is not there (any more)."
            return self._known, {"state": "gone", "alerts": [alert(ERROR, text)], "sites": {}}
        seen = stamp(source.run.history), stamp(source.config)
        if seen != self._seen:
            self._known, self._seen = recorded(source, self._known), seen
            if self._known["unreadable"]:  # perhaps for a moment only, and the file stays as it is
                self._seen = ()
        known, holder = self._known, lock_holder(source.lock)
        running, status = holder is not None, status_of(source, holder)
        alerts: list[Document] = []
        if running:
            alerts += status_alerts(status, self.now())
            if not status.get("waiting") and not known["complete"]:
                # the history changes when a round ends, and at the roll call of the next
                alerts += slow_alerts(known, self.now() - seen[0][0] / 1e9)
        elif known["rounds"] and not known["complete"]:
            text = "No process works on this run. The command that began it continues after round "
            alerts.append(alert(WARNING, f"{text}{known['rounds'][-1]}."))
        alerts += [*recorded_alerts(known), *self._problems_in_audit_log(), *_disk(source.path)]
        return known, {
            "running": running,
            "state": state(known, status, running=running, coordinators=source.is_coordinators),
            "alerts": sorted(alerts, key=lambda a: LEVELS.index(a["level"])),
            "sites": site_states(known, status),
        }

    def _problems_in_audit_log(self) -> list[Document]:
        """What the server noted in it as problems; whether it is whole, `audit verify` says."""
        if not self.source.is_coordinators:
            return []
        if self._problems is None:
            self._problems = Follower(self.source.coordinator.audit, ("problem",))
        try:
            entries = self._problems.entries()[-MOST_PROBLEMS:]
        except LogError as error:
            return [alert(ERROR, f"Audit log: {plain(str(error))}")]
        told = dict.fromkeys(plain(str(entry.details.get("what", ""))) for entry in entries)
        return [alert(ERROR, f"Audit log: {text}") for text in told]


def _disk(path: Path) -> list[Document]:
    with contextlib.suppress(OSError):
        if shutil.disk_usage(path).free < LOW_DISK_GB * 1e9:
            return [alert(WARNING, f"Less than {LOW_DISK_GB:g} GB is free on the run's disk.")]
    return []


def dashboard_app(observer: Observer) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=WEB))

    @app.api_route("/", methods=["GET", "HEAD"])
    def page() -> FileResponse:
        return FileResponse(WEB / "dashboard.html")

    @app.get("/favicon.ico")
    def icon() -> FileResponse:
        return FileResponse(WEB / "dashboard.svg", media_type="image/svg+xml")

    @app.get("/api/state")
    def whole() -> Response:
        view = observer.view
        text = f'{{"recorded": {view.recorded}, "live": {view.live}}}'
        return Response(text, media_type="application/json")

    @app.get("/api/events")
    def events() -> StreamingResponse:
        return StreamingResponse(stream(observer), media_type="text/event-stream")

    return app


async def stream(observer: Observer) -> AsyncIterator[str]:
    """`recorded` and `live` once they are known and when they changed, else `alive` now and then."""
    sent, last = (0, 0), 0.0
    while True:
        view = observer.view
        news = []
        if view.numbers[0] != sent[0]:
            news.append(f"event: recorded\ndata: {view.recorded}\n\n")
        if view.numbers[1] != sent[1]:
            news.append(f"event: live\ndata: {view.live}\n\n")
        if not news and time.monotonic() - last > ALIVE_SECONDS:
            news.append("event: alive\ndata: 1\n\n")
        if news:
            yield "".join(news)
            sent, last = view.numbers, time.monotonic()
        await asyncio.sleep(STREAM_SECONDS)


@contextlib.contextmanager
def serving_dashboard(path: Path, place: Place) -> Iterator[str]:
    """Serve the dashboard of the folder while the block runs; yields the address.

    Raises:
        NotServed: as `common.local_page.serving` says.
    """
    observer = Observer(Source(path))
    with (  # the first look, too, is the thread's: whoever serves this must not wait for a file
        every(LOOK_SECONDS, observer.look, at_once=True),
        serving(dashboard_app(observer), place) as address,
    ):
        yield address
