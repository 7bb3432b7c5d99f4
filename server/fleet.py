"""Flower's fleet interface: its handlers and its node authentication, called straight from ASGI.

Flower serves them through FastAPI and three middlewares, which cost more than the handlers; here a
request is parsed, authenticated, answered. A client may ask that the answer wait for a message (`Prefer:
wait=SECONDS`, RFC 7240), so that it has it at once and need not ask many times a second.
Who may ask at all, and how much, is `server.gate`'s affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any, cast

from fastapi import Request, Response
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError, Message
from starlette.concurrency import run_in_threadpool

from server.link_state import LinkState

PREFIX, HEALTH = "/v1/fleet/", "/health"
PULL = PREFIX + "pull-messages"
LONGEST_WAIT = 5.0  # seconds
Handler = Callable[[Any, Any], Message]
HANDLERS: dict[str, tuple[type[Message], Handler]] = {
    PREFIX + "activate-node": (ActivateNodeRequest, fleet_handlers.activate_node),
    PREFIX + "deactivate-node": (DeactivateNodeRequest, fleet_handlers.deactivate_node),
    PREFIX + "send-node-heartbeat": (SendNodeHeartbeatRequest, fleet_handlers.send_node_heartbeat),
    PULL: (PullMessagesRequest, lambda r, s: fleet_handlers.pull_messages(r, s, s.object_store)),
    PREFIX + "push-messages": (PushMessagesRequest, fleet_handlers.push_messages),
    PREFIX + "get-run": (GetRunRequest, fleet_handlers.get_run),
    PREFIX + "push-object": (PushObjectRequest, fleet_handlers.push_object),
    PREFIX + "pull-object": (PullObjectRequest, fleet_handlers.pull_object),
}


class Fleet:
    """The interface as an ASGI application."""

    def __init__(self, state: LinkState) -> None:
        self._state = state
        # what Flower's authentication takes the state from
        made = SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: state))
        self._app = SimpleNamespace(state=made)

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        request = Request({**scope, "app": self._app}, receive)
        response = await http_error_translator(request, self._respond)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        path = request.url.path
        if path == HEALTH:
            return Response(status_code=200 if request.method in ("GET", "HEAD") else 405)
        if request.method != "POST":
            return Response(status_code=405)
        kind, handle = HANDLERS[path]
        if request.headers.get("content-type") != PROTOBUF_MEDIA_TYPE:
            return Response(status_code=415)
        try:
            message = request.state.protobuf_request = kind.FromString(await request.body())
        except DecodeError:
            return Response(status_code=400)

        wait = _wait_of(request) if path == PULL else 0.0

        def answer() -> Message:
            authenticate_node(request)
            if wait:  # who waits has nothing in hand
                self._state.offer_again(cast(PullMessagesRequest, message).node.node_id)
            return handle(message, self._state)

        result = await run_in_threadpool(answer)
        if wait and not cast(PullMessagesResponse, result).messages_list:
            await self._news(cast(PullMessagesRequest, message).node.node_id, wait)
            result = await run_in_threadpool(answer)
        return Response(result.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)

    async def _news(self, node: int, seconds: float) -> None:
        """Until there is a message to the node, or so long."""
        loop, bell = asyncio.get_running_loop(), asyncio.Event()
        with self._state.told(node, lambda: loop.call_soon_threadsafe(bell.set)) as there:
            if not there:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), seconds)


def _wait_of(request: Request) -> float:
    found = re.fullmatch(r"wait=(\d{1,4})", request.headers.get("prefer", ""))
    return min(float(found[1]), LONGEST_WAIT) if found else 0.0
