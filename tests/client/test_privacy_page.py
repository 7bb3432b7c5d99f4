"""How the privacy report looks: one page that refers to nothing outside, whatever the names hold."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console, RenderableType

from client.budget import pay_for_training, record_unprotected
from client.privacy_page import ledger_table, report_page, report_table
from client.privacy_report import privacy_document
from tests.client.paid_site import OTHER, prepared_site, trained


@pytest.fixture
def document(hospital, prepared, tiny_config) -> dict[str, Any]:
    """Two federations, a round without privacy, one interrupted."""
    config = tiny_config("rounds.number=20")

    def site(**named: Any) -> Any:
        return prepared_site(hospital, prepared.ready, config, **named)

    record_unprotected(site(budget=None), 1)
    trained(site(federation=OTHER), 1)
    here = site()
    trained(here, 2, 3)
    pay_for_training(here, 4)
    return privacy_document(hospital)


class Page(HTMLParser):
    """All tags, addresses, texts and cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def printed(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=10_000, highlight=False)
    console.print(table)
    return console.file.getvalue()


def test_the_page_refers_to_nothing_outside_itself(document):
    text = report_page(document)
    page = Page(text)
    assert "svg" in page.tags
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(page.tags)
    references = [v for name, v in page.attributes if name in ("href", "xlink:href", "src")]
    assert references  # of the plot's marks
    assert all(value.startswith("#") for value in references)
    assert all(found == "#" for found in re.findall(r"url\(\s*['\"]?(.)", text))
    assert "://" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_page_says_what_the_document_says(document):
    text = Page(report_page(document)).text
    for said in (
        document["headline"],
        *document["meaning"],
        document["unit"],
        *document["not_protected_from"],
        *(entry["why"] for entry in document["not_covered"]),
        document["code"],
        document["ledger"]["head"],
        f"{document['spent']['epsilon']:.3f}",
        "interrupted",
        OTHER[:12],
    ):
        assert said in text, said
    assert "budget 8" in text  # in the plot, as text


def test_names_cannot_become_markup(document):
    evil = "<script>alert(1)</script>"
    for key in ("site", "headline", "coordinator"):
        document[key] = evil
    document["warnings"] = [evil]
    document["federation"]["name"] = evil
    for entry in (*document["entries"], *document["federations"], *document["unprotected"]):
        entry.update({key: evil for key in ("federation", "site", "id") if key in entry})
        entry["this"] = False
    page = Page(report_page(document))
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_a_terminal_is_not_drawn_over(document):
    document["site"] = "[red]Oslo[/red]\x1b[2J"
    document["warnings"] = ["[bold]\x1b[31m"]
    text = printed(report_table(document, terminal=False))
    assert "\x1b" not in text
    assert "[red]Oslo[/red]?[2J" in text
    assert "Warning: [bold]?[31m" in text


def test_the_terminal_table_has_the_numbers(document):
    text = printed(report_table(document, terminal=False))
    assert f"{document['spent']['epsilon']:.3f}" in text
    assert document["ledger"]["id"] in text
    rows = [line for line in text.splitlines() if "training" in line and "this one" in line]
    assert [row.split("|")[4].strip() for row in rows] == [
        "carried through",
        "carried through",
        "interrupted",
    ]
    assert all(entry["what"] in text for entry in document["not_covered"])


def test_a_terminal_shows_the_newest_payments_only(document):
    document["entries"] = [{**document["entries"][0], "number": 1000 + n} for n in range(30)]
    text = printed(report_table(document, terminal=False))
    assert "1029" in text
    assert "1019" not in text
    assert "20 older ones" in text
    assert all(f"{1000 + n}" in report_page(document) for n in range(30))


def test_without_payments_there_is_no_plot(hospital):
    document = privacy_document(hospital)
    page = Page(report_page(document))
    assert "svg" not in page.tags
    assert "OFF" in page.text
    assert "nobody: there is no differential privacy" in page.text
    assert "Every payment" not in page.text
    assert "OFF" in printed(report_table(document, terminal=False))


def test_every_entry_of_the_ledger_has_a_line():
    entry = {
        **{"number": 1, "at": "2026-01-02T03:04:05+00:00", "kind": "plan", "federation": OTHER},
        **{"site": "Oslo", "round": 3, "size": 12, "noise_multiplier": 1.5, "sampling_rate": 0.25},
        **{"steps": 4, "clip": 1.0, "epsilon": None, "delta": 0.01, "of": None},
    }
    document = {
        **{"id": "ab" * 16, "path": "/x", "anchored": False, "head": "cd" * 32},
        "entries": [entry, {**entry, "number": 2, "kind": "done", "of": 1}],
    }
    text = printed(ledger_table(document, terminal=False))
    [plan] = [line for line in text.splitlines() if "plan" in line]
    cells = [cell.strip() for cell in plan.strip("|").split("|")]
    assert cells == [
        *("1", "2026-01-02 03:04:05", "plan", OTHER[:12], "Oslo", "3", "12"),
        *("1.5", "0.25", "4", "1", "", "0.01", ""),
    ]
    assert "2 entries" in text
    assert "cd" * 32 in text
