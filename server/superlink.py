"""Flower's SuperLink, reduced to what hospitals need: its link state on disk and its fleet routes.

A stock `flower-superlink` serves four interfaces on one port, and the one that starts, stops and
lists runs asks nobody who they are. Here that interface, the runtime's and the package store do not
exist: `ALLOWED` is everything that is served, over TLS, and all but `/health` only to enrolled keys.
Runs are driven inside this process (`server.link_grid`), so there is no control port at all.

Built from private modules of Flower, hence for one exact version of it, checked when a link starts.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import flwr
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, HTTPException, Request
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, Status
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.routers import health
from flwr.supercore.state.schema.corestate_models import Task as TaskRow
from flwr.supercore.state.schema.linkstate_models import Node as NodeRow
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from sqlalchemy import update
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

LOG = logging.getLogger("fedbrats")
FLOWER = "1.41.0"
ALLOWED = frozenset(
    {"/health"}
    | {
        f"/v1/fleet/{name}"
        for name in (
            "activate-node",
            "deactivate-node",
            "send-node-heartbeat",
            "pull-messages",
            "push-messages",
            "get-run",
            "push-object",
            "pull-object",
        )
    }
)
LARGEST_REQUEST = 16 * 2**20  # bytes; Flower cuts what it sends into pieces of 5 MB
KEEP_ALIVE_SECONDS = 75

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class CannotListen(RuntimeError):
    """The address or port cannot be used; the text says why and what to do."""


class Gate:
    """The outermost layer: serves `ALLOWED` and nothing else, and bounds what one request may hold."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http" or scope["path"] not in ALLOWED:
            return await _refuse(404, scope, send)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if scope["method"] == "POST" and not length.isdigit():
            return await _refuse(411, scope, send)
        if length.isdigit() and int(length) > LARGEST_REQUEST:
            return await _refuse(413, scope, send)
        return await self._app(scope, receive, send)


async def _refuse(status: int, scope: Scope, send: Send) -> None:
    if scope["type"] != "http":
        return
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class EnrolledOnly(NodeAuthMiddleware):
    """Flower's authentication, and 401 in two more cases: a client that begins with a key that is not
    enrolled, and a reply in another node's name.

    Flower lets the first pass, and then fails with the words that it has for a second client with
    one key, so a client could not tell which it is. Of the second it looks at no sender.
    """

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        async def enrolled(request: Request) -> Response:
            asked = getattr(request.state, "protobuf_request", None)
            if isinstance(asked, ActivateNodeRequest):
                find = get_linkstate(request).get_node_id_by_public_key
                if await run_in_threadpool(find, asked.public_key) is None:
                    raise HTTPException(status_code=401)
            if isinstance(asked, PushMessagesRequest) and any(
                message.metadata.src_node_id != asked.node.node_id
                for message in asked.messages_list
            ):
                raise HTTPException(status_code=401)
            return await call_next(request)

        return await super().dispatch(request, enrolled)


def open_link_state(database: Path) -> LinkStateFactory:
    """The link state in this file. Runs that an earlier process left behind are stopped.

    Raises:
        RuntimeError: another version of Flower is installed than this module was written for.
    """
    if flwr.__version__ != FLOWER:
        raise RuntimeError(f"fedbrats needs flwr {FLOWER}, found {flwr.__version__}.")
    store = ObjectStoreFactory(str(database))
    factory = LinkStateFactory(str(database), NoOpFederationManager(), store)
    database.touch(mode=0o600)
    state = factory.state()
    for run in state.get_run_info():
        if run.status.status != Status.FINISHED:
            state.stop_run(run.run_id)
    return factory


def begin_run(state: LinkState, federation: str, code_hash: str) -> int:
    """A new run, whose package id and hash tell a site which federation and which code it is of.

    There is no package: the hash is that of the installed code, and a site compares it with its own.
    """
    run_id = state.create_run(
        federation,
        "",
        code_hash,
        {},
        NOOP_FEDERATION_ID,
        None,
        NOOP_FLWR_AID,
        TaskType.SERVER_APP,
    )
    # without a token no missing heartbeat ends it: it lives and dies with this process
    with state.session() as session:
        session.execute(
            update(TaskRow)
            .where(TaskRow.run_id == uint64_to_int64(run_id))
            .values(starting_at=now(), running_at=now(), token=None, active_until=None)
        )
    return run_id


def place_nodes(state: LinkState, keys: Mapping[str, ec.EllipticCurvePublicKey]) -> None:
    """Make the nodes of the link state those of these sites: no other key is served."""
    wanted = {public_key_to_bytes(key): site for site, key in keys.items()}
    with state.session() as session:
        known = {bytes(row.public_key): row for row in session.query(NodeRow).all()}
        for public_key, row in known.items():
            gone = row.status == NodeStatus.UNREGISTERED
            if public_key not in wanted and not gone:
                row.status, row.unregistered_at = NodeStatus.UNREGISTERED, now().isoformat()
                row.online_until = min(row.online_until or 0.0, now().timestamp())
            elif public_key in wanted and gone:
                row.status, row.unregistered_at = NodeStatus.REGISTERED, None
            if public_key in wanted:
                row.name = wanted[public_key]
    for public_key, site in wanted.items():
        if public_key not in known:
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 0, name=site)


def fleet_app(factory: LinkStateFactory) -> Gate:
    """What hospitals reach: Flower's fleet routes behind its node authentication, and the gate."""
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(EnrolledOnly),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.state.fleet_event_log_plugin = None
    app.include_router(health.router)
    app.include_router(fleet_router)
    return Gate(app)


@contextlib.contextmanager
def listening(app: Gate, host: str, port: int, certificate: Path, key: Path) -> Iterator[int]:
    """Serve `app` over TLS (1.2 or newer) in a thread while the block runs; yields the port.

    Raises:
        CannotListen: the address is not this machine's, the port is taken or not allowed, or the
            certificate and key do not fit.
    """
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise CannotListen(
            f"{certificate} and {key} cannot be used ({error}); `fed-server renew-certificate` "
            "makes new ones."
        ) from error
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise CannotListen(
            f"Cannot listen on {host} port {port} ({error.strerror}); another program may use it. "
            "Choose another `server.port` or `server.listen` in federation.yaml."
        ) from error
    config = uvicorn.Config(
        app,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody stands in front of it
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise CannotListen(f"The server could not be started on {host} port {port}.")
            time.sleep(0.01)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=5)
        sock.close()
