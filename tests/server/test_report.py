"""`fed-server report`: what the history says is on the page, and nothing on it can do or fetch anything."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from typer.testing import CliRunner

from common.config_file import load_config
from common.figures import Drawn, new_figure
from common.keys import new_private_key
from common.messages import SiteCard
from common.statement import Signed, Statement, sign
from server.attendance import note_terms
from server.checkpoint import RunFolder
from server.cli import app
from server.coordinator import CoordinatorFolder, federation_id, init_folder, terms
from server.enrolment import admit
from server.history import TRAINING, Contribution, GivenStatement, History, RoundRecord
from server.privacy_report import EXPLAINED
from server.recorded import published, read_recorded
from server.report import (
    Plot,
    Report,
    ReportError,
    Section,
    figures_path,
    page_path,
    write_report,
)
from server.shown_names import NOT_PUBLISHED
from tests.server.test_tables import metrics

HOSTILE = ("<script>alert(1)</script>", "$x^2$", "[red]", 'a" onload="x')
NAMES = ("Oslo", "Bergen", *HOSTILE)
DICE = {1: 0.4, 2: 0.61, 3: 0.55}


class Page(HTMLParser):
    """All tags, attributes and texts of a page, and the texts of table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._within = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        self.text += data
        if self._within in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, *begins: str) -> list[str]:
        """The first row that begins so."""
        return next(row for row in self.rows if tuple(row[: len(begins)]) == begins)


def assert_self_contained(page: Page) -> None:
    """Nothing can run, and no address leads out of the page."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("href", "src", "xlink:href", "srcset", "poster", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value[:80])
    assert all(found == "#" for found in re.findall(r"url\(\s*['\"]?(.)", page.source))
    assert "@import" not in page.source
    assert "://" not in page.source
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def made(path: Path, *, final: bool = True, hidden: tuple[str, ...] = ()) -> CoordinatorFolder:
    """A coordinator's folder with three rounds; Bergen is absent in the second."""
    config = load_config(assign=["name=study", "rounds.number=3", "server.address=fed.org"])
    folder = init_folder(path / "study", config)
    run = RunFolder(folder.run)
    run.path.mkdir()
    with History(run.history) as history:
        note_terms(history, terms(folder))
        history.record_sites(
            [SiteCard(name, True, 5, 2, 1, "f", shows_name=name not in hidden) for name in NAMES]
        )
        for number, dice in DICE.items():
            measured = {
                name: metrics(2, dice_wt=dice, dice_tc=dice, dice_et=dice, iou_wt=dice / 2)
                for name in NAMES
            }
            contributions = tuple(
                Contribution(name, False, f"{name}: power cut <b>")
                if (name, number) == ("Bergen", 2)
                else Contribution(name, True, "", 0.5, 1.25, 2.0, 2_000_000)
                for name in NAMES
            )
            record = RoundRecord(
                number, 1e-3, 5.0, 0.4, "c", f"{number:064x}", contributions, measured
            )
            history.record_round(record)
        if final:
            found = {name: metrics(2, dice_wt=0.7, hd95_et=12.34) for name in NAMES}
            history.record_final(2, found, {})
    return folder


def report(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page_of(folder: CoordinatorFolder, *arguments: object) -> Page:
    done = report(folder.path, *arguments)
    assert done.exit_code == 0, done.output
    path = Path(re.search(r"^Page: (.+)$", done.stdout, re.M)[1])
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """The page without its figures, which take most of the time."""

    def no_figure(figure, folder, name, alt, **how):
        return Drawn(folder / f"{name}.png", None, Markup(""))

    monkeypatch.setattr("server.report.draw", no_figure)
    monkeypatch.setattr("server.report.draw_pixels", no_figure)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[CoordinatorFolder, Page]:
    folder = made(tmp_path_factory.mktemp("finished"))
    before = hashlib.sha256(RunFolder(folder.run).history.read_bytes()).hexdigest()
    page = page_of(folder)
    assert hashlib.sha256(RunFolder(folder.run).history.read_bytes()).hexdigest() == before
    assert not list(folder.run.glob("*-journal"))
    return folder, page


def test_the_page_leads_nowhere_and_runs_nothing(finished):
    _, page = finished
    assert_self_contained(page)
    assert "svg" in page.tags


def test_hostile_names_are_text_in_tables_and_in_figures(finished):
    folder, page = finished
    for name in HOSTILE:
        assert any(name in row for row in page.rows)
        assert page.text.count(name) > 5, "also in figures, where a label is text"
    for path in (folder.path / "report" / "report-figures").glob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")


def test_numbers_are_those_of_the_history(finished):
    _, page = finished
    assert page.row("Oslo", "every round") == ["Oslo", "every round", "3", "3.8", "6.0"]
    assert page.row("Bergen", "1, 3") == ["Bergen", "1, 3", "2", "2.5", "4.0"]
    assert page.row("Bergen", "2")[2] == "Bergen: power cut <b>"
    oslo = page.row("Oslo", "0.700")
    assert (oslo[9], oslo[10]) == ("12.3", "2")
    for number, dice in DICE.items():
        row = page.row(str(number))
        assert row[1:3] == [f"{dice:.3f}"] * 2
        assert row[6] == str(len(NAMES) - (number == 2))
        assert row[8] == f"{2.0 * (len(NAMES) - (number == 2)):.1f}"
    assert page.row("Oslo", "trains")[2:5] == ["5", "2", "1"]
    assert page.row("all")[2:5] == [str(n * len(NAMES)) for n in (5, 2, 1)]
    assert "Training is complete: 3 rounds. Not everybody took part" in page.text
    assert "sha256" in page.row("checkpoint of round 2, sha256")[0]
    assert page.row("checkpoint of round 2, sha256")[1] == f"{2:064x}"


def test_what_a_coordinator_cannot_know_is_said(finished):
    _, page = finished
    assert "no result of a single subject" in page.text
    assert "fed-client evaluate" in page.text
    assert "No site stated a budget" in page.text
    assert "Secure aggregation was off" in page.text
    assert "For research; not a medical device." in page.text
    assert "not a single subject" not in page.text


def test_every_figure_is_a_png_and_an_svg(finished):
    folder, _ = finished
    names = sorted(path.name for path in (folder.path / "report" / "report-figures").iterdir())
    stems = {name.rsplit(".", 1)[0] for name in names}
    assert stems >= {
        "dice-and-iou",
        "dice-of-each-site",
        "loss",
        "participation",
        "times-and-bytes",
    }
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))


def test_a_federation_that_is_not_finished_is_reported_as_such(tmp_path, undrawn):
    page = page_of(made(tmp_path, final=False), "--out", tmp_path / "x.html")
    assert (tmp_path / "x.html").exists()
    assert "NOT complete: 3 of 3 rounds so far, and nothing runs now." in page.text
    assert "this is the model of round 3, the last so far" in page.text
    assert page.row("Oslo", "0.550")


def test_before_the_first_round_there_is_a_page_that_says_so(tmp_path):
    folder = made(tmp_path)
    with sqlite3.connect(RunFolder(folder.run).history) as database:
        for table in ("rounds", "contributions", "metrics", "final", "statements"):
            database.execute(f"DELETE FROM {table}")
    page = page_of(folder, "--out", tmp_path)
    assert "No round is complete yet." in page.text
    assert_self_contained(page)


def test_hidden_names_are_numbered_in_a_publishable_report_and_in_its_figures(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("common.figures._png", lambda figure, dpi: b"")  # the SVGs hold the texts
    folder = made(tmp_path, hidden=("Bergen", HOSTILE[0]))
    page = page_of(folder, "--publishable")
    assert_self_contained(page)
    assert page.row("another site (1)", "every round")
    assert page.row("another site (2)", "1, 3")
    assert page.row("another site (2)", "2")[2] == NOT_PUBLISHED
    files = list((folder.path / "report-publishable").rglob("*.*"))
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert b"Bergen" not in content, path
        assert b"alert(1)" not in content, path


def test_privacy_is_what_sites_state(tmp_path, undrawn):
    folder = made(tmp_path)
    key = new_private_key()
    admit(folder.enrolled, "Oslo", key.public_key())
    given = []
    for number in DICE:
        statement = Statement(
            federation_id(folder), "Oslo", number, "c0de", "2026-11-25", private=True,
            metrics="withheld", epsilon=0.5 * number, delta=0.01, budget=8.0, noise_multiplier=2.5,
            sampling_rate=0.75, clip=1.5, steps=4, patients=12, accountant="PRV", ledger="1e" * 16,
            entries=number, head=f"{number:02d}" * 32,
        )  # fmt: skip
        signed = Signed(statement.text(), sign(statement.text(), key))
        given.append(GivenStatement(number, "Oslo", TRAINING, signed))
    with History(RunFolder(folder.run).history) as history:
        history._insert_statements(given)
        history._database.commit()
    page = page_of(folder)
    row = page.row("Oslo", "1-3", "none")
    assert row[3:6] == ["1.5", "0.01", "8"]
    assert row[-1] == "good"
    assert EXPLAINED[0] in page.text
    assert "No site stated a budget" not in page.text


def test_a_round_recorded_meanwhile_is_in_all_of_the_report_or_in_none(tmp_path):
    """The history is copied before it is read, as its writer may go on between two looks."""
    folder = made(tmp_path, final=False)
    path = RunFolder(folder.run).history
    with History(path) as writer, writer._transaction() as database:
        database.execute("INSERT INTO rounds VALUES (4, 0.1, 1.0, 0.1, 'c', 's')")
        recorded = read_recorded(path, {}, "")  # inside the writer's transaction
    assert [r.round for r in recorded.records] == [1, 2, 3]
    assert recorded.verdict.rounds == 3
    assert len(read_recorded(path, {}, "").records) == 4


def test_published_changes_names_only(tmp_path, undrawn):
    folder = made(tmp_path, hidden=("Bergen",))
    assert "1 site here may not be named to others" in page_of(folder).text
    recorded = read_recorded(RunFolder(folder.run).history, {}, "")
    assert recorded.hidden == ("Bergen",)
    shown = published(recorded)
    assert "Bergen" not in repr(shown)
    assert shown.verdict.contributed["another site"] == (1, 3)
    back = [replace(c, site=c.site.replace("another site", "Bergen")) for c in shown.cards]
    assert [(c.site, c.n_training) for c in back] == [
        (c.site, c.n_training) for c in recorded.cards
    ]
    for before, after in zip(recorded.records, shown.records, strict=True):
        assert after.metrics["another site"] == before.metrics["Bergen"]
        assert after.metrics["Oslo"] == before.metrics["Oslo"]


def small_report(state: str = "") -> Report:
    plot = Plot("loss", new_figure(1, 1), "nothing")
    return Report("t", "", state, True, (), (), [Section("s", "S", plots=[plot])])


def test_two_pages_in_one_folder_do_not_share_figures_and_a_page_keeps_none_of_its_old_ones(
    tmp_path,
):
    ours, given = tmp_path / "ours.html", tmp_path / "given.html"
    write_report(small_report(), ours)
    folder = figures_path(ours)
    (folder / "slices-of-Bergen.png").write_text("old")
    (folder / "mine.txt").write_text("mine")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    write_report(small_report(), given)
    assert "“given-figures” beside this page" in given.read_text()
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    write_report(small_report(), folder / "report.html")
    write_report(small_report(), ours)
    names = {p.name for p in folder.iterdir()}
    assert names == {"loss.png", "loss.svg", "mine.txt", "report.html", "report-figures"}
    assert len(list((folder / "report-figures").iterdir())) == 2
    assert figures_path(tmp_path / "a.htm") != figures_path(tmp_path / "a.html")


def test_a_name_cannot_draw_over_the_terminal(tmp_path, monkeypatch):
    made_up = small_report("see x\x1b[2J below")
    monkeypatch.setattr("server.report_sections.coordinators_report", lambda *_, **__: made_up)
    done = report(made(tmp_path).path)
    assert "see x?[2J below" in done.stdout


# ------------------------------------------------------------------------------------- what fails


def one_line(done) -> str:
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    [line] = done.stderr.strip().splitlines()
    return line


def test_no_federation_and_no_run_are_said_in_a_line(tmp_path):
    assert "is no coordinator's folder" in one_line(report(tmp_path / "nothing"))
    config = load_config(assign=["server.address=fed.org"])
    init_folder(tmp_path / "new", config)
    assert "no run has begun" in one_line(report(tmp_path / "new"))
    assert not (tmp_path / "new" / "report").exists()


def test_a_damaged_history_is_named_and_nothing_is_written(tmp_path):
    folder = made(tmp_path)
    history = RunFolder(folder.run).history
    history.write_bytes(b"no database" * 100)
    line = one_line(report(folder.path))
    assert str(history) in line
    assert not (folder.path / "report").exists()


def test_a_cut_history_is_named_with_its_own_path(tmp_path):
    folder = made(tmp_path)
    history = RunFolder(folder.run).history
    history.write_bytes(history.read_bytes()[:6000])
    assert str(history) in one_line(report(folder.path))


def test_where_the_page_cannot_be_is_said_before_anything_is_made(tmp_path):
    folder = made(tmp_path)
    (tmp_path / "x.html").mkdir()
    (tmp_path / "file").write_text("mine")
    assert "is a folder" in one_line(report(folder.path, "--out", tmp_path / "x.html"))
    assert "is a file" in one_line(report(folder.path, "--out", tmp_path / "file"))
    under = one_line(report(folder.path, "--out", tmp_path / "file" / "x"))
    assert str(tmp_path / "file") in under
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    """Root may write everywhere, so that the answer is made up."""
    folder = made(tmp_path)
    (closed := tmp_path / "closed").mkdir()
    monkeypatch.setattr("server.recorded.read_recorded", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr("common.files.os.access", lambda place, mode: place != closed)
    said = one_line(report(folder.path, "--out", closed / "x" / "page.html"))
    assert f"{closed}: Permission denied" in said


def test_a_path_that_is_no_text_is_printed_all_the_same(tmp_path, undrawn):
    place = tmp_path / os.fsdecode(b"b\xe9richt")
    done = report(made(tmp_path).path, "--out", place)
    assert done.exit_code == 0, done.output
    assert f"Page: {tmp_path}/b?richt/report.html" in done.stdout
    assert (place / "report.html").exists()


def test_out_is_a_file_or_a_folder(tmp_path):
    assert page_path(tmp_path / "a.html") == tmp_path / "a.html"
    assert page_path(tmp_path / "new") == tmp_path / "new" / "report.html"
    assert page_path(tmp_path) == tmp_path / "report.html"
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportError, match="is a folder"):
        page_path(tmp_path)
