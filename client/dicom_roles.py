"""Which series of a study is t1, t1ce, t2 or flair: by the name of its folder, else by its header.

A folder named after a modality decides. Otherwise the words of SeriesDescription and ProtocolName do,
with ContrastBolusAgent between t1 and t1ce, and only without any such word the times TR, TE and TI.
Nothing is guessed between two candidates: people are asked to name the folders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from client.dicom_files import DicomError, Series, numbers_of, text_of

_FOLDERS = {
    **{"t1": "t1", "t1n": "t1", "t1w": "t1", "t1ce": "t1ce", "t1c": "t1ce", "t1gd": "t1ce"},
    **{"t2": "t2", "t2w": "t2", "flair": "flair", "t2f": "flair", "t2flair": "flair"},
}
_NUMBERED = re.compile(r"\d+[ ._-]+")  # "03_t1ce"

_OTHER = re.compile(
    r"locali[sz]er|scout|survey|\bdwi|\bdiff|\bdti|\badc\b|\btrace|\bswi|swan|t2 ?\*|t2star|perf"
    r"|\bdsc|\bdce|\bpwi|\basl\b|\btof\b|angio|\bbold\b|spectro|\bmip\b|subtract"
)
_FLAIR = re.compile(r"flair|dark.?fluid|tirm")
_T1 = re.compile(r"t1|mp.?rage|spgr|bravo|vibe|\btfe\b")
_T2 = re.compile(r"t2")
_WITH = re.compile(
    r"t1ce|t1c\b|t1.?gd|\+ ?(c|gd|km)\b|\bpost|\bgd\b|gado?\b|contrast|\bkm\b|\bce\b"
)
_WITHOUT = re.compile(
    r"(\bpre\b|\bpre(?=contrast)|without|\bno\b|\bnon|\bw/?o\b|\bohne\b|unenhanced|\bnative?\b)"
    r"[ -]*(contrast|gado?|gd|km|c)?\b"
)


def choose(series: Sequence[Series], modalities: Sequence[str]) -> dict[str, Series]:
    """One series for each of `modalities`; series of other kinds are left aside.

    Raises:
        DicomError: a modality has no series or several; the text lists all series.
    """
    roles = [role_of(one) for one in series]
    chosen = {}
    for modality in modalities:
        candidates = [one for one, role in zip(series, roles, strict=True) if role == modality]
        if len(candidates) != 1:
            found = "no series" if not candidates else f"{len(candidates)} series"
            listed = "; ".join(
                f"{one.name()} and {len(one.files) - 1} more files: {role or 'unknown'}"
                for one, role in zip(series, roles, strict=True)
            )
            raise DicomError(
                f"{found} can be told to be {modality}. Put each series into a folder of its own, "
                f"named {', '.join(modalities)}. Found: {listed}."
            )
        chosen[modality] = candidates[0]
    return chosen


def role_of(series: Series) -> str | None:
    """ "t1", "t1ce", "t2", "flair", or None where that cannot be told."""
    return _by_folder(series) or _by_header(series)


def _by_folder(series: Series) -> str | None:
    """The innermost folder with a modality's name that all files of the series are in."""
    names = {
        _folder_role(PurePath(path.relative_to(series.root)).parts[:-1]) for path in series.files
    }
    return names.pop() if len(names) == 1 else None


def _folder_role(folders: tuple[str, ...]) -> str | None:
    for folder in reversed(folders):
        name = re.sub(r"[ ._+-]", "", _NUMBERED.sub("", folder.lower(), count=1))
        if name in _FOLDERS:
            return _FOLDERS[name]
    return None


def _by_header(series: Series) -> str | None:
    header, file = series.headers[0], series.name()
    words = " ".join(
        text_of(header, keyword, file).lower().replace("_", " ")
        for keyword in ("SeriesDescription", "ProtocolName")
    )
    if _OTHER.search(words):
        return None
    t1, t2 = bool(_T1.search(words)), bool(_T2.search(words))
    if _FLAIR.search(words) and not t1:
        return "flair"
    if t1 and t2:
        return None
    if t2:
        return "t2"
    if not t1:
        kind = _by_times(series)
        if kind != "t1":
            return kind
    agent = text_of(header, "ContrastBolusAgent", file).lower() not in ("", "no", "none", "n/a")
    agent = agent or "ContrastBolusAgentSequence" in header
    without = bool(_WITHOUT.search(words))
    with_contrast = agent or bool(_WITH.search(_WITHOUT.sub(" ", words)))
    if without and with_contrast:  # words against words, or against the agent
        return None
    return "t1ce" if with_contrast else "t1"


def _by_times(series: Series) -> str | None:
    """From ms of repetition, echo and inversion at 1.5 to 3 T, far from the bounds between kinds."""
    header, file = series.headers[0], series.name()

    def milliseconds(keyword: str) -> float | None:
        return numbers_of(header, keyword, 1, file)[0] if text_of(header, keyword, file) else None

    repetition, echo, inversion = map(milliseconds, ("RepetitionTime", "EchoTime", "InversionTime"))
    if repetition is None or echo is None:
        return None
    if inversion is not None and inversion >= 1500 and echo >= 60:
        return "flair"
    if echo <= 30 and (repetition <= 1000 or (inversion is not None and 400 <= inversion <= 1300)):
        return "t1"
    if not inversion and echo >= 70 and repetition >= 2000:
        return "t2"
    return None
