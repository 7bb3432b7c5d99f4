"""The network's input against numpy on the same voxels, and the way back to the subject's own grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.brats import MODALITIES
from sites.checks import Scan, examine
from sites.phantom_cohort import write_cohort
from sites.preprocess import VERSION, Prepared, Recipe, best_class, prepare, restore
from sites.subject import Subject, discover

SHAPE = (40, 36, 30)
RNG = np.random.default_rng(7)


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float, spacing=(1, 1, 1)):
    """True within `radius` mm of `centre` (mm)."""
    axes = np.indices(shape)
    parts = zip(axes, centre, spacing, strict=True)
    return sum((axis * mm - c) ** 2 for axis, c, mm in parts) < radius**2


BRAIN = ball(SHAPE, (20, 18, 15), 13)
LABELS = (2 * ball(SHAPE, (22, 19, 14), 7)).astype(np.uint8)
LABELS[ball(SHAPE, (22, 19, 14), 5)] = 3
LABELS[ball(SHAPE, (22, 19, 14), 3)] = 1


def scan_of(images: dict[str, np.ndarray], labels: np.ndarray | None, spacing=(1.0, 1.0, 1.0)):
    """A scan as `sites.checks` hands it over."""
    shape = next(iter(images.values())).shape
    affine = np.diag([*spacing, 1.0])
    subject = Subject("S", Path(), {}, None)
    return Scan(subject, images, labels, spacing, affine, affine, shape, "", ())


def noisy_scan(brain: np.ndarray = BRAIN, labels: np.ndarray | None = LABELS, **more) -> Scan:
    images = {
        modality: np.where(brain, RNG.integers(50, 900, brain.shape), 0).astype(np.int16)
        for modality in MODALITIES
    }
    return scan_of(images, labels, **more)


def one_hot(labels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([labels == k for k in range(4)]).astype(np.float32))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def centroid(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0)


def crop(volume: np.ndarray, prepared: Prepared) -> np.ndarray:
    low, high = prepared.geometry.box
    return volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]


# ------------------------------------------------------------------------------------ intensities


def test_zscore_is_over_the_nonzero_voxels_of_each_modality_alone():
    scan = noisy_scan()
    scan.images["t2"][:22] = 0  # this modality covers half of the brain only
    prepared = prepare(scan, Recipe())
    for channel, modality in enumerate(MODALITIES):
        volume = scan.images[modality].astype(np.float64)
        inside = volume != 0
        expected = np.where(inside, (volume - volume[inside].mean()) / volume[inside].std(), 0)
        found = prepared.image[channel].astype(np.float64)
        np.testing.assert_allclose(found, crop(expected, prepared), atol=2e-3)  # fp16


def test_minmax_reaches_from_0_to_1():
    scan = noisy_scan()
    prepared = prepare(scan, Recipe(normalise="minmax"))
    for channel, modality in enumerate(MODALITIES):
        volume = scan.images[modality].astype(np.float64)
        expected = (volume - volume.min()) / (volume.max() - volume.min())
        found = prepared.image[channel].astype(np.float64)
        np.testing.assert_allclose(found, crop(expected, prepared), atol=1e-3)
        assert (found.min(), found.max()) == (0, 1)


@pytest.mark.parametrize("normalise", ["zscore", "minmax"])
def test_a_scanners_gain_makes_no_difference_whatever_number_type_holds_it(normalise: str):
    scan = noisy_scan()
    louder = {m: v.astype(np.float32) * np.float32(1e4) for m, v in scan.images.items()}
    recipe = Recipe(normalise=normalise)
    a, b = prepare(scan, recipe), prepare(scan_of(louder, LABELS), recipe)
    np.testing.assert_allclose(a.image.astype(float), b.image.astype(float), atol=2e-3)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("resample", (24, 26, 9))])
@pytest.mark.parametrize("normalise", ["zscore", "minmax"])
@pytest.mark.parametrize("dtype", ["i2", "u1", "f4", "i4"])
def test_the_voxels_of_this_version_stay_the_same_to_the_byte(recipe, normalise, dtype):
    """Caches are shared by all releases of one VERSION; this is how its voxels were first made.

    `benchmarks/preprocessing.py` compares them with MONAI's.
    """
    assert VERSION == 1
    shift = 2**28 if dtype == "i4" else 0  # float32 holds these not exactly
    scan = noisy_scan()
    for m, v in scan.images.items():
        scan.images[m] = np.where(v, v.astype("i8") % 251 + 1 + shift, 0).astype(dtype, "F")
    scan.images["flair"] = np.zeros_like(scan.images["flair"])
    prepared = prepare(scan, replace(recipe, normalise=normalise))
    for channel, modality in enumerate(MODALITIES):
        volume = crop(scan.images[modality], prepared).astype(np.float32)
        brain = volume != 0
        if normalise == "minmax":
            low, high = float(volume.min()), float(volume.max())
            volume = (volume - low) / max(high - low, 1e-6)
        elif brain.any():
            values = volume[brain].astype(np.float64)
            volume = (volume - float(values.mean())) / max(float(values.std()), 1e-6)
            volume = np.where(brain, volume, 0).clip(-20, 20)
        if recipe.mode == "resample":
            volume = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
            volume = F.interpolate(
                volume, size=(25, 25, 9), mode="area"
            )  # z alone shrinks by so much
            volume = F.interpolate(volume, size=recipe.shape, mode="trilinear")[0, 0].numpy()
        assert prepared.image[channel].tobytes() == volume.astype(np.float16).tobytes()


@pytest.mark.parametrize("recipe", [Recipe("resample", (24, 24, 16)), Recipe("patches")])
def test_monais_transforms_give_the_same_voxels(tmp_path: Path, recipe: Recipe):
    """From the files: to RAS, crop to the brain, normalise what is not 0, resample."""
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

    root = write_cohort(tmp_path, sites=1, subjects_per_site=1, shape=(40, 40, 26), seed=3)
    [subject] = discover(root).subjects
    scan, _ = examine(subject, modalities=MODALITIES)
    assert scan is not None
    found = prepare(scan, recipe)

    keys = ["image", "label"]
    target = recipe.shape if recipe.mode == "resample" else found.geometry.box_shape
    expected = Compose(
        [
            LoadImaged(keys, reader=NibabelReader(), dtype=np.float32),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            CropForegroundd(keys, "image", select_fn=lambda v: v != 0, allow_smaller=True),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            Resized(keys, target, mode=["trilinear", "nearest-exact"]),
        ]
    )({"image": [subject.images[m] for m in MODALITIES], "label": subject.segmentation})
    image, labels = (np.asarray(expected[key]) for key in keys)
    np.testing.assert_allclose(found.image.astype(np.float32), image, rtol=2**-11, atol=1e-4)
    np.testing.assert_array_equal(found.labels, np.where(labels[0] == 4, 3, labels[0]))
    assert len(np.unique(labels)) == 4


def test_one_absurdly_bright_voxel_stays_finite_in_half_precision():
    scan = noisy_scan()
    bright = scan.images["t1"].astype(np.float32)
    bright[20, 18, 15] = 3e38
    prepared = prepare(scan_of(scan.images | {"t1": bright}, LABELS), Recipe())
    assert np.isfinite(prepared.image).all()
    assert np.abs(prepared.image).max() <= 20


def test_channels_come_in_the_agreed_order():
    scan = noisy_scan()
    whole = prepare(scan, Recipe())
    pair = prepare(scan, Recipe(modalities=("t1ce", "flair")))
    np.testing.assert_array_equal(pair.image, whole.image[[1, 3]])


# --------------------------------------------------------------------------------------- geometry


def test_the_crop_is_the_box_around_every_modality():
    images = {m: np.zeros(SHAPE, np.int16) for m in MODALITIES}
    images["t1"][5:20, 7:21, 8:11] = 100
    images["t1"][6, 8, 9] = 50
    images["t2"][9:25, 7:20, 3:9] = 100
    images["t2"][9, 8, 4] = 50
    prepared = prepare(scan_of(images, None), Recipe())
    assert prepared.geometry.box == ((5, 7, 3), (25, 21, 11))
    assert prepared.geometry.shape == SHAPE
    assert prepared.image.shape == (4, 20, 14, 8)
    assert prepared.labels is None
    assert prepared.truth is None


def test_a_label_outside_the_brain_still_counts_but_can_never_be_predicted():
    labels = LABELS.copy()
    labels[1, 2, 3] = 3
    prepared = prepare(noisy_scan(labels=labels), Recipe())
    assert prepared.geometry.truth_box[0] == (1, 2, 3)
    assert prepared.truth[0, 0, 0] == 3
    assert (prepared.truth > 0).sum() == (labels > 0).sum()
    np.testing.assert_array_equal(prepared.labels, crop(labels, prepared))
    restored = restore(one_hot(prepared.labels), prepared.geometry)
    assert restored.shape == prepared.truth.shape
    assert np.argwhere(restored != prepared.truth).tolist() == [[0, 0, 0]]


def test_truth_is_every_label_even_without_any_tumour():
    prepared = prepare(noisy_scan(labels=np.zeros(SHAPE, np.uint8)), Recipe())
    assert prepared.geometry.truth_box == prepared.geometry.box
    assert not prepared.truth.any()


def test_labels_at_1_mm_come_back_exactly():
    prepared = prepare(noisy_scan(), Recipe())
    np.testing.assert_array_equal(prepared.labels, crop(LABELS, prepared))
    restored = restore(one_hot(prepared.labels), prepared.geometry)
    np.testing.assert_array_equal(restored, prepared.truth)


@pytest.mark.parametrize("shape", [(32, 32, 32), (48, 40, 24), (64, 64, 64)])
def test_labels_come_back_from_a_fixed_grid_nearly_and_in_place(shape):
    prepared = prepare(noisy_scan(), Recipe(mode="resample", shape=shape))
    assert prepared.image.shape == (4, *shape)
    assert prepared.labels.shape == shape
    restored = restore(one_hot(prepared.labels), prepared.geometry)
    for region in ((1, 2, 3), (1, 3)):
        found, true = np.isin(restored, region), np.isin(prepared.truth, region)
        assert dice(found, true) > 0.93
        np.testing.assert_allclose(centroid(found), centroid(true), atol=0.1)


@pytest.mark.parametrize("shape", [(9, 9, 9), (9, 26, 60), (26, 26, 26), (64, 64, 64)])
def test_image_and_labels_stay_aligned_whatever_the_grid(shape):
    """The image shows the label; its centre of mass must be the label's on the working grid."""
    images = dict.fromkeys(MODALITIES, BRAIN * 100 + 900 * (LABELS > 0))
    recipe = Recipe(mode="resample", shape=shape, normalise="minmax")
    prepared = prepare(scan_of(images, LABELS), recipe)
    weight = np.clip(prepared.image[0].astype(float) - 0.1, 0, None)
    mean = [(np.arange(n) * weight.sum(axis=tuple({0, 1, 2} - {a}))).sum() / weight.sum()
            for a, n in enumerate(shape)]  # fmt: skip
    np.testing.assert_allclose(mean, centroid(prepared.labels > 0), atol=0.25)


def test_shrinking_averages_instead_of_skipping_voxels():
    images = {m: BRAIN.astype(np.float32) for m in MODALITIES}
    for volume in images.values():
        volume[21] = 10 * BRAIN[21]  # a thin bright sheet
    recipe = Recipe(mode="resample", shape=(6, 36, 30), normalise="minmax")
    shrunk = prepare(scan_of(images, LABELS), recipe).image[0].astype(float)
    # 26 voxels become 6, 4 or 5 each: the sheet is diluted, not lost and not taken whole
    assert 0.2 < shrunk.max() < 0.5


def test_an_axis_that_grows_is_interpolated_also_when_another_shrinks():
    """Thick slices: every step of the enlarged ramp must be small."""
    images = {m: np.zeros((60, 20, 8), np.float32) for m in MODALITIES}
    for volume in images.values():
        volume[...] = 100 + np.arange(8) * 100
        volume[0, 0, 0] = 0
    recipe = Recipe(mode="resample", shape=(20, 20, 40), normalise="minmax")
    ramp = prepare(scan_of(images, None), recipe).image[0, 10, 10].astype(float)
    assert np.diff(ramp).max() < 1.2 * 700 / 800 / 35  # linear between the centres of 8 slices


def test_thick_slices_become_1_mm_and_labels_come_back_exactly():
    spacing = (1.0, 1.0, 5.0)
    shape = (40, 36, 12)
    brain = ball(shape, (20, 18, 30), 16, spacing)
    labels = (3 * ball(shape, (22, 18, 30), 9, spacing)).astype(np.uint8)
    prepared = prepare(noisy_scan(brain, labels, spacing=spacing), Recipe())
    low, high = np.array(prepared.geometry.box)
    assert prepared.image.shape[1:] == tuple((high - low) * (1, 1, 5))
    volume_ml = (prepared.labels > 0).sum() / 1000
    assert volume_ml == pytest.approx((labels > 0).sum() * 5 / 1000, rel=0.01)
    np.testing.assert_array_equal(
        restore(one_hot(prepared.labels), prepared.geometry), prepared.truth
    )
    expected = np.linalg.norm([40, 36, 60])
    assert prepared.geometry.diagonal_mm == pytest.approx(expected)


def test_voxel_sizes_that_no_head_has_are_refused_before_memory_is_taken():
    scan = noisy_scan(np.ones(SHAPE, bool), spacing=(20.0, 20.0, 20.0))
    with pytest.raises(MemoryError, match="800x720x600 mm"):
        prepare(scan, Recipe())
    prepare(scan, Recipe(mode="resample", shape=(16, 16, 16)))  # needs no more memory than any


@pytest.mark.parametrize("mode", ["patches", "resample"])
def test_one_subject_on_lps_and_on_ras_axes_gives_the_same_voxels(tmp_path: Path, mode: str):
    scan = noisy_scan()
    prepared = []
    for axes, step in (("ras", 1), ("lps", -1)):
        folder = tmp_path / axes / "BraTS20_Training_001"
        folder.mkdir(parents=True)
        affine = np.diag([step, step, 1.0, 1.0])
        if step < 0:
            affine[:2, 3] = SHAPE[0] - 1, SHAPE[1] - 1
        for name, ras in (scan.images | {"seg": np.where(LABELS == 3, 4, LABELS)}).items():
            image = nibabel.Nifti1Image(ras[::step, ::step].astype(np.int16), affine)
            nibabel.save(image, folder / f"BraTS20_Training_001_{name}.nii.gz")
        subject = discover(folder).subjects[0]
        read, findings = examine(subject, modalities=MODALITIES)
        assert read is not None, findings
        prepared.append(prepare(read, Recipe(mode=mode, shape=(32, 32, 32))))
    ras, lps = prepared
    np.testing.assert_array_equal(ras.image, lps.image)
    np.testing.assert_array_equal(ras.labels, lps.labels)
    np.testing.assert_array_equal(ras.truth, lps.truth)
    assert ras.geometry == lps.geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_best_class_is_the_first_of_the_highest(dtype, channels_last):
    scores = torch.randint(-2, 3, (4, 6, 7, 8), generator=torch.Generator().manual_seed(0))
    scores = scores.to(dtype)  # few values, so that most voxels have equals
    scores[:, 0, 0, :4] = torch.tensor([[1, 5, 0, 0], [1, 5, 7, 0], [1, 4, 7, 2], [1, 5, 1, 2]])
    scores[0, 1], scores[:, 2, 0, 0] = -torch.inf, -torch.inf
    expected = scores.float().numpy().argmax(axis=0)  # the first, says numpy
    assert expected[0, 0, :4].tolist() == [0, 0, 1, 2]
    scores[:, 3, 0, 0], expected[3, 0, 0] = torch.nan, 0
    if channels_last:
        scores = scores[None].contiguous(memory_format=torch.channels_last_3d)[0]
    before = scores.clone()
    found = best_class(scores)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)
