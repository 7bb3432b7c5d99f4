"""From one subject's five .nii.gz files to the network's input, against MONAI's dictionary transforms.

    python benchmarks/preprocessing.py [--quick] [--repeats N] [--json FILE] [--subject FOLDER]

A phantom of 240x240x155 (80x80x52 with --quick), or the subject in FOLDER, on each working grid that
`sites.preprocess` has: resampled to 128^3 (48^3), and cropped at 1 mm. MONAI computes the same
function, which is asserted voxel by voxel before anything is timed: to fp16's rounding, as ours is
stored so; labels are equal. It writes nothing, so "the same work" of ours reads the files and
prepares them, without checks, digests and cache; the last row is everything that `prepare_subject`
does before a subject can be trained on, to the fsync. One CPU thread and one core, files in the page cache.

MONAI also runs with the normalisation after the resampling, as many recipes have it: less work, and
another function of the voxels. What unpacking the files alone takes is the floor; beside it, the same by
Python's gzip.

First, a site of 8 phantoms, whole, with all cores: `prepare_subjects` as it is, and one subject after
the other.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deflate
import numpy as np
import torch
from interleaved import interleaved, options, report, spread, write_json

import sites.each_subject
from common.brats import MODALITIES
from sites.cache import prepare_subject, prepare_subjects
from sites.checks import Scan
from sites.phantom_cohort import write_cohort
from sites.preprocess import Prepared, Recipe, prepare
from sites.subject import Subject, discover
from sites.volumes import read_volume

REACH = 3.0
PEER, AFTER = "MONAI, the same function", "MONAI, normalised after resampling"
OURS, WHOLE = "ours, the same work", "ours, with checks, digests, cache"
IN_TURN, TOGETHER = "ours, one subject after the other", "ours, a few at a time"
SUBJECTS = 8
FLOOR, ZLIB = "unpacking alone, libdeflate", "unpacking alone, Python's gzip"
Shape = tuple[int, int, int]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--subject", type=Path, help="a folder with one subject's files")
    chosen = parser.parse_args()
    shape, side = ((80, 80, 52), 48) if chosen.quick else ((240, 240, 155), 128)
    with tempfile.TemporaryDirectory() as folder:
        site = a_site(Path(folder), shape, side, chosen.repeats)
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        root = chosen.subject or write_cohort(
            Path(folder) / "data", sites=1, subjects_per_site=1, shape=shape
        )
        [subject] = discover(root).subjects
        reports = [
            measured(subject, recipe, Path(folder), chosen.repeats)
            for recipe in (Recipe("resample", (side, side, side)), Recipe("patches", (0, 0, 0)))
        ]
    write_json(chosen.json, [*reports, site])


def a_site(folder: Path, shape: Shape, side: int, repeats: int) -> dict[str, Any]:
    data = write_cohort(folder / "site", sites=1, subjects_per_site=SUBJECTS, shape=shape)
    subjects = discover(data).subjects
    recipe, cache = Recipe("resample", (side, side, side)), folder / "site-cache"
    cores = sites.each_subject.available_cores()

    def whole(cores: int) -> None:
        sites.each_subject.available_cores = lambda: cores
        assert len(prepare_subjects(subjects, recipe, cache, site="").ready) == SUBJECTS

    timings = interleaved(
        {IN_TURN: lambda: whole(1), TOGETHER: lambda: whole(cores)},
        repeats=repeats,
        before=lambda: shutil.rmtree(cache, ignore_errors=True),
    )
    title = f"Preparing a site of {SUBJECTS} subjects, {cores} cores"
    return report(title, timings, peer=IN_TURN, reach={})


def measured(subject: Subject, recipe: Recipe, folder: Path, repeats: int) -> dict[str, Any]:
    files = [subject.images[m] for m in MODALITIES]
    if subject.segmentation is not None:
        files.append(subject.segmentation)
    target = recipe.shape if recipe.mode == "resample" else None
    same, after = by_monai(subject, target), by_monai(subject, target, last="normalise")
    prepared = by_us(subject, recipe)
    difference = furthest(prepared, same())
    cache = folder / "cache"

    def whole() -> None:
        entry, findings = prepare_subject(
            subject, recipe, cache, site="", require_labels=subject.segmentation is not None
        )
        if entry is None:
            raise SystemExit(f"{subject.id} cannot be used: {findings[0].what}")

    ways: dict[str, Callable[[], object]] = {
        PEER: same,
        AFTER: after,
        OURS: lambda: by_us(subject, recipe),
        WHOLE: whole,
        FLOOR: lambda: unpack(files, lambda packed: deflate.gzip_decompress(packed)),
        ZLIB: lambda: unpack(files, gzip.decompress),
    }
    if target is None:
        del ways[AFTER]  # there is no resampling
    timings = interleaved(
        ways, repeats=repeats, before=lambda: shutil.rmtree(cache, ignore_errors=True)
    )
    facts: dict[str, Any] = {
        "MB of the files": [round(f.stat().st_size / 1e6, 2) for f in files],
        "largest difference from MONAI, sigma": difference,
    }
    unpacked = unpack(files, gzip.decompress)
    for way in (FLOOR, ZLIB):
        facts[f"{way}, MB/s of CPU time"] = round(unpacked / 1e6 / np.median(timings[way].cpu))
    if AFTER in timings:
        for way in (OURS, WHOLE):
            ratios = spread(timings[AFTER].ratios_to(timings[way])).values()
            facts[f"{AFTER} / {way}"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
    grid = "x".join(map(str, prepared.image.shape[1:]))
    return report(
        f"Preprocessing {subject.id}, {recipe.mode} to {grid}",
        timings,
        peer=PEER,
        reach={OURS: REACH, WHOLE: REACH},
        facts=facts,
    )


def by_us(subject: Subject, recipe: Recipe) -> Prepared:
    """The product's own path from files to voxels; what the labels mean stays as in the file."""
    volumes = {modality: read_volume(path) for modality, path in subject.images.items()}
    labels = None
    if subject.segmentation is not None:
        labels = read_volume(subject.segmentation).voxels.astype(np.uint8, copy=False)
    first = volumes[recipe.modalities[0]]
    x, y, z = (float(edge) for edge in np.abs(first.affine).max(axis=0)[:3])
    images = {modality: volume.voxels for modality, volume in volumes.items()}
    affines = first.affine, first.file_affine
    scan = Scan(subject, images, labels, (x, y, z), *affines, first.file_shape, "", ())
    return prepare(scan, recipe)


def by_monai(
    subject: Subject, target: Shape | None, last: str = "resample"
) -> Callable[[], dict[str, torch.Tensor]]:
    """The same in MONAI: to RAS, crop to what is not 0, normalise what is not 0, resample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional readers that are not installed
        from monai.data import NibabelReader
        from monai.transforms import (
            Compose,
            CropForegroundd,
            EnsureChannelFirstd,
            LoadImaged,
            NormalizeIntensityd,
            Orientationd,
            Resized,
        )

    files: dict[str, Any] = {"image": [subject.images[m] for m in MODALITIES]}
    if subject.segmentation is not None:
        files["label"] = subject.segmentation
    keys = list(files)
    steps = [
        # as the files hold them: a tenth faster here than as MONAI's default float32
        LoadImaged(keys, reader=NibabelReader(), dtype=np.int16),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="RAS", labels=None),
        CropForegroundd(keys, "image", select_fn=lambda voxels: voxels != 0, allow_smaller=True),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True),
    ]
    if target is not None:
        modes = ["trilinear", "nearest-exact"][: len(keys)]
        steps.insert(5 if last == "resample" else 4, Resized(keys, target, mode=modes))
    chain = Compose(steps)
    return lambda: chain(files)


def furthest(ours: Prepared, monai: dict[str, torch.Tensor]) -> float:
    """The largest difference of intensities in sigma, once all are within fp16's rounding."""
    image = np.asarray(monai["image"])
    np.testing.assert_allclose(ours.image.astype(np.float32), image, rtol=2**-11, atol=1e-4)
    if ours.labels is not None:
        np.testing.assert_array_equal(ours.labels, np.asarray(monai["label"])[0])
    return float(np.abs(ours.image - image).max())


def unpack(files: list[Path], how: Callable[[bytes], bytes | bytearray]) -> int:
    """Bytes that came out."""
    return sum(len(how(path.read_bytes())) for path in files)


if __name__ == "__main__":
    main()
