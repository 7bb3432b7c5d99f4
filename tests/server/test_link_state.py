"""Requests do not wait for each other for ever, and who waits for a message is told of it."""

from __future__ import annotations

import threading
import time

from flwr.app.message import remove_content_from_message
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_tree, no_object_id_recompute

from tests.link import reply_to, take


def test_an_expired_upload_and_a_new_one_do_not_wait_for_each_other(link, monkeypatch):
    """Flower takes two locks in both orders, and a server would stand still for ever."""
    client, state = link.connect("a"), link.state
    link.send("a")
    reply = reply_to(client, take(client))
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, bare = get_object_tree(reply), remove_content_from_message(reply)
    expired, session = state._on_push_session_expired, state.start_session(link.run_id)
    state.store_message_and_object_tree(bare, tree, session)
    state._object_push_sessions[session].expires_at = now()
    entered = threading.Event()

    def slowly(roots):
        entered.set()
        time.sleep(0.3)
        expired(roots)

    monkeypatch.setattr(state, "_on_push_session_expired", slowly)
    first = threading.Thread(
        target=state.store_object,
        args=(link.run_id, session, tree.object_id, reply.deflate()),
        daemon=True,
    )
    second = threading.Thread(
        target=state.store_message_and_object_tree,
        args=(bare, tree, state.start_session(link.run_id)),
        daemon=True,
    )
    first.start()
    assert entered.wait(10)
    second.start()
    for thread in (first, second):
        thread.join(10)
        assert not thread.is_alive()


def test_who_answers_twice_leaves_nothing_behind(link):
    client = link.connect("a")
    link.send("a")
    message = take(client)
    assert client.send(reply_to(client, message))
    for _ in range(3):
        assert client.send(reply_to(client, message)) is False
    assert link.state._object_push_sessions == {}


def test_who_waits_is_told_of_its_own_messages_only_and_only_while_it_waits(link):
    a, b = (link.connect(site).node_id for site in "ab")
    heard: list[str] = []
    with link.state.told(a, lambda: heard.append("a")) as there:
        assert not there
        with link.state.told(b, lambda: heard.append("b")):
            link.send("a")
            assert heard == ["a"]
    link.send("a")
    assert heard == ["a"]
    with link.state.told(a, lambda: None) as there:
        assert there


def test_a_listener_that_is_gone_harms_nobody(link):
    def gone():
        raise RuntimeError("Event loop is closed")

    with link.state.told(link.connect("a").node_id, gone):
        assert link.send("a")
