"""The finished model to give away: weights as safetensors, and a card that says what it is.

The card (model-card.json and the same as text, MODEL-CARD.md) holds the configuration, the sites and
how many subjects each trained and measured on, the metrics per site as far as they are released, what
the sites state about privacy, and the hashes of weights, configuration and code. A site that hides its
name is `another site` in it. It holds no subject ids: the server does not know them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.audit_log import append
from common.files import write_text_atomically
from common.metrics import SiteMetrics, mean_dice
from common.weights import load_weights, save_weights
from server.checkpoint import RunFolder
from server.coordinator import CoordinatorError, CoordinatorFolder, federation_id
from server.enrolment import keys_of_all
from server.history import History, RoundRecord
from server.privacy_report import aggregation_in_words, privacy_document
from server.shown_names import named_in, shown_names, verdict_to_publish
from server.tables import verdict

LIMITS = (
    "For research; not a medical device.",
    (
        "Metrics are means over each site's own held-out subjects, on their own grid, without "
        "post-processing."
    ),
)
NOBODY_CHOSE = "last round: no site releases its metrics"
ROUNDS = "private_rounds", "rounds_without_privacy", "rounds_without_statement"
PRIVACY = "epsilon", "delta", *ROUNDS, "signature", "warnings"  # of a site's statements


def export_model(
    folder: CoordinatorFolder, out: Path, *, worst_site: bool = False
) -> tuple[Path, Path]:
    """Write model and card to the new folder `out`; returns their paths.

    Raises:
        CoordinatorError: the federation is not complete, or `out` holds something already.
        BadWeights: the model is damaged.
        BadKey, LogError: the audit log cannot be written.
    """
    run = RunFolder(folder.run)
    final = None
    if run.history.exists():
        with History(run.history) as history:
            final, judged = history.final(), verdict(history)
            sites, noted = history.sites(), history.noted("terms")
            records, released = history.rounds(), history.final_released()
            init_sha256 = history.noted("init_from")
            keys = keys_of_all(folder.enrolled)
            privacy = privacy_document(history, keys, federation_id(folder))["sites"]
            how_aggregated = aggregation_in_words(history)
    if final is None:
        raise CoordinatorError(
            f"{folder.path}: the federation is not complete, so there is no final model yet."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CoordinatorError(f"{out} exists already; give a new folder.")
    weights, about = load_weights(run.model_worst_site if worst_site else run.model)
    assert isinstance(noted, list)
    names = shown_names(sites, named_in(judged))
    judged = verdict_to_publish(judged, names)
    privacy = [
        {**stated, "site": names.get(stated["site"], stated["site"])}  # its warnings name nobody
        for stated in privacy
    ]
    number = about["round"]
    record = next(r for r in records if r.round == number)
    # the chosen model is measured once more, with HD95; the other one has its own round's figures
    if final[0] == number:
        metrics = final[1]
    else:
        metrics, released = record.metrics, record.released
    metrics = {names.get(site, site): found for site, found in metrics.items()}
    released = {names.get(site, site): how for site, how in released.items()}
    chosen_by = "best worst site" if worst_site else "best mean Dice over sites"
    if not any(r.metrics for r in records):
        chosen_by = NOBODY_CHOSE
    card: dict[str, Any] = {
        "name": about["config"]["name"],  # type: ignore[index]
        "federation": federation_id(folder),
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "round": number,
        "chosen_by": chosen_by,
        "began_from_sha256": init_sha256,
        "config": about["config"],
        "terms": noted,
        "sites": [
            {
                "site": names[card.site],
                "training_subjects": card.n_training,
                "held_out_subjects": card.n_held_out,
                "left_out_subjects": card.n_left_out,
                "rounds": list(judged.contributed.get(names[card.site], ())),
            }
            for card in sites
        ],
        "absences": [list(absence) for absence in judged.absent],
        "privacy": {s["site"]: {key: s[key] for key in PRIVACY} for s in privacy},
        "released": released,
        "metrics": {site: _plain(m) for site, m in metrics.items()},
        "mean_dice": {site: _number(mean_dice(m)) for site, m in metrics.items()},
        "checkpoint_sha256": record.sha256,
        "limits": [
            *LIMITS,
            _how_chosen(records, names),
            _how_private(privacy),
            how_aggregated,
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model.safetensors"
    card["model_sha256"] = save_weights(model, weights, about)
    write_text_atomically(out / "model-card.json", json.dumps(card, indent=1, allow_nan=False))
    text = out / "MODEL-CARD.md"
    write_text_atomically(text, _as_text(card))
    exported = {"round": number, "sha256": card["model_sha256"], "worst_site": worst_site}
    append(folder.audit, "exported", exported)
    return model, text


def _number_told(number: int | None) -> str:
    return "hidden" if number is None else str(number)


def _how_chosen(records: Sequence[RoundRecord], names: Mapping[str, str]) -> str:
    if not any(record.metrics for record in records):
        return "This is the last round's model, chosen by nobody: no site releases its metrics."
    ways = {
        names.get(site, site): how for record in records for site, how in record.released.items()
    }
    own = "".join(f" {site}: {how}, by its own choice." for site, how in sorted(ways.items()))
    return (
        "The round was chosen by Dice on the held-out subjects"
        + (" of the sites that release it" if ways else "")
        + f", so these figures are slightly optimistic.{own}"
    )


def _how_private(sites: Sequence[Mapping[str, Any]]) -> str:
    """Private is only who says so of every round that it trained, signed and without contradiction."""
    trained = [s for s in sites if any(s[rounds] for rounds in ROUNDS)]
    private = [
        s
        for s in trained
        if s["epsilon"] is not None
        and not s["warnings"]  # also of a signature that is not good
        and not s["rounds_without_privacy"]
    ]
    if not private:
        return (
            "Trained without differential privacy: weights can reveal facts about training subjects. "
            "Give it only to those who may know."
        )
    said = "; ".join(
        f"{s['site']}: epsilon {s['epsilon']:.4g}, delta {s['delta']:.4g}" for s in private
    )
    text = (
        "Patient-level differential privacy, by each site's own "
        f"statement and for its own patients: {said}."
    )
    others = [s["site"] for s in trained if s not in private]
    if others:
        text += (
            " Without it in some or all rounds, or with statements that do not bear it out: "
            f"{', '.join(others)}; weights can reveal facts about their training subjects. Give it "
            "only to those who may know."
        )
    return text


def _as_text(card: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {s['site']} | {_number_told(s['training_subjects'])} | {s['held_out_subjects']} | "
        f"{len(s['rounds'])} | {_shown(card['mean_dice'].get(s['site']))} |"
        for s in card["sites"]
    )
    network = card["config"]["network"]
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    began = card["began_from_sha256"]
    beginning = f"- began from weights sha256 {began}\n" if began else ""
    decay = card["config"]["rounds"].get("average_decay")
    average = f"- moving average of the rounds' models, decay {decay:g}\n" if decay else ""
    return f"""\
# {card["name"]}: brain-tumour segmentation model, round {card["round"]}

{network["name"]}, {network["norm"]} norm, feature maps {network["channels"]}; modalities
{", ".join(card["config"]["modalities"])}. Chosen by: {card["chosen_by"]}. The whole configuration
and all metrics are in model-card.json.

| site | training subjects | held-out subjects | rounds | mean Dice (WT, TC, ET) |
|---|---|---|---|---|
{rows}

- weights: sha256 {card["model_sha256"]}
- code: {", then ".join(dict.fromkeys(t["terms"]["code_hash"] for t in card["terms"]))}
- federation: {card["federation"]}
{beginning}{average}
## Limits

{limits}
"""


def _plain(metrics: SiteMetrics) -> dict[str, Any]:
    means = {key: _number(value) for key, value in metrics.means.items()}
    return {"subjects": metrics.n, "means": means, "defined": metrics.defined}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
