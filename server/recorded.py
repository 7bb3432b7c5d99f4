"""What a run has recorded, read once: so that all of a report is of the same moment.

A copy of the history is read, so that nothing is changed and a run in progress can be looked at at any
time. For a report that others may read, `published` hides the names of the sites that
hide theirs, as `server.shown_names` does for an exported model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from common.message_words import EXACT, NOISED, WITHHELD
from common.messages import SiteCard
from common.metrics import SiteMetrics
from server.history import History, RoundRecord
from server.privacy_report import aggregation_in_words, privacy_document
from server.shown_names import (
    named_in,
    reason_to_publish,
    shown_names,
    verdict_to_publish,
)
from server.tables import Verdict, verdict

WAYS = (EXACT, NOISED, WITHHELD)


@dataclass(frozen=True)
class Recorded:
    """`terms` are those of all rounds as `server.attendance` noted them; none in a simulation.

    `sites` are all that the history knows, in the order in which reports show them.
    """

    records: tuple[RoundRecord, ...]
    cards: tuple[SiteCard, ...]
    final: tuple[int, dict[str, SiteMetrics]] | None
    final_released: dict[str, str]
    verdict: Verdict
    privacy: dict[str, Any]
    aggregation: str
    terms: tuple[dict[str, Any], ...]
    init_from: str | None
    sites: tuple[str, ...]

    @property
    def measured(self) -> tuple[int, dict[str, SiteMetrics], dict[str, str]] | None:
        """The chosen model's round, metrics and who releases other than exact ones; before the end
        those of the last round; None before the first."""
        if self.final is not None:
            return (*self.final, self.final_released)
        if not self.records:
            return None
        last = self.records[-1]
        return last.round, last.metrics, last.released

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites whose names other sites do not read."""
        names = shown_names(self.cards, self.sites)
        return tuple(site for site in self.sites if names[site] != site)


def read_recorded(
    path: Path, keys: Mapping[str, Sequence[ec.EllipticCurvePublicKey]], federation: str
) -> Recorded:
    """Everything in the history at `path`; the arguments are those of `privacy_document`.

    Raises:
        HistoryError: it cannot be read.
    """
    with History(path, copied=True) as history:
        noted = history.noted("terms")
        init = history.noted("init_from")
        judged, records, cards = verdict(history), history.rounds(), history.sites()
        measured = {site for r in records for site in (*r.metrics, *r.released)}
        return Recorded(
            records=tuple(records),
            cards=tuple(cards),
            final=history.final(),
            final_released=history.final_released(),
            verdict=judged,
            privacy=privacy_document(history, keys, federation),
            aggregation=aggregation_in_words(history),
            terms=tuple(noted) if isinstance(noted, list) else (),
            init_from=init if isinstance(init, str) else None,
            sites=tuple(sorted({c.site for c in cards} | named_in(judged) | measured)),
        )


def published(recorded: Recorded) -> Recorded:
    """The same for anybody to read: hidden names are replaced, and of these sites no words are left.

    The federation's own name and configuration are the coordinator's words, and stay.
    """
    names = shown_names(recorded.cards, recorded.sites)

    def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(site, site): value for site, value in values.items()}

    def reasons(values: Mapping[str, str]) -> dict[str, str]:
        return by_name({site: reason_to_publish(site, why, names) for site, why in values.items()})

    records = tuple(
        replace(
            r,
            contributions=tuple(
                replace(
                    c,
                    site=names.get(c.site, c.site),
                    reason=reason_to_publish(c.site, c.reason, names),
                )
                for c in r.contributions
            ),
            metrics=by_name(r.metrics),
            unmeasured=reasons(r.unmeasured),
            released=by_name(r.released),
            chosen=r.chosen and names.get(r.chosen, r.chosen),
        )
        for r in recorded.records
    )
    privacy_sites = [
        {
            **stated,
            "site": names.get(stated["site"], stated["site"]),
            # the site's own word; its warnings are this program's, and name nobody
            "metrics": stated["metrics"] if stated["metrics"] in WAYS else None,
        }
        for stated in recorded.privacy["sites"]
    ]
    return replace(
        recorded,
        records=records,
        cards=tuple(replace(c, site=names[c.site]) for c in recorded.cards),
        final=recorded.final and (recorded.final[0], by_name(recorded.final[1])),
        final_released=by_name(recorded.final_released),
        verdict=verdict_to_publish(recorded.verdict, names),
        privacy={**recorded.privacy, "sites": privacy_sites},
        sites=tuple(sorted(names.get(site, site) for site in recorded.sites)),
    )
