"""One federation of which one hospital's client does something else wrong in every round.

The round goes on without it, the verdict says what was wrong and when, and the next round it takes
part as if nothing had been: nobody at the coordinator or at the hospital has done anything.
"""

from __future__ import annotations

import os
import signal

import pytest

pytestmark = pytest.mark.slow
FAULTY, OTHERS = "site-06", ("site-01", "site-13")
RAISES, DIES, IS_KILLED, NAN, SHAPE, HUGE, HANGS, NORMAL = range(1, 9)


@pytest.fixture(scope="module")
def ended(new_federation):
    """The federation, the server and the faulty site's client after their end."""
    rounds = f"rounds.number={NORMAL}", "rounds.min_sites=2", "rounds.max_change=50"
    f = new_federation(*rounds, "rounds.deadline_minutes=0.5", misbehaving=[FAULTY])
    faults = f.faults[FAULTY]
    faults.plan(
        {RAISES: "raise", DIES: "exit", NAN: "nan", SHAPE: "shape", HUGE: "huge", HANGS: "hang"}
    )
    faults.hold(f"train-{IS_KILLED}")
    server = f.serving()
    clients = {site: f.join(site) for site in f.hospitals}
    faults.until_held(f"train-{IS_KILLED}")
    (worker,) = f.workers(FAULTY)
    os.kill(worker, signal.SIGKILL)
    for program in (server, *clients.values()):
        program.ends_well()
    return f, server, clients[FAULTY]


def test_the_others_go_on_and_the_faulty_one_is_back_in_the_end(ended):
    f, _, _ = ended
    verdict = f.results()["verdict"]
    assert (verdict["complete"], verdict["rounds"], verdict["everyone"]) == (True, NORMAL, False)
    assert verdict["contributed"][FAULTY] == [NORMAL]
    for site in OTHERS:
        assert verdict["contributed"][site] == list(range(1, NORMAL + 1))
    # it measured every round, the one in which it hung too
    assert all(FAULTY in record["metrics"] for record in f.results()["rounds"])
    assert FAULTY in f.results()["final"]["metrics"]


@pytest.mark.parametrize(
    ("round_", "words"),
    [
        (RAISES, "the task failed at the site (RuntimeError); its log says more."),
        (DIES, "the training process ended with exit code 3."),
        (IS_KILLED, "the training process was killed (signal 9; often the machine ran out of"),
        (NAN, "tensor conv_0.conv_0.conv.weight holds values that are not finite."),
        (SHAPE, "tensor conv_0.conv_0.conv.weight is torch.float32 (7, 4, 3, 3, 3), expected"),
        (HUGE, "times as large as the model (limit: 50)."),
        (HANGS, "it took longer than the round's deadline of 0.5 minutes."),
    ],
)
def test_the_verdict_names_site_round_and_reason(ended, round_, words):
    f, server, client = ended
    reasons = f.reasons(round_)
    assert list(reasons) == [FAULTY]
    assert words in reasons[FAULTY]
    assert f"Round {round_}: without {FAULTY}: {reasons[FAULTY]}" in server.text()
    assert reasons[FAULTY] in client.text()  # the farewell tells the site too


def test_an_error_tells_the_coordinator_no_paths(ended):
    f, server, client = ended
    assert "/hospital/secret" in client.text()
    assert "/hospital/secret" not in server.text()
    assert "secret" not in str(f.left(FAULTY))


def test_what_was_refused_is_in_the_site_s_record_all_the_same(ended):
    f, _, _ = ended
    assert [row["round"] for row in f.left(FAULTY, "update")] == [NAN, SHAPE, HUGE, NORMAL]
    assert len(f.left(FAULTY, "error")) == 4


def test_nothing_is_left_running(ended):
    f, _, _ = ended
    assert f.orphans() == []
