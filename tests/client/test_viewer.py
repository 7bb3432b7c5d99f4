"""`fed-client view` without a browser: what the page may ask for, and what becomes of uploads."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.cookiejar import CookieJar
from pathlib import Path

import nibabel
import numpy as np
import pytest
from fastapi.testclient import TestClient

from client import viewer, viewing
from client.prediction import Model, load_model
from client.viewer import viewer_app
from client.viewing import Viewing
from common.brats import CODINGS, MODALITIES, STRUCTURES
from common.model import initial_weights
from common.weights import save_weights
from sites.subject import Subject, discover

FOR_EVER = """
import client.viewing, torch
def segmentation_of(*_):
    while True:
        torch.nn.functional.conv3d(torch.ones(1, 8, 12, 12, 12), torch.ones(8, 8, 3, 3, 3))
client.viewing.segmentation_of = segmentation_of
from client.cli import main
main()
"""
WEB = Path(viewer.__file__).parent / "web"


@pytest.fixture(scope="module")
def model_file(tiny_config, tmp_path_factory) -> Path:
    """An untrained model: it marks much of a brain, as nothing in particular."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(path, initial_weights(tiny_config()), {"config": tiny_config().agreed()})
    return path


@pytest.fixture(scope="module")
def model(model_file) -> Model:
    return load_model(model_file)


@pytest.fixture(scope="module")
def folder(cohort_data) -> Path:
    return sorted(path for path in cohort_data.iterdir() if path.is_dir())[0]


@pytest.fixture
def subject(folder) -> Subject:
    return discover(folder).subjects[0]


@pytest.fixture
def private(tmp_path) -> Path:
    """The folder that a viewing keeps uploads in."""
    path = tmp_path / "private"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def waiting(model, private):
    """A viewing with a model and without a subject, and a client of its page."""
    viewing = Viewing(private, model, "model.safetensors")
    with TestClient(viewer_app(viewing)) as client:
        yield viewing, client


def until_done(client: TestClient) -> dict:
    end = time.monotonic() + 60
    while (state := client.get("/api/state").json())["job"]["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.02)
    return state


def read(content: bytes) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(content)


def scans_of(folder: Path) -> dict[str, bytes]:
    return {m: (folder / f"{folder.name}_{m}.nii.gz").read_bytes() for m in MODALITIES}


def upload(client: TestClient, scans: dict[str, bytes]) -> list[int]:
    return [client.put(f"/api/upload/{m}", content=c).status_code for m, c in scans.items()]


def test_volumes_in_ml_are_those_of_the_files(subject, private):
    viewing = Viewing(private, None)
    viewing.show(subject)
    state = viewing.state()
    seg = nibabel.load(subject.segmentation)
    voxels = np.asarray(seg.dataobj)
    voxel = abs(np.linalg.det(seg.affine[:3, :3])) / 1000
    expected = {"NCR": (voxels == 1), "ED": (voxels == 2), "ET": (voxels == 4), "WT": voxels > 0}
    expected["TC"] = (voxels == 1) | (voxels == 4)
    assert state["volumes"]["truth"] == pytest.approx(
        {name: mask.sum() * voxel for name, mask in expected.items()}
    )
    assert "prediction" not in state["volumes"]
    assert state["dice"] is None
    # the page adds labels up to what is shown
    for name, labels in state["structures"].items():
        together = sum(state["volumes"]["truth"][label] for label in labels)
        assert together == pytest.approx(state["volumes"]["truth"][name])


def test_the_page_gets_the_voxels_where_they_are_and_nothing_else_of_the_headers(
    folder, tmp_path, private
):
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.glob("*.nii.gz"):
        image = nibabel.load(path)
        image.header["descrip"] = b"Doe^Jane 1970-01-01"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"MRN 4711001"))
        nibabel.save(image, copy / path.name)
    viewing = Viewing(private, None)
    viewing.show(discover(copy).subjects[0])
    with TestClient(viewer_app(viewing)) as client:
        for name in (*MODALITIES, "truth"):
            served = client.get(f"/api/volumes/{name}.nii").content
            assert b"Jane" not in served
            assert b"4711001" not in served
            file = "seg" if name == "truth" else name
            own = nibabel.as_closest_canonical(
                nibabel.load(folder / f"{folder.name}_{file}.nii.gz")
            )
            expected = np.asarray(own.dataobj)
            if name == "truth":
                expected = np.vectorize(CODINGS["brats"].get)(expected)
            image = read(served)
            np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
            np.testing.assert_allclose(image.affine, own.affine)
            assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        for name in ("seg", "prediction", "..%2f..%2fetc%2fpasswd"):
            assert client.get(f"/api/volumes/{name}.nii").status_code == 404
        assert client.get("/api/segmentation.nii.gz").status_code == 404


def test_whole_numbers_beyond_int16_stay_what_they_are():
    voxels = np.array([[[0, 40000]]], np.uint16)
    np.testing.assert_array_equal(
        np.asarray(read(viewing.as_nifti(voxels, np.eye(4))).dataobj), voxels
    )
    small = np.array([[[0, 400]]], np.int64)
    assert read(viewing.as_nifti(small, np.eye(4))).get_data_dtype() == np.int16


def test_the_model_segments_the_subject_shown_and_is_compared_with_the_truth(
    subject, model, private
):
    viewing = Viewing(private, model, "model.safetensors")
    viewing.show(subject)
    viewing.segment_shown()
    with TestClient(viewer_app(viewing)) as client:
        state = until_done(client)
        assert state["job"]["state"] == "done"
        answer = client.get("/api/segmentation.nii.gz")
        predicted = np.asarray(read(client.get("/api/volumes/prediction.nii").content).dataobj)
    assert f'"{subject.id}_segmentation.nii.gz"' in answer.headers["content-disposition"]
    written = read(gzip.decompress(answer.content))
    truth = nibabel.load(subject.segmentation)
    np.testing.assert_array_equal(written.affine, truth.affine)
    own, true = np.asarray(written.dataobj), np.asarray(truth.dataobj)
    turned = np.asarray(nibabel.as_closest_canonical(written).dataobj)
    np.testing.assert_array_equal(np.vectorize(CODINGS["brats"].get)(turned), predicted)
    assert own.any()
    file_labels = {1: 1, 2: 2, 3: 4}
    for name, members in STRUCTURES.items():
        a, b = (np.isin(x, [file_labels[m] for m in members]) for x in (own, true))
        assert state["dice"][name] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert state["volumes"]["prediction"][name] == pytest.approx(
            a.sum() * abs(np.linalg.det(truth.affine[:3, :3])) / 1000
        )
    assert list(private.iterdir()) == []


def test_a_subject_without_a_modality_of_the_model_is_shown_but_not_segmented(
    subject, model, private
):
    some = {m: path for m, path in subject.images.items() if m != "t2"}
    viewing = Viewing(private, model, "model.safetensors")
    viewing.show(replace(subject, images=some))
    viewing.segment_shown()
    with TestClient(viewer_app(viewing)) as client:
        state = until_done(client)
    assert state["modalities"] == ["t1", "t1ce", "flair"]
    assert state["job"]["state"] == "failed"
    assert "modality t2 is missing" in state["job"]["problems"][0]["what"]


def test_labels_that_cannot_be_used_are_left_out_with_a_note(folder, tmp_path, private):
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / f"{folder.name}_seg.nii.gz").write_bytes(b"not a scan")
    viewing = Viewing(private, None)
    viewing.show(discover(copy).subjects[0])
    state = viewing.state()
    assert state["volumes"] == {}
    notes = [f for f in state["findings"] if f["file"] == f"{folder.name}_seg.nii.gz"]
    assert [note["severity"] for note in notes] == ["warning"]


def test_uploaded_scans_are_segmented_and_then_deleted(waiting, folder, private):
    viewing, client = waiting
    assert client.get("/api/state").json()["subject"] is None
    about = client.put("/api/upload/t1", content=scans_of(folder)["t1"]).json()
    assert about["shape"] == [32, 32, 20]
    assert upload(client, scans_of(folder)) == [200] * 4
    assert len(list(private.iterdir())) == 4  # the second t1 replaced the first
    assert client.post("/api/segment").status_code == 202
    state = until_done(client)
    assert state["job"] == state["job"] | {"state": "done", "problems": []}
    assert state["subject"] == "uploaded scans"
    assert state["volumes"]["prediction"]["WT"] > 0
    assert list(private.iterdir()) == []
    name, content = viewing.segmentation_file()
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
    flair = nibabel.load(folder / f"{folder.name}_flair.nii.gz")
    np.testing.assert_array_equal(read(gzip.decompress(content)).affine, flair.affine)


def uncompressed(scan: bytes) -> bytes:
    return gzip.decompress(scan)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda scan: b"", "empty"),
        (lambda scan: b"a photograph", "not NIfTI"),
        (lambda scan: scan[: len(scan) // 2], "too early|too short|ends after"),
        (lambda scan: uncompressed(scan)[:2000], "too short|ends after"),
    ],
)
def test_what_is_no_scan_is_refused_in_words_and_not_kept(spoil, says, waiting, folder, private):
    _, client = waiting
    answer = client.put("/api/upload/t2", content=spoil(scans_of(folder)["t2"]))
    assert answer.status_code == 422
    (problem,) = answer.json()["problems"]
    assert problem["file"] == "t2"
    assert re.search(says, problem["what"])
    assert problem["remedy"]
    assert list(private.iterdir()) == []
    assert client.get("/api/state").json()["uploads"] == []


def test_scans_that_do_not_fit_together_are_refused_in_words(waiting, folder, private):
    _, client = waiting
    scans = scans_of(folder)
    image = read(uncompressed(scans["t2"]))
    scans["t2"] = image.slicer[:, :, :-2].to_bytes()  # and not compressed: that is seen, not asked
    assert upload(client, scans) == [200] * 4
    assert client.post("/api/segment").status_code == 202
    state = until_done(client)
    assert state["job"]["state"] == "failed"
    assert "t2" in state["job"]["problems"][0]["file"]
    assert "32x32x18" in state["job"]["problems"][0]["what"]
    assert state["subject"] is None
    assert list(private.iterdir()) == []


def test_a_missing_modality_is_named_and_a_foreign_one_refused(waiting, folder):
    _, client = waiting
    scans = scans_of(folder)
    del scans["t1ce"]
    upload(client, scans)
    answer = client.post("/api/segment")
    assert answer.status_code == 422
    assert [p["what"] for p in answer.json()["problems"]] == ["modality t1ce is missing"]
    for name in ("seg", "pd", "..%2fx"):
        assert client.put(f"/api/upload/{name}", content=b"x").status_code in (404, 405)


def test_a_file_that_is_too_large_is_refused_before_it_fills_the_disk(
    waiting, private, monkeypatch
):
    monkeypatch.setattr(viewer, "MOST_BYTES", 1000)
    _, client = waiting
    assert client.put("/api/upload/t1", content=b"x" * 1001).status_code == 413
    undeclared = client.put("/api/upload/t1", content=iter([b"x" * 600] * 2))  # chunked
    assert undeclared.status_code == 413
    assert list(private.iterdir()) == []


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused_by_its_header(waiting, private):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape((511, 511, 511))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_sform(np.eye(4), 1)
    with gzip.open(private / "bomb", "wb", 9) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(8):  # of 1067 MB: the header suffices to refuse it
            file.write(bytes(2**20))
    bomb = (private / "bomb").read_bytes() + b"\0" * 1_100_000  # the length of the whole one
    (private / "bomb").unlink()
    _, client = waiting
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = client.put("/api/upload/t1", content=bomb)
    assert (answer.status_code, time.monotonic() - begin < 2) == (422, True)
    assert "voxels are 1067 MB, more than the 400 MB" in answer.json()["problems"][0]["what"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert list(private.iterdir()) == []


def test_uploads_are_unpacked_one_at_a_time(waiting, folder, monkeypatch):
    at_once, most = [], []
    real = viewing.read_volume

    def slowly(*arguments, **named):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.1)
        at_once.pop()
        return real(*arguments, **named)

    monkeypatch.setattr(viewing, "read_volume", slowly)
    _, client = waiting
    scans = scans_of(folder).items()
    with ThreadPoolExecutor(4) as pool:
        put = [pool.submit(client.put, f"/api/upload/{m}", content=scan) for m, scan in scans]
        assert [one.result().status_code for one in put] == [200] * 4
    assert most == [1] * 4


def test_an_upload_that_breaks_off_leaves_nothing(waiting, private):
    viewing, _ = waiting
    sent = iter(
        [
            {"type": "http.request", "body": b"\x1f\x8b half a scan", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive():
        return next(sent)

    async def send(message):
        assert message.get("status", 400) == 400

    path = "/api/upload/t1"
    scope = {"type": "http", "method": "PUT", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": [], "root_path": "", "http_version": "1.1"}
    scope |= {"scheme": "http", "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2)}
    asyncio.run(viewer_app(viewing)(scope, receive, send))
    assert list(private.iterdir()) == []
    assert viewing.state()["uploads"] == []


def test_one_segmentation_at_a_time(waiting, folder, monkeypatch):
    import threading

    _, client = waiting
    go_on = threading.Event()
    real = viewing.segmentation_of

    def slowly(*arguments):
        go_on.wait(30)
        return real(*arguments)

    monkeypatch.setattr(viewing, "segmentation_of", slowly)
    upload(client, scans_of(folder))
    assert client.post("/api/segment").status_code == 202
    try:
        assert client.get("/api/state").json()["job"]["state"] == "running"
        assert client.post("/api/segment").status_code == 409
        refused = client.put("/api/upload/t1", content=b"x")
        assert refused.status_code == 409
        assert "running" in refused.json()["problems"][0]["what"]
        assert client.delete("/api/upload").status_code == 409, "it would delete what is read"
        assert len(client.get("/api/state").json()["uploads"]) == 4
    finally:
        go_on.set()
    assert until_done(client)["job"]["state"] == "done"


def test_a_defect_while_segmenting_is_told_to_the_page(waiting, folder, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("voxel 17")

    monkeypatch.setattr(viewing, "segmentation_of", broken)
    _, client = waiting
    upload(client, scans_of(folder))
    client.post("/api/segment")
    state = until_done(client)
    assert state["job"]["state"] == "failed"
    assert "ZeroDivisionError at" in state["job"]["problems"][0]["what"]
    assert "voxel 17" not in str(state)


def test_names_of_files_tell_their_modality(waiting):
    _, client = waiting
    names = ["a_t1ce.nii.gz", "BraTS-GLI-00001-000-t2f.nii", "holiday.png", "a_seg.nii.gz"]
    answer = client.post("/api/roles", json=names)
    assert answer.json() == ["t1ce", "flair", None, None]


def test_the_page_names_no_other_place_and_no_script_of_its_own():
    page = (WEB / "viewer.html").read_text()
    assert not re.search(r"https?:|//[a-z]", page)
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert not re.search(r" (style|on\w+)=", page)
    assert "not a medical device" in page
    assert not re.search(r"https?:|innerHTML", (WEB / "viewer.js").read_text())


def test_vendored_code_is_what_its_list_says():
    table = (WEB / "VENDORED.md").read_text()
    listed = dict(re.findall(r"^\| `(\S+)` .* `([0-9a-f]{64})` \|$", table, re.MULTILINE))
    programs = {str(p.relative_to(WEB)) for p in (WEB / "vendor").iterdir() if p.suffix == ".js"}
    assert listed.keys() == programs
    for name, digest in listed.items():
        assert hashlib.sha256((WEB / name).read_bytes()).hexdigest() == digest
        assert f'src="web/{name}"' in (WEB / "viewer.html").read_text()


def fetch(opener: urllib.request.OpenerDirector, address: str) -> int:
    try:
        return opener.open(address).status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_the_program_asks_for_its_token_and_ends_amid_work_leaving_nothing(
    model_file, folder, tmp_path
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    running = subprocess.Popen(
        [sys.executable, "-c", FOR_EVER, "view", "--model", str(model_file), "--no-open"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    try:
        address = running.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\S{16}/\?token=\S{32}", address)
        assert "not a medical device" in running.stdout.readline()
        bare = address.split("?")[0]
        assert fetch(urllib.request.build_opener(), f"{bare}api/state") == 401
        assert fetch(urllib.request.build_opener(), f"{bare}web/viewer.js") == 401
        mine = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        assert fetch(mine, address) == 200
        for name, scan in scans_of(folder).items():
            put = urllib.request.Request(f"{bare}api/upload/{name}", scan, method="PUT")
            assert mine.open(put).status == 200
        (private,) = temporary.glob("fedbrats-view-*")
        assert private.stat().st_mode & 0o777 == 0o700
        assert len(list(private.iterdir())) == 4
        segment = urllib.request.Request(f"{bare}api/segment", b"", method="POST")
        assert mine.open(segment).status == 202
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)
    finally:
        running.kill()
    assert (running.returncode, stderr) == (0, "")
    assert "deleted" in stdout
    assert list(temporary.glob("fedbrats-view-*")) == []


def test_wrong_usage_and_unusable_subjects_are_said_in_words(
    folder, tmp_path, cohort_data, capsys, undisturbed_log
):
    from typer.testing import CliRunner

    from client.cli import app

    def run(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["view", "--no-open", *map(str, arguments)])
        return done.exit_code, done.output

    assert run()[0] == 2
    assert run(tmp_path / "gone")[0] == 2
    assert run(folder, "--model", tmp_path / "gone")[0] == 2
    code, text = run(cohort_data)
    assert (code, "holds 18 subjects" in text) == (2, True)
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty")[0] == 1
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / f"{folder.name}_t1.nii.gz").write_bytes(b"not a scan")
    code, text = run(copy)
    assert code == 1
    assert f"{folder.name}_t1.nii.gz: " in text
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(io.BytesIO(b"pickle").read())
    code, text = run(folder, "--model", broken)
    assert (code, "model.safetensors" in text) == (1, True)


def test_an_upload_that_a_full_disk_does_not_even_begin_is_refused_in_words(waiting, monkeypatch):
    _, client = waiting

    def full(**_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(viewing.tempfile, "NamedTemporaryFile", full)
    answer = client.put("/api/upload/t1", content=b"x")
    assert answer.status_code == 507
    assert "No space left on device" in answer.json()["problems"][0]["what"]
