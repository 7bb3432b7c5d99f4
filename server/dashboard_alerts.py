"""What in a run needs somebody's attention, in words: functions of what `server.dashboard_state` read.

An alert is about now, and goes when its cause does. Absences in earlier rounds are the history's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from common.console import plain
from server.dashboard_state import Document

ERROR, WARNING, NOTE = "error", "warning", "note"
LEVELS = ERROR, WARNING, NOTE  # gravest first
SILENT_SECONDS = 15.0  # a running server writes its status every second
NEARLY_SPENT = 0.9  # of a budget
FALLS = 0.05  # of Dice, over two rounds
SLOW_FACTOR, SLOW_SECONDS = 3.0, 30.0  # a round takes far longer than usual: both


def alert(level: str, text: str) -> Document:
    return {"level": level, "text": text}


def recorded_alerts(known: Document) -> Iterator[Document]:
    if known["problem"] and known["rounds"]:
        yield alert(ERROR, known["problem"])
    for failure in known["failures"]:
        what = f"Round {failure['round']} could not be completed: {failure['site']}: "
        yield alert(ERROR, what + failure["text"])
    for site, about in known["sites"].items():
        if about["absent"] is not None:
            text = f"{plain(site, 64)} did not contribute to round {known['rounds'][-1]}"
            yield alert(WARNING, f"{text}: {about['absent']}")
    yield from _budgets(known)
    yield from _falling(known)


def _budgets(known: Document) -> Iterator[Document]:
    """One alert for all sites that are alike; both numbers are rounded."""
    shares = {
        plain(site, 64): about["epsilon_spent"] / about["budget"]
        for site, about in known["sites"].items()
        if about["epsilon_spent"] is not None and about["budget"]
    }
    over = [site for site, share in shares.items() if share > 1.001]
    spent = [site for site, share in shares.items() if 0.999 <= share <= 1.001]
    nearly = [site for site, share in shares.items() if NEARLY_SPENT <= share < 0.999]
    if over:
        yield alert(ERROR, f"States more epsilon than its budget: {', '.join(over)}.")
    if spent:
        yield alert(WARNING, f"Budget of epsilon spent: {', '.join(spent)}.")
    if nearly:
        yield alert(NOTE, f"Budget of epsilon nearly spent: {', '.join(nearly)}.")


def _falling(known: Document) -> Iterator[Document]:
    """The worst site, if its Dice fell in both of the last two rounds, and by how much."""
    worst = known["worst_site"][-1] if known["worst_site"] else None
    if worst is None or len(known["rounds"]) < 3:
        return
    *_, first, second, third = known["sites"][worst]["dice"]["mean"]
    if None in (first, second, third) or not first > second > third or first - third < FALLS:
        return
    text = f"The Dice of {plain(worst, 64)}, the worst site, falls: {first:.3f}, {second:.3f}, "
    yield alert(WARNING, f"{text}{third:.3f} in the last three rounds.")


def status_alerts(status: Document, now: float) -> Iterator[Document]:
    """Of a running server; `now` in seconds since 1970."""
    waiting: dict[str, Any] = status.get("waiting") or {}
    if waiting:
        left = math.ceil(waiting["seconds_left"] / 60)
        yield alert(
            WARNING,
            f"Round {waiting['round']} waits for sites: {waiting['training']} that train are here, "
            f"{waiting['needed']} needed; {left} min left.",
        )
    for site, why in waiting.get("absent", {}).items():
        yield alert(WARNING, f"{plain(site, 64)} is absent: {plain(str(why))}")
    for site, why in waiting.get("resting", {}).items():
        yield alert(NOTE, f"{plain(site, 64)} rests: {plain(str(why))}")
    for site, about in status.get("sites", {}).items():
        lost = about["state"] in ("offline", "never connected")
        if lost and site not in waiting.get("absent", {}):
            yield alert(WARNING, f"{plain(site, 64)}: {about['state']}.")
    try:
        silent = now - datetime.fromisoformat(status["written"]).timestamp()
    except (LookupError, ValueError, TypeError):
        return
    if silent > SILENT_SECONDS:
        text = f"The server runs, but has said nothing of itself for {_duration(silent)}."
        yield alert(WARNING, text)


def slow_alerts(known: Document, elapsed: float) -> Iterator[Document]:
    """`elapsed` seconds of the round that is going on."""
    before = [seconds for seconds in known["seconds"][-10:] if seconds is not None]
    if not before:
        return
    usual = statistics.median(before)
    if elapsed > SLOW_FACTOR * usual and elapsed > usual + SLOW_SECONDS:
        text = f"The round after {known['rounds'][-1]} takes far longer than usual: "
        yield alert(WARNING, f"{text}{_duration(elapsed)} so far, usually {_duration(usual)}.")


def _duration(seconds: float) -> str:
    """Rough, so that a page is not told of every second."""
    if seconds < 120:
        return f"{max(1, round(seconds / 10)) * 10} s" if seconds > 20 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
