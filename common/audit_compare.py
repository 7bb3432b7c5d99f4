"""Whether a hospital's audit log and its coordinator's fit together, both ways.

Neither side can rewrite its own log so that this does not show, as long as the other side's is kept:
what one remembers of the other must be in the other's log, and what one received the other must have
sent. A copy that is older than the log it is compared with lacks its end, which looks the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.audit_heads import COORDINATOR, all_heard
from common.audit_log import Entry, Head, LogError, Reading

INVITED = "invitation taken"


def misfits(one: Reading, other: Reading) -> list[str]:
    """What does not fit between two verified logs, in words; empty if all does.

    Raises:
        LogError: they are not a hospital's and a coordinator's.
    """
    hospital, coordinator = _which(one, other)
    names = {e.details["site"] for e in hospital.entries if e.kind == INVITED}
    site = " or ".join(sorted(names))
    about = _about(coordinator.entries, names, set(hospital.keys()))
    return [
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


def _about(entries: Sequence[Entry], names: set[str], keys: set[str]) -> list[Entry]:
    """The coordinator's entries about this hospital while one of its log's keys was enrolled: a site
    with a new key may have begun a new log."""
    ours, found = dict.fromkeys(names, True), []
    for entry in entries:
        name = entry.details.get("site")
        if name not in ours:
            continue
        if entry.kind == "admitted":
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
