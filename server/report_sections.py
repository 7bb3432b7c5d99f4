"""The sections of a report that a run's history can fill, for the coordinator and for a simulation.

The coordinator has neither scans nor anybody's results of single subjects; where a reader would look
for them, `nothing_of_subjects` says so.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from common.code_hash import code_hash
from common.console import many
from common.environment import installed_version
from common.evaluation_summary import GRADES
from common.metrics import REGIONS, SiteMetrics, mean_dice
from server.privacy_report import EXPLAINED, HEADINGS, remarks, site_row
from server.recorded import Recorded
from server.report import Plot, Report, Section, Table
from server.report_figures import (
    MEGABYTE,
    SPELLED,
    boxes_over_sites,
    curves,
    curves_of_each_site,
    losses,
    participation,
    times_and_bytes,
)
from server.tables import NOTHING_TO_DO, average, number, spans

PACKAGES = ("fedbrats", "torch", "monai", "flwr", "numpy", "opacus")
NO_BUDGET = (
    "No site stated a budget: nothing bounds what the model, or an update, can reveal about a single "
    "patient."
)
NO_SUBJECTS = (
    "The coordinator has no scan and no result of a single subject: these stay in the hospitals, and "
    "only their means are sent. So this page has no box plots over subjects, no best and worst case and "
    "no picture of a tumour. A hospital makes them of its own subjects with fed-client evaluate; a "
    "simulation's report has them of all."
)


def report_of(
    recorded: Recorded, sections: Sequence[Section], *, title: str, planned: int | None, about: str,
    running: bool = False, notes: Sequence[str] = (),
) -> Report:  # fmt: skip
    """The report's head from what was recorded, with these sections."""
    judged = recorded.verdict
    return Report(
        title=title,
        about=f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} (UTC) by fedbrats {installed_version('fedbrats')}"
        f"{about}",
        state=_state(recorded, planned, running),
        good=judged.complete and judged.everyone,
        notes=notes,
        figures=_first(recorded),
        sections=sections,
    )


def coordinators_report(
    recorded: Recorded, config: Mapping[str, Any], federation: str, *, hidden: int, publishable: bool,
    running: bool,
) -> Report:  # fmt: skip
    """All that a coordinator can report; `hidden` is how many sites hide their names from others."""
    notes = []
    if hidden and not publishable:
        notes.append(
            f"For the coordinator only: {many(hidden, 'site')} here may not be named to others. "
            "fed-server report --publishable numbers them."
        )
    elif hidden:
        notes.append(
            f"{many(hidden, 'site')} not named here, by their own policy. A name is hidden, not a site: "
            "what each did can be read."
        )
    sections = [
        who_took_part(recorded),
        measured(recorded),
        *over_the_rounds(recorded),
        *spread_over_sites(recorded),
        nothing_of_subjects(),
        cohort(recorded),
        privacy(recorded, config),
        configuration(recorded, config),
    ]
    name = config.get("name", "")
    return report_of(
        recorded,
        sections,
        title=f"Report of the federation “{name}”",
        planned=config.get("rounds", {}).get("number"),
        about=f" from the coordinator's history of federation {federation}.",
        running=running,
        notes=notes,
    )


def who_took_part(recorded: Recorded) -> Section:
    """The verdict: who contributed to which round, and of everybody else why not."""
    judged, records = recorded.verdict, recorded.records
    rows = []
    for site, rounds in judged.contributed.items():
        every = bool(rounds) and len(rounds) == judged.rounds
        own = [c for r in records for c in r.contributions if c.site == site and c.trained]
        rows.append(
            [
                site,
                "every round" if every else spans(rounds),
                str(len(rounds)),
                number(sum(c.seconds or 0 for c in own), 1),
                number(sum(c.bytes or 0 for c in own) / MEGABYTE, 1),
            ]
        )
    headings = ("site", "contributed to", "rounds", "training, s", "sent, MB")
    tables = [Table(headings, rows, left=2)]
    absent: dict[tuple[str, str], list[int]] = {}
    for round_, site, why in judged.absent:
        absent.setdefault((site, why), []).append(round_)
    for round_, site, why in judged.stopped:
        absent.setdefault((site, f"the round failed: {why}"), []).append(round_)
    if absent:
        lines = [[site, spans(rounds), why] for (site, why), rounds in absent.items()]
        tables.append(Table(("site", "round", "why"), lines, "Who was absent, and why", left=3))
    choices = [f"{site} withholds its metrics, by its own choice." for site in judged.withheld]
    choices += [
        f"{site} releases its metrics with noise, by its own choice." for site in judged.noised
    ]
    choices += [f"{site} {NOTHING_TO_DO}" for site in judged.idle]
    chosen = [f"round {r.round}: {r.chosen}" for r in records if r.chosen]
    if chosen:
        choices.append(f"The site whose update became the model: {', '.join(chosen)}.")
    if not records:
        return Section("who", "Who contributed to which round", choices, tables)
    plot = Plot(
        "participation",
        participation(records, recorded.sites),
        f"What each of {len(recorded.sites)} sites did in each of {len(records)} rounds",
        "■ the site's update is in the round's model. × it should have trained and did not. ○ it was "
        "only evaluated. Nothing: it had no part in the round.",
    )
    return Section("who", "Who contributed to which round", choices, tables, [plot])


def measured(recorded: Recorded, explained: Sequence[str] = ()) -> Section:
    """The chosen model, or before the end the last round's, on each site's held-out subjects."""
    found = recorded.measured
    if found is None:
        return Section("final", "How good the model is", ["No round is complete yet."])
    round_, metrics, released = found
    names = [site for site in recorded.sites if site in metrics or site in released]
    keys = [
        (key, r) for key in ("dice", "iou", "hd95") for r in REGIONS if key != "hd95" or _has_hd95(metrics)
    ]  # fmt: skip
    rows = []
    for site in names:
        m = metrics.get(site)
        cells = [_number(m.means.get(f"{k}/{r}") if m else None, k) for k, r in keys]
        how = " ".join(filter(None, (str(m.n) if m else "", released.get(site)))) or "0"
        rows.append([site, *cells, how])
    n = sum(m.n for m in metrics.values())
    for name, by_subject in (("mean over sites", False), ("mean over subjects", True)):
        means = [_number(average(metrics, f"{k}/{r}", by_subject=by_subject), k) for k, r in keys]
        rows.append([name, *means, str(n)])
    headings = ("site", *(f"{SPELLED[k]} {r}" for k, r in keys), "n")
    if recorded.final is not None:
        what = f"The model of round {round_}"
        text = [
            (
                f"{what}, measured once more on each site's own held-out subjects. It was chosen by Dice "
                "on these same subjects, so its figures are slightly optimistic."
            )
        ]
        if not any(r.metrics for r in recorded.records):
            text = [f"{what}, the last one: no site releases metrics to choose by."]
    else:
        text = [f"The run is not finished: this is the model of round {round_}, the last so far."]
    caption = "HD95 in mm. n: held-out subjects." if _has_hd95(metrics) else "n: held-out subjects."
    table = Table(headings, rows, caption, summary=2)
    return Section("final", "How good the model is", [*text, *explained], [table])


def over_the_rounds(recorded: Recorded) -> list[Section]:
    """Curves of Dice, IoU, loss, seconds and bytes."""
    records, sites = recorded.records, recorded.sites
    if not records:
        return []
    chosen = recorded.final[0] if recorded.final else None
    rows = [
        [
            str(r.round),
            number(r.mean_dice),
            number(r.worst[1]) if r.worst else "-",
            r.worst[0] if r.worst else "-",
            number(r.loss),
            f"{r.learning_rate:.3g}",
            str(sum(c.trained for c in r.contributions)),
            number(r.seconds, 1),
            number(sum(c.bytes or 0 for c in r.contributions) / MEGABYTE, 1),
        ]
        for r in records
    ]
    headings = (
        "round", "mean Dice", "worst Dice", "at", "loss", "learning rate", "sites", "s", "MB",
    )  # fmt: skip
    caption = "Mean over sites of the mean Dice of WT, TC and ET; loss over all held-out subjects."
    told = sum(any(site in r.metrics for r in records) for site in sites)
    what = f"over {many(len(records), 'round')} at {many(told, 'site')}"
    quality = [
        Plot("dice-and-iou", curves(records, sites, chosen), f"Dice and IoU {what}",
             "Each site's mean over its own held-out subjects."),
        *(
            Plot(f"{metric}-of-each-site", curves_of_each_site(records, sites, metric),
                 f"{SPELLED[metric]} of WT, TC and ET {what}, a panel for each site",
                 f"{SPELLED[metric]} by region. Grey: between the lowest and the highest site's mean "
                 "of the three.")
            for metric in ("dice", "iou")
        ),
    ]  # fmt: skip
    if not told:
        quality = []
    cost = [
        Plot("loss", losses(records, sites), f"Training and validation loss {what}"),
        Plot("times-and-bytes", times_and_bytes(records, sites), f"Seconds and megabytes {what}"),
    ]
    none = () if told else ("No site released metrics.",)
    return [
        Section("curves", "Dice and IoU over the rounds", none, [], quality),
        Section("cost", "Loss, time and bytes", [], [Table(headings, rows, caption)], cost),
    ]


def spread_over_sites(recorded: Recorded) -> list[Section]:
    """How far sites lie apart, by what a coordinator knows: their means."""
    found = recorded.measured
    if found is None or not found[1]:
        return []
    plot = Plot(
        "spread-over-sites",
        boxes_over_sites(found[1]),
        f"Dice and IoU of each region at {many(len(found[1]), 'site')}",
        "Box: median and quartiles of the sites' means, where there are five or more; line: the median.",
    )
    return [Section("spread", "How far the sites lie apart", [], [], [plot])]


def nothing_of_subjects() -> Section:
    return Section("subjects", "Single subjects and scans", [NO_SUBJECTS])


def cohort(
    recorded: Recorded,
    remarks: Sequence[str] = (),
    grades: Mapping[str, Mapping[str, int]] | None = None,
) -> Section:
    """Who takes part, with how many subjects. What a site hides is shown as hidden.

    `grades`: site -> grade -> held-out subjects, where these are known; a coordinator knows none.
    """
    found = recorded.measured
    metrics = found[1] if found else {}
    rows = []
    for card in recorded.cards:
        rounds = recorded.verdict.contributed.get(card.site, ())
        m = metrics.get(card.site)
        rows.append(
            [
                card.site,
                "trains" if card.trains else "trained before" if rounds else "only evaluates",
                "hidden" if card.n_training is None else str(card.n_training),
                str(card.n_held_out),
                str(card.n_left_out),
                str(len(rounds)),
                number(mean_dice(m)) if m else "-",
            ]
        )
    told = [card.n_training for card in recorded.cards if card.n_training is not None]
    totals = [sum(told), *(sum(getattr(c, k) for c in recorded.cards) for k in _COUNTS)]
    rows.append(["all", "", *map(str, totals), "", ""])
    headings: tuple[str, ...] = (
        *("site", "role", "training", "held out", "left out", "rounds", "mean Dice"),
    )
    if grades:
        headings = (*headings, "held out by grade")
        for row in rows[:-1]:
            row.append(_counted(grades.get(row[0], {})))
        rows[-1].append(_counted({g: sum(s.get(g, 0) for s in grades.values()) for g in GRADES}))
    caption = "Subjects of each site. Left out: unusable, as the site's own check says."
    table = Table(headings, rows, caption, left=2, summary=1)
    return Section("cohort", "Cohort", [], [table], remarks=remarks)


def _counted(grades: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {grade}" for grade, n in grades.items() if n) or "-"


def privacy(recorded: Recorded, config: Mapping[str, Any], *, simulated: bool = False) -> Section:
    """What the sites state, secure aggregation, and what withstands bad sites."""
    document = recorded.privacy
    budgeted = [s for s in document["sites"] if s["budget"] is not None or s["private_rounds"]]
    secure = bool(config.get("secure_aggregation"))
    text, tables, notes = [], [], []
    if simulated:
        text.append("A simulation protects nobody: it is one process on one machine.")
    if budgeted:
        rows = [site_row(site) for site in document["sites"]]
        headings: Sequence[str] = HEADINGS
        if simulated:  # which signs nothing
            headings, rows = headings[:-1], [row[:-1] for row in rows]
        tables.append(Table(headings, rows, "As the sites state it."))
        text += EXPLAINED if not simulated else EXPLAINED[1:2]
    else:
        text.append(NO_BUDGET)
    if not simulated:
        notes = [
            f"{site}: {warning}"
            for site, warning in remarks(document)
            if budgeted or not warning.startswith("no statement")
        ]
    words = f"Secure aggregation was {'on' if secure else 'off'}."
    text.append(words if simulated else recorded.aggregation)
    text.append(_robustness(config))
    return Section("privacy", "Privacy and protection", text, tables, remarks=notes)


def configuration(recorded: Recorded, config: Mapping[str, Any]) -> Section:
    """The agreed configuration, whole, and the versions of code and libraries."""
    rows = [["fedbrats code that wrote this page", code_hash()]]
    for entry in recorded.terms:
        what = f"code of the terms from round {entry['after_round'] + 1} on"
        rows.append([what, str(entry["terms"]["code_hash"])])
    if recorded.init_from:
        rows.append(["weights before round 1, sha256", recorded.init_from])
    final = recorded.final
    for r in recorded.records:
        if final is not None and r.round == final[0]:
            rows.append([f"checkpoint of round {r.round}, sha256", r.sha256])
    versions = ", ".join(
        f"{name} {installed_version(name) or '(not installed)'}" for name in PACKAGES
    )
    rows.append(
        ["installed where this page was written", f"Python {platform.python_version()}, {versions}"]
    )
    text = []
    if len(recorded.terms) > 1:
        text.append("The terms changed between rounds; below are the last ones.")
    listing = (
        yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None) if config else ""
    )
    if not config:
        text.append("The history holds no configuration.")
    return Section("configuration", "Configuration and versions", text,
                   [Table((), rows, left=2)], listing=listing)  # fmt: skip


def agreed_config(recorded: Recorded) -> dict[str, Any]:
    """The configuration of the last rounds, by the terms that the history holds."""
    return dict(recorded.terms[-1]["terms"]["config"]) if recorded.terms else {}


_COUNTS = ("n_held_out", "n_left_out")


def _state(recorded: Recorded, planned: int | None, running: bool) -> str:
    judged = recorded.verdict
    of = f" of {planned}" if planned is not None else ""
    why = f" It ended there: {judged.ended}." if judged.ended else ""
    if judged.complete:
        state = f"Training is complete: {many(judged.rounds, 'round')}.{why}"
    elif running:
        state = f"Training goes on: {judged.rounds}{of} rounds so far."
    else:
        state = f"NOT complete: {judged.rounds}{of} rounds so far, and nothing runs now.{why}"
    if not judged.rounds:
        return state
    if judged.everyone and not judged.stopped:
        return f"{state} Every site did what it should in every round."
    sites = sorted({site for _, site, _ in (*judged.absent, *judged.stopped)})
    return f"{state} Not everybody took part in everything: see {', '.join(sites)} below."


def _first(recorded: Recorded) -> list[tuple[str, str]]:
    found = recorded.measured
    if found is None:
        return []
    _, metrics, _ = found
    trained = sum(bool(rounds) for rounds in recorded.verdict.contributed.values())
    shown = [("rounds", str(recorded.verdict.rounds)), ("sites that trained", str(trained))]
    if metrics:
        for key, region in (("dice", "WT"), ("dice", "TC"), ("dice", "ET"), ("iou", "WT")):
            value = average(metrics, f"{key}/{region}", by_subject=False)
            shown.append((f"{SPELLED[key]} {region}, mean over sites", number(value)))
        worst = min(metrics, key=lambda site: _last_if_nan(mean_dice(metrics[site])))
        shown.append((f"mean Dice of the worst site, {worst}", number(mean_dice(metrics[worst]))))
        shown.append(("held-out subjects", str(sum(m.n for m in metrics.values()))))
    return shown


def _robustness(config: Mapping[str, Any]) -> str:
    rounds = config.get("rounds", {})
    if not rounds:
        return "How updates were averaged is not recorded."
    how = {
        "fedavg": "fedavg, a mean weighted by subjects, which a few bad sites can spoil",
        "trimmed_mean": f"a trimmed mean that leaves out {rounds.get('trim', 0):g} at either end",
        "median": "the median of the updates",
        "krum": f"krum, which withstands {rounds.get('bad_sites')} bad sites",
    }.get(rounds.get("aggregation"), str(rounds.get("aggregation")))
    limits = f"larger than {rounds.get('max_change'):g} times the model"
    if rounds.get("outlier_factor") and not config.get("secure_aggregation"):
        limits += f" or {rounds['outlier_factor']:g} times the round's median change"
    return f"Aggregation: {how}. An update {limits} is refused."


def _has_hd95(metrics: Mapping[str, SiteMetrics]) -> bool:
    return any(f"hd95/{region}" in m.means for m in metrics.values() for region in REGIONS)


def _number(value: float | None, key: str) -> str:
    return number(value, 1 if key == "hd95" else 3)


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
