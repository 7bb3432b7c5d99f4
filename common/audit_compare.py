"""Whether a hospital's audit log and its coordinator's fit together, both ways.

Neither side can rewrite its own log so that this does not show, as long as the other side's is kept:
what one remembers of the other must be in the other's log, and what one received the other must have
sent. Whose log the hospital's is, is what the coordinator enrolled: the keys that sign it, under the
site's name. Which key the coordinator must sign with, a hospital does not know. A copy that is older
than the log it is compared with lacks its end, which looks the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.audit_heads import COORDINATOR, all_heard
from common.audit_lines import Entry, Head
from common.audit_log import LogError, Reading

INVITED, ADMITTED = "invitation taken", "admitted"
CONNECTED = {"connected", "task received", "trained", "evaluated", "answered", "sent"}


def misfits(one: Reading, other: Reading) -> list[str]:
    """What does not fit between two verified logs, in words; empty if all does.

    Raises:
        LogError: they are not a hospital's and a coordinator's, or an entry says what none can say.
    """
    for reading in one, other:
        _require_form(reading.entries)
    hospital, coordinator = _which(one, other)
    keys = {key for key, _ in hospital.signers()}
    admitted = [e for e in coordinator.entries if e.kind == ADMITTED]
    names = {e.details["site"] for e in admitted if e.details["key"] in keys}
    if not names:
        text = (
            f"the two logs have nothing in common: the coordinator has never enrolled a key that "
            f"signs the hospital's ({', '.join(sorted(keys))}). It is another site's or another "
            "federation's, or it was written anew with another key."
        )
        return [text]
    enrolled = {e.details["key"] for e in admitted if e.details["site"] in names}
    site = " or ".join(sorted(names))
    about = _about(coordinator.entries, names, keys)
    return [
        *_names(hospital, names),
        *_strangers(hospital, site, enrolled),
        *_lacking(f"{site}'s", hospital, "the coordinator", all_heard_of(about, names)),
        *_lacking("the coordinator's", coordinator, site, all_heard(hospital.entries, COORDINATOR)),
        *_unsent(
            f"an update of {site}'s",
            [e for e in about if e.kind == "reply received"],
            [e for e in hospital.entries if e.kind == "sent"],
        ),
        *_unsent(
            "a model of the coordinator's",
            [e for e in hospital.entries if e.kind == "task received"],
            [e for e in about if e.kind == "task sent"],
        ),
    ]


def all_heard_of(entries: Sequence[Entry], names: set[str]) -> list[tuple[Entry, Head]]:
    found = [pair for name in names for pair in all_heard(entries, name)]
    return sorted(found, key=lambda pair: pair[0].number)


def _require_form(entries: Sequence[Entry]) -> None:
    """Somebody else's log is signed by somebody else: it may say anything."""
    for entry in entries:
        details, needed = entry.details, {ADMITTED: ("site", "key"), INVITED: ("site",)}
        texts = *needed.get(entry.kind, ()), *({"site", "sha256"} & details.keys())
        good = all(isinstance(details.get(name), str) for name in texts)
        if "heard" in details:
            heard = details["heard"]
            good = good and (
                isinstance(heard, dict)
                and isinstance(heard.get("of"), str)
                and isinstance(heard.get("hash"), str)
                and type(heard.get("number")) is int
            )
        if not good:
            raise LogError(
                f"Entry {entry.number} of one of the two logs ({entry.kind!r}, {entry.at[:19]}) does "
                "not hold what such an entry holds: it was not written by this program."
            )


def _which(one: Reading, other: Reading) -> tuple[Reading, Reading]:
    """The hospital's, which has taken an invitation, and the coordinator's, which has not."""
    hospitals = [any(e.kind == INVITED for e in reading.entries) for reading in (one, other)]
    if hospitals == [True, False]:
        return one, other
    if hospitals == [False, True]:
        return other, one
    raise LogError(
        "The two logs are not those of a hospital that has an invitation and of its coordinator."
    )


def _names(hospital: Reading, names: set[str]) -> list[str]:
    said = {e.details["site"] for e in hospital.entries if e.kind == INVITED}
    return [
        f"the hospital's log says that it was invited as {name}; the coordinator enrolled its key as "
        f"{' and '.join(sorted(names))}."
        for name in sorted(said - names)
    ]


def _strangers(hospital: Reading, site: str, enrolled: set[str]) -> list[str]:
    """Keys that cannot have signed what they did: only an enrolled one gets a connection, and only
    the key before, or the coordinator, can say that a key is the site's."""
    alone = {entry.key for entry, _ in hospital.unvouched()}
    found: dict[str, Entry] = {}
    for entry in hospital.entries:
        if entry.key not in enrolled and (entry.key in alone or entry.kind in CONNECTED):
            found.setdefault(entry.key, entry)
    return [
        f"{site}'s log holds entries signed by {key} (from entry {entry.number} on), which the "
        f"coordinator has never enrolled for {site}."
        for key, entry in found.items()
    ]


def _about(entries: Sequence[Entry], names: set[str], keys: set[str]) -> list[Entry]:
    """The coordinator's entries about this hospital while one of its log's keys was enrolled: a site
    with a new key may have begun a new log."""
    ours, found = dict.fromkeys(names, False), []
    for entry in entries:
        name = entry.details.get("site")
        if name not in ours:
            continue
        if entry.kind == ADMITTED:
            ours[name] = entry.details["key"] in keys
        elif ours[name]:
            found.append(entry)
    return found


def _lacking(
    whose: str, log: Reading, who: str, remembered: Sequence[tuple[Entry, Head]]
) -> list[str]:
    """The first entry that somebody remembers and that is not in the log is enough."""
    held = {entry.number: entry.hash for entry in log.entries}
    for entry, head in remembered:
        if head.number and held.get(head.number) != head.hash:
            last = log.head.number
            why = (
                f"it ends with entry {last}: a copy older than that, or its end was cut off"
                if head.number > last
                else "it holds another one: it was rewritten"
            )
            text = (
                f"{whose} log lacks entry {head.number} that {who} heard of "
                f"({entry.at[:19]}, its entry {entry.number}); {why}."
            )
            return [text]
    return []


def _unsent(what: str, received: Sequence[Entry], sent: Sequence[Entry]) -> list[str]:
    known = {entry.details.get("sha256") for entry in sent} | {""}
    for entry in received:
        if entry.details.get("sha256", "") not in known:
            text = (
                f"{what} that was received (entry {entry.number}, {entry.at[:19]}, sha256 "
                f"{entry.details['sha256'][:12]}) is not among what the other log says was sent."
            )
            return [text]
    return []
