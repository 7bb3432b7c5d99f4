"""Results of subjects made by hand, for what is computed from them."""

from __future__ import annotations

import math

from common.evaluation_summary import LESION_METRICS, METRICS, SubjectResult
from common.metrics import REGIONS

STRUCTURES = ("ET", "ED", "NCR", "TC", "WT")


def result(
    site: str,
    subject: str,
    dice: float,
    *,
    patient: str = "",
    grade: str | None = None,
    tumour_ml: float = 10.0,
    **of_et: float,
) -> SubjectResult:
    """`dice` is that of WT; TC has 0.1 less and ET 0.2 less. Every other value is 0.5."""
    scores = {s: dict.fromkeys(METRICS, 0.5) for s in STRUCTURES}
    for less, region in enumerate(("WT", "TC", "ET")):
        scores[region]["dice"] = dice - less / 10
    for region in REGIONS:
        scores[region] |= dict.fromkeys(LESION_METRICS, 0.5)
    scores["ET"] |= of_et
    return SubjectResult(site, subject, patient or subject, grade, tumour_ml, scores)


RESULTS = [
    result("b", "b1", 0.9, grade="HGG", tumour_ml=50.0),
    result("b", "b2", 0.5, grade="HGG", tumour_ml=5.0, precision=math.nan),
    result("b", "b3", 0.7, grade="LGG", tumour_ml=80.0),
    result("a", "a1", 0.4, tumour_ml=20.0, precision=math.nan),
    result("a", "a2", 0.6, grade="LGG", tumour_ml=30.0),
    result("c", "c1", 0.8, grade="HGG", tumour_ml=100.0),
]
