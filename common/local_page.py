"""Serving a page to a browser on this machine, for the dashboard and the viewer.

Loopback unless the user asks for more, and then with TLS (or `--insecure`). A page on loopback can be
reached by every web site that the user's browser shows and by every account of the machine: it always
asks for a token, and refuses requests under a foreign name (DNS rebinding) and writes from a foreign
page. Browsers send a cookie to every port of a host, another account's server too, so the page lies
below a path that nobody can guess, and the cookie goes there only. What a page shows is elsewhere; its
own addresses must be relative.
"""

from __future__ import annotations

import contextlib
import hmac
import html
import ipaddress
import logging
import os
import secrets
import socket
import sys
import traceback
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.few_connections import FewConnections
from common.served import NotStarted, bound_socket, served, tls_settings

LOG = logging.getLogger("fedbrats")
LOOPBACK = "127.0.0.1"
SAME_PLACE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""The content security policy of a page that takes everything from its own server."""
COOKIE = "fedbrats-page"
MOST_CONNECTIONS = 64  # a browser opens six, and the process may be a federation's server
SECONDS = 10.0  # that a connection has until it has shown the token


class NotServed(RuntimeError):
    """A page cannot or must not be served there; the text says why and what to do."""


def new_token() -> str:
    return secrets.token_urlsafe(24)


@dataclass(frozen=True)
class Place:
    """Where a page is served. `port` 0 takes a free one. `certificate` and `key` are the files of TLS,
    both or none. `name` is what the printed address calls this machine, where `host` is no name for it
    (every address) or not the certificate's."""

    host: str = LOOPBACK
    port: int = 0
    token: str = field(default_factory=new_token, repr=False)
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


def require_safe(place: Place, *, insecure: bool) -> None:
    """Raises NotServed if others could read along, and nobody said that this is wanted."""
    if not place.is_loopback and place.certificate is None and not insecure:
        raise NotServed(
            f"{place.host} can be reached by other machines: that needs TLS. Serve the page on "
            f"{LOOPBACK} and use an SSH tunnel, give a certificate, or type --insecure."
        )


class Guarded:
    """An ASGI application that only its own page, under its own name and with the token, can use.

    `keep` is told the other end, as ASGI's `client`, of each connection that has shown the token.
    """

    def __init__(
        self,
        app: ASGIApp,
        place: Place,
        keep: Callable[[object], None] = lambda client: None,
    ) -> None:
        self._app, self._place, self._keep = app, place, keep
        self.root = f"/{secrets.token_urlsafe(12)}/"  # below which everything is
        self._session = new_token()  # what the cookie holds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        answer, known = self._instead(scope)
        if known:
            self._keep(scope.get("client"))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = SAME_PLACE
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers["Cross-Origin-Opener-Policy"] = "same-origin"
                if not known:
                    headers["Connection"] = "close"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await (answer or self._app)(self._inside(scope), receive, with_headers)
        except Exception as defect:  # Starlette has answered 500; said as `common.console` says it
            where = traceback.extract_tb(defect.__traceback__)[-1]
            place = f"{type(defect).__name__} at {Path(where.filename).name}:{where.lineno}"
            LOG.error(f"a page could not be shown ({place}); please report it")

    def _inside(self, scope: Scope) -> Scope:
        """As the application sees it, which does not know what it lies below."""
        inside = {key: value for key, value in scope.items() if key != "raw_path"}
        return inside | {"path": "/" + scope["path"].removeprefix(self.root).lstrip("/")}

    def _instead(self, scope: Scope) -> tuple[Response | None, bool]:
        """What is answered in the application's place, if anything; has the request the token?"""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # with a token that no foreign page has, the name does not matter
        if self._place.is_loopback and not _is_this_machine(host):
            return PlainTextResponse("This page is served to this machine only.\n", 403), False
        # of the same machine, too: cookies and names do not tell ports apart, browsers do here
        if (
            headers.get("sec-fetch-site") in ("cross-site", "same-site")
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            return PlainTextResponse("Asked for by another page.\n", 403), False
        origins = (None, f"{self._place.scheme}://{host}")  # what is no browser says none
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") not in origins:
            return PlainTextResponse("Asked for by another page.\n", 403), False
        if _same(scope["path"][: len(self.root)], self.root):
            if _same(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""), self._session):
                return None, True
            query = parse_qs(scope["query_string"].decode("latin-1"))
            given = query.pop("token", [""])[0]
            if scope["method"] in ("GET", "HEAD") and _same(given, self._place.token):
                return self._let_in(scope["path"], urlencode(query, doseq=True)), True
        text = "Open the whole address that the program printed: it ends in ?token=...\n"
        return PlainTextResponse(text, 401), False

    def _let_in(self, path: str, query: str) -> Response:
        answer = RedirectResponse(path + (f"?{query}" if query else ""), 303)
        # lax: the address may be clicked in a mail or a terminal that is a page itself
        answer.set_cookie(
            COOKIE,
            self._session,
            path=self.root,
            httponly=True,
            samesite="lax",
            secure=self._place.certificate is not None,
        )
        return answer


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


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
def serving(app: ASGIApp, place: Place) -> Iterator[str]:
    """Serve `app` in a thread while the block runs; yields the address to open, token included.

    Raises:
        NotServed: the address is not this machine's, the port is taken or not allowed, or the
            certificate cannot be used.
    """
    tls: dict[str, Any] = {}
    if (place.certificate is None) != (place.key is None):
        raise NotServed("TLS needs both a certificate and its key.")
    if place.certificate is not None and place.key is not None:
        try:
            tls = tls_settings(place.certificate, place.key)
        except NotStarted as error:
            raise NotServed(
                f"{place.certificate} and {place.key} cannot be used ({error})."
            ) from error
    try:
        listening = bound_socket(place.host, place.port)
    except NotStarted as error:
        raise NotServed(
            f"Cannot serve a page on {place.host} port {place.port} ({error}). Choose "
            "another --port; 0 takes a free one."
        ) from error
    sock = FewConnections(listening, most=MOST_CONNECTIONS, seconds=SECONDS)
    guarded = Guarded(app, place, sock.keep)
    # without a handler of its own, what it says of hasty browsers would go to standard error
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    try:
        with served(guarded, sock, timeout_graceful_shutdown=1, **tls) as port:
            yield _address(place, port, guarded.root)
    except NotStarted as error:
        raise NotServed(f"The page could not be served on {place.host}.") from error


def _address(place: Place, port: int, root: str) -> str:
    host = place.name or place.host
    if host in ("0.0.0.0", "::"):  # every address of this machine, and no address itself
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    return f"{place.scheme}://{host}:{port}{root}?token={place.token}"


def _has_screen() -> bool:
    """Without one, webbrowser may start a text browser in this terminal."""
    return sys.platform == "darwin" or any(
        os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY")
    )


def open_in_browser(address: str, private: Path) -> None:
    """Nothing happens on a machine without a screen.

    By way of a file in `private`, a folder that only this account can open: every account can read
    a browser's command line, and the token."""
    if not _has_screen():
        return
    page = private / "open.html"
    target = html.escape(address)
    page.write_text(f'<meta http-equiv="refresh" content="0; url={target}">', encoding="utf-8")
    webbrowser.open(page.as_uri())
