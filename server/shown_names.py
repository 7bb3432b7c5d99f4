"""Site names as other sites may read them: a site whose policy hides its name is `another site`.

For what leaves the coordinator: the farewell's words, a model's metadata, an exported model's card.
The coordinator's own results, screens and logs keep every name. A name is hidden, not a site: how
many there are and what each did can still be read.

Other sites' hospitals read reasons with names replaced where they stand as words (`text_with`). What
anybody may read (`verdict_to_publish`, `text_to_publish`) holds no words of a hidden site at all, as
these may tell its name in a path or in a way that no search finds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from common.messages import SiteCard
from server.tables import Verdict

HIDDEN = "another site"
NOT_PUBLISHED = "a reason that its site has given is not published."
NOT_PUBLISHED_TEXT = "a text that may name a site is not published."
_PREFIXES = ("not evaluated: ", "final model not evaluated: ")  # of `server.tables.verdict`
_NUMBER = r"-?[0-9][0-9.e+-]*|-?inf|nan"
_OWN_FORMS = (  # this program's own reasons, which hold no text from elsewhere; # is a number
    "it has never connected.",
    "it has just connected.",
    "it has not answered the roll call yet.",
    "the message could not be sent.",
    "it withholds its metrics, by its own choice.",
    "its training loss, time or throughput is not a possible number.",
    "its validation loss is not a possible number.",
    "its noised metrics are not between 0 and 1.",
    "it says that it withholds its metrics, and tells some.",
    "its privacy ledger cannot be used, so it does not train; its log says more.",
    "a prepared subject is missing or damaged at the site; its log says more.",
    "it trained on # subjects but announced #.",
    "it evaluated # subjects but announced #.",
    "its change is # times as large as the model (limit: #).",
    "its change is # times the median of the round's (limit for its # subject: #).",
    "its change is # times the median of the round's (limit for its # subjects: #).",
)
_OWN = (
    re.compile(
        r"it is not connected \(last heard of \d\d [A-Z][a-z]{2} \d\d:\d\d:\d\d UTC\)\.", re.ASCII
    ),
    *(re.compile(re.escape(f).replace(r"\#", f"(?:{_NUMBER})"), re.ASCII) for f in _OWN_FORMS),
)


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
    return _verdict(judged, names, lambda _, why: text_with(why, names))


def verdict_to_publish(judged: Verdict, names: dict[str, str]) -> Verdict:
    """The verdict for anybody to read: with these names, and no own words of a hidden site."""
    return _verdict(judged, names, lambda site, why: reason_to_publish(site, why, names))


def _verdict(judged: Verdict, names: dict[str, str], said: Callable[[str, str], str]) -> Verdict:
    def name(site: str) -> str:
        return names.get(site, site)

    def absences(found: Iterable[tuple[int, str, str]]) -> tuple[tuple[int, str, str], ...]:
        return tuple((n, name(site), said(site, why)) for n, site, why in found)

    return replace(
        judged,
        contributed={name(site): rounds for site, rounds in judged.contributed.items()},
        absent=absences(judged.absent),
        stopped=absences(judged.stopped),
        withheld=tuple(map(name, judged.withheld)),
        noised=tuple(map(name, judged.noised)),
        idle=tuple(map(name, judged.idle)),
    )


def reason_to_publish(site: str, why: str, names: dict[str, str]) -> str:
    """Why a site was absent, for anybody to read. A hidden site's own words are left out whole."""
    prefix = next((p for p in _PREFIXES if why.startswith(p)), "")
    said = why.removeprefix(prefix)
    if not said or any(form.fullmatch(said) for form in _OWN):
        return why
    if names.get(site, site) != site:
        return prefix + NOT_PUBLISHED
    return prefix + text_to_publish(said, names)


def text_to_publish(text: str, names: dict[str, str]) -> str:
    """`text_with`; nothing of a text in which a hidden name is left inside another word.

    Neither case nor punctuation counts: `Mercy_West2` holds `mercy-west`.
    """
    left = _letters(_replaced(text, dict.fromkeys(names, HIDDEN), lambda _: " "))
    for site, name in names.items():
        if name != site and _letters(site) in left:
            return NOT_PUBLISHED_TEXT
    return text_with(text, names)


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum()) or text


def text_with(text: str, names: dict[str, str]) -> str:
    """The text with every hidden name in it replaced, where it stands as a name of its own.

    Letters, digits and . _ - belong to a name, but for the full stop after a sentence. Capitals do not
    count, but for a name that is also shown as it stands there. A site that is called as an ordinary
    word is hidden in that word's place too.
    """
    return _replaced(text, names, lambda name: name)


def _replaced(text: str, names: dict[str, str], by: Callable[[str], str]) -> str:
    changed = {site: name for site, name in names.items() if site != name}
    if not changed:
        return text
    of_any_case = {site.casefold(): name for site, name in changed.items()}

    def replaced(found: re.Match[str]) -> str:
        word = found[0]
        name = names.get(word) or of_any_case.get(word.casefold(), HIDDEN)
        return word if name == word else by(name)

    longest_first = sorted(changed, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    word = rf"(?<![A-Za-z0-9_-])(?<![A-Za-z0-9_-]\.)(?:{pattern})(?!\.*[A-Za-z0-9_-])"
    return re.sub(word, replaced, text, flags=re.IGNORECASE)
