"""Serving a page to a browser on this machine, for the dashboard and the viewer.

Loopback unless the user asks for more, and then with a token and TLS (or `--insecure`). A page on
loopback can be reached by every web site that the user's browser shows and by every account of the
machine, so requests under a foreign name (DNS rebinding) and writes from a foreign page are refused,
and a page with patients' data asks for its token on loopback too. What a page shows is elsewhere.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("fedbrats")
LOOPBACK = "127.0.0.1"
SAME_PLACE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""The content security policy of a page that takes everything from its own server."""


class NotServed(RuntimeError):
    """A page cannot or must not be served there; the text says why and what to do."""


@dataclass(frozen=True)
class Place:
    """Where a page is served. `port` 0 takes a free one. `token` is None where nobody is asked for it;
    `certificate` and `key` are the files of TLS, both or none. `name` is what the printed address
    calls this machine, where `host` is no name for it (every address) or not the certificate's."""

    host: str = LOOPBACK
    port: int = 0
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def new_token() -> str:
    return secrets.token_urlsafe(24)


def require_safe(place: Place, *, insecure: bool) -> None:
    """Raises NotServed if others could read along, and nobody said that this is wanted."""
    if place.is_loopback:
        return
    if place.token is None:
        raise NotServed(f"{place.host} can be reached by other machines: that needs a token.")
    if place.certificate is None and not insecure:
        raise NotServed(
            f"{place.host} can be reached by other machines: that needs TLS. Serve the page on "
            f"{LOOPBACK} and use an SSH tunnel, give a certificate, or type --insecure."
        )


class Guarded:
    """An ASGI application that only its own page, under its own name and with the token, can use."""

    def __init__(self, app: ASGIApp, place: Place, policy: str = SAME_PLACE) -> None:
        self._app, self._place, self._policy = app, place, policy
        self._cookie = f"fedbrats-{secrets.token_hex(4)}"  # cookies do not tell ports apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self._refusal(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self._policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await (refusal or self._app)(scope, receive, with_headers)
        except Exception as defect:  # Starlette has answered 500; said as `common.console` says it
            where = traceback.extract_tb(defect.__traceback__)[-1]
            place = f"{type(defect).__name__} at {Path(where.filename).name}:{where.lineno}"
            LOG.error(f"a page could not be shown ({place}); please report it")

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # with a token that no foreign page has, the name does not matter
        if self._place.is_loopback and not _is_this_machine(host):
            return PlainTextResponse("This page is served to this machine only.\n", 403)
        # of the same machine, too: cookies and names do not tell ports apart, browsers do here
        if (
            headers.get("sec-fetch-site") in ("cross-site", "same-site")
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            return PlainTextResponse("Asked for by another page.\n", 403)
        origins = (None, f"{self._place.scheme}://{host}")  # what is no browser says none
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") not in origins:
            return PlainTextResponse("Asked for by another page.\n", 403)
        if self._place.token is None:
            return None
        if self._knows(cookie_parser(headers.get("cookie", "")).get(self._cookie, "")):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.pop("token", [""])[0]
        if scope["method"] in ("GET", "HEAD") and self._knows(given):
            rest = urlencode(query, doseq=True)
            path = "/" + scope["path"].lstrip("/\\")  # `//name` would be another server
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            # lax: the address may be clicked in a mail or a terminal that is a page itself
            answer.set_cookie(
                self._cookie,
                given,
                httponly=True,
                samesite="lax",
                secure=self._place.certificate is not None,
            )
            return answer
        return PlainTextResponse(
            "Open the whole address that the program printed: it ends in ?token=...\n", 401
        )

    def _knows(self, given: str) -> bool:
        token = self._place.token
        return token is not None and hmac.compare_digest(given.encode(), token.encode())


def _is_this_machine(host: str) -> bool:
    """Is the Host header a name that only means this machine?"""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def serving(app: ASGIApp, place: Place, policy: str = SAME_PLACE) -> Iterator[str]:
    """Serve `app` in a thread while the block runs; yields the address to open, token included.

    Raises:
        NotServed: the address is not this machine's, the port is taken or not allowed, or the
            certificate cannot be used.
    """
    tls: dict[str, Any] = {}
    if (place.certificate is None) != (place.key is None):
        raise NotServed("TLS needs both a certificate and its key.")
    if place.certificate is not None:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            # the password keeps OpenSSL from asking for one on the terminal
            context.load_cert_chain(place.certificate, place.key, password="")
        except (OSError, ssl.SSLError, ValueError) as error:
            raise NotServed(
                f"{place.certificate} and {place.key} cannot be used ({error})."
            ) from error
        tls = {"ssl_certfile": str(place.certificate), "ssl_keyfile": str(place.key)}
    try:
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        sock = socket.create_server((place.host, place.port), family=family)
    except OSError as error:
        known = error.errno is not None and error.errno > 0  # else of the look-up of a name
        why = os.strerror(error.errno or 0) if known else error.strerror
        raise NotServed(
            f"Cannot serve a page on {place.host} port {place.port} ({why}). Choose "
            "another --port; 0 takes a free one."
        ) from error
    # without a handler of its own, what it says of hasty browsers would go to standard error
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        Guarded(app, place, policy),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=1,
        **tls,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise NotServed(f"The page could not be served on {place.host}.")
            time.sleep(0.01)
        yield _address(place, sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=5)
        sock.close()


def _address(place: Place, port: int) -> str:
    host = place.name or place.host
    if host in ("0.0.0.0", "::"):  # every address of this machine, and no address itself
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    return f"{place.scheme}://{host}:{port}/" + (f"?token={place.token}" if place.token else "")
