"""Every message ends with a whole reply or with words, whatever the other side does in between."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.servicer.fleet import fleet_handlers

from client.connection import Unreachable
from common.keys import new_private_key
from server import link_grid
from server.exchange import answers
from server.link_grid import LinkGrid
from tests.link import Link, counting, reply_to, stamp, take, until


def model(seed: int = 0, arrays: int = 6, size: int = 200) -> RecordDict:
    """A message's content of several pieces."""
    noise = random.Random(seed)
    record = ArrayRecord(
        {f"t{i}": Array("uint8", (size,), "raw", noise.randbytes(size)) for i in range(arrays)}
    )
    return RecordDict({"about": ConfigRecord({"seed": seed}), "weights": record})


def same(content: RecordDict, other: RecordDict) -> bool:
    weights, others = content["weights"], other["weights"]
    return content["about"]["seed"] == other["about"]["seed"] and all(
        weights[name].data == others[name].data for name in {*weights, *others}
    )


@pytest.fixture(autouse=True)
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid looks after its sites at every call, not once a second."""
    monkeypatch.setattr("server.link_grid.SECONDS_BETWEEN_LOOKS", 0.0)


def words(reply: Message | None) -> str:
    assert reply is not None
    assert reply.has_error(), reply
    return reply.error.reason


def cut_after(client, pieces: int) -> None:
    """The client's connection breaks after so many pieces of its reply."""
    push, left = client._client.PushObject, [pieces]

    def pushing(request):
        left[0] -= 1
        if left[0] < 0:
            client._client.PushObject = push
            raise httpx.ReadError("cut")
        return push(request)

    client._client.PushObject = pushing


# ------------------------------------------------------------------------------ a whole exchange


def test_a_message_and_its_reply_arrive_whole_and_leave_nothing_behind(link):
    client = link.connect("a")
    assert client.receive() is None
    sent = link.send("a", model(1), kind="train")
    assert link.pull(sent) is None
    message = take(client)
    assert same(message.content, model(1))
    assert message.metadata.message_type == "train"
    assert message.metadata.run_id == link.run_id
    assert client.send(reply_to(client, message, model(2)))
    reply = link.pull(sent)
    assert same(reply.content, model(2))
    assert reply.metadata.reply_to_message_id == sent
    assert reply.metadata.src_node_id == client.node_id
    assert link.held() == {}


def test_an_error_reply_arrives_as_it_is(link):
    client = link.connect("a")
    sent = link.send("a")
    message = take(client)
    stamp(client, link.run_id)
    assert client.send(Message(Error(code=2, reason="no Gd"), reply_to=message))
    reply = link.pull(sent)
    assert reply.error.reason == "no Gd"
    assert link.held() == {}


def test_an_error_text_cannot_draw_over_a_screen(link):
    client = link.connect("a")
    sent = link.send("a")
    message = take(client)
    stamp(client, link.run_id)
    reason = "\x1b[2J" + "no\nGd " * 400
    assert client.send(Message(Error(code=2, reason=reason), reply_to=message))
    said = words(link.pull(sent))
    assert said.isprintable()
    assert len(said) <= 500


def test_several_sites_at_once_share_what_is_the_same(link):
    """The round's model goes to every site, and is in the database once."""
    clients = {site: link.connect(site) for site in ("a", "b")}
    before = link.held().get("objects", 0)
    first = link.send("a", model(1, size=1000))
    once = link.held()["objects"] - before
    second = link.send("b", model(1, size=1000))
    assert link.held()["objects"] == once + 1, "only the message's head is another"
    for seed, (site, client) in enumerate(clients.items()):
        message = take(client)
        assert same(message.content, model(1, size=1000)), site
        assert client.send(reply_to(client, message, model(seed + 5)))
    assert same(link.pull(first).content, model(5))
    assert same(link.pull(second).content, model(6))
    assert link.held() == {}


def test_exchange_over_the_link_takes_the_answers_in_order(link):
    clients = {site: link.connect(site) for site in ("b", "a")}

    def work(client):
        message = until(lambda: take(client), "the task")
        with lock:  # flower stamps replies from a global
            reply = reply_to(client, message, model(message.content["about"]["seed"] + 1))
        client.send(reply)

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(client,)) for client in clients.values()]
    contacts = link.grid.contacts()
    messages = {
        site: Message(model(seed), contacts[site].node, "train", ttl=60)
        for site, seed in (("a", 10), ("b", 20))
    }
    for thread in threads:
        thread.start()
    found = list(answers(link.grid, messages, lambda site, c: (site, c["about"]["seed"])))
    for thread in threads:
        thread.join()
    assert found == [("a", ("a", 11)), ("b", ("b", 21))]
    assert link.held() == {}


# ----------------------------------------------------------------------- nothing that is half there


def test_a_message_is_invisible_until_all_of_it_is_there(link, monkeypatch):
    node = link.connect("a").node_id
    seen, askers = [], []
    store = link.state.store_object

    def ask():
        found = link.state.get_message_ins(node, limit=1)
        seen.append([link.held()["objects"] for _ in found])

    def storing(*arguments):
        askers.append(threading.Thread(target=ask))
        askers[-1].start()
        askers[-1].join(0.02)
        assert not seen, "they wait"
        return store(*arguments)

    monkeypatch.setattr(link.state, "store_object", storing)
    link.send("a", model())
    for asker in askers:
        asker.join()
    assert len(askers) > 6
    assert sorted(seen)[:-1] == [[]] * (len(askers) - 1), "it comes once"
    assert sorted(seen)[-1] == [len(askers)], "with all of its pieces"


def full(monkeypatch, after: int) -> None:
    """A disk that has room for so many files only."""
    left = [after]
    write = Path.write_bytes

    def writing(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", writing)


def test_a_message_that_cannot_be_stored_is_not_there_at_all(link, monkeypatch):
    client = link.connect("a")
    full(monkeypatch, 2)
    with pytest.raises(
        OSError, match=r"pieces: cannot be written \(No space left .* Free disk space"
    ):
        link.send("a", model(arrays=6, size=100_000))
    assert link.held() == {}
    assert client.receive() is None


def test_a_reply_that_cannot_be_stored_ends_the_wait(link, monkeypatch):
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client), model(arrays=6, size=100_000))
    full(monkeypatch, 2)
    with pytest.raises(Unreachable, match="a full disk there"):
        client.send(reply)
    with pytest.raises(OSError, match="Free disk space"):
        link.pull(sent)


def test_a_client_that_polls_all_the_time_never_sees_half_a_message(link):
    client = link.connect("a")
    taken, over = [], threading.Event()

    def poll():
        while not over.is_set():
            if (received := client.receive()) is not None:
                taken.append(client.fetch(*received, 10**9).content["about"]["seed"])

    thread = threading.Thread(target=poll)
    thread.start()
    for seed in range(8):
        link.send("a", model(seed, arrays=10))
    with contextlib.suppress(AssertionError):
        until(lambda: len(taken) == 8 or not thread.is_alive(), "all messages")
    over.set()
    thread.join()
    assert taken == list(range(8))


@pytest.mark.parametrize("pieces", [0, 1, 5, 9])
def test_half_a_reply_is_none_until_the_rest_has_come(link, pieces):
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client), model(3))
    cut_after(client, pieces)
    with pytest.raises(Unreachable):
        client.send(reply)
    assert link.grid.doing() == {"a": "sending"}
    assert link.pull(sent) is None
    assert link.pull(sent) is None
    with counting(client, "PushObject") as pushed:
        assert client.send(reply), "calling again sends what is missing"
    assert len(pushed) == len(get_all_nested_objects(reply)) - pieces
    assert same(link.pull(sent).content, model(3))
    assert link.held() == {}


def test_half_a_reply_that_is_given_up_is_not_kept(link):
    """Each could be a whole model, in every round."""
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client), model(3))
    cut_after(client, 4)
    with pytest.raises(Unreachable):
        client.send(reply)
    assert "did not answer" in words(link.expire(sent))
    assert link.held() == {}
    assert client.send(reply) is False, "and the rest of it is not wanted any more"
    assert link.held() == {}


def test_a_reply_given_up_between_two_pieces_ends_in_words_at_the_client(link):
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client), model(3))
    push, given_up = client._client.PushObject, []

    def pushing(request):
        if not given_up:
            given_up.append(link.expire(sent))
        return push(request)

    client._client.PushObject = pushing
    with pytest.raises(Unreachable, match="did not keep"):
        client.send(reply)
    assert client.send(reply) is False
    assert link.held() == {}


# --------------------------------------------------------------------------------- given up in words


def test_after_the_deadline_no_reply_is_taken(link):
    client = link.connect("a")
    sent = link.send("a", ttl=90)
    reply = reply_to(client, take(client))
    assert link.pull(sent) is None
    assert words(link.expire(sent)) == "it did not answer within 1.5 minutes."
    assert client.send(reply) is False
    assert link.held() == {}
    again = link.send("a")
    assert client.send(reply) is False
    client.send(reply_to(client, take(client)))
    assert link.pull(again).has_content(), "the next one is not affected"


def test_a_message_that_nobody_fetched_ends_at_its_deadline_too(link):
    link.connect("a").close()
    sent = link.send("a")
    assert "within 1 minutes" in words(link.expire(sent))
    assert link.connect("a").receive() is None
    assert link.held() == {}


def lose(link: Link, *sites: str, seconds: float = 0.0) -> datetime:
    """Their connections were given up so long ago; returns when."""
    gone = datetime.now(UTC) - timedelta(seconds=seconds)
    for site in sites:
        link.set(site, online_until=gone.timestamp())
    assert not any(link.grid.contacts()[site].online for site in sites)
    return gone


def test_lost_contact_is_waited_out_and_then_named(link, monkeypatch):
    clock = Clock(monkeypatch)
    client = link.connect("a")
    sent = link.send("a", ttl=1000)
    take(client)
    gone = lose(link, "a")
    assert link.pull(sent) is None, "within return_seconds it may come back"
    clock.now += 59
    assert link.pull(sent) is None
    clock.now += 2
    assert words(link.pull(sent)) == (
        f"its connection was lost ({gone:%H:%M:%S} UTC) and did not return within 1 minutes."
    )
    assert link.held() == {}


def test_who_came_back_is_waited_for_as_long_again(link, monkeypatch):
    """Also who was given up before, and who came back while another site was waited for."""
    clock = Clock(monkeypatch)
    clients = {site: link.connect(site) for site in ("a", "b")}
    other = link.send("a", ttl=10_000)
    for attempt in range(2):
        sent = link.send("b", ttl=10_000)
        lose(link, "b")
        assert link.pull(sent) is None, attempt
        clock.now += 61
        assert "was lost" in words(link.pull(sent))
        link.set("b", status="online", online_until=time.time() + 20)
        assert link.pull(other) is None, "only a is asked about"
    sent = link.send("b", ttl=10_000)
    clock.now += 600
    assert link.pull(other) is None
    lose(link, "b")
    assert link.pull(sent) is None, "it has been away for a moment only"
    clock.now += 50
    assert link.pull(other) is None
    clock.now += 11
    assert "was lost" in words(link.pull(sent)), "it was away all the time that a was waited for"
    assert clients


class Clock:
    """The clock of this process, for the grid alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("server.link_grid.time", self)

    def monotonic(self) -> float:
        return self.now


def test_who_says_goodbye_and_stays_away_is_given_up_too(link):
    client = link.connect("a")
    grid = LinkGrid(link.state, link.run_id, return_seconds=0.05)
    node = grid.contacts()["a"].node
    (sent,) = grid.push_messages([Message(model(), node, "train", ttl=60)])
    client.close()
    error = until(lambda: list(grid.pull_messages([sent])), "the loss")[0]
    assert "its connection was lost (" in error.error.reason
    assert link.held() == {}


@pytest.mark.parametrize("how", ["revoked", "rotated"])
def test_a_revoked_or_rotated_key_is_named(link, how):
    client = link.connect("a")
    sent = link.send("a")
    reply = reply_to(client, take(client))
    if how == "revoked":
        link.place("b")
    else:
        link.keys["a"] = new_private_key()
        link.place("a", "b")
    assert words(link.pull(sent)) == "its key was revoked or replaced."
    assert link.held() == {}
    with pytest.raises(RuntimeError, match="does not know"):
        client.send(reply)


def test_nothing_is_sent_to_whom_is_not_enrolled(link):
    node = link.grid.contacts()["a"].node
    link.place("b")
    messages = [Message(model(), n, "train", ttl=60) for n in (node, 12345)]
    assert list(link.grid.push_messages(messages)) == ["", ""]
    assert list(answers(link.grid, {"a": messages[0]}, lambda *_: None)) == [
        ("a", "the message could not be sent.")
    ]
    assert link.held() == {}


# -------------------------------------------------------------------------------- offered again


def test_who_was_started_anew_gets_the_task_again(link):
    first = link.connect("a")
    sent = link.send("a", model(1))
    assert take(first) is not None
    assert link.pull(sent) is None
    first._node = None  # killed: no goodbye
    link.set("a", online_until=time.time() - 1)
    second = link.connect("a")
    assert second.receive() is None, "offered when the coordinator looks again"
    assert link.pull(sent) is None
    message = take(second)
    assert message.metadata.message_id == sent
    assert same(message.content, model(1))
    second.send(reply_to(second, message, model(2)))
    assert same(link.pull(sent).content, model(2))
    assert link.held() == {}


def test_what_the_dead_client_had_sent_of_its_reply_is_not_in_the_way(link):
    first = link.connect("a")
    sent = link.send("a", model(1))
    cut_after(first, 4)
    with pytest.raises(Unreachable):
        first.send(reply_to(first, take(first), model(2)))
    first._node = None
    link.set("a", online_until=time.time() - 1)
    second = link.connect("a")
    assert link.pull(sent) is None
    assert second.send(reply_to(second, take(second), model(3)))
    assert same(link.pull(sent).content, model(3))
    assert link.held() == {}


def test_a_whole_reply_of_a_client_that_died_since_is_taken(link):
    first = link.connect("a")
    sent = link.send("a", model(1))
    first.send(reply_to(first, take(first), model(2)))
    first.close()
    second = link.connect("a")
    other = link.send("b") if link.grid.contacts()["b"].last else link.send("a", model(9))
    assert link.pull(other) is None
    assert take(second).metadata.message_id == other, "not the old task again"
    assert same(link.pull(sent).content, model(2))


def test_a_client_that_lives_is_not_asked_twice(link):
    client = link.connect("a")
    sent = link.send("a")
    message = take(client)
    for _ in range(3):
        assert link.pull(sent) is None
        assert client.receive() is None
    other = link.connect("b")
    link.send("b")
    assert take(other) is not None
    assert link.pull(sent) is None
    assert client.receive() is None, "another site's start is another's"
    client.send(reply_to(client, message))
    assert link.pull(sent).has_content()


def test_a_task_that_was_not_taken_before_the_restart_comes_once(link):
    link.connect("a").close()
    sent = link.send("a")
    client = link.connect("a")
    assert take(client).metadata.message_id == sent
    for _ in range(2):
        assert link.pull(sent) is None
        assert client.receive() is None


# --------------------------------------------------------------------------- what cannot be right


@pytest.mark.parametrize("pieces", [0, 3, 99])
def test_who_claims_the_next_models_pieces_is_refused_and_nobody_else_harmed(link, pieces):
    """A site may know the model, as from before a restart of the server, and announce its pieces."""
    a, b = link.connect("a"), link.connect("b")
    first = link.send("a")
    claim = reply_to(a, take(a), model(7))
    cut_after(a, pieces)
    with contextlib.suppress(Unreachable):
        a.send(claim)
    assert pieces == 99 or link.pull(first) is None
    second = link.send("b", model(7))
    assert same(take(b).content, model(7))
    assert words(link.pull(first)) == "its reply names an object of the server."
    assert link.pull(second) is None
    link.expire(second)
    assert link.held() == {}


class Direct:
    """Flower's handlers of a reply without network and authentication, which take most of the time."""

    def __init__(self, link: Link) -> None:
        self._state = link.state

    def PushMessages(self, request):
        return fleet_handlers.push_messages(request, self._state)

    def PushObject(self, request):
        return fleet_handlers.push_object(request, self._state)


def upload(
    client,
    head: Message,
    pieces: dict[str, bytes],
    tree: ObjectTree,
    direct: Direct | None = None,
    *,
    name: str = "",
) -> list[str]:
    """Push this head, tree and pieces as a malicious client could; the ids that were stored.

    `name` is the message's, if not that of the tree.
    """
    with no_object_id_recompute():
        proto = message_to_proto(remove_content_from_message(head))
    proto.metadata.message_id = name or tree.object_id
    request = PushMessagesRequest(
        node=client._node,
        messages_list=[proto],
        message_object_trees=[tree],
        clientapp_runtime_list=[0.0],
    )
    fleet = direct or client._client
    response = fleet.PushMessages(request)
    stored = []
    for object_id in response.objects_to_push:
        content = pieces.get(object_id)
        if content is not None:
            asked = PushObjectRequest(
                node=client._node,
                run_id=head.metadata.run_id,
                object_id=object_id,
                object_content=content,
                session_id=response.session_id,
            )
            if fleet.PushObject(asked).stored:
                stored.append(object_id)
    return stored


def packed(reply: Message) -> tuple[dict[str, bytes], ObjectTree]:
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        pieces = {key: obj.deflate() for key, obj in get_all_nested_objects(reply).items()}
        return pieces, get_object_tree(reply)


def signed(reply: Message, node: int) -> Message:
    """The reply with another sender."""
    reply.metadata.__dict__["_src_node_id"] = node
    return reply


def test_a_reply_to_another_message_is_named(link):
    client = link.connect("a")
    first = link.send("a", model(1))
    second = link.send("a", model(2))
    one, two = take(client), take(client)
    right, wrong = reply_to(client, one), reply_to(client, two)
    assert upload(client, right, *packed(wrong))
    assert words(link.pull(first)) == "its reply is to another message."
    assert client.send(wrong)
    assert link.pull(second).has_content()
    assert link.held() == {}


def test_nobody_answers_for_another_site(link):
    a, b = link.connect("a"), link.connect("b")
    sent = link.send("a")
    message = take(a)
    true, false = reply_to(a, message, model(1)), reply_to(b, message, model(2))
    assert upload(b, signed(false, b.node_id), *packed(false)) == [], "it was not asked"
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        upload(b, signed(true, a.node_id), *packed(true))
    assert link.pull(sent) is None
    # the head says that it is a's, what is in it that it is b's
    assert upload(a, true, *packed(signed(false, b.node_id)))
    assert words(link.pull(sent)) == "its reply is to another message."
    assert link.held() == {}


def test_a_reply_of_endless_size_is_not_taken(link, monkeypatch):
    client = link.connect("a")
    for target, limit, value in (
        (link.grid, "_largest_reply", 1000),
        (link_grid, "MOST_PIECES", 3),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, limit, value)
            sent = link.send("a")
            client.send(reply_to(client, take(client), model(4)))
            assert words(link.pull(sent)) == "its reply is larger than any answer can be."
        assert link.held() == {}, limit


def noisy(count: int) -> dict[str, bytes]:
    """Pieces that are large enough for a file."""
    noise = random.Random(1)
    contents = [object_of("ArrayChunk", [], noise.randbytes(100_000)) for _ in range(count)]
    return {get_object_id(content): content for content in contents}


def test_what_a_site_sends_beside_its_reply_is_not_kept(link):
    """Trees without end for one task: by the name of another, with other parts, as a circle."""
    client = link.connect("a")
    sent = link.send("a")
    head = reply_to(client, take(client), model(1))
    pieces, root = noisy(5), "ab" * 32
    leaves = [ObjectTree(object_id=name) for name in pieces]
    for leaf in leaves:
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            upload(client, head, pieces, leaf, name="cd" * 32)
        upload(client, head, pieces, ObjectTree(object_id=root, children=[leaf]))
    loops = [
        ObjectTree(object_id=leaf.object_id, children=[ObjectTree(object_id=root)])
        for leaf in leaves
    ]
    assert upload(client, head, pieces, ObjectTree(object_id=root, children=loops)) == []
    assert link.held()["files"] == 1, "the first was good as far as it went"
    assert "did not answer" in words(link.expire(sent))
    assert link.held() == {}


def test_a_piece_without_the_parts_that_were_announced_is_not_kept(link):
    """Else its name could be taken by who knows it, and the site that has it sent away."""
    a, b = link.connect("a"), link.connect("b")
    known = RecordDict({"card": ConfigRecord({"site": "b"})})
    card = known["card"]
    sent = link.send("a")
    head = reply_to(a, take(a), model(1))
    claimed = ObjectTree(object_id=card.object_id, children=[ObjectTree(object_id="cd" * 32)])
    tree = ObjectTree(object_id="ab" * 32, children=[claimed])
    assert upload(a, head, {card.object_id: card.deflate()}, tree) == []
    other = link.send("b")
    message = take(b)
    assert b.send(reply_to(b, message, known)) is False, "so long it is not taken"
    link.expire(sent)
    assert b.send(reply_to(b, message, known))
    assert link.pull(other).has_content()


def test_a_whole_reply_is_taken_although_another_was_late(link):
    a, b = link.connect("a"), link.connect("b")
    late, whole = (link.send(site, kind="train", ttl=1) for site in "ab")
    take(a)
    assert b.send(reply_to(b, take(b), model(5)))
    assert "did not answer within" in words(until(lambda: link.pull(late), "the deadline"))
    a.receive()  # any site's question, before the grid comes to b
    assert same(link.pull(whole).content, model(5))
    assert link.held() == {}


def test_half_a_reply_at_the_deadline_leaves_nothing(link):
    a, b = link.connect("a"), link.connect("b")
    sent = link.send("a", kind="train", ttl=1)
    cut_after(a, 4)
    with pytest.raises(Unreachable):
        a.send(reply_to(a, take(a), model(5, size=100_000)))
    time.sleep(1.1)
    b.receive()
    assert "did not answer" in words(link.pull(sent))
    assert link.held() == {}


def object_of(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body


def mangled(reply: Message, noise: random.Random) -> tuple[dict[str, bytes], ObjectTree]:
    """A reply's pieces, one or more of them changed in such a way that Flower stores them."""
    kinds = ("Message", "RecordDict", "ArrayRecord", "ConfigRecord", "MetricRecord", "Array",
             "ArrayChunk")  # fmt: skip
    pieces: dict[str, bytes] = {}

    def walk(obj) -> ObjectTree:
        trees = [walk(child) for child in (obj.children or {}).values()]
        kind, body = type(obj).__qualname__, bytearray(obj.deflate().partition(b"\x00")[2])
        children = [tree.object_id for tree in trees]
        for before, after in zip(obj.children or {}, children, strict=True):
            body = body.replace(before.encode(), after.encode())
        what = noise.randrange(40)
        if what == 0 and body:
            body[noise.randrange(len(body))] ^= 1 << noise.randrange(8)
        elif what == 1:
            body = body[: noise.randrange(len(body) + 1)]
        elif what == 2:
            body = bytearray(noise.randbytes(noise.randrange(60)))
        elif what == 3:
            kind = noise.choice(kinds)
        elif what == 4:
            children = children[1:]
        elif what == 5:
            children = [*children, noise.randbytes(32).hex()]
        elif what == 6 and trees:
            trees = trees[1:]
        content = object_of(kind, children, bytes(body))
        object_id = get_object_id(content)
        if what != 7:  # one that never comes
            pieces[object_id] = content
        return ObjectTree(object_id=object_id, children=trees)

    return pieces, walk(reply)


def test_whatever_a_reply_holds_the_round_goes_on(link):
    """Random faults in every piece of a reply: a usable message comes out, or words, or nothing yet."""
    client = link.connect("a")
    noise = random.Random(7)
    outcomes = {"words": 0, "content": 0, "waiting": 0}
    direct = Direct(link)
    for attempt in range(40):
        sent = link.send("a", RecordDict())
        message = link.grid._sent[sent].message
        reply = reply_to(client, message, model(2, arrays=2, size=4))
        head = reply_to(client, reply, RecordDict())
        head.__dict__["_metadata"] = reply.metadata
        with contextlib.suppress(ValueError):  # Flower itself refuses some
            upload(client, head, *mangled(reply, noise), direct)
        found = link.pull(sent)
        if found is None:
            outcomes["waiting"] += 1
            assert "did not answer" in words(link.expire(sent))
        elif found.has_error():
            outcomes["words"] += 1
            assert words(found).startswith("its reply ")
        else:
            outcomes["content"] += 1
            assert found.has_content(), attempt
            assert isinstance(found.content, RecordDict), attempt
        assert link.held() == {}, attempt
    assert min(outcomes.values()) > 3, outcomes


# --------------------------------------------------------------------------------- what is known


def test_contacts_tell_who_is_there_and_since_when(link):
    def contact():
        return link.grid.contacts()["a"]

    assert (contact().online, contact().last, contact().activated) == (False, None, None)
    assert contact().site == "a"
    begin = datetime.now(UTC)
    client = link.connect("a")
    assert contact().node == client.node_id
    assert contact().online
    for moment in (contact().last, contact().activated):
        assert begin - timedelta(seconds=0.1) <= moment <= datetime.now(UTC)
    assert set(link.grid.get_node_ids()) == {client.node_id}
    ago = (datetime.now(UTC) - timedelta(seconds=5)).timestamp()
    link.set("a", online_until=ago)
    assert not contact().online
    assert contact().last == datetime.fromtimestamp(ago, UTC)
    assert list(link.grid.get_node_ids()) == []
    client.receive()
    assert not contact().online, "only heartbeats count as signs of life"
    client.close()


def test_doing_tells_what_a_site_is_at(link):
    client = link.connect("a")
    assert link.grid.doing() == {}
    steps = {"query": "answering", "train": "training", "evaluate": "evaluating"}
    for kind, work in steps.items():
        sent = link.send("a", kind=kind)
        assert link.grid.doing() == {"a": "called"}
        message = take(client)
        assert link.grid.doing() == {"a": work}
        client.send(reply_to(client, message))
        assert link.grid.doing() == {"a": "sending"}, "all there, not yet taken"
        assert link.pull(sent) is not None
        assert link.grid.doing() == {}
    link.connect("b")
    link.send("b")
    link.send("a", kind="train")
    take(client)
    assert link.grid.doing() == {"a": "training", "b": "called"}


def test_what_a_grid_need_not_do_here_is_refused(link: Link):
    with pytest.raises(NotImplementedError):
        link.grid.send_and_receive([])
    with pytest.raises(NotImplementedError):
        link.grid.set_run(link.grid.run)
    assert link.grid.run.run_id == link.run_id
    made = link.grid.create_message(model(), "train", 5, "g", 7.0)
    assert (made.metadata.dst_node_id, made.metadata.ttl) == (5, 7.0)
