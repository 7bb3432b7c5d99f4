"""One federation through which people come and go and in which things change, while it runs.

site-01 is there all the time and pauses in the middle of every round, so that the others can be
watched. A round needs one site only, until the coordinator changes that.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

from client.hospital import HospitalFolder

pytestmark = pytest.mark.slow
STEADY, LATE, ADMITTED = "site-01", "site-06", "site-13"
COPY = "copy"


@dataclass
class Story:
    """The federation after its end, and what each program said, by what it was for."""

    federation: Any
    said: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(new_federation, scans, cohort_cache):
    few = "rounds.min_sites=1", "server.gather_minutes=0"
    rounds = "rounds.number=5", "rounds.plateau_patience=null"
    f = new_federation(*few, *rounds, sites=[STEADY, LATE], misbehaving=[STEADY])
    s, server = Story(f), str(f.coordinator.path)
    pause = f.faults[STEADY]
    pause.hold(*(f"train-{round_}" for round_ in range(1, 6)))

    # round 1: a second server, and a hospital that joins late
    s.said["server"] = f.serving()
    s.said[STEADY] = f.join(STEADY)
    pause.until_held("train-1")
    s.said["second server"] = f.start()
    s.said["second server"].exit_code()
    s.said[LATE] = f.join(LATE)
    f.until(LATE, "connected")
    pause.release("train-1")

    # round 2: one folder twice, one key twice, and a hospital that is admitted only now
    pause.until_held("train-2")
    s.said["same folder"] = f.join(STEADY)
    copied = f.hospitals[COPY] = HospitalFolder(f.path / COPY)
    without = shutil.ignore_patterns("audit.*")  # to see what leaves from there
    shutil.copytree(f.hospitals[STEADY].path, copied.path, ignore=without)
    settings = copied.config.read_text().replace("patience_hours: 24.0", "patience_hours: 0.001")
    copied.config.write_text(settings)
    s.said["same key"] = f.join(COPY, accept=False)
    f.hospital(ADMITTED, scans[ADMITTED], cohort_cache)
    sent = str(f.hospitals[ADMITTED].public_key)
    f.typed("fed-server", "admit", server, sent, "--name", ADMITTED)
    s.said[ADMITTED] = f.join(ADMITTED)
    f.until(ADMITTED, "connected")
    for name in ("same folder", "same key"):
        s.said[name].exit_code()
    pause.release("train-2")

    # round 3: one is revoked
    pause.until_held("train-3")
    s.said[LATE].says("round 3: update of")
    f.typed("fed-server", "revoke", server, LATE)
    s.said[LATE].says("or has revoked it")
    s.said[LATE].process.terminate()  # it would ask for some minutes more
    s.said[LATE].exit_code()
    pause.release("train-3")

    # round 4: the server is stopped; a change that cannot be, and one that can
    pause.until_held("train-4")
    f.typed("fed-server", "stop", server)
    s.said["server"].exit_code()
    f.change("channels: [2,", "channels: [3,")
    s.said["other network"] = f.start()
    s.said["other network"].exit_code()
    f.change("channels: [3,", "channels: [2,")
    f.change("learning_rate: 0.02", "learning_rate: 0.01")
    f.change("min_sites: 1", "min_sites: 3")
    # the revoked site gets a new key; the others do nothing for that
    late = str(f.hospitals[LATE].path)
    f.typed("fed-client", "rotate-key", late)
    sent = str(f.hospitals[LATE].public_key)
    f.typed("fed-server", "admit", server, sent, "--name", LATE, "--replace")
    s.said["server again"] = f.serving()
    invitation = str(f.coordinator.invitation(LATE))
    s.said["old invitation"] = f.join(LATE, accept=False)
    s.said["old invitation"].exit_code()
    s.said["new key"] = f.join(LATE, "--invitation", invitation)
    for site in (STEADY, ADMITTED):
        s.said[site].says("Nothing is done for them until you agree")
    for site in (STEADY, ADMITTED):
        folder = str(f.hospitals[site].path)
        s.said[f"{site} reviews"] = f.run("fed-client", "review", folder)
        s.said[f"{site} reviews"].exit_code()
    for site in (ADMITTED, STEADY):
        f.typed("fed-client", "review", str(f.hospitals[site].path), "--accept", f.terms_hash())
        s.said[site].says("the changed terms are accepted")
    pause.release("train-4")
    pause.release("train-5")
    for name in ("server again", "new key", STEADY, ADMITTED):
        s.said[name].ends_well()
    return s


def test_who_comes_late_enters_at_the_next_round(story):
    f = story.federation
    assert LATE in f.reasons(1)
    assert f.results()["verdict"]["contributed"][LATE][:2] == [2, 3]


def test_who_is_admitted_while_the_server_runs_joins_without_a_restart(story):
    f = story.federation
    assert f.results()["verdict"]["contributed"][ADMITTED][:1] == [3]
    assert story.said["server"].text().count("serving ") == 1


def test_a_second_server_is_refused_and_the_first_goes_on(story):
    first = story.said["server"]
    story.said["second server"].fails_saying(f"is in use by another process (number {first.pid})")


def test_one_folder_joins_once(story):
    process = story.said[STEADY].pid
    story.said["same folder"].fails_saying(f"is in use by another process (number {process})")


def test_two_clients_with_one_key_are_told_and_the_first_goes_on(story):
    story.said["same key"].fails_saying(
        "another client is connected with this site's key",
        "Is it running on another machine? If not, somebody has your key",
        "`fed-client rotate-key`",
    )
    assert story.federation.left(COPY) == []
    assert story.federation.results()["verdict"]["contributed"][STEADY] == [1, 2, 3, 4, 5]


def test_who_is_revoked_is_refused_at_once_and_the_others_go_on(story):
    f = story.federation
    text = story.said[LATE].text()
    assert "the coordinator does not know this site's key" in text
    assert "Send site.pub to the coordinator, who enrols it with `fed-server admit`" in text
    assert "Stopped. The same command joins again." in text
    assert f.workers(LATE) == []
    assert [row["round"] for row in f.left(LATE, "update")][:2] == [2, 3]


def test_a_stopped_server_says_so_and_continues(story):
    story.said["server"].fails_saying("stopped; the same command continues after the last complete")
    assert "continuing after round 3" in story.said["server again"].text()


def test_another_network_cannot_be_continued(story):
    story.said["other network"].fails_saying(
        "The rounds so far are of another model (changed: network.channels)",
        "Restore federation.yaml, or begin a new federation",
    )


def test_changed_terms_wait_for_the_hospital_s_yes(story):
    for site in (STEADY, ADMITTED):
        client = story.said[site].text()
        assert "training.learning_rate: 0.02 -> 0.01" in client
        assert f"fed-client review {story.federation.hospitals[site].path}" in client
        story.said[f"{site} reviews"].fails_saying(
            "Changed since the last yes:\n  training.learning_rate: 0.02 -> 0.01",
            f"To accept: fed-client review {story.federation.hospitals[site].path} --accept ",
        )
    server = story.said["server again"].text()
    assert (
        "the terms have changed after round 3 (training.learning_rate, rounds.min_sites)" in server
    )
    assert f"{STEADY}: has not accepted the changed terms yet (fed-client review)." in server
    rates = [record["learning_rate"] for record in story.federation.results()["rounds"]]
    assert rates[:3] == [0.02] * 3
    assert rates[3:] == [0.01] * 2


def test_a_rotated_key_concerns_its_own_site_only(story):
    f = story.federation
    story.said["old invitation"].fails_saying(
        "is for the key SHA256:", "but this site's is SHA256:"
    )
    contributed = f.results()["verdict"]["contributed"]
    assert contributed == {STEADY: [1, 2, 3, 4, 5], LATE: [2, 3, 4, 5], ADMITTED: [3, 4, 5]}
    assert "accepted" in story.said["new key"].text().lower()


def test_nothing_is_left_running(story):
    assert story.federation.orphans() == []
