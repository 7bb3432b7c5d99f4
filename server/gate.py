"""What stands in front of Flower's fleet routes: who is heard, about what, and how much of it.

An outsider must cost nothing: no body is read before its signed headers are checked, and a connection
without any does not last (`common.few_connections`). An enrolled site may be broken
or hostile: what it announces as a reply must look like one, and must not touch anything that the
server itself has sent. Not here: the contents of a reply (`server.rounds`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Container, Iterator, MutableMapping
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool

from server.fleet import HANDLERS, HEALTH, PREFIX

REPLY = PREFIX + "push-messages"
ALLOWED = frozenset({HEALTH, *HANDLERS})
LARGEST_REQUEST = 16 * 2**20  # bytes; Flower cuts what it sends into pieces of 5 MB
LARGEST_HEAD = 2**18  # bytes of a reply's announcement: a name for each piece
MOST_PIECES = 1000  # of one reply: 5 GB
DEEPEST = 8  # message, records, record, array, piece
LONGEST_REASON = 4000  # characters of an error text
LONGEST_TTL = 400 * 24 * 3600.0
BODY_SECONDS = 300.0  # for one request's body: 5 MB at 140 kbit/s

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """The outermost layer: serves `ALLOWED` and nothing else.

    `enrolled` says whether a request's headers are signed by a key that counts; `own` holds the ids
    of all objects that the server has sent. `keep` is told the other end of a connection, as ASGI's
    `client`, whose request is so signed.
    """

    keep: Callable[[object], None] = staticmethod(lambda client: None)

    def __init__(
        self, app: App, enrolled: Callable[[dict[str, str]], bool], own: Container[str]
    ) -> None:
        self._app, self._enrolled, self._own = app, enrolled, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http" or scope["path"] not in ALLOWED:
            return await _refuse(404, scope, send)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if not re.fullmatch(r"[A-Za-z0-9.:_\[\]-]{1,255}", headers.get("host", "")):
            return await _refuse(400, scope, send)
        length = headers.get("content-length", "")
        if scope["method"] == "POST" and not length.isdigit():
            return await _refuse(411, scope, send)
        largest = LARGEST_HEAD if scope["path"] == REPLY else LARGEST_REQUEST
        if length.isdigit() and int(length) > largest:
            return await _refuse(413, scope, send)
        if scope["path"] == HEALTH:
            return await self._app(scope, receive, send)
        if not await run_in_threadpool(self._enrolled, headers):
            return await _refuse(401, scope, send)
        self.keep(scope.get("client"))
        try:
            body = await asyncio.wait_for(_body(receive), BODY_SECONDS)
        except (TimeoutError, ConnectionError):
            return await _refuse(408, scope, send)
        if scope["path"] == REPLY and reply_problem(body, self._own):
            return await _refuse(400, scope, send)
        return await self._app(scope, _replay(body, receive), send)


def reply_problem(body: bytes, own: Container[str]) -> str:
    """Why an announced reply is not what an honest site sends; empty if it is."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return "it is no protobuf message"
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return "it is not exactly one message"
    head, tree = request.messages_list[0], request.message_object_trees[0]
    metadata = head.metadata
    if not metadata.reply_to_message_id or metadata.src_node_id != request.node.node_id:
        return "it replies to nothing, or in another node's name"
    if head.HasField("content") and head.content.ByteSize() > 0:
        return "its head holds content"
    if not 0 <= metadata.ttl <= LONGEST_TTL:  # also if it is not a number
        return "its time to live is no time"
    if head.HasField("error") and len(head.error.reason) > LONGEST_REASON:
        return "its error text is too long"
    for number, (depth, piece) in enumerate(_pieces(tree)):
        if number > MOST_PIECES or depth > DEEPEST:
            return "it has too many pieces"
        if not re.fullmatch(r"[0-9a-f]{64}", piece.object_id):
            return "a piece's name is no hash"
        if piece.object_id in own:
            return "it names an object of the server"
    if metadata.message_id != tree.object_id:
        return "its name is not that of its pieces"
    return ""


def _pieces(tree: ObjectTree, depth: int = 0) -> Iterator[tuple[int, ObjectTree]]:
    yield depth, tree
    if depth <= DEEPEST:
        for child in tree.children:
            yield from _pieces(child, depth + 1)


async def _body(receive: Receive) -> bytes:
    """The whole body, whose length the server has been told and keeps to."""
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(status: int, scope: Scope, send: Send) -> None:
    if scope["type"] != "http":
        return
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
