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
from common.keys import new_private_key
from common.messages import SiteCard
from common.statement import Signed, Statement, sign
from common.weights import BadWeights, load_weights, save_weights
from server.attendance import note_terms
from server.checkpoint import RunFolder
from server.coordinator import CoordinatorError, federation_id, init_folder, terms
from server.enrolment import admit
from server.export import export_model
from server.history import TRAINING, Contribution, GivenStatement, History, RoundRecord
from server.shown_names import NOT_PUBLISHED
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


def test_a_hidden_name_is_in_no_exported_file(folder, tmp_path):
    with History(RunFolder(folder.run).history) as history:
        hidden = {"b": "b", "only-evaluates": "only-evaluates"}
        history.record_sites([replace(c, shows_name=c.site not in hidden) for c in history.sites()])
    out = tmp_path / "out"
    export_model(folder, out)
    card = json.loads((out / "model-card.json").read_text())
    first, second = "another site (1)", "another site (2)"
    assert [site["site"] for site in card["sites"]] == ["a", first, second]
    assert card["sites"][1]["rounds"] == [1, 3]
    assert card["absences"] == [
        [2, first, NOT_PUBLISHED],
        [2, second, f"final model not evaluated: {NOT_PUBLISHED}"],
    ]
    assert set(card["metrics"]) == set(card["mean_dice"]) == {"a", first}
    for name in ("model-card.json", "MODEL-CARD.md"):
        assert "only-evaluates" not in (out / name).read_text()


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


# ------------------------------------------------------------------------ what sites keep or state


def change_rounds(folder, change) -> None:
    """Write the rounds anew, each as `change` makes it, and its statements with it."""
    with History(RunFolder(folder.run).history) as history:
        records = history.rounds()
        with history._transaction() as database:
            for table in ("rounds", "contributions", "metrics", "unmeasured", "released"):
                database.execute(f"DELETE FROM {table} WHERE round > 0")
            database.execute("DELETE FROM statements")
        for record in records:
            changed, statements = change(record)
            history.record_round(changed, statements)


def card_of(folder, out, **options) -> tuple[dict, str]:
    _, text = export_model(folder, out, **options)
    card = json.loads((out / "model-card.json").read_text(), parse_constant=pytest.fail)
    return card, text.read_text()


def test_the_card_says_that_nobody_chose_when_no_site_tells_its_metrics(folder, tmp_path):
    every = dict.fromkeys("ab", "withheld")
    change_rounds(folder, lambda r: (replace(r, metrics={}, loss=None, released=every), ()))
    with History(RunFolder(folder.run).history) as history:
        history.record_final(3, {}, dict.fromkeys("ab", "it withholds"), every)
    about = load_weights(RunFolder(folder.run).model)[1]
    save_weights(RunFolder(folder.run).model, weights(3), {**about, "round": 3})
    for options in ({}, {"worst_site": True}):
        card, text = card_of(folder, tmp_path / str(options), **options)
        assert card["chosen_by"] == "last round: no site releases its metrics"
        assert (card["metrics"], card["mean_dice"], card["released"]) == ({}, {}, every)
        assert "the last round's model, chosen by nobody" in text
        assert "chosen by Dice" not in text.lower()
        assert "| a | 4 | 2 | 3 | - |" in text


def test_the_card_says_whose_metrics_chose_the_round(folder, tmp_path):
    card, text = card_of(folder, tmp_path / "all")
    said = "chosen by Dice on the held-out subjects, so these figures are slightly optimistic."
    assert said in text
    some = {"b": "withheld", "only-evaluates": "noised"}
    change_rounds(folder, lambda r: (replace(r, released=some), ()))
    with History(RunFolder(folder.run).history) as history:
        history.record_final(2, {"a": metrics(2)}, {}, some)
    card, text = card_of(folder, tmp_path / "some")
    assert card["released"] == some
    assert "on the held-out subjects of the sites that release it" in text
    assert "b: withheld, by its own choice. only-evaluates: noised, by its own choice." in text
    change_rounds(folder, lambda r: (replace(r, released={"b": "noised"}), ()))
    card, _ = card_of(folder, tmp_path / "worst", worst_site=True)
    assert card["released"] == {"b": "noised"}, "those of its own round"


def test_the_card_tells_the_weights_a_run_began_from_and_the_moving_average(folder, tmp_path):
    card, text = card_of(folder, tmp_path / "none")
    assert card["began_from_sha256"] is None
    assert "began from" not in text
    assert "moving average" not in text
    with History(RunFolder(folder.run).history) as history:
        history.note("init_from", "ab" * 32)
    run = RunFolder(folder.run)
    loaded, about = load_weights(run.model)
    about["config"]["rounds"]["average_decay"] = 0.9
    save_weights(run.model, loaded, about)
    card, text = card_of(folder, tmp_path / "some")
    assert card["began_from_sha256"] == "ab" * 32
    assert f"- began from weights sha256 {'ab' * 32}\n" in text
    assert "moving average of the rounds' models, decay 0.9" in text


def with_privacy(folder, keys, *, without=frozenset(), ledger="1e" * 16) -> None:
    """Every site states each round that it trained; those in `without` as not private."""

    def stated(record: RoundRecord, site: str) -> GivenStatement:
        private = (site, record.round) not in without
        numbers = {
            "epsilon": record.round / 2, "delta": 0.01, "noise_multiplier": 2.0,
            "ledger": ledger, "entries": record.round, "head": str(record.round),
        }  # fmt: skip
        statement = Statement(
            federation_id(folder), site, record.round, "c0de", "2026", private=private,
            metrics="exact", **numbers if private else {},
        )  # fmt: skip
        text = statement.text()
        return GivenStatement(record.round, site, TRAINING, Signed(text, sign(text, keys[site])))

    change_rounds(folder, lambda r: (r, [stated(r, c.site) for c in r.contributions if c.trained]))


@pytest.fixture
def keys(folder):
    keys = {site: new_private_key() for site in "ab"}
    for site, key in keys.items():
        admit(folder.enrolled, site, key.public_key())
    return keys


def test_the_card_repeats_the_epsilons_that_the_sites_state(folder, keys, tmp_path):
    with_privacy(folder, keys)
    card, text = card_of(folder, tmp_path / "out")
    assert card["privacy"]["a"] == {
        "epsilon": 1.5,
        "delta": 0.01,
        "private_rounds": [1, 2, 3],
        "rounds_without_privacy": [],
        "rounds_without_statement": [],
        "signature": "good",
        "warnings": [],
    }
    assert card["privacy"]["only-evaluates"]["private_rounds"] == []
    assert "by each site's own statement" in text
    assert "a: epsilon 1.5, delta 0.01; b: epsilon 1.5, delta 0.01." in text
    assert "without differential privacy" not in text
    assert "Without it" not in text


def test_a_site_that_was_not_private_throughout_is_named_in_the_card(folder, keys, tmp_path):
    with_privacy(folder, keys, without={("b", 3)})
    _, text = card_of(folder, tmp_path / "some")
    assert "own patients: a: epsilon 1.5, delta 0.01." in text
    assert "do not bear it out: b; weights can reveal" in text
    with_privacy(folder, keys, without={("a", 1), ("b", 3)})
    _, text = card_of(folder, tmp_path / "none")
    assert "Trained without differential privacy" in text


def test_a_statement_that_nobody_can_vouch_for_makes_no_site_private_in_the_card(
    folder, keys, tmp_path
):
    with_privacy(folder, {"a": keys["b"], "b": keys["b"]})
    _, text = card_of(folder, tmp_path / "out")
    assert "own patients: b: epsilon 1.5" in text
    assert "do not bear it out: a; weights" in text
