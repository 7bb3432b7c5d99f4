"""The worker as a process: it does what it is told, tells what it does, and never outlives anybody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import worker_process
from client.worker_process import ROOT, Event, Worker
from common.code_hash import code_hash
from tests.link import until

CHANNEL = """
import json, os, signal, subprocess, sys, time
from multiprocessing.connection import Connection
channel = Connection(int(sys.argv[1]))
def say(event, **details):
    channel.send_bytes(json.dumps({"event": event, "bytes": False, **details}).encode())
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A function: program text ("" for the real one), device -> a worker, killed at the end."""
    workers: list[Worker] = []

    def make(program: str = "", *, device: str = "cpu", folder: Path = tmp_path) -> Worker:
        with monkeypatch.context() as patched:
            if program:
                patched.setattr(worker_process, "START", ("-c", CHANNEL + program))
            workers.append(Worker(folder, device))
        return workers[-1]

    yield make
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.kill()


def next_of(worker: Worker, *kinds: str) -> Event:
    """The next event of these kinds; a busy machine may take its time."""

    def look() -> Event | None:
        event = worker.event(1)
        assert event is None or event.kind in (*kinds, "log", "progress"), event
        return event if event and event.kind in kinds else None

    return until(look, f"{kinds}", seconds=120)


def alive(process: int) -> bool:
    """Also False for one that has ended and that nobody has asked about."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# -------------------------------------------------------------------------------- the real one


def test_it_prepares_and_answers_and_tells_how_far_it_is(accepted, start, terms):
    from flwr.app import Message, MessageType, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from client.parcel import pack, unpack
    from client.site import load_site
    from common.messages import (
        TrainTask,
        pack_train_task,
        unpack_site_card,
        unpack_site_update,
    )
    from common.model import initial_weights
    from common.wire import encode

    worker = start(folder=accepted.path)
    worker.order("prepare", name="Oslo", code=code_hash())
    prepared = next_of(worker, "prepared").details
    start_weights = initial_weights(terms.config)
    site = load_site(accepted.state)
    assert (site.name, site.config) == ("Oslo", terms.config)
    assert prepared["n_training"] == len(site.training) > 0
    assert prepared["n_held_out"] == len(site.held_out) > 0
    assert prepared["n_training"] + prepared["n_held_out"] + prepared["n_left_out"] == 18
    assert prepared["model_bytes"] == len(encode(start_weights))

    def ask(kind: str, content: RecordDict) -> tuple[Message, list[Event]]:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 5, 5, 1
        message = Message(content, 77, kind, ttl=600)
        message.metadata.__dict__["_message_id"] = "ab" * 32
        payload = pack(message)
        worker.order("answer", payload, code=code_hash())
        heard: list[Event] = []
        while not heard or heard[-1].kind not in ("reply", "failed", "died"):
            if (event := worker.event(1)) is not None:
                heard.append(event)
        assert heard[-1].kind == "reply", heard[-1]
        return unpack(heard[-1].payload), heard[:-1]

    reply, _ = ask(MessageType.QUERY, RecordDict())
    assert (reply.metadata.run_id, reply.metadata.src_node_id) == (5, 77)
    assert reply.metadata.reply_to_message_id == "ab" * 32
    card = unpack_site_card(reply.content)
    assert (card.n_training, card.n_held_out) == (len(site.training), len(site.held_out))

    task = TrainTask(1, terms.config.fingerprint(), 0.01, start_weights)
    reply, heard = ask(MessageType.TRAIN, pack_train_task(task))
    update = unpack_site_update(reply.content, since=start_weights)
    assert (update.site, update.n_training) == ("Oslo", len(site.training))
    steps = [event.details["progress"] for event in heard if event.kind == "progress"]
    assert [step["done"] for step in steps] == list(range(steps[-1]["total"] + 1))
    assert "loss" in steps[-1]["remark"]

    # what it cannot do ends in words, and the same process goes on
    worker.order("answer", b"\xff" * 3_000_000, code=code_hash())
    failed = next_of(worker, "failed").details
    assert failed["text"].startswith("internal error (")
    worker.order("answer", b"", code="of other files")
    assert "was changed while the client ran" in next_of(worker, "failed").details["text"]
    (accepted.config).write_text(f"data: {accepted.path / 'gone'}\n")
    worker.order("prepare", name="Oslo", code=code_hash())
    failed = next_of(worker, "failed").details
    assert failed["text"] == f"{accepted.path / 'gone'} is no folder; correct `data` in site.yaml."
    assert alive(worker._process.pid)


# ----------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed (signal 9; often the machine ran out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal 11."),
        ("sys.exit(3)", "ended with exit code 3."),
        ("raise SystemExit", "ended with exit code 0."),
    ],
)
def test_its_death_is_an_event_in_words(start, program, said):
    worker = start(f"say('log', level=20, text='here')\n{program}")
    assert next_of(worker, "log").details == {"level": 20, "text": "here"}
    for _ in range(2):
        death = next_of(worker, "died")
        assert death.details["text"].startswith("the training process ")
        assert said in death.details["text"]
    worker.order("answer", b"x" * 10**6, code="")
    assert worker.event(0.1).kind == "died", "giving orders to it raises nothing"
    worker.kill()


def test_one_that_only_hangs_up_is_named_too(start):
    worker = start("channel.close(); time.sleep(600)")
    wait = worker._process.wait
    worker._process.wait = lambda timeout=None: wait(timeout and 0.1)
    assert next_of(worker, "died").details["text"] == (
        "the training process closed its connection."
    )
    worker.kill()
    assert not alive(worker._process.pid)


def test_a_worker_that_was_killed_with_half_an_event_sent_has_died(start):
    """The parent must not wait for the other half."""
    program = (
        "say('reply'); os.write(channel.fileno(), b'\\0\\0\\1\\0half'); os.kill(os.getpid(), 9)"
    )
    worker = start(program)
    assert next_of(worker, "reply").payload == b""
    assert "signal 9" in next_of(worker, "died").details["text"]


def test_killing_it_kills_whatever_it_has_started(start):
    worker = start(
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "say('log', child=child.pid)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(600)"
    )
    child = next_of(worker, "log").details["child"]
    assert alive(child)
    worker.kill()
    until(lambda: not alive(child), "the end of the grandchild")
    assert not alive(worker._process.pid)


def test_what_it_started_dies_with_the_kill_even_if_it_has_died_itself(start):
    worker = start(
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "say('log', child=child.pid)\n"
    )
    child = next_of(worker, "log").details["child"]
    next_of(worker, "died")
    worker.kill()
    until(lambda: not alive(child), "the end of the grandchild")


PARENT = """
import sys, time
from pathlib import Path
from client import worker_process
worker_process.START = ("-c", '''
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=open(sys.argv[2] + "/child", "w"), flush=True)
from client.worker import main
main()
''')
worker = worker_process.Worker(Path(sys.argv[1]), "cpu")
print(worker._process.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_parent_however_that_ends(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    child = int(until(lambda: (tmp_path / "child").exists() and
                      (tmp_path / "child").read_text(), "the grandchild"))  # fmt: skip
    try:
        assert alive(worker)
        assert alive(child)
        parent.kill()
        parent.wait()
        until(lambda: not alive(worker), "the end of the worker")
        until(lambda: not alive(child), "the end of what it had started")
    finally:
        parent.kill()
        for process in (worker, child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


# --------------------------------------------------------------------------- how it begins


@pytest.mark.parametrize(
    ("device", "visible"), [("auto", "7"), ("cpu", ""), ("cuda", "7"), ("cuda:2", "2")]
)
def test_it_sees_the_gpu_that_the_site_allows(start, monkeypatch, device, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    program = "say('log', seen=os.environ.get('CUDA_VISIBLE_DEVICES'), cwd=os.getcwd())"
    details = next_of(start(program, device=device), "log").details
    assert details == {"seen": visible, "cwd": str(ROOT)}


def test_it_gets_one_connection_and_nothing_else_of_its_parent(start, tmp_path):
    """No socket to the coordinator, no terminal, no lock."""
    secret = (tmp_path / "secret").open("w")
    program = (
        "held = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if "
        "os.path.lexists(f'/proc/self/fd/{n}')]\n"
        "say('log', held=held, leads=os.getpgrp() == os.getpid() == os.getsid(0))"
    )
    details = next_of(start(program), "log").details
    secret.close()
    assert details["leads"]
    assert not [name for name in details["held"] if "secret" in name]
    assert len([name for name in details["held"] if name.startswith("socket:")]) == 1
    assert "/dev/null" in details["held"], "standard input"


def test_waiting_for_an_event_takes_no_longer_than_asked(start):
    worker = start("time.sleep(600)")
    begin = time.monotonic()
    assert worker.event(0.05) is None
    assert time.monotonic() - begin >= 0.04


def test_large_orders_and_events_pass_each_other(start):
    """A reply of the size of a model on its way out while a task of the same size comes in."""
    program = """
import threading
from client import worker
worker._prepare = lambda folder, name: {"name": name}
worker._answer = lambda folder, payload: payload * 2
worker._require_same_code = lambda code: None
sys.argv[1] = str(os.dup(channel.fileno()))
worker.main()
"""
    worker = start(program)
    payload = os.urandom(1000) * 8000
    for _ in range(3):
        worker.order("answer", payload, code="")
    for _ in range(3):
        assert next_of(worker, "reply").payload == payload * 2
    worker.order("prepare", name="Köln", code="")
    assert next_of(worker, "prepared").details == {"name": "Köln"}
