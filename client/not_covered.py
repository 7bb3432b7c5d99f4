"""What no epsilon of this site says anything about, each with what is known about it here.

The list that a data-protection officer needs beside the number: `client.privacy_report` puts the two
together. What is covered is not said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.console import many
from common.message_words import EXACT, NOISED, WITHHELD


def not_covered(
    coordinator: str,
    way: str,
    released: Mapping[str, Any],
    unprotected: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """`what` is not covered and `why`, as the report shows it.

    Args:
        coordinator: its address; empty before an invitation was accepted.
        way: how metrics leave this site: WITHHELD, NOISED or EXACT.
        released: what has left, as `client.privacy_report` counts it.
        unprotected: the rounds without differential privacy.
    """
    to = f"the coordinator ({coordinator})" if coordinator else "the coordinator"
    metrics = released["metrics"]
    counts = ", ".join(f"{metrics[key]} {key}" for key in (WITHHELD, NOISED, EXACT))
    held = {
        WITHHELD: "Withheld: no result of theirs leaves. Their number does.",
        NOISED: "Covered by the budget: their mean Dice leaves with noise, paid for in the ledger.",
        EXACT: "NOT protected: the means over them leave as they are; over one subject, the mean is "
        "that subject's result.",
    }[way]
    if way != EXACT and metrics[EXACT]:
        held += (
            f" But {many(metrics[EXACT], 'set')} of exact ones left before, outside of any epsilon: "
            "for what those told of them there is no guarantee."
        )
    size = released["site_size"]
    sizes = (
        f"Sent last: {size.get('n_training', '?')} training, {size.get('n_held_out', '?')} held-out, "
        f"{size.get('n_left_out', '?')} left-out subjects."
        if size
        else "None sent yet."
    )
    rounds = "none that the ledger knows of."
    if unprotected:
        same = sum(entry["same_patients"] for entry in unprotected)
        rounds = (
            f"{many(len(unprotected), 'round')} WITHOUT differential privacy are in the ledger "
            f"and listed here, {same} of them on patients who also have rounds with privacy. For "
            "those patients the epsilon covers the private rounds only."
        )
    listed = {
        "Metrics on held-out patients": (
            f"This site's choice is {way} (withheld unless site.yaml says otherwise; without privacy, "
            f"exact). Sets of metrics that left so far: {counts}. They go to {to}, who keeps them "
            "and may pass them on. Exact ones are outside of any epsilon."
        ),
        "Held-out patients": held,
        "Size of the site": (
            "The numbers of training, held-out and left-out subjects are sent as they are, and each "
            f"statement holds the number of patients. {sizes}"
        ),
        "Patients of several hospitals": (
            "Who is also trained on elsewhere has an epsilon at each hospital; they add up, and no "
            "hospital knows of the other's."
        ),
        "Taking part before": (
            "Noise and epsilon follow the most affected patient, and both are told. Whoever knows of "
            "earlier federations can see in them that one of their patients takes part here too."
        ),
        "Timing and failures": (
            "When an answer comes, how long it takes, and that a round failed can be seen from "
            f"outside and may depend on the patients. {many(released['error_texts'], 'error text')} "
            f"and {many(released['updates']['with_loss'], 'mean training loss', 'es')} were sent."
        ),
        "Choice of settings": (
            "Rounds, clipping norm, network and learning rate are people's choices. If they were "
            "made by looking at results on the same patients, that is not counted."
        ),
        "Choice of the best round": (
            "The coordinator may choose the model by the Dice on held-out patients that the sites "
            "release; with exact metrics that choice depends on those patients outside of epsilon, who "
            "may have trained in another federation."
        ),
        "Preparation of the scans": (
            "Which scans were taken, left out or corrected is not counted. Normalisation is within "
            "each volume; no statistic over patients enters the model."
        ),
        "Models trained before, or without privacy": f"Rounds on these patients: {rounds} Whatever "
        "was trained on them elsewhere is unknown here.",
        "Scans under another name": (
            "A person is recognised by id or by the voxels of any scan. A scan that was both renamed "
            "and changed counts as a new patient, whose spending begins anew."
        ),
        "What the hospital keeps itself": (
            "Scans, prepared scans, results of single patients, kept answers, logs and this report "
            "lie in the hospital's own folders and are as safe as those."
        ),
        "The program": (
            "The bound is proved for exact numbers; the program computes with 32-bit floats (noise "
            "is made to hide their last bits). Whether the installed code does what it says is for "
            "a review of the code whose hash is given here."
        ),
    }
    return [{"what": what, "why": why} for what, why in listed.items()]
