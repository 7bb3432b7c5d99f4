"""Flower's SuperLink, reduced to what hospitals need: its link state and its fleet routes.

A stock `flower-superlink` serves four interfaces on one port, and the one that starts, stops and
lists runs asks nobody who they are. Here that interface, the runtime's and the package store do not
exist: `server.gate` lets through a short list of paths, over TLS, and all but `/health` only for
enrolled keys.
Runs are driven inside this process (`server.link_grid`), so there is no control port at all.

The link state lives and dies with the process. What a federation needs to go on after a restart is
elsewhere, on disk: who is enrolled (`server.enrolment`), what was reached (`server.history`); and a
client that finds the server begun anew signs in again. Flower can keep the state in SQLite, at the
price of most of a round's overhead (docs/measurements.md) and for messages nobody waits for any more.

Built from private modules of Flower, hence for one exact version of it, checked when a link starts.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from base64 import b64decode
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import cast

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    Status,
)
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    verify_signature,
)
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.routers import health
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from common.flower import require_flower
from server.gate import Gate, Limited
from server.pieces import PieceStore

KEEP_ALIVE_SECONDS = 75


class CannotListen(RuntimeError):
    """The address or port cannot be used; the text says why and what to do."""


class LinkState(InMemoryLinkState):
    """Flower's state in memory, with one order of its locks.

    Flower takes the lock of its messages before that of its uploads, but the other way round when a
    piece shows that its upload has expired: two such requests at once would wait for each other.
    """

    def __init__(self, pieces: PieceStore) -> None:
        super().__init__(NoOpFederationManager(), pieces)
        self.pieces = pieces

    def store_object(
        self, run_id: int, session_id: str, object_id: str, object_content: bytes
    ) -> bool:
        with self.lock:
            return super().store_object(run_id, session_id, object_id, object_content)

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        with self.lock:
            return super().get_object(run_id, object_id)


def new_link_state(pieces: Path) -> LinkState:
    """A link state of this process, which knows no node and no run; message pieces lie in a folder.

    Raises:
        WrongFlower: another version of Flower is installed than this module was written for.
        OSError: the folder cannot be made or emptied.
    """
    require_flower()
    return LinkState(PieceStore(pieces))


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
    with state.lock_task_store:
        task = state.task_store[cast(int, state.run_ids[run_id].run.primary_task_id)]
        task.starting_at = task.running_at = now().isoformat()
        task.status.status = Status.RUNNING
    return run_id


def place_nodes(state: LinkState, keys: Mapping[str, ec.EllipticCurvePublicKey]) -> None:
    """Make the nodes of the link state those of these sites: no other key is served."""
    wanted = {public_key_to_bytes(key): site for site, key in keys.items()}
    with state.lock:
        for node in state.nodes.values():
            site = wanted.pop(node.public_key, None)
            gone = node.status == NodeStatus.UNREGISTERED
            if site is None and not gone:
                node.status, node.unregistered_at = NodeStatus.UNREGISTERED, now().isoformat()
                node.online_until = min(node.online_until or 0.0, now().timestamp())
            elif site is not None and gone:
                node.status = NodeStatus.REGISTERED
                node.ClearField("unregistered_at")
            if site is not None:
                node.name = site
        for public_key, site in wanted.items():
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 0, name=site)


def fleet_app(state: LinkState, own: Container[str] = ()) -> Gate:
    """What hospitals reach: Flower's fleet routes behind its node authentication, and the gate.

    `own` holds the ids of the objects that the server has sent (`server.link_grid`).
    """
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = _Made(state)
    app.state.enable_supernode_auth = True
    app.state.fleet_event_log_plugin = None
    app.include_router(health.router)
    app.include_router(fleet_router)
    return Gate(app, lambda headers: _is_signed(state, headers), own)


@dataclass(frozen=True)
class _Made:
    """What Flower's routes ask for the state."""

    made: LinkState

    def state(self) -> LinkState:
        return self.made


def _is_signed(state: LinkState, headers: Mapping[str, str]) -> bool:
    """By an enrolled key, over a recent time: Flower's own check, before anything else is read."""
    try:
        public_key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        timestamp = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.fromisoformat(timestamp)).total_seconds()
        key = bytes_to_public_key(public_key)
    except Exception:  # from outside: whatever is wrong with it
        return False
    recent = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    known = recent and state.get_node_id_by_public_key(public_key) is not None
    return known and verify_signature(key, timestamp.encode(), signature)


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
        http=Limited,
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
