"""The viewer's page in a real browser: what is seen changes with what is chosen, and stays here."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib.image
import nibabel
import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

import client.viewing
from client.prediction import load_model
from client.viewer import viewer_app
from client.viewing import Viewing
from common.brats import MODALITIES
from common.local_page import Place, serving
from common.model import initial_weights
from common.weights import save_weights
from sites.subject import discover
from tests.browser import chromium, complaints, eventually

ED, ET, NCR = (0, 158, 115), (240, 228, 66), (0, 114, 178)


@pytest.fixture(scope="module")
def folders(cohort_data) -> list[Path]:
    return sorted(path for path in cohort_data.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(path, initial_weights(tiny_config()), {"config": tiny_config().agreed()})
    return load_model(path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    # small: every picture is computed on the CPU
    with chromium(tmp_path_factory.mktemp("profile"), width=900, height=700) as started:
        yield started


class Page:
    """The page of one viewing, as a user handles it."""

    def __init__(self, browser, viewing: Viewing) -> None:
        self.browser, self.viewing = browser, viewing

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Of what is visible, empty where nothing is."""
        return " ".join(e.text for e in self.browser.find_elements(By.CSS_SELECTOR, selector))

    def click(self, selector: str) -> None:
        self.browser.execute_script("arguments[0].click()", self.find(selector))

    def picture(self) -> np.ndarray:
        """What the canvas shows, (height, width, 3) from 0 to 1."""
        png = self.find("#canvas").screenshot_as_png
        return matplotlib.image.imread(io.BytesIO(png))[..., :3]

    def tint(self, colour: tuple[int, int, int]) -> int:
        """How many pixels are grey mixed with `colour`: what is filled is half transparent."""
        picture = self.picture()
        chroma = picture - picture.mean(axis=-1, keepdims=True)
        strength = np.linalg.norm(chroma, axis=-1)
        pure = np.array(colour) / 255
        pure = (pure - pure.mean()) / np.linalg.norm(pure - pure.mean())
        return int(((chroma @ pure > 0.97 * strength) & (strength > 0.1)).sum())

    def shown(self, layer: str) -> float:
        return float(self.text(f"#shown [data-layer={layer}]").removesuffix(" ml"))

    def ready(self, layer: str) -> None:
        eventually(
            lambda: self.browser.find_elements(By.CSS_SELECTOR, f"#shown [data-layer={layer}]"),
            f"the volumes of the {layer}",
        )
        eventually(lambda: self.find("#toolbar").is_displayed(), "the picture")


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[object]:
    """A function that opens a viewing's page."""
    with ExitStack() as stack:

        def opening(viewing: Viewing) -> Page:
            browser.get(stack.enter_context(serving(viewer_app(viewing), Place())))
            return Page(browser, viewing)

        yield opening
        assert complaints(browser) == []
        names = browser.execute_script(
            "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        )
        assert names
        own = urlsplit(browser.current_url)
        assert {(u.scheme, u.netloc) for u in map(urlsplit, names)} == {(own.scheme, own.netloc)}


def test_what_is_seen_and_its_volume_change_with_the_region(opened, folders, tmp_path):
    viewing = Viewing(tmp_path, None)
    viewing.show(discover(folders[0]).subjects[0])
    page = opened(viewing)
    page.ready("truth")
    volumes = viewing.state()["volumes"]["truth"]
    assert page.shown("truth") == pytest.approx(volumes["WT"], rel=0.01, abs=0.006)
    assert page.text("#warning") == "For research; not a medical device."
    whole = {colour: page.tint(colour) for colour in (ED, ET, NCR)}
    assert min(whole[ED], whole[ET]) > 100

    page.click("[data-region=ET]")
    assert page.shown("truth") == pytest.approx(volumes["ET"], rel=0.01, abs=0.006)
    assert eventually(lambda: page.tint(ED) < whole[ED] / 10, "the oedema to vanish")
    assert page.tint(ET) > whole[ET] / 2

    page.click("[data-region=TC]")
    assert page.shown("truth") == pytest.approx(volumes["TC"], rel=0.01, abs=0.006)
    page.click("[data-label=ED]")
    assert page.shown("truth") == pytest.approx(volumes["WT"], rel=0.01, abs=0.006)
    page.click("[data-label=NCR]")
    assert page.shown("truth") == pytest.approx(volumes["ED"] + volumes["ET"], rel=0.01, abs=0.006)
    assert page.find("[data-region=WT]").get_attribute("aria-pressed") == "false"

    page.find("#canvas").send_keys("t")
    assert page.shown("truth") == pytest.approx(volumes["TC"], rel=0.01, abs=0.006)
    page.find("#canvas").send_keys("w")
    page.click("[data-show=truth]")
    eventually(lambda: page.tint(ED) + page.tint(ET) < 20, "the truth to vanish")
    page.find("#canvas").send_keys("g")
    eventually(lambda: page.tint(ED) > whole[ED] / 2, "the truth to be back")


def test_uploading_four_files_in_the_page_shows_and_gives_their_segmentation(
    opened, folders, model, tmp_path, monkeypatch
):
    real = client.viewing.segmentation_of

    def doubted(*arguments):
        segmentation, findings = real(*arguments)
        return replace(segmentation, warnings=("Is this <i>a head</i>?",)), findings

    monkeypatch.setattr(client.viewing, "segmentation_of", doubted)
    viewing = Viewing(tmp_path, model, "model.safetensors")
    page = opened(viewing)
    eventually(lambda: page.find("#upload").is_displayed(), "the upload form")
    folder = folders[1]
    bad = tmp_path.parent / "bad.nii.gz"
    bad.write_bytes(b"not a scan")
    for modality in MODALITIES:
        path = folder / f"{folder.name}_{modality}.nii.gz"
        page.find(f"[data-file={modality}]").send_keys(str(bad if modality == "t2" else path))
    page.click("#upload button.main")
    said = eventually(lambda: page.text("#status .problem"), "the refusal")
    assert said.startswith("t2: the file is not NIfTI. ")
    assert all("a status of 422" in entry for entry in complaints(page.browser))

    page.find("[data-file=t2]").send_keys(str(folder / f"{folder.name}_t2.nii.gz"))
    page.click("#upload button.main")
    page.ready("prediction")
    volumes = viewing.state()["volumes"]["prediction"]
    assert page.shown("prediction") == pytest.approx(volumes["WT"], rel=0.01, abs=0.006)
    assert page.text("#status") == ""
    assert page.text("#doubts") == "Is this <i>a head</i>?"
    most = max((ED, ET, NCR), key=page.tint)
    filled = page.tint(most)
    assert filled > 100
    page.click("[data-show=prediction]")
    eventually(lambda: page.tint(most) < filled / 10, "the prediction to vanish")
    before = page.picture()
    page.click("#modalities button:first-child")
    eventually(lambda: np.abs(page.picture() - before).mean() > 0.005, "another modality")

    sent = page.browser.execute_async_script(
        "const [done] = arguments;"
        "fetch(document.getElementById('download').href).then((answer) => answer.arrayBuffer())"
        ".then((buffer) => done(Array.from(new Uint8Array(buffer))))"
    )
    written = nibabel.Nifti1Image.from_bytes(gzip.decompress(bytes(sent)))
    flair = nibabel.load(folder / f"{folder.name}_flair.nii.gz")
    assert written.shape == flair.shape
    np.testing.assert_array_equal(written.affine, flair.affine)
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}


def test_files_dropped_together_sort_themselves(opened, folders, model, tmp_path):
    page = opened(Viewing(tmp_path, model, "model.safetensors"))
    eventually(lambda: page.find("#upload").is_displayed(), "the upload form")
    page.browser.execute_script(
        "const transfer = new DataTransfer();"
        "for (const name of ['a_t2.nii', 'a-t1c.nii.gz', 'a_flair.nii.gz', 'a_t1.nii', 'b.nii'])"
        "  transfer.items.add(new File(['x'], name));"
        "document.getElementById('drop').dispatchEvent("
        "  new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }))"
    )
    eventually(lambda: "b.nii" in page.text("#status"), "the word about the file of no modality")
    chosen = {
        name: page.browser.execute_script("return arguments[0].files[0]?.name", field)
        for name in MODALITIES
        for field in [page.find(f"[data-file={name}]")]
    }
    assert chosen == {
        "t1": "a_t1.nii",
        "t1ce": "a-t1c.nii.gz",
        "t2": "a_t2.nii",
        "flair": "a_flair.nii.gz",
    }
