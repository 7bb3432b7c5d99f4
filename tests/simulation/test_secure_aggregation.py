"""`fed-sim run` with secure aggregation: same model but for rounding, budgets kept, kills survived."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server.rounds
from client.ledger import TRAINING, open_ledger
from client.secure_round import RoundRefused, answer_task
from client.site import load_site
from common.messages import TrainTask
from common.secure_messages import Session
from common.weights import load_weights
from server.checkpoint import RunFolder
from server.history import History
from simulation.cli import app

SECURE = ("--set", "secure_aggregation=true")


@pytest.fixture
def run(cohort_data, cohort_cache, tiny_arguments, tmp_path):
    def start(out: str, *more: str, data: Path = cohort_data):
        fixed = ("run", str(data), "--out", str(tmp_path / out), "--cache", str(cohort_cache))
        arguments = (*fixed, *tiny_arguments, "--set", "rounds.number=1", *more)
        return CliRunner().invoke(app, arguments)

    return start


def first_round(folder: Path):
    return load_weights(RunFolder(folder).checkpoint(1))[0]


def test_the_model_is_that_of_plain_averaging_but_for_rounding(run, tmp_path):
    assert run("plain", "--set", "rounds.updates=fp32").exit_code == 0
    done = run("secure", "--set", "rounds.updates=fp32", *SECURE)
    assert done.exit_code == 0, done.output
    plain, secure = first_round(tmp_path / "plain"), first_round(tmp_path / "secure")
    assert plain.keys() == secure.keys()
    largest = max(float((plain[n].double() - secure[n].double()).abs().max()) for n in plain)
    assert 0 < largest < 1e-5
    with History(RunFolder(tmp_path / "secure").history) as history:
        assert all(c.trained and c.bytes for c in history.rounds()[0].contributions)
        assert [card.n_training for card in history.sites()] == [None, None, None]
        numbers = json.dumps([vars(c) for c in history.rounds()[0].contributions])
    assert "n_training" not in numbers
    assert not RunFolder(tmp_path / "secure").secure_sum.exists()


def test_two_sites_are_refused_before_anything_is_trained(run, cohort_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cohort_data, data)
    done = run("two", *SECURE, "--set", "split.by=iid", "--set", "split.parts=2", data=data)
    assert done.exit_code == 2
    assert "needs at least 3 sites that train, found 2" in done.output
    assert not RunFolder(tmp_path / "two").history.exists()


def test_with_a_budget_each_site_pays_once_and_the_noise_is_in_the_sum(run, tmp_path):
    private = ("--set", "network.norm=group", "--set", "privacy.epsilon=8", *SECURE)
    done = run("private", *private)
    assert done.exit_code == 0, done.output
    for site in ("site-01", "site-06", "site-13"):
        folder = tmp_path / "private" / "sites" / site
        with open_ledger(folder / "privacy-ledger.sqlite", None, write=False) as ledger:
            assert [e.round for e in ledger.entries if e.kind == TRAINING] == [1]
    with History(RunFolder(tmp_path / "private").history) as history:
        assert len([s for s in history.statements() if s.stage == TRAINING]) == 3


def test_a_server_that_dies_after_unmasking_goes_on_from_the_sum(run, tmp_path, monkeypatch):
    """The sites would help with the very same sum only, and training again would cost hours."""

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server.rounds, "_evaluate", dies)
        run("killed", *SECURE)
    folder = RunFolder(tmp_path / "killed")
    assert folder.secure_sum.exists()
    kept, _ = load_weights(folder.secure_sum)
    sessions = sorted((tmp_path / "killed" / "sites").glob("*/secure/*/session.json"))
    assert len(sessions) == 3
    for session in sessions:
        session.unlink()  # so that nobody could answer
    done = run("killed", *SECURE)
    assert done.exit_code == 0, done.output
    assert not folder.secure_sum.exists()
    result = first_round(tmp_path / "killed")
    assert all(bool((result[name] == kept[name]).all()) for name in kept)


def test_a_damaged_record_of_a_site_is_said_and_not_taken_for_none(run, tmp_path):
    assert run("once", *SECURE).exit_code == 0
    (tmp_path / "once" / "sites" / "site-06" / "secure" / "simulation" / "agreed.json").write_text(
        "{"
    )
    site = load_site(tmp_path / "once" / "sites" / "site-06")
    task = TrainTask(2, "", 0.01, first_round(tmp_path / "once"))
    with pytest.raises(RoundRefused, match="damaged"):
        answer_task(site, task, "h", Session("s", 3), lambda: pytest.fail("it trained"))
