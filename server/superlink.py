"""Flower's SuperLink, reduced to what hospitals need: a run, the sites' nodes, the fleet interface.

A stock `flower-superlink` serves four interfaces on one port, and the one that starts, stops and
lists runs asks nobody who they are. Here that interface, the runtime's and the package store do not
exist: `server.gate` lets through a short list of paths, over TLS, and all but `/health` only for
enrolled keys.
Runs are driven inside this process (`server.link_grid`), so there is no control port at all.

Built from private modules of Flower, hence for one exact version of it, checked when a link state is made.
"""

from __future__ import annotations

import contextlib
from base64 import b64decode
from collections.abc import Container, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import (
    NOOP_FLWR_AID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    Status,
)
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    verify_signature,
)

from common.few_connections import FewConnections
from common.served import NotStarted, bound_socket, served, tls_settings
from server.fleet import Fleet
from server.gate import Gate
from server.link_state import LinkState

KEEP_ALIVE_SECONDS = 75
MOST_CONNECTIONS, MOST_PER_ADDRESS = 500, 100
FIRST_SECONDS = 20.0  # that a connection has until its first signed request, TLS included


class CannotListen(RuntimeError):
    """The address or port cannot be used; the text says why and what to do."""


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
            state.place_node(public_key, site)


def fleet_app(state: LinkState, own: Container[str] = ()) -> Gate:
    """What hospitals reach: Flower's fleet interface behind the gate.

    `own` holds the ids of the objects that the server has sent (`server.link_grid`).
    """
    return Gate(Fleet(state), lambda headers: _is_signed(state, headers), own)


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
        tls = tls_settings(certificate, key)
    except NotStarted as error:
        raise CannotListen(
            f"{certificate} and {key} cannot be used ({error}); `fed-server renew-certificate` "
            "makes new ones."
        ) from error
    try:
        plain = bound_socket(host, port)
    except NotStarted as error:
        raise CannotListen(
            f"Cannot listen on {host} port {port} ({error}); another program may use it. "
            "Choose another `server.port` or `server.listen` in federation.yaml."
        ) from error
    sock = FewConnections(
        plain, most=MOST_CONNECTIONS, most_per_address=MOST_PER_ADDRESS, seconds=FIRST_SECONDS
    )
    app.keep = sock.keep
    waits = {"timeout_keep_alive": KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": 2}
    try:
        with served(app, sock, **tls, **waits) as bound:
            yield bound
    except NotStarted as error:
        raise CannotListen(f"The server could not be started on {host} port {port}.") from error
