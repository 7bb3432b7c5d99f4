"""`fed-client privacy-report`, `privacy-plan`, `privacy-ledger` as typed: words, files, exit codes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner, Result

from client.cli import app
from client.hospital import init_hospital
from client.ledger import anchor_in, create_ledger, open_ledger
from tests.client.paid_site import N_TRAINING, ledger_of, prepared_site, trained

pytestmark = pytest.mark.usefixtures("undisturbed_log")


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def paid(hospital, prepared, tiny_config):
    """Oslo with two paid rounds."""
    site = prepared_site(hospital, prepared.ready, tiny_config("rounds.number=20"))
    trained(site, 1, 2)
    return hospital


def tamper(hospital) -> None:
    with closing(sqlite3.connect(ledger_of(hospital))) as database, database:
        database.execute("DROP TRIGGER entries_UPDATE")
        database.execute(
            "UPDATE entries SET document = replace(document, '\"steps\":1', '\"steps\":0')"
        )


def one_line(text: str) -> str:
    [line] = text.strip().splitlines()
    return line


# -------------------------------------------------------------------------------- privacy-report


def test_report_writes_a_page_and_the_same_as_json(paid):
    result = command("privacy-report", paid.path)
    assert result.exit_code == 0
    folder = paid.path / "privacy-report"
    assert {path.name for path in folder.iterdir()} == {
        "privacy-report.html",
        "privacy-report.json",
    }
    document = json.loads((folder / "privacy-report.json").read_text())
    assert document["site"] == "Oslo"
    assert document["headline"] in result.stdout
    assert document["headline"] in (folder / "privacy-report.html").read_text()
    assert str(folder / "privacy-report.html") in result.stdout


def test_report_as_json_goes_where_it_is_told(paid, tmp_path):
    out = tmp_path / "for" / "the officer"
    result = command("privacy-report", paid.path, "--json", "--out", out)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads((out / "privacy-report.json").read_text())
    assert (out / "privacy-report.html").exists()
    assert not (paid.path / "privacy-report").exists()


def test_report_of_a_site_without_privacy(hospital):
    result = command("privacy-report", hospital.path)
    assert result.exit_code == 0
    assert "Differential privacy is OFF" in result.stdout
    assert (hospital.path / "privacy-report" / "privacy-report.html").exists()


@pytest.mark.parametrize("what", ["missing", "tampered"])
def test_report_of_a_bad_ledger_is_one_line_and_no_file(paid, what):
    ledger_of(paid).unlink() if what == "missing" else tamper(paid)
    result = command("privacy-report", paid.path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert what in one_line(result.stderr)
    assert not (paid.path / "privacy-report").exists()


def test_report_that_cannot_be_written(paid, tmp_path):
    (tmp_path / "file").touch()
    result = command("privacy-report", paid.path, "--out", tmp_path / "file")
    assert result.exit_code == 1
    assert str(tmp_path / "file") in one_line(result.stderr.splitlines()[-1])


def test_report_changes_nothing_else(paid):
    def state():
        files = [*paid.path.rglob("*"), ledger_of(paid)]
        kept = [f for f in files if f.is_file() and "privacy-report" not in str(f)]
        return {f: f.read_bytes() for f in kept}

    before = state()
    assert command("privacy-report", paid.path).exit_code == 0
    assert state() == before


@pytest.mark.parametrize("name", ["privacy-report", "privacy-ledger", "privacy-plan"])
def test_no_hospital_there(tmp_path, name):
    result = command(name, tmp_path)
    assert result.exit_code == 1
    assert "no hospital's folder" in one_line(result.stderr)


# -------------------------------------------------------------------------------- privacy-ledger


def test_ledger_is_verified_and_listed(paid):
    result = command("privacy-ledger", paid.path)
    assert result.exit_code == 0
    assert "5 entries" in result.stdout
    kinds = [line.split("|")[3].strip() for line in result.stdout.splitlines() if "| Oslo" in line]
    assert kinds == ["plan", "training", "done", "training", "done"]

    document = json.loads(command("privacy-ledger", paid.path, "--json").stdout)
    with open_ledger(ledger_of(paid), None, write=False) as ledger:
        assert document["head"] == ledger.head
        assert document["id"] == ledger.id
    assert [entry["number"] for entry in document["entries"]] == [1, 2, 3, 4, 5]
    assert {entry["size"] for entry in document["entries"]} == {N_TRAINING}
    assert document["anchored"] is True


@pytest.mark.parametrize("what", ["missing", "tampered"])
def test_a_bad_ledger_is_one_line(paid, what):
    ledger_of(paid).unlink() if what == "missing" else tamper(paid)
    result = command("privacy-ledger", paid.path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert what in one_line(result.stderr)


def test_another_ledger_than_before_is_not_taken_for_it(paid):
    ledger_of(paid).unlink()
    create_ledger(ledger_of(paid))
    result = command("privacy-ledger", paid.path)
    assert result.exit_code == 1
    assert "another ledger" in one_line(result.stderr)


def test_create_makes_an_empty_one_and_warns(hospital):
    ledger_of(hospital).unlink()
    result = command("privacy-ledger", hospital.path, "--create", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["entries"] == []
    assert "Spending begins anew" in result.stderr
    assert "another ledger" in result.stderr
    with open_ledger(ledger_of(hospital), None, write=False) as ledger:
        assert ledger.entries == []


def test_create_refuses_where_one_is(paid):
    before = ledger_of(paid).read_bytes()
    result = command("privacy-ledger", paid.path, "--create")
    assert result.exit_code == 1
    assert "exists already" in one_line(result.stderr)
    assert ledger_of(paid).read_bytes() == before


def test_create_refuses_where_another_was_known(paid):
    ledger_of(paid).unlink()
    anchor = paid.state / "ledger-anchor.json"
    result = command("privacy-ledger", paid.path, "--create")
    assert result.exit_code == 1
    assert f"delete {anchor} by hand" in one_line(result.stderr)
    assert not ledger_of(paid).exists()
    anchor.unlink()
    assert command("privacy-ledger", paid.path, "--create").exit_code == 0
    assert ledger_of(paid).exists()


def test_create_refuses_where_a_folder_beside_remembers_another(paid):
    beside = init_hospital(paid.path.parent / "beside", "Oslo", paid.path)
    anchor_in(beside.state).parent.mkdir()
    anchor_in(paid.state).rename(anchor_in(beside.state))
    ledger_of(paid).unlink()
    result = command("privacy-ledger", paid.path, "--create")
    assert result.exit_code == 1
    assert f"delete {anchor_in(beside.state)} by hand" in one_line(result.stderr)
    assert not ledger_of(paid).exists()


def test_create_where_no_folder_is(hospital, tmp_path):
    text = hospital.config.read_text() + "privacy_ledger: /nowhere/at/all.sqlite\n"
    hospital.config.write_text(text)
    result = command("privacy-ledger", hospital.path, "--create")
    assert result.exit_code == 1
    assert "/nowhere/at/all.sqlite" in one_line(result.stderr)


# ---------------------------------------------------------------------------------- privacy-plan


@pytest.fixture
def planned(monkeypatch):
    """Instead of calibrating: what `plan_document` was called with."""
    calls = []

    def plan(cohort, config, recipe, epsilons, delta, compared_at, spent):
        calls.append((cohort, config, recipe, tuple(epsilons), delta, compared_at))
        return {"planned": True}

    monkeypatch.setattr("client.privacy_plan.plan_document", plan)
    return calls


def test_plan_without_a_folder(planned):
    result = command("privacy-plan", "--patients", 8, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"planned": True}
    [(cohort, config, recipe, epsilons, delta, compared_at)] = planned
    assert cohort.training == 8
    assert config.preset == "private"
    assert (recipe.rounds, recipe.steps, recipe.batch) == (20, 1, None)
    assert (epsilons, delta, compared_at) == ((20, 8, 3), 1 / 80, 8)


def test_plan_takes_what_is_given(planned, tmp_path):
    (tmp_path / "federation.yaml").write_text("preset: private\nprivacy: {steps: 2}\n")
    result = command(
        *("privacy-plan", "--patients", 8, "--rounds", 5, "--epsilon", 2, "--epsilon", 6, "--json"),
        *("--delta", 0.001, "--expected-batch", 2.5, "--config", tmp_path / "federation.yaml"),
    )
    assert result.exit_code == 0
    [(_, _, recipe, epsilons, delta, compared_at)] = planned
    assert (recipe.rounds, recipe.steps, recipe.batch) == (5, 2, 2.5)
    assert (epsilons, delta) == ((6, 2), 0.001)
    assert compared_at in epsilons


def test_plan_of_a_folder_knows_its_terms_and_budget(planned, accepted, terms):
    accepted.config.write_text(
        accepted.config.read_text() + "privacy: {epsilon: 5, delta: 0.002}\n"
    )
    result = command("privacy-plan", accepted.path, "--json")
    assert result.exit_code == 0
    [(cohort, config, recipe, epsilons, delta, compared_at)] = planned
    assert config == terms.config
    assert cohort.held_out
    assert cohort.training + cohort.held_out == 18
    assert recipe.rounds == terms.config.rounds.number
    assert (epsilons, delta, compared_at) == ((20, 8, 5, 3), 0.002, 5)


def test_plan_tells_what_the_ledger_has_spent(paid, monkeypatch):
    monkeypatch.setattr("client.privacy_plan._recipes", lambda patients, recipe: [])
    arguments = "privacy-plan", paid.path, "--patients", N_TRAINING, "--rounds", 2, "--epsilon", 8
    document = json.loads(command(*arguments, "--json").stdout)
    report = json.loads(command("privacy-report", paid.path, "--json").stdout)
    assert document["spent"] == report["spent"]["epsilon"] > 0
    assert f"epsilon {document['spent']:.3f} has been spent already" in document["advice"][0]
    ledger_of(paid).unlink()
    assert json.loads(command(*arguments, "--json").stdout)["spent"] == 0


def test_plan_prints_and_draws(tmp_path):
    plot = tmp_path / "plan.svg"
    result = command(
        *("privacy-plan", "--patients", 8, "--rounds", 2, "--epsilon", 8, "--plot", plot),
    )
    assert result.exit_code == 0
    assert "8 patients train" in result.stdout
    assert plot.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "DIR"),
        (("--patients", 0), "--patients"),
        (("--patients", 8, "--epsilon", 0), "--epsilon"),
        (("--patients", 8, "--epsilon", "nan"), "--epsilon"),
        (("--patients", 8, "--epsilon", "inf"), "--epsilon"),
        (("--patients", 8, "--delta", 1), "--delta"),
        (("--patients", 8, "--expected-batch", -1), "--expected-batch"),
        (("--patients", 8, "--expected-batch", 1e-200), "--expected-batch"),
        (("--patients", 8, "--expected-batch", "nan"), "--expected-batch"),
        (("--patients", 8, "--plot", "plan.pdf"), "--plot"),
        (("--patients", 8, "--plot", "/nowhere/plan.svg"), "--plot"),
        (("--patients", 8, "--preset", "privat"), "privat"),
    ],
)
def test_plan_used_wrongly(planned, arguments, named):
    result = command("privacy-plan", *arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert planned == []
