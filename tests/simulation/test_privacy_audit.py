"""The privacy audit: that it passes a sound client, and that it finds every planted fault."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import client.patient_optimizer
import client.privacy
from client.ledger import TRAINING, open_ledger
from simulation.cli import Plant, app
from simulation.planted_faults import PLANTS, planted
from simulation.privacy_audit import (
    BOUND,
    INFLUENCE,
    NOISE,
    REPETITION,
    Audit,
    NotAudited,
    audit,
    lines,
)

pytestmark = pytest.mark.usefixtures("undisturbed_log")

SMALL = {"budget": 2.0, "rounds": 4, "patients": 1, "canaries": 200}

# ----------------------------------------------------------------------------------- sound client


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], tuple[Audit, Path]]:
    """A function: fault or None -> the small audit and its folder, each done once."""
    done: dict[str | None, tuple[Audit, Path]] = {}

    def of(plant: str | None) -> tuple[Audit, Path]:
        if plant not in done:
            folder = tmp_path_factory.mktemp("audit")
            done[plant] = audit(folder, plant=plant, **SMALL), folder
        return done[plant]

    return of


def test_a_sound_client_passes(audited):
    result, _ = audited(None)
    assert result.found == ()
    assert result.bound <= result.claim.epsilon
    assert result.noise == pytest.approx(result.claim.sigma, rel=0.01)
    assert result.epsilon_as_measured == pytest.approx(result.claim.epsilon, rel=0.03)
    assert abs(result.alike) < 0.05
    assert abs(result.influence - 1) < 6 * result.influence_error
    assert lines(result)[-1] == "Verdict: nothing found."


def test_the_claim_is_the_ledgers(audited):
    result, folder = audited(None)
    site = folder / "audited"
    with open_ledger(site / "privacy-ledger.sqlite", None, write=False) as ledger:
        paid = [e for e in ledger.entries if e.kind == TRAINING]
        (group,) = {e.patients for e in paid}
        assert len(ledger.groups[group]) == result.claim.patients
    assert len(paid) == result.claim.rounds == SMALL["rounds"]
    assert paid[-1].epsilon == result.claim.epsilon <= SMALL["budget"]
    assert paid[0].noise_multiplier == pytest.approx(result.claim.sigma)


def test_canaries_take_part_by_coins(audited):
    result, folder = audited(None)
    taking_part = [len(list((folder / s / "canaries").iterdir())) for s in ("audited", "repeated")]
    assert taking_part == 2 * [result.claim.patients - SMALL["patients"]]
    assert 0.3 < taking_part[0] / SMALL["canaries"] < 0.7
    _, other = audited("no-noise")
    names = [{p.name for p in (f / "audited" / "canaries").iterdir()} for f in (folder, other)]
    assert names[0] != names[1]


# ----------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        ("no-noise", {BOUND, NOISE}),
        ("seeded-noise", {NOISE, REPETITION}),
        ("broken-clipping", {BOUND, INFLUENCE}),
        ("half-noise", {NOISE}),
    ],
)
def test_every_planted_fault_is_found(audited, plant, found):
    result, _ = audited(plant)
    # half the noise leaves the bound where chance wills
    assert set(result.found) - ({BOUND} if plant == "half-noise" else set()) == found
    assert lines(result)[-1].startswith(f"Verdict (planted: {plant}): VIOLATION: ")


def test_half_of_the_noise_is_measured_and_priced(audited):
    result, _ = audited("half-noise")
    assert result.noise == pytest.approx(result.claim.sigma / 2, rel=0.01)
    assert result.epsilon_as_measured > 2 * result.claim.epsilon


def test_a_tensor_without_noise_is_found(tmp_path, monkeypatch):
    real = client.patient_optimizer.add_system_gaussian

    def spare(values, deviation):
        if values.shape != (4, 4, 3, 3, 3):  # one of 53 tensors, 432 of 73,985 values
            real(values, deviation)

    monkeypatch.setitem(
        PLANTS, "spared", lambda seed: [(client.patient_optimizer, "add_system_gaussian", spare)]
    )
    result = audit(tmp_path / "audit", plant="spared", **{**SMALL, "canaries": 16})
    assert result.quiet == ("model.2.1.conv.unit0.conv.weight",)
    assert NOISE in result.found
    assert result.noise == pytest.approx(result.claim.sigma, rel=0.02)  # on the whole


def test_a_fault_ends_with_the_audit():
    def code() -> tuple[dict, dict, object]:
        optimizer = client.patient_optimizer
        return dict(vars(client.privacy)), dict(vars(optimizer)), optimizer.PatientOptimizer.take

    before = code()
    for plant in PLANTS:
        with planted(plant, 1):
            assert code() != before
        assert code() == before


def test_canaries_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(NotAudited, match="there must be 16 to"):
        audit(tmp_path / "audit", canaries=10**6)
    assert not (tmp_path / "audit").exists()


# ---------------------------------------------------------------------------------------- command


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder and an empty folder for temporary files; both must stay empty."""
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield tmp_path
    for name in ("here", "temporary"):
        assert list((tmp_path / name).iterdir()) == []


SMALLEST = ("--epsilon", "2", "--rounds", "2", "--patients", "1", "--canaries", "40")


def fed_sim(*arguments: str):
    return CliRunner().invoke(app, ("audit-privacy", *arguments))


def test_the_command_passes_a_sound_client_and_leaves_no_trace(nowhere):
    done = fed_sim(*SMALLEST, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["found"] == []
    assert document["planted"] is None
    assert document["claim"]["rounds"] == 2


def test_the_command_finds_a_fault_and_keeps_what_it_is_told_to(nowhere):
    out = nowhere / "kept"
    done = fed_sim(*SMALLEST, "--plant", "half-noise", "--out", str(out))
    assert done.exit_code == 1, done.output
    assert "VIOLATION: " in done.stdout
    assert json.loads((out / "audit.json").read_text())["found"] == ["noise"]
    again = fed_sim(*SMALLEST, "--out", str(out))
    assert again.exit_code == 2
    assert "exists already" in " ".join(again.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--plant", "magic"), "magic"),
        (("--epsilon", "nan"), "--epsilon"),
        (("--epsilon", "inf"), "--epsilon"),
        (("--canaries", "4"), "x>=16"),
        (("--epsilon", "0.01", "--rounds", "2000", *SMALLEST[4:]), "does not train"),
    ],
)
def test_wrong_usage_is_told_from_a_violation(nowhere, arguments, text):
    done = fed_sim(*arguments)
    assert done.exit_code == 2
    assert text in done.output


def test_the_command_offers_every_plant():
    assert [plant.value for plant in Plant] == list(PLANTS)
