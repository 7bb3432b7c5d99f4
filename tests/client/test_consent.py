"""The sheet says what the terms say, and a yes is to exactly these terms and to code that is here."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from client.consent import (
    NotAccepted,
    accept,
    accepted_terms,
    difference,
    propose,
    proposed_terms,
    require_same_code,
    sheet,
    withdraw,
)
from client.policy import Policy
from client.site_config import PrivacyBudget, SiteConfig
from common.code_hash import code_hash
from common.terms import BadTerms, Terms

OFF = SiteConfig(data=Path("/data"))


def words(text: str) -> str:
    return " ".join(text.split())


def refusal(action) -> str:
    with pytest.raises(NotAccepted) as caught:
        action()
    return str(caught.value)


# ------------------------------------------------------------------------------------- the sheet


def test_the_sheet_says_the_values_of_the_terms(terms, invitation):
    config = terms.config
    text = words(sheet(terms, invitation, OFF))
    for value in (
        f'federation "{config.name}" ({terms.federation}) for Oslo',
        "Coordinator 127.0.0.1:1",
        f"Its CA {invitation.ca_digits()}",
        f"Code {code_hash()[:12]}",
        "Network unet, feature maps 2, 2, 2, 2, 2, instance norm",
        f"Data modalities {', '.join(config.modalities)}",
        f"Dice + {config.loss.focal_weight:g} x focal (gamma {config.loss.gamma:g})",
        "at most 3 rounds of 1 epoch",
        "30% of the subjects are held out",
        "its change since the round's model, rounded to 16-bit numbers",
        "NO differential privacy (privacy: off in site.yaml)",
        "NO secure aggregation: the coordinator sees this site's own update",
        f"Hash of these terms: {terms.hash()}",
    ):
        assert value in text, value


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ("withheld", "no metric: results of held-out subjects are withheld"),
        ("noised", "noised mean Dice of the held-out subjects, within the privacy budget"),
        ("exact", "exact, outside of the budget"),
    ],
)
def test_the_sheet_says_what_a_budget_promises_and_what_still_leaves(
    terms, invitation, tiny_config, metrics, said
):
    budget = PrivacyBudget(epsilon=3.5, delta=1e-4, metrics=metrics)
    on = SiteConfig(data=Path("/data"), privacy=budget)
    text = words(sheet(terms, invitation, on))
    assert "at most epsilon 3.5 at delta 0.0001, over all federations" in text
    assert "1 noisy step a round with every patient in each" in text
    assert "NO differential privacy" not in text
    assert "NO secure aggregation" in text
    assert said in text
    assert "no loss, time or throughput" in text
    assert "mean training loss" not in text
    assert "CANNOT" not in text
    other = replace(terms, config=tiny_config("network.norm=batch", "privacy.expected_batch=2.5"))
    text = words(sheet(other, invitation, on))
    assert "CANNOT be protected: join will refuse" in text
    assert "on average 2.5 patients, drawn at random" in text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rounds.updates", "fp32", "the network's weights (whole, as 32-bit numbers)"),
        ("rounds.number", "77", "at most 77 rounds"),
        ("training.epochs", "5", "rounds of 5 epochs"),
        ("preprocess.shape", "[64, 32, 32]", "volumes resampled to 64 x 32 x 32 voxels"),
        ("held_out_fraction", "0.25", "25% of the subjects"),
        ("loss.focal_weight", "0.125", "Dice + 0.125 x focal"),
        ("loss.gamma", "3", "(gamma 3)"),
        ("modalities", "[t2, flair]", "modalities t2, flair"),
        ("network.name", "residual_unet", "Network residual_unet"),
        ("name", "other-name", 'federation "other-name"'),
    ],
)
def test_the_sheet_follows_every_change(terms, invitation, tiny_config, key, value, said):
    before = words(sheet(terms, invitation, OFF))
    assert said not in before
    other = replace(terms, config=tiny_config(f"{key}={value}"))
    after = words(sheet(other, invitation, OFF))
    assert said in after
    assert other.hash() in after


def test_the_sheet_names_everything_that_an_answer_holds(terms, invitation):
    """Each number of every answer, as `common.messages` packs it, is one of the lines."""
    from dataclasses import fields

    from common.messages import SiteCard, SiteReport, SiteUpdate

    said = {
        "site": "this site's name",
        "n_training": "the numbers of its training, held-out and left-out subjects",
        "n_held_out": "the numbers of its training, held-out and left-out subjects",
        "n_left_out": "the numbers of its training, held-out and left-out subjects",
        "loss": "the mean training loss",
        "seconds": "seconds",
        "samples_per_second": "throughput",
        "weights": "the network's weights",
        "statement": "the signed statement that this site trains without differential privacy",
        "metrics": "means of the metrics over the held-out subjects, with the number of subjects",
    }
    no_fact_of_the_site = {
        "shows_name",
        "round",
        "config_fingerprint",
        "trains",
        "released",
        "resting",
    }
    text = words(sheet(terms, invitation, OFF)).partition("What leaves this building")[2]
    sent = {f.name for answer in (SiteCard, SiteUpdate, SiteReport) for f in fields(answer)}
    assert sent == said.keys() | no_fact_of_the_site
    for words_ in said.values():
        assert words_ in text


@pytest.mark.parametrize(
    ("policy", "said", "no_longer"),
    [
        ({"send_updates": False}, "no model update: this site only evaluates", "after each round"),
        ({"metrics": ()}, "no metric: only the number of held-out", "means of the metrics"),
        ({"metrics": ("dice",)}, "behind each: dice; none over", "hd95"),
        ({"decimals": 1}, "rounded to 1 decimal", "3 decimals"),
        ({"training_numbers": False}, "no loss, time or throughput", "mean training loss"),
        ({"min_subjects": 7}, "none over fewer than 7 subjects", "fewer than 5"),
        ({"min_subjects": 1}, "held-out subject is that subject's result", "results of single"),
        ({"show_name": True}, "other sites may read too", "for the coordinator only"),
    ],
)
def test_the_sheet_tells_what_the_sites_policy_lets_out(terms, invitation, policy, said, no_longer):
    usual = words(sheet(terms, invitation, OFF)).partition("Everything that the yes")[0]
    assert said not in usual
    assert no_longer in usual
    settings = SiteConfig(data=Path("/data"), policy=Policy(**policy))
    text = words(sheet(terms, invitation, settings)).partition("Everything that the yes")[0]
    assert said in text
    assert no_longer not in text


def test_patches_are_told_with_their_size(terms, invitation, tiny_config):
    other = replace(terms, config=tiny_config("preprocess.mode=patches"))
    patch = " x ".join(map(str, other.config.training.patch))
    assert f"patches of {patch} voxels" in words(sheet(other, invitation, OFF))


# ---------------------------------------------------------------------------------- the yes


def test_a_yes_is_all_digits_of_the_hash(hospital, terms):
    full = terms.hash()
    spellings = (full, full.upper(), f"  {full}\n", f"{full[:4]} {full[4:8]} {full[8:]}")
    for given in spellings:
        assert accepted_terms(hospital) is None
        begin = datetime.now(UTC).replace(microsecond=0)
        accept(hospital, terms, given)
        assert accepted_terms(hospital) == terms
        record = json.loads(hospital.accepted.read_text())
        assert record["hash"] == full
        assert begin <= datetime.fromisoformat(record["accepted_at"]) <= datetime.now(UTC)
        withdraw(hospital)


def test_anything_else_is_no_yes(hospital, terms):
    full = terms.hash()
    other = "0" if full[11] != "0" else "1"
    for given in ("", full[:12], full[:63], full + "0", full[:11] + other, "yes", "x" * 64):
        text = refusal(lambda given=given: accept(hospital, terms, given))
        assert full in text
        assert "fed-client review" in text
    assert accepted_terms(hospital) is None
    assert not hospital.accepted.exists()


def test_terms_of_other_code_cannot_be_accepted(hospital, terms):
    other = replace(terms, code_hash="c0de" * 16)
    text = refusal(lambda: accept(hospital, other, other.hash()))
    assert "c0dec0dec0de" in text
    assert code_hash()[:12] in text
    assert "same version" in text
    assert not hospital.accepted.exists()
    require_same_code(terms)


def test_a_yes_to_proposed_terms_settles_the_proposal(accepted, terms, tiny_config):
    other = replace(terms, config=tiny_config("rounds.number=9"))
    assert proposed_terms(accepted) is None
    propose(accepted, other)
    assert proposed_terms(accepted) == other
    assert accepted_terms(accepted) == terms, "until there is a yes, the old ones hold"
    accept(accepted, other, other.hash())
    assert proposed_terms(accepted) is None
    assert accepted_terms(accepted) == other
    propose(accepted, terms)
    withdraw(accepted)
    assert (accepted_terms(accepted), proposed_terms(accepted)) == (None, None)
    withdraw(accepted)


def test_damaged_records_are_named_with_a_remedy(accepted):
    for text in ("", "{", "[]", "5", '{"terms": 5}', "{}", "\x00"):
        accepted.accepted.write_text(text)
        said = refusal(lambda: accepted_terms(accepted))
        assert str(accepted.accepted) in said
        assert "delete it" in said
    accepted.accepted.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal(lambda: accepted_terms(accepted))


def test_a_record_of_another_version_is_named(accepted, terms):
    document = terms.document()
    document["config"]["no_such_key"] = 1
    accepted.accepted.write_text(json.dumps({"terms": document}))
    with pytest.raises(BadTerms, match="no_such_key"):
        accepted_terms(accepted)


# -------------------------------------------------------------------------------- the difference


def test_every_changed_value_is_a_line(terms, tiny_config):
    other = Terms(
        terms.federation,
        "ab" * 32,
        tiny_config("rounds.number=9", "loss.gamma=3", "modalities=[t2]", "name=changed"),
    )
    before = terms.config
    assert set(difference(terms, other).splitlines()) == {
        f'  code_hash: {json.dumps(code_hash())[:57]}... -> "{"ab" * 28}...',
        "  rounds.number: 3 -> 9",
        f"  loss.gamma: {json.dumps(before.loss.gamma)} -> 3.0",
        f'  modalities: {json.dumps(list(before.modalities))} -> ["t2"]',
        f'  name: "{before.name}" -> "changed"',
    }
    assert difference(terms, terms) == "  nothing"


def test_long_values_are_cut(terms, tiny_config):
    other = replace(terms, config=tiny_config("name=" + "n" * 60))
    (line,) = difference(terms, other).splitlines()
    assert line.endswith("n...")
    assert len(line) < 150


def test_the_sheet_lists_every_value_that_the_yes_covers(terms, invitation):
    text = sheet(terms, invitation, OFF)
    listed = text.partition("Everything that the yes covers:\n")[2].partition("\n\n")[0]
    assert yaml.safe_load(listed) == json.loads(json.dumps(terms.config.agreed()))


def test_the_sheet_of_secure_aggregation_names_the_roster_and_what_it_withstands(terms, invitation):
    others = tuple(f"SHA256:{letter * 43}" for letter in "ABC")
    agreed = terms.config
    rounds = agreed.rounds.model_copy(update={"min_sites": 3})
    config = agreed.model_copy(update={"secure_aggregation": True, "rounds": rounds})
    secure = replace(terms, config=config, roster=(*others, invitation.key_fingerprint))
    text = words(sheet(secure, invitation, OFF))
    assert "masked: only the sum over all sites can be read" in text
    assert "numbers of its held-out and left-out subjects" in text
    assert "of at least 3 of the 4 sites below" in text
    assert "no more than 1 of them colludes with it" in text
    assert f"{invitation.key_fingerprint} (this site)" in text
    assert all(mark in text for mark in others)
    assert "NO secure aggregation" not in text
    plain = words(sheet(terms, invitation, OFF))
    assert "SHA256:" not in plain.split("Everything that the yes covers")[0]
