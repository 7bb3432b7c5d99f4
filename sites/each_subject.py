"""Reading many subjects: a few at a time, for unpacking, hashing and resampling leave Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from common.machine import available_cores, available_memory
from common.progress import track
from sites.finding import Finding
from sites.subject import Subject

AT_ONCE = 4
LARGEST = 3 * 2**30  # bytes that a subject of the largest scans takes; one of BraTS takes 0.2 GB
Made = TypeVar("Made")
Answer = tuple[Made, list[Finding]]


def each_subject(
    work: Callable[[Subject], Answer[Made]], subjects: Sequence[Subject], what: str
) -> list[Answer[Made]]:
    """What `work` makes of each subject, in their order, with progress named `what`.

    `work` is called by as many threads as there are cores and memory for, at most AT_ONCE. A subject for
    which it found too little memory is tried again when it is alone. If `work` raises, what has not begun
    is dropped.
    """
    threads = ThreadPoolExecutor(_at_once(), thread_name_prefix="subjects")
    try:
        made = list(track(threads.map(work, subjects), what, len(subjects), "subjects"))
    finally:
        threads.shutdown(cancel_futures=True)
    for number, (_, findings) in enumerate(made):
        if any(finding.code == "no-memory" for finding in findings):
            made[number] = work(subjects[number])
    return made


def _at_once() -> int:
    memory = available_memory()
    fit = AT_ONCE if memory is None else max(1, memory // LARGEST)
    return min(AT_ONCE, available_cores(), fit)
