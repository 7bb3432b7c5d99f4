"""What the sites state about the privacy of their patients, checked against each other and their keys.

A statement is the site's own word. What can be checked here is who signed it, that it is of this
federation, and that a site's statements do not contradict each other; not whether the noise was added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from jinja2 import Environment
from rich.console import Group
from rich.markup import escape

from common.console import plain
from common.message_words import NOISED
from common.statement import BadStatement, Statement, is_signed_by, read_statement
from server.history import TRAINING, GivenStatement, History
from server.tables import site_table, spans, verdict

GOOD, BAD, UNSIGNED = "good", "bad", "none"  # signatures
NO_STATEMENT = "no statement: trained without differential privacy, or an older version"
EXPLAINED = (
    (
        "Every number is the site's own statement. A signature shows who said it and that nobody "
        "changed it, not that it is true."
    ),
    (
        "The model's guarantee for a site's patients is that site's epsilon (at its delta), whatever "
        "the other sites do. It is for a patient with all scans: how much the model can differ with "
        "and without that patient. Smaller is stronger."
    ),
    (
        "A site's epsilon holds against the coordinator and everybody else too, with or without secure "
        "aggregation, because all of the noise was added at the site."
    ),
    (
        "Rounds without differential privacy have no such guarantee, whatever other rounds had; nor "
        "have the held-out patients of a site that releases exact metrics."
    ),
)
# of a round, as the last private update states them
NUMBERS = ("noise_multiplier", "sampling_rate", "clip", "steps", "patients", "accountant")


def privacy_document(
    history: History, keys: Mapping[str, Sequence[ec.EllipticCurvePublicKey]], federation: str
) -> dict[str, Any]:
    """The report as plain JSON types; a number that is none is null.

    Args:
        keys: all that each site was ever enrolled with, also those replaced since.
        federation: its id, which every statement must name.
    """
    judged = verdict(history)
    given: dict[str, list[GivenStatement]] = {}
    for statement in history.statements():
        given.setdefault(statement.site, []).append(statement)
    names = {card.site for card in history.sites()} | judged.contributed.keys() | given.keys()
    return {
        "federation": federation,
        "rounds": judged.rounds,
        "complete": judged.complete,
        "sites": [
            _site(
                site,
                given.get(site, []),
                judged.contributed.get(site, ()),
                keys.get(site, ()),
                federation,
            )
            for site in sorted(names)
        ],
        "explained": [*EXPLAINED, aggregation_in_words(history)],
    }


def aggregation_in_words(history: History) -> str:
    """Whether the coordinator saw each site's update, by the terms of the rounds."""
    noted: Any = history.noted("terms") or []
    ways = {entry["terms"]["config"].get("secure_aggregation", False) for entry in noted}
    if ways == {True}:
        return (
            "Secure aggregation was on in every round: the coordinator's server learned sums of updates "
            "only, and no single one unless it broke the protocol with more sites colluding than "
            "docs/security.md says."
        )
    if True in ways:
        return "Secure aggregation was on in some rounds; in the others the coordinator saw each update."
    return "Secure aggregation was off: the coordinator saw each site's update."


def _site(
    site: str,
    given: Sequence[GivenStatement],
    trained: Sequence[int],
    keys: Sequence[ec.EllipticCurvePublicKey],
    federation: str,
) -> dict[str, Any]:
    read: list[tuple[GivenStatement, Statement]] = []
    signatures: dict[str, list[int]] = {}
    unreadable: list[int] = []
    for one in given:
        signatures.setdefault(_signature(one, keys), []).append(one.round)
        try:
            read.append((one, read_statement(one.signed.text)))
        except BadStatement:  # of another version of this program
            unreadable.append(one.round)
    updates = {one.round: stated for one, stated in read if one.stage == TRAINING}
    private = [number for number in trained if number in updates and updates[number].private]
    without = [number for number in trained if number in updates and not updates[number].private]
    unstated = [number for number in trained if number not in updates]
    warnings = _contradictions(read, federation)
    if unreadable:
        warnings.append(
            f"round {_spans(unreadable)}: its statement cannot be read by this version."
        )
    if given and unstated:
        warnings.append(f"round {_spans(unstated)}: it trained, and its statement is missing.")
    for kind, words in ((BAD, "is signed by no key of this site"), (UNSIGNED, "is not signed")):
        if kind in signatures:
            warnings.append(f"round {_spans(signatures[kind])}: its statement {words}.")
    last = read[-1][1] if read else None
    # held-out patients pay for noised metrics: who has lost more counts
    told = {one.stage == TRAINING: s for one, s in read if s.epsilon is not None}
    spent = max(told.values(), key=lambda s: s.epsilon or 0.0, default=None)
    newest = next((s for _, s in reversed(read) if s.ledger), None)
    noisy = next((updates[number] for number in reversed(private)), None)
    return {
        "site": site,
        "private_rounds": private,
        "rounds_without_privacy": without,
        "rounds_without_statement": unstated,
        "epsilon": _finite(spent.epsilon) if spent else None,
        "delta": _finite(spent.delta) if spent else None,
        "budget": _finite(spent.budget) if spent else None,
        **{name: _finite(getattr(noisy, name, None)) for name in NUMBERS},
        "metrics": last.metrics if last else None,
        "ledger": newest.ledger if newest else None,
        "entries": newest.entries if newest else None,
        "statements": len(given),
        "signature": next((kind for kind in (BAD, UNSIGNED, GOOD) if kind in signatures), UNSIGNED),
        "warnings": warnings,
        "note": "" if given else NO_STATEMENT,
    }


def _signature(one: GivenStatement, keys: Iterable[ec.EllipticCurvePublicKey]) -> str:
    if not one.signed.signature:
        return UNSIGNED
    return GOOD if any(is_signed_by(one.signed, key) for key in keys) else BAD


def _contradictions(read: Sequence[tuple[GivenStatement, Statement]], federation: str) -> list[str]:
    """What does not fit together in a site's statements, in the order in which they came."""
    warnings = []
    ledger: Statement | None = None  # the last that named one
    spent: dict[str, Statement] = {}  # the last that told one: other patients, another epsilon
    for one, s in read:
        where = f"round {one.round}, {one.stage}"
        if s.federation != federation:
            warnings.append(f"{where}: its statement is for another federation.")
        tells = one.stage == TRAINING or s.metrics == NOISED
        if s.private and tells and not (_positive(s.epsilon) and _positive(s.delta)):
            warnings.append(f"{where}: it says private, without a possible epsilon and delta.")
        if one.stage == TRAINING and s.private and not _positive(s.noise_multiplier):
            warnings.append(f"{where}: it says private, without noise.")
        if s.epsilon is not None and s.budget is not None and s.epsilon > s.budget:
            warnings.append(f"{where}: epsilon {s.epsilon:.4g} is above its budget {s.budget:.4g}.")
        if ledger is not None and s.ledger:
            if s.ledger != ledger.ledger:
                warnings.append(f"{where}: its ledger is another one than before.")
            elif s.entries < ledger.entries:
                warnings.append(
                    f"{where}: its ledger has {s.entries} entries, before it had {ledger.entries}."
                )
            elif s.entries == ledger.entries and s.head != ledger.head:
                warnings.append(f"{where}: the last entry of its ledger has changed.")
        if s.epsilon is not None:
            kind = TRAINING if one.stage == TRAINING else NOISED
            before = spent.get(kind)
            if before is not None and not s.epsilon >= (before.epsilon or 0):
                fell = f"from {before.epsilon:.4g} to {s.epsilon:.4g}"
                warnings.append(f"{where}: epsilon fell {fell}.")
            spent[kind] = s
        ledger = s if s.ledger else ledger
    return warnings


def report_table(document: Mapping[str, Any]) -> Group:
    """For a terminal: a line for each site, the warnings, and what the numbers mean."""
    table = site_table(
        [
            *("private rounds", "rounds without", "epsilon", "delta", "budget", "sigma", "q", "C"),
            *("steps", "metrics", "signature"),
        ]
    )
    for s in document["sites"]:
        table.add_row(*(escape(cell) for cell in site_row(s)))
    lines = [escape(f"  {site}: {text}") for site, text in remarks(document)]
    return Group(
        f"Privacy as the sites state it, {document['rounds']} rounds",
        table,
        *lines,
        *map(escape, document["explained"]),
    )


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Privacy report</title>
<style>
body { font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 14px; }
th, td { border: 1px solid #999; padding: .3em .6em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
<h1>Privacy report</h1>
<p>Federation {{ federation }}, {{ rounds }} rounds, {{ "complete" if complete else "not complete" }}.
Everything below is as the sites state it.</p>
<table>
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if remarks %}<h2>Warnings and remarks</h2>
<ul>
{% for site, text in remarks %}<li><b>{{ site }}</b>: {{ text }}</li>
{% endfor %}</ul>
{% endif %}<h2>What this means</h2>
{% for text in explained %}<p>{{ text }}</p>
{% endfor %}</body>
</html>
"""
HEADINGS = (
    "site", "rounds with differential privacy", "rounds without", "ε spent", "δ", "budget",
    "noise σ", "sampling q", "clipping C", "steps a round", "its metrics", "signature",
)  # fmt: skip


def report_page(document: Mapping[str, Any]) -> str:
    """One HTML file that needs no other; whatever a site wrote into its statement is text in it."""
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            **document,
            headings=HEADINGS,
            rows=[site_row(site) for site in document["sites"]],
            remarks=remarks(document),
        )
    )


def site_row(s: Mapping[str, Any]) -> list[str]:
    without = [*s["rounds_without_privacy"], *s["rounds_without_statement"]]
    cells = [
        spans(s["private_rounds"]),
        spans(sorted(without)),
        *(_number(s[name]) for name in ("epsilon", "delta", "budget", "noise_multiplier")),
        *(_number(s[name]) for name in ("sampling_rate", "clip", "steps")),
        s["metrics"] or "-",
        s["signature"],
    ]
    return [plain(cell, 64) for cell in (s["site"], *cells)]


def remarks(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (plain(site["site"], 64), plain(text))
        for site in document["sites"]
        for text in (*site["warnings"], *filter(None, (site["note"],)))
    ]


def _number(value: float | None) -> str:
    if value is None or isinstance(value, int):  # which may be too large for a float
        return "-" if value is None else str(value)
    return f"{value:.4g}"


def _spans(rounds: Iterable[int]) -> str:
    return spans(sorted(set(rounds)))


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _finite(value: Any) -> Any:
    """A site's JSON may hold NaN and infinity; ours may not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
