from __future__ import annotations

import csv
import gzip
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sites.phantom import synthesise
from sites.phantom_cohort import SITE_ORDER, plan, site_model, write_cohort

SHAPE = (40, 36, 24)
PARTS = {"flair", "t1", "t1ce", "t2", "seg"}


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "out"
    write_cohort(out, sites=2, subjects_per_site=2, shape=SHAPE, seed=4)
    return out


def test_layout_is_brats_2020(cohort: Path) -> None:
    root = cohort / "MICCAI_BraTS2020_TrainingData"
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    assert [p.name for p in folders] == [s.id for s in plan(sites=2, subjects_per_site=2)]
    for folder in folders:
        expected = {f"{folder.name}_{part}.nii.gz" for part in PARTS}
        assert {p.name for p in folder.iterdir()} == expected
    assert sorted(p.name for p in cohort.iterdir()) == [
        "MICCAI_BraTS2020_TrainingData",
        "phantom.json",
        "sites.csv",
    ]


def test_headers_are_those_of_brats_2020(cohort: Path) -> None:
    for path in cohort.rglob("*.nii.gz"):
        image = nib.load(path)
        affine = [[-1, 0, 0, 0], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]]
        assert np.array_equal(image.affine, affine)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert np.allclose(image.header.get_qform(), image.header.get_sform())
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
        assert image.header.get_zooms() == (1, 1, 1)
        assert image.header.get_xyzt_units()[0] == "mm"
        kind = np.uint8 if "seg" in path.name else np.int16
        assert image.get_data_dtype() == kind
        assert image.shape == SHAPE
    labels = nib.load(path.parent / f"{path.parent.name}_seg.nii.gz")
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 4}


def test_gzip_carries_neither_name_nor_time(cohort: Path) -> None:
    header = next(cohort.rglob("*.nii.gz")).read_bytes()[:10]
    assert header[3] == 0  # no optional field, so no file name
    assert header[4:8] == bytes(4)


def test_subject_is_the_same_whatever_else_is_made(cohort: Path, tmp_path: Path) -> None:
    # another process, a larger cohort, this site not first in the order
    code = (
        "import sys; from pathlib import Path; from sites.phantom_cohort import write_cohort;"
        f"write_cohort(Path(sys.argv[1]), sites=4, subjects_per_site=4, shape={SHAPE}, seed=4)"
    )
    repository = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "big")], check=True, cwd=repository)
    small, big = digests(cohort), digests(tmp_path / "big")
    shared = {name for name in small if name.endswith(".nii.gz")} & set(big)
    assert len(shared) == 4 * 5  # every other of the larger cohort's
    assert all(small[name] == big[name] for name in shared)

    last = plan(sites=2, subjects_per_site=2)[-1]
    model = site_model(last.site, seed=4, heterogeneity=1.0)
    alone = synthesise(4, last.id, model, last.grade, SHAPE)
    path = cohort / "MICCAI_BraTS2020_TrainingData" / last.id / f"{last.id}_t2.nii.gz"
    assert np.array_equal(np.asanyarray(nib.load(path).dataobj), alone.images["t2"])


def test_uncompressed_and_true_spacing(cohort: Path, tmp_path: Path) -> None:
    kaggle = {"sites": 2, "subjects_per_site": 2, "shape": SHAPE, "seed": 4, "compressed": False}
    root = write_cohort(tmp_path / "nii", **kaggle)  # type: ignore[arg-type]
    plain = next(root.rglob("*_t1.nii"))
    packed = cohort / root.name / plain.parent.name / f"{plain.name}.gz"
    assert plain.read_bytes() == gzip.decompress(packed.read_bytes())

    real_mm = write_cohort(
        tmp_path / "mm", sites=1, subjects_per_site=1, shape=SHAPE, true_spacing=True
    )
    image = nib.load(next(real_mm.rglob("*_t1.nii.gz")))
    spacing = (240 / 40, 240 / 36, 155 / 24)
    assert np.allclose(image.header.get_zooms(), spacing)
    assert np.allclose(image.affine[:3, 3], (0, 35 * spacing[1], 0))


def test_resumes_with_identical_bytes_and_touches_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    parameters = {"sites": 2, "subjects_per_site": 2, "shape": SHAPE, "seed": 1}
    calls: list[tuple[str, int, int]] = []
    root = write_cohort(out, **parameters, on_subject=lambda *c: calls.append(c))  # type: ignore[arg-type]
    assert [c[1:] for c in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = digests(out)
    inodes = {p: p.stat().st_ino for p in root.rglob("*.nii.gz")}

    victim = sorted(root.rglob("*_t2.nii.gz"))[1]
    victim.unlink()
    (victim.parent / f".{victim.name}.part").write_bytes(b"left by a kill")
    write_cohort(out, **parameters)  # type: ignore[arg-type]
    assert digests(out) == before
    rewritten = {p.parent for p, inode in inodes.items() if p.stat().st_ino != inode}
    assert rewritten <= {victim.parent}
    others = [p for p in inodes if p.parent != victim.parent]
    assert all(p.stat().st_ino == inodes[p] for p in others)

    # killed before the tables were written
    (out / "sites.csv").unlink()
    (root / "name_mapping.csv").unlink()
    write_cohort(out, **parameters)  # type: ignore[arg-type]
    assert digests(out) == before


def test_refuses_a_folder_that_holds_something_else(cohort: Path, tmp_path: Path) -> None:
    before = digests(cohort)
    with pytest.raises(ValueError, match="seed was 4 and is now 5") as error:
        write_cohort(cohort, sites=2, subjects_per_site=2, shape=SHAPE, seed=5)
    assert "another folder" in str(error.value)
    assert "heterogeneity" not in str(error.value)  # only what differs
    assert digests(cohort) == before

    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no phantom"):
        write_cohort(tmp_path, sites=1, subjects_per_site=1, shape=SHAPE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
    with pytest.raises(ValueError, match="is a file"):
        write_cohort(tmp_path / "thesis.doc", sites=1, subjects_per_site=1, shape=SHAPE)

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "phantom.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match="cannot be read"):
        write_cohort(broken, sites=1, subjects_per_site=1, shape=SHAPE)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sites": 18}, "1 to 17"),
        ({"sites": 0}, "1 to 17"),
        ({"subjects_per_site": 0}, "1 to 999"),
        ({"subjects_per_site": 1000}, "1 to 999"),
        ({"shape": (8, 8, 8)}, "too small"),
        ({"seed": -1}, "0 or more"),
        ({"heterogeneity": 3.0}, "0 .* to 2"),
        ({"heterogeneity": float("nan")}, "0 .* to 2"),
    ],
)
def test_argument_out_of_range_writes_nothing(
    tmp_path: Path, arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        write_cohort(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_real_sizes_are_those_of_brats_2020() -> None:
    subjects = plan(real_sizes=True)
    sizes = sorted(Counter(s.site for s in subjects).values(), reverse=True)
    assert sizes == [129, 35, 34, 34, 22, 15, 14, 13, 12, 11, 9, 9, 8, 8, 6, 6, 4]
    assert [s.id for s in subjects] == [f"BraTS20_Training_{n:03d}" for n in range(1, 370)]
    assert Counter(s.grade for s in subjects) == {"HGG": 293, "LGG": 76}


def test_few_sites_already_mix_grades() -> None:
    grades: dict[int, set[str]] = {}
    for s in plan(sites=6, subjects_per_site=6):
        grades.setdefault(s.site, set()).add(s.grade)
    assert set(grades) == set(SITE_ORDER[:6])
    assert {frozenset(g) for g in grades.values()} == {
        frozenset({"HGG"}),
        frozenset({"LGG"}),
        frozenset({"HGG", "LGG"}),
    }


def test_more_subjects_than_the_real_site_has() -> None:
    for_ten, for_twelve = ({s.id: s for s in plan(sites=17, subjects_per_site=n)} for n in (10, 12))
    assert len(for_twelve) == 17 * 12
    beyond = {i for i, s in for_ten.items() if s.number > 369}
    assert beyond
    # a subject that both have is the same one: ids do not depend on how many are made
    assert all(for_twelve[i] == for_ten[i] for i in beyond)
    site_9 = [s.number for s in for_ten.values() if s.site == 9]  # 4 real subjects
    assert site_9 == [234, 235, 236, 237, 9001, 9002, 9003, 9004, 9005, 9006]


def test_name_mapping_agrees_with_sites(tmp_path: Path) -> None:
    root = write_cohort(tmp_path / "out", sites=13, subjects_per_site=10, shape=(32, 32, 20))
    names = {row["BraTS_2020_subject_ID"]: row for row in table(root / "name_mapping.csv")}
    sites = {row["BraTS_2020_subject_ID"]: row for row in table(tmp_path / "out" / "sites.csv")}
    assert set(names) == set(sites) == {p.name for p in root.iterdir() if p.is_dir()}
    assert any(int(i.rsplit("_", 1)[1]) > 369 for i in names)  # sites 17, 4: 9 real subjects
    for subject_id, row in names.items():
        truth = sites[subject_id]
        assert row["Grade"] == truth["Grade"]
        number = subject_id.rsplit("_", 1)[1]
        if truth["token"] == "IVYGAP":
            assert {v for k, v in row.items() if k not in ("Grade", "BraTS_2020_subject_ID")} == {
                "NA"
            }
        else:
            assert row["BraTS_2019_subject_ID"] == f"BraTS19_{truth['token']}_S{number}_1"
            assert row["TCGA_TCIA_subject_ID"].startswith("TCGA-") == truth["token"].startswith(
                "TCIA"
            )
    assert names["BraTS20_Training_282"]["TCGA_TCIA_subject_ID"] == "TCGA-DU-S282"
    survival = table(root / "survival_info.csv")
    assert {row["Brats20ID"] for row in survival} == {
        i for i, row in sites.items() if row["Grade"] == "HGG"
    }


def test_heterogeneity_is_the_dial_of_the_shift_between_sites() -> None:
    def spread(heterogeneity: float) -> tuple[float, float]:
        """Across sites: of log brightness, and of the tumour's level after z-scoring, on T1ce."""
        brightness, contrast = [], []
        for site in (1, 5, 6, 16):
            model = site_model(site, seed=0, heterogeneity=heterogeneity)
            levels, lesions = [], []
            for k in range(6):  # the same six patients everywhere: what differs is the site
                phantom = synthesise(0, f"BraTS20_Training_{k:03d}", model, "HGG", SHAPE)
                image = phantom.images["t1ce"].astype(float)
                brain = image[image > 0]
                levels.append(np.log(np.median(brain)))
                enhancing = image[phantom.labels == 4]
                lesions.append((enhancing.mean() - brain.mean()) / brain.std())
            brightness.append(np.mean(levels))
            contrast.append(np.mean(lesions))
        return float(np.std(brightness)), float(np.std(contrast))

    alike, apart = spread(0), spread(1)
    assert alike == (0, 0)
    assert apart[0] > 0.2
    assert apart[1] > 0.2  # normalising each volume does not take the shift away
    assert site_model(5, seed=0, heterogeneity=1) == site_model(5, seed=0, heterogeneity=1)
    assert site_model(5, seed=0, heterogeneity=1) != site_model(5, seed=1, heterogeneity=1)
