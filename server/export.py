"""The finished model to give away: weights as safetensors, and a card that says what it is.

The card (model-card.json and the same as text, MODEL-CARD.md) holds the configuration, the sites and
how many subjects each trained and measured on, the metrics per site, and the hashes of weights,
configuration and code. It holds no subject ids: the server does not know them.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import write_text_atomically
from common.metrics import SiteMetrics, mean_dice
from common.weights import load_weights, save_weights
from server.checkpoint import RunFolder
from server.coordinator import CoordinatorError, CoordinatorFolder, federation_id
from server.history import History
from server.tables import verdict

LIMITS = (
    "For research; not a medical device.",
    (
        "Trained without differential privacy and without secure aggregation: weights can reveal facts "
        "about training subjects. Give it only to those who may know."
    ),
    "The round was chosen by Dice on the held-out subjects, so these figures are slightly optimistic.",
    (
        "Metrics are means over each site's own held-out subjects, on their own grid, without "
        "post-processing."
    ),
)


def export_model(
    folder: CoordinatorFolder, out: Path, *, worst_site: bool = False
) -> tuple[Path, Path]:
    """Write model and card to the new folder `out`; returns their paths.

    Raises:
        CoordinatorError: the federation is not complete, or `out` holds something already.
        BadWeights: the model is damaged.
    """
    run = RunFolder(folder.run)
    final = None
    if run.history.exists():
        with History(run.history) as history:
            final, judged = history.final(), verdict(history)
            sites, noted = history.sites(), history.noted("terms")
            records = history.rounds()
    if final is None:
        raise CoordinatorError(
            f"{folder.path}: the federation is not complete, so there is no final model yet."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CoordinatorError(f"{out} exists already; give a new folder.")
    weights, about = load_weights(run.model_worst_site if worst_site else run.model)
    assert isinstance(noted, list)
    number = about["round"]
    record = next(r for r in records if r.round == number)
    # the chosen model is measured once more, with HD95; the other one has its own round's figures
    metrics = final[1] if final[0] == number else record.metrics
    card: dict[str, Any] = {
        "name": about["config"]["name"],  # type: ignore[index]
        "federation": federation_id(folder),
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "round": number,
        "chosen_by": "best worst site" if worst_site else "best mean Dice over sites",
        "config": about["config"],
        "terms": noted,
        "sites": [
            {
                "site": card.site,
                "training_subjects": card.n_training,
                "held_out_subjects": card.n_held_out,
                "left_out_subjects": card.n_left_out,
                "rounds": list(judged.contributed.get(card.site, ())),
            }
            for card in sites
        ],
        "absences": [list(absence) for absence in judged.absent],
        "metrics": {site: _plain(m) for site, m in metrics.items()},
        "mean_dice": {site: _number(mean_dice(m)) for site, m in metrics.items()},
        "checkpoint_sha256": record.sha256,
        "limits": list(LIMITS),
    }
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model.safetensors"
    card["model_sha256"] = save_weights(model, weights, about)
    write_text_atomically(out / "model-card.json", json.dumps(card, indent=1, allow_nan=False))
    text = out / "MODEL-CARD.md"
    write_text_atomically(text, _as_text(card))
    return model, text


def _as_text(card: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {s['site']} | {s['training_subjects']} | {s['held_out_subjects']} | "
        f"{len(s['rounds'])} | {_shown(card['mean_dice'].get(s['site']))} |"
        for s in card["sites"]
    )
    network = card["config"]["network"]
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
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
