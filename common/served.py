"""An ASGI application served by a thread of this process, over few connections, in silence."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from common.few_connections import FewConnections


class NotStarted(RuntimeError):
    """The server ended before it served anything."""


@contextlib.contextmanager
def served(app: Any, sock: FewConnections, **settings: Any) -> Iterator[int]:
    """Serve `app` on `sock`, which is closed at the end, while the block runs; yields the port.

    `settings` are uvicorn's: TLS, and how long it waits.

    Raises:
        NotStarted: the application or the settings cannot be served.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",  # which accepts by way of `sock`
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody stands in front of it
        **settings,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise NotStarted
            time.sleep(0.01)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=5)
        sock.close()
