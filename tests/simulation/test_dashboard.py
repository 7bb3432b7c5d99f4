"""The dashboard in a real browser, beside a real run that is going on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from common.local_page import Place
from server.dashboard import serving_dashboard
from server.history import History
from tests.browser import chromium, complaints, eventually
from tests.server.test_dashboard_state import HOSTILE, a_round, metrics

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def typed(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    program, *rest = map(str, arguments)
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / program), *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def words(browser: webdriver.Chrome, selector: str) -> str:
    return "\n".join(found.text for found in browser.find_elements(By.CSS_SELECTOR, selector))


def drawn(browser: webdriver.Chrome) -> int:
    """Pixels of the first chart that are not empty."""
    return browser.execute_script(
        """
        const canvas = document.querySelector('#chart-list canvas');
        if (!canvas) return 0;
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 0;
        return count;
        """
    )


def test_rounds_of_a_run_that_goes_on_appear_without_reload(
    cohort_data, cohort_cache, tiny_arguments, tmp_path
):
    out = tmp_path / "run"
    run = ("fed-sim", "run", cohort_data, "--out", out, "--cache", cohort_cache, *tiny_arguments)
    with typed(*run) as going, chromium(tmp_path / "profile") as browser:
        eventually((out / "run.lock").exists, "the run's folder")
        with serving_dashboard(out, Place()) as address:
            browser.get(address)
            browser.execute_script("window.loadedOnce = true")
            titles = []

            def complete() -> bool:
                if browser.title not in titles:
                    titles.append(browser.title)
                return "round 3 of 3 (complete) – brats" in browser.title

            eventually(complete, "the end of the run")
            assert len(titles) > 1, "it was seen to go on"
            assert browser.execute_script("return window.loadedOnce")
            assert going.wait(60) == 0
            eventually(lambda: drawn(browser) > 500, "curves")
            with History(out / "history.sqlite") as history:
                final = history.final()
                dice = history.rounds()[-1].metrics["site-01"].means["dice/WT"]
            assert final is not None
            row = next(
                found.text
                for found in browser.find_elements(By.CSS_SELECTOR, "#site-table tbody tr")
                if found.text.startswith("site-01")
            )
            assert f"{dice:.3f}" in row
            assert f"Final model (of round {final[0]})" in words(browser, "#final-title")
            assert complaints(browser) == []


def test_a_hostile_name_is_text_and_the_page_works_by_keyboard_and_heals(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    with History(run / "history.sqlite") as history:
        for number, dice in ((1, 0.5), (2, 0.7)):
            of = {"a": metrics(dice, dice, dice), HOSTILE: metrics(0.9, 0.6, 0.3)}
            history.record_round(a_round(number, of, *([HOSTILE] if number == 2 else [])))
    token = "secret-token"
    monkeypatch.setattr("common.local_page.secrets.token_urlsafe", lambda size: "x" * size)
    with contextlib.ExitStack() as stack:
        browser = stack.enter_context(chromium(tmp_path / "profile", width=400, height=800))
        served = stack.enter_context(contextlib.ExitStack())
        address = served.enter_context(serving_dashboard(run, Place(token=token)))
        browser.get(address.split("?")[0])
        assert "ends in ?token=" in words(browser, "body")
        complaints(browser)  # the refusal
        browser.get(address)
        eventually(lambda: drawn(browser) > 500, "curves")
        assert token not in browser.current_url
        assert browser.execute_script("return document.querySelectorAll('main script').length") == 0
        for selector in ("button.site", "#site-table", "#alert-list", "#event-table"):
            assert HOSTILE in words(browser, selector), selector
        assert f"{HOSTILE} did not contribute to round 2" in words(browser, "#alert-list")
        wide = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide == 0, "on a small screen only tables scroll sideways"

        chart = browser.find_element(By.CSS_SELECTOR, ".plot")
        assert "Last: mean over sites 0.650" in chart.get_attribute("aria-label")
        chart.send_keys(Keys.ARROW_LEFT)
        eventually(lambda: "round 1:" in words(browser, "figure output"), "the round before")
        button = browser.find_elements(By.CSS_SELECTOR, "button.site")[1]
        before = drawn(browser)
        button.send_keys(Keys.ENTER)
        assert button.get_attribute("aria-pressed") == "false"
        eventually(lambda: drawn(browser) < before, "a curve less")
        browser.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
        eventually(lambda: "0.700" in words(browser, "figure td"), "the table")
        assert complaints(browser) == []

        served.close()
        eventually(lambda: "not live since" in words(browser, "#connection"), "the loss")
        with History(run / "history.sqlite") as history:
            history.record_round(a_round(3, {"a": metrics(0.8, 0.8, 0.8)}))
        place = Place(
            port=urlsplit(address).port or 0, token=token
        )  # the same, as if a tunnel were back
        with serving_dashboard(run, place):
            eventually(lambda: "round 3" in browser.title, "the new round")
            assert words(browser, "#connection") == "live"


def test_final_numbers_that_are_not_exact_are_marked_and_charts_leave_no_hole(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with History(run / "history.sqlite") as history:
        of = {"a": metrics(0.8, 0.8, 0.8), "b": metrics(0.7, 0.7, 0.7)}
        for number in (1, 2):
            history.record_round(a_round(number, of))
        history.record_final(2, of, {"c": "withheld"}, {"b": "noised", "c": "withheld"})
    with (
        serving_dashboard(run, Place()) as address,
        chromium(tmp_path / "profile", width=1280) as browser,
    ):
        browser.get(address)
        eventually(lambda: drawn(browser) > 500, "curves")
        ends = [
            row.find_element(By.CSS_SELECTOR, "td:last-child").text
            for row in browser.find_elements(By.CSS_SELECTOR, "#final-table tbody tr")
        ]
        assert ends == ["4", "4 noised", "withheld", "8"]
        figures = browser.find_elements(By.CSS_SELECTOR, "#chart-list figure:not([hidden])")
        assert len(figures) == 3, "nobody states an epsilon"
        first, second, third = (figure.rect for figure in figures)
        assert second["x"] > first["x"] + first["width"]
        whole = second["x"] + second["width"] - first["x"]
        assert third["width"] == pytest.approx(whole, abs=1)
        plot = figures[2].find_element(By.CSS_SELECTOR, "canvas").rect
        eventually(
            lambda: figures[2].find_element(By.CSS_SELECTOR, "canvas").rect["width"] > whole * 0.9,
            f"a plot as wide as its place, {plot}",
        )
        assert complaints(browser) == []


def test_the_last_contact_is_told_in_the_time_zone_of_the_browser(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    with History(run / "history.sqlite") as history:
        of = {name: metrics(0.5, 0.5, 0.5) for name in ("a", "b")}
        history.record_round(a_round(1, of))
    told = {
        "a": {"state": "training", "last_contact": "2026-11-24T23:10:00.123456+00:00"},
        "b": {"state": "training", "last_contact": None},
    }
    monkeypatch.setattr("server.dashboard.site_states", lambda *_: told)
    with chromium(tmp_path / "profile") as browser, serving_dashboard(run, Place()) as address:
        zone = {"timezoneId": "Asia/Kolkata"}  # five and a half hours ahead
        browser.execute_cdp_cmd("Emulation.setTimezoneOverride", zone)
        browser.get(address)
        cell = "#site-table tbody td:last-child"
        eventually(lambda: "training" in words(browser, "#site-table tbody"), "the states")
        a, b = words(browser, cell).splitlines()
        assert "25" in a
        assert "4:40:00" in a
        assert b == "–"
