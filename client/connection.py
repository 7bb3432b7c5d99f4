"""A hospital's connection to the coordinator: Flower's fleet protocol over TLS, outbound only.

It fetches messages and sends replies. It never asks for a program package: there is no code here
that could receive one. Failures come in two kinds: `Unreachable` may pass, so the caller tries
again; `Refused` will not pass by waiting, and its text says what to do.
"""

from __future__ import annotations

import contextlib
import email.utils
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.flower import require_flower
from common.keys import fingerprint

TIMEOUT = httpx.Timeout(20.0, connect=10.0)  # seconds, of one step of a request
ANSWER_SECONDS = 300.0  # for all of one answer: a piece of 5 MB at 140 kbit/s
LARGEST_ANSWER = 16 * 2**20  # bytes; Flower cuts what it sends into pieces of 5 MB
LAST_TIMEOUT = httpx.Timeout(3.0)  # when this client is being stopped
HEARTBEAT_SECONDS = 10  # the least that Flower allows; twice as long without one is "offline"
CLOCK_AHEAD, CLOCK_BEHIND = 4.0, 295.0  # seconds; Flower refuses 5 s ahead or 305 s behind
LARGEST_OVERHEAD = 2**20  # bytes of a message beside its weights
MOST_PIECES = 10_000
Result = TypeVar("Result")


class Unreachable(RuntimeError):
    """The coordinator cannot be reached now, or it has a problem of its own; worth trying again."""


class Refused(RuntimeError):
    """The coordinator or the certificate check says no; waiting will not help."""


class UnknownKey(Refused):
    """This site's key is not enrolled, or not any more."""


class Rejected(Unreachable):
    """The coordinator does not take what was sent; for a reply, sending it again will not help."""


class AlreadyConnected(Unreachable):
    """Another client is connected with this key, or was until a moment ago."""


class RunOver(RuntimeError):
    """The message belongs to a run that has ended, as when the coordinator's server was restarted."""


class TooLarge(RuntimeError):
    """A message holds more than the agreed network can, or is not what was announced; it is dropped."""


class Connection:
    """One node's session with the coordinator. Not for use by several threads at once."""

    def __init__(
        self,
        address: str,
        ca_certificate: str,
        private_key: ec.EllipticCurvePrivateKey,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Does not connect yet.

        Args:
            address: host:port, the only one that is ever contacted.
            ca_certificate: PEM text.
            check: called again and again while something is under way; may raise to end it.
        """
        require_flower()
        self._patience = _Patience()
        self._address = address
        self._key = private_key
        self._client = FleetHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=ca_certificate.encode("ascii"),
            interceptors=[
                self._patience,
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private_key, private_key.public_key()),
            ],
        )
        self._check = check
        http = self._client._client
        http.timeout = TIMEOUT
        http.follow_redirects = False  # one address, and what it says cannot lead to another
        http.headers["accept-encoding"] = "identity"  # what is small on the line must stay small
        http.event_hooks = {"response": [self._bound]}
        self._pushed = ""  # the piece that was sent last
        self._node: Node | None = None
        self._pieces: dict[str, bytes] = {}  # of the last message: often the next holds the same
        self._heartbeat = threading.Thread(target=self._keep_alive, daemon=True)
        self._closing = threading.Event()
        self.last_contact: datetime | None = None

    @property
    def node_id(self) -> int:
        assert self._node is not None
        return int(self._node.node_id)

    def open(self) -> None:
        """Become this key's node.

        Raises:
            Unreachable, AlreadyConnected, Refused
        """
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(self._key.public_key()),
            heartbeat_interval=HEARTBEAT_SECONDS,
        )
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        if not self._heartbeat.is_alive():
            self._heartbeat = threading.Thread(target=self._keep_alive, daemon=True)
            self._heartbeat.start()

    def hurry(self) -> None:
        """From now on wait for no step longer than a few seconds."""
        self._client._client.timeout = LAST_TIMEOUT

    def close(self) -> None:
        """Say goodbye, so that nobody waits for this site; never raises."""
        self._closing.set()
        self.hurry()
        if self._node is not None:
            with contextlib.suppress(Unreachable, Refused):
                request = DeactivateNodeRequest(node_id=self.node_id)
                self._call(self._client.DeactivateNode, request)
            self._node = None
        self._client.close()

    def receive(self, wait: int = 0) -> tuple[Message, ObjectTree] | None:
        """The next message's head, if there is one; `fetch` brings its content.

        Args:
            wait: seconds that the server may hold the answer for a message to come. Who waits has no
                message in hand: one that was sent, but not received, is sent again.

        Raises:
            Unreachable, Refused
        """
        self._patience.seconds = wait
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        with self._in_words():
            return message_from_proto(response.messages_list[0]), response.message_object_trees[0]

    def fetch(
        self,
        head: Message,
        tree: ObjectTree,
        largest: int,
    ) -> Message:
        """The whole message, of which at most `largest` bytes of weights are fetched.

        Pieces that the last message had too, as when a model is first evaluated and then trained
        on, are not fetched again.

        Raises:
            Unreachable, Refused
            TooLarge: there is more, or it is not what its head announced.
        """
        pieces: dict[str, bytes] = {}
        size = 0
        for number, piece in enumerate(iterate_object_tree(tree)):
            content = self._pieces.get(piece.object_id)
            if content is None:
                self._check()
                content = self._piece(head.metadata.run_id, piece.object_id)
            size += len(content)
            if size > largest + LARGEST_OVERHEAD or number > MOST_PIECES:
                raise TooLarge(f"the message holds more than {largest} bytes of weights.")
            pieces[piece.object_id] = content
        self._pieces = dict(pieces)
        try:
            message = inflate_object_from_contents(tree.object_id, pieces)
        except Exception as error:  # from outside: whatever is wrong with it, refuse it
            raise TooLarge(f"the message cannot be read ({type(error).__name__}).") from error
        if not isinstance(message, Message) or _announced(message) != _announced(head):
            raise TooLarge("what was sent is not the message that was announced.")
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def send(self, reply: Message) -> bool:
        """Send a reply; False if the coordinator does not wait for it any more.

        Raises:
            Unreachable: part of it may have arrived; calling again sends what is missing.
            Refused
        """
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            try:
                response = self._call(self._client.PushMessages, request)
            except Rejected as error:
                raise RunOver(str(error)) from error
            missing = set(response.objects_to_push)
            if not missing:
                return self._pushed == reply.object_id  # only the last answer was lost
            objects = get_all_nested_objects(reply)  # children before parents, so the head is last
            for object_id, piece in objects.items():
                if object_id in missing:
                    self._check()
                    content = piece.deflate()
                    self._pushed = object_id
                    pushed = self._call(
                        self._client.PushObject,
                        PushObjectRequest(
                            node=self._node,
                            run_id=reply.metadata.run_id,
                            object_id=object_id,
                            object_content=content,
                            session_id=response.session_id,
                        ),
                    )
                    if not pushed.stored:
                        self._pushed = ""
                        raise Unreachable(
                            f"{self._address}: did not keep a part of the reply (a full disk there, "
                            "or the upload took a pause of over 3 minutes)."
                        )
        return True

    def run(self, run_id: int) -> tuple[str, str]:
        """The federation and the code hash that a run states (`server.superlink.begin_run`).

        Raises:
            Unreachable, Refused
        """
        response = self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        run = run_from_proto(response.run)
        return run.fab_id, run.fab_hash

    # ------------------------------------------------------------------------------------ internals

    def _piece(self, run_id: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        response = self._call(self._client.PullObject, request)
        if not response.object_found:
            raise RunOver(f"{self._address}: the message is not offered any more.")
        if not response.object_available:
            raise Unreachable(f"{self._address}: a part of the message is not there yet.")
        return cast(bytes, response.object_content)

    def _keep_alive(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS * 0.8):
            # what is wrong shows when the next message is asked for
            with contextlib.suppress(Unreachable, Refused, RuntimeError):
                self._sign_of_life()

    def _sign_of_life(self) -> None:
        if self._node is not None:
            request = SendNodeHeartbeatRequest(
                node=self._node, heartbeat_interval=HEARTBEAT_SECONDS
            )
            self._call(self._client.SendNodeHeartbeat, request)

    def _bound(self, response: httpx.Response) -> None:
        """Before the body is read: it may be neither packed, nor large, nor endless."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.RemoteProtocolError("the answer is packed")
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Bounded(response.stream, self._check)

    def _call(self, method: Callable[[Any], Result], request: Any) -> Result:
        with self._in_words():
            result = method(request)
        self.last_contact = datetime.now(UTC)
        return result

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise self._explained(error.response) from error
        except httpx.TransportError as error:
            reason = _certificate_problem(error)
            if reason:
                raise Refused(f"{self._address}: {reason}") from error
            raise Unreachable(f"{self._address}: {_plain(error)}") from error
        except (ValueError, LookupError) as error:  # not what Flower answers
            raise Unreachable(f"{self._address}: answers in an unknown way.") from error

    def _explained(self, response: httpx.Response) -> RuntimeError:
        status = response.status_code
        if status == httpx.codes.UNAUTHORIZED:
            apart = _clocks_apart(response)
            if apart < -CLOCK_AHEAD or apart > CLOCK_BEHIND:
                way = "behind" if apart > 0 else "ahead of"
                return Refused(
                    f"{self._address}: this machine's clock is {_duration(abs(apart))} {way} "
                    "the coordinator's. Set the clock (NTP) on the one that is wrong."
                )
            return UnknownKey(
                f"{self._address}: the coordinator does not know this site's key "
                f"({fingerprint(self._key.public_key())}), or has revoked it. Send site.pub to the "
                "coordinator, who enrols it with `fed-server admit`."
            )
        if response.is_redirect or 300 <= status < 400:
            return Refused(f"{self._address}: answers with a redirection, which is not followed.")
        known = FlowerError.from_json(response.text)
        if known is not None and known.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return AlreadyConnected(
                f"{self._address}: another client is connected with this site's key, or was until "
                f"less than {2 * HEARTBEAT_SECONDS} s ago."
            )
        if known is not None and known.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return RunOver(f"{self._address}: the run that the message belongs to is over.")
        if status in (403, 404, 405):
            return Refused(
                f"{self._address}: this is not a fedbrats server (HTTP {status}); check the address."
            )
        kind = Rejected if status in (400, 413) else Unreachable
        return kind(f"{self._address}: the coordinator has a problem (HTTP {status}).")


class _Patience:
    """Asks the server to hold the answer while there is no message (RFC 7240)."""

    seconds = 0

    def intercept(
        self, context: ProtobufRequestContext, call_next: Callable[..., httpx.Response]
    ) -> httpx.Response:
        if self.seconds and isinstance(context.message, PullMessagesRequest):
            context.request.headers["prefer"] = f"wait={self.seconds}"
        return call_next(context)


class _Bounded(httpx.SyncByteStream):
    """An answer's body that ends by `LARGEST_ANSWER` and `ANSWER_SECONDS`, or when it is told to."""

    def __init__(self, stream: httpx.SyncByteStream, check: Callable[[], None]) -> None:
        self._stream, self._check = stream, check

    def __iter__(self) -> Iterator[bytes]:
        size, begin = 0, time.monotonic()
        for part in self._stream:
            self._check()
            size += len(part)
            if size > LARGEST_ANSWER or time.monotonic() - begin > ANSWER_SECONDS:
                raise httpx.RemoteProtocolError("the answer is too large or too slow")
            yield part

    def close(self) -> None:
        self._stream.close()


def _announced(message: Message) -> tuple[Any, ...]:
    m = message.metadata
    return m.message_type, m.run_id, m.src_node_id, m.dst_node_id, m.created_at, m.ttl


def _certificate_problem(error: BaseException) -> str:
    """Words for a failed certificate check; empty for any other failure."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    text = str(cause or error)
    if cause is None and "CERTIFICATE_VERIFY_FAILED" not in text:
        return ""
    if "expired" in text:
        return (
            "the server's certificate has expired. Ask the coordinator to run "
            "`fed-server renew-certificate` (nothing changes here), or check this machine's clock."
        )
    if "not yet valid" in text:
        return "the server's certificate is not valid yet: check this machine's clock."
    if "mismatch" in text or "not valid for" in text:
        return (
            "the server's certificate is for another name or address. Ask the coordinator to run "
            "`fed-server renew-certificate` with this one."
        )
    return (
        "the server's certificate is not from the CA in this site's invitation: a wrong or old "
        "invitation, or somebody in between. Nothing was sent. Ask the coordinator."
    )


def _clocks_apart(response: httpx.Response) -> float:
    """Seconds by which this machine's clock is behind the server's."""
    try:
        there = email.utils.parsedate_to_datetime(response.headers["date"])
    except (KeyError, ValueError, TypeError):
        return 0.0
    return (there - datetime.now(UTC)).total_seconds()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def _plain(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return "no answer (a firewall may block the outbound connection)"
    if isinstance(error, httpx.TimeoutException):
        return "the connection stalled"
    text = str(error)
    if "refused" in text:
        return "nothing listens there now (the server is not running, or the port is wrong)"
    if "Name or service" in text or "name resolution" in text or "nodename" in text:
        return "the name cannot be resolved"
    return f"the connection failed ({text or type(error).__name__})"
