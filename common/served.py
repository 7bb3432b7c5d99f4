"""An ASGI application served by a thread of this process, over few connections, in silence."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from common.few_connections import FewConnections


class NotStarted(RuntimeError):
    """Nothing can be served so; the text is the system's or OpenSSL's reason, if there is one."""


def tls_settings(certificate: Path, key: Path) -> dict[str, str]:
    """uvicorn's settings for TLS with these files. Raises NotStarted."""
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # the password keeps OpenSSL from asking for one on the terminal
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise NotStarted(str(error)) from error
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises NotStarted."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        known = error.errno is not None and error.errno > 0  # else of the look-up of a name
        raise NotStarted(os.strerror(error.errno or 0) if known else error.strerror) from error


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
