"""The model that is given away is the chosen one, and its card says what the history says."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from common.config_file import load_config
from common.messages import SiteCard
from common.weights import BadWeights, load_weights, save_weights
from server.attendance import note_terms
from server.checkpoint import RunFolder
from server.coordinator import CoordinatorError, federation_id, init_folder, terms
from server.export import export_model
from server.history import Contribution, History, RoundRecord
from tests.server.test_tables import metrics

SITES = (("a", 4, 2, 0), ("b", 10, 1, 3), ("only-evaluates", 0, 5, 0))


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), float(seed)), "n": torch.tensor(seed)}


@pytest.fixture
def folder(tmp_path):
    """A coordinator's folder whose three rounds are done; round 2 is best, round 3 by worst site."""
    config = load_config(assign=["name=study", "rounds.number=3", "server.address=fed.org"])
    made = init_folder(tmp_path / "study", config)
    run = RunFolder(made.run)
    run.path.mkdir()
    with History(run.history) as history:
        note_terms(history, terms(made))
        history.record_sites(
            [SiteCard(site, n > 0, n, held, left, "") for site, n, held, left in SITES]
        )
        for number, dice in ((1, (0.5, 0.5, 0.5)), (2, (0.9, 0.8, 0.2)), (3, (0.6, 0.6, 0.55))):
            trained = [
                Contribution("a", True, "", 0.5, 1.0, 2.0, 100),
                Contribution("b", number != 2, "it was off" if number == 2 else ""),
            ]
            measured = {
                name: metrics(held, dice_wt=d, dice_tc=d, dice_et=d)
                for (name, _, held, _), d in zip(SITES, dice, strict=True)
            }
            digest = f"{number:064x}"
            history.record_round(
                RoundRecord(number, 1e-3, 5.0, 0.4, "c", digest, tuple(trained), measured)
            )
            if number == 1:
                stricter = replace(terms(made), config=load_config(made.config, assign=["seed=7"]))
                note_terms(history, stricter)
        final = {
            "a": metrics(2, dice_wt=0.9, dice_tc=0.9, dice_et=0.9, hd95_et=math.nan),
            "b": metrics(1, dice_wt=0.8, dice_tc=0.8, dice_et=0.8),
        }
        history.record_final(2, final, {"only-evaluates": "it was off"})
    about = {"config": config.agreed(), "sites": ["a", "b"]}
    save_weights(run.model, weights(2), {**about, "round": 2})
    save_weights(run.model_worst_site, weights(3), {**about, "round": 3})
    return made


def test_the_card_says_what_the_history_says(folder, tmp_path):
    begin = datetime.now(UTC).replace(microsecond=0)
    model, text = export_model(folder, tmp_path / "new" / "out")
    assert {path.name for path in model.parent.iterdir()} == {
        "model.safetensors",
        "model-card.json",
        "MODEL-CARD.md",
    }
    loaded, about = load_weights(model)
    assert torch.equal(loaded["w"], weights(2)["w"])
    assert about["round"] == 2
    content = (model.parent / "model-card.json").read_text()
    card = json.loads(content, parse_constant=lambda name: pytest.fail(name))
    config = load_config(folder.config)
    assert card["config"] == json.loads(json.dumps(config.agreed()))
    assert card["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    for key, value in {
        "name": "study",
        "federation": federation_id(folder),
        "round": 2,
        "chosen_by": "best mean Dice over sites",
        "checkpoint_sha256": f"{2:064x}",
    }.items():
        assert card[key] == value, key
    assert begin <= datetime.fromisoformat(card["exported"]) <= datetime.now(UTC)
    subjects = ("training_subjects", "held_out_subjects", "left_out_subjects")
    rows = [(s["site"], *(s[key] for key in subjects)) for s in card["sites"]]
    assert rows == list(SITES)
    assert [s["rounds"] for s in card["sites"]] == [[1, 2, 3], [1, 3], []]
    assert card["absences"] == [
        [2, "b", "it was off"],
        [2, "only-evaluates", "final model not evaluated: it was off"],
    ]
    assert card["mean_dice"] == {"a": pytest.approx(0.9), "b": pytest.approx(0.8)}
    assert card["metrics"]["a"]["subjects"] == 2
    assert card["metrics"]["a"]["means"]["hd95/ET"] is None
    assert card["metrics"]["a"]["defined"]["hd95/ET"] == 0
    noted = [(entry["after_round"], entry["terms"]["config"]["seed"]) for entry in card["terms"]]
    assert noted == [(0, config.seed), (1, 7)], "under which terms each round was trained"
    words = text.read_text()
    for said in (
        "# study: brain-tumour segmentation model, round 2",
        "| a | 4 | 2 | 3 | 0.900 |",
        "| b | 10 | 1 | 2 | 0.800 |",
        "| only-evaluates | 0 | 5 | 0 | - |",
        f"- weights: sha256 {card['model_sha256']}",
        f"- code: {terms(folder).code_hash}\n",
        f"- federation: {federation_id(folder)}",
        "not a medical device",
        "without differential privacy",
    ):
        assert said in words, said


def test_the_model_of_the_best_worst_site_has_its_own_rounds_figures(folder, tmp_path):
    model, _ = export_model(folder, tmp_path / "out", worst_site=True)
    card = json.loads((tmp_path / "out" / "model-card.json").read_text())
    assert torch.equal(load_weights(model)[0]["w"], weights(3)["w"])
    assert (card["round"], card["chosen_by"]) == (3, "best worst site")
    expected = {"a": 0.6, "b": 0.6, "only-evaluates": 0.55}
    assert card["mean_dice"] == pytest.approx(expected)
    assert card["checkpoint_sha256"] == f"{3:064x}"


def test_nothing_is_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    export_model(folder, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CoordinatorError, match="exists already; give a new folder"):
        export_model(folder, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CoordinatorError, match="exists already"):
        export_model(folder, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_model(folder, tmp_path / "empty")


def test_a_federation_that_is_not_complete_has_no_model(folder, tmp_path):
    with History(RunFolder(folder.run).history) as history, history._transaction() as database:
        database.execute("DELETE FROM final")
    with pytest.raises(CoordinatorError, match="not complete"):
        export_model(folder, tmp_path / "out")
    RunFolder(folder.run).history.unlink()
    with pytest.raises(CoordinatorError, match="not complete"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_refused(folder, tmp_path):
    RunFolder(folder.run).model.write_bytes(b"x")
    with pytest.raises(BadWeights):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_names_nobody_but_the_sites(folder, tmp_path):
    """No path of the coordinator's machine, no key."""
    export_model(folder, tmp_path / "out")
    for name in ("model-card.json", "MODEL-CARD.md"):
        content = (tmp_path / "out" / name).read_text()
        for secret in (str(tmp_path), "PRIVATE", "fed.org"):
            assert secret not in content, (name, secret)
