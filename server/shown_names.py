"""Site names as other sites may read them: a site whose policy hides its name is `another site`.

For what leaves the coordinator: the farewell's words, a model's metadata, an exported model's card.
The coordinator's own results, screens and logs keep every name. A name is hidden, not a site: how
many there are and what each did can still be read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from common.messages import SiteCard
from server.tables import Verdict

HIDDEN = "another site"


def shown_names(
    cards: Collection[SiteCard], others: Iterable[str] = (), reader: str = ""
) -> dict[str, str]:
    """What each site is called where `reader` reads it; a number tells several hidden ones apart.

    `others` never told the coordinator anything, so not that they show their names either.
    """
    shown = {card.site for card in cards if card.shows_name} | {reader}
    sites = sorted({card.site for card in cards} | set(others))
    hidden = [site for site in sites if site not in shown]
    names = {site: site for site in sites}
    for number, site in enumerate(hidden, start=1):
        names[site] = HIDDEN if len(hidden) == 1 else f"{HIDDEN} ({number})"
    return names


def named_in(judged: Verdict) -> set[str]:
    """Every site that the verdict speaks of."""
    absent = {site for _, site, _ in (*judged.absent, *judged.stopped)}
    return {*judged.contributed, *judged.withheld, *judged.noised, *absent}


def verdict_with(judged: Verdict, names: dict[str, str]) -> Verdict:
    """The verdict with these names, in the sites' own words too; they often begin with their name.

    Why it `ended` are the coordinator's own words, which name nobody.
    """

    def name(site: str) -> str:
        return names.get(site, site)

    def absences(found: Iterable[tuple[int, str, str]]) -> tuple[tuple[int, str, str], ...]:
        return tuple((n, name(site), text_with(why, names)) for n, site, why in found)

    return replace(
        judged,
        contributed={name(site): rounds for site, rounds in judged.contributed.items()},
        absent=absences(judged.absent),
        stopped=absences(judged.stopped),
        withheld=tuple(map(name, judged.withheld)),
        noised=tuple(map(name, judged.noised)),
    )


def text_with(text: str, names: dict[str, str]) -> str:
    """The text with every hidden name in it replaced, where it stands as a name of its own.

    Letters, digits and . _ - belong to a name, but for the full stop after a sentence. Capitals count.
    A site that is called as an ordinary word is hidden in that word's place too.
    """
    changed = {site: name for site, name in names.items() if site != name}
    if not changed:
        return text
    longest_first = sorted(changed, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    word = rf"(?<![A-Za-z0-9_-])(?<![A-Za-z0-9_-]\.)(?:{pattern})(?!\.*[A-Za-z0-9_-])"
    return re.sub(word, lambda found: changed[found[0]], text)
