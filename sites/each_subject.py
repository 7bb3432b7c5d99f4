"""Reading many subjects: a few at a time, for unpacking, hashing and resampling leave Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from common.cores import available_cores
from common.progress import track
from sites.finding import Finding
from sites.subject import Subject

AT_ONCE = 4  # each has all its scans in memory: 0.2 GB of BraTS
Made = TypeVar("Made")
Answer = tuple[Made, list[Finding]]


def each_subject(
    work: Callable[[Subject], Answer[Made]], subjects: Sequence[Subject], what: str
) -> list[Answer[Made]]:
    """What `work` makes of each subject, in their order, with progress named `what`.

    `work` is called by as many threads as there are cores, at most AT_ONCE. A subject for which there
    was too little memory is tried again when it is alone. If `work` raises, what has not begun is dropped.
    """
    threads = ThreadPoolExecutor(min(AT_ONCE, available_cores()), thread_name_prefix="subjects")
    try:
        made = list(track(threads.map(work, subjects), what, len(subjects), "subjects"))
    finally:
        threads.shutdown(cancel_futures=True)
    for number, (_, findings) in enumerate(made):
        if any(finding.code == "no-memory" for finding in findings):
            made[number] = work(subjects[number])
    return made
