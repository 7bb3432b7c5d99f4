"""The report says what sites state, who signed it and what does not fit; and nothing a site writes
can be more than text in it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from common.keys import new_private_key
from common.messages import SiteCard
from common.statement import Signed, Statement, sign
from server.history import (
    FINAL,
    METRICS,
    TRAINING,
    Contribution,
    GivenStatement,
    History,
    RoundRecord,
)
from server.privacy_report import (
    EXPLAINED,
    NO_STATEMENT,
    privacy_document,
    report_page,
    report_table,
)

FEDERATION = "3f" * 16
KEYS = {site: new_private_key() for site in "abc"}
OTHER = new_private_key()


def private(round_: int, **changes) -> Statement:
    """A private update's statement: the ledger grows by one entry a round, and so does epsilon."""
    return replace(
        Statement(
            FEDERATION, "a", round_, "c0de", "2026-11-25", private=True, metrics="withheld",
            epsilon=0.5 * round_, delta=0.01, budget=8.0, noise_multiplier=2.5, sampling_rate=0.75,
            clip=1.5, steps=4, patients=12, accountant="PRV", ledger="1e" * 16, entries=round_,
            head=f"{round_:02d}" * 32,
        ),
        **changes,
    )  # fmt: skip


def beside_metrics(round_: int, **changes) -> Statement:
    none = dict.fromkeys(("noise_multiplier", "sampling_rate", "clip", "steps"))
    return private(round_, **none | changes)


def given(statement: Statement, stage: str = TRAINING, key=None, signature: bytes | None = None):
    text = statement.text()
    signed = sign(text, key or KEYS["a"]) if signature is None else signature
    return GivenStatement(statement.round, "a", stage, Signed(text, signed))


def history_of(path, statements, *, trained=(1, 2, 3), sites="a") -> History:
    history = History(path / "h")
    history.record_sites([SiteCard(site, True, 5, 2, 0, "f") for site in sites])
    for number in (1, 2, 3):
        contributions = tuple(Contribution(s, number in trained, "") for s in sites)
        record = RoundRecord(number, 1e-4, 1.0, None, "c", "s", contributions, {})
        history.record_round(record, [s for s in statements if s.round == number])
    return history


def document_of(path, statements, **more) -> dict:
    keys = {site: [key.public_key()] for site, key in KEYS.items()}
    with history_of(path, statements, **more) as history:
        return privacy_document(history, keys, FEDERATION)


def only_site(path, statements, **more) -> dict:
    (site,) = document_of(path, statements, **more)["sites"]
    return site


def test_a_site_that_was_private_in_every_round(tmp_path):
    statements = [given(private(n)) for n in (1, 2, 3)]
    statements.insert(1, given(beside_metrics(1), METRICS))
    site = only_site(tmp_path, statements)
    assert site == {
        "site": "a",
        "private_rounds": [1, 2, 3],
        "rounds_without_privacy": [],
        "rounds_without_statement": [],
        "epsilon": 1.5,
        "delta": 0.01,
        "budget": 8.0,
        "noise_multiplier": 2.5,
        "sampling_rate": 0.75,
        "clip": 1.5,
        "steps": 4,
        "patients": 12,
        "accountant": "PRV",
        "metrics": "withheld",
        "ledger": "1e" * 16,
        "entries": 3,
        "statements": 4,
        "signature": "good",
        "warnings": [],
        "note": "",
    }


def test_what_metrics_cost_is_in_the_latest_epsilon_and_the_numbers_are_those_of_training(tmp_path):
    statements = [given(private(n)) for n in (1, 2, 3)]
    at_the_end = beside_metrics(3, epsilon=2.25, entries=4, head="ff" * 32, metrics="noised")
    site = only_site(tmp_path, [*statements, given(at_the_end, FINAL)])
    assert (site["epsilon"], site["entries"], site["metrics"]) == (2.25, 4, "noised")
    assert (site["noise_multiplier"], site["steps"]) == (2.5, 4)
    assert site["warnings"] == []


def test_rounds_with_without_and_unknown_are_told_apart(tmp_path):
    open_ = Statement(FEDERATION, "a", 2, "c0de", "2026", private=False, metrics="exact")
    site = only_site(tmp_path, [given(private(1)), given(open_)])
    assert site["private_rounds"] == [1]
    assert site["rounds_without_privacy"] == [2]
    assert site["rounds_without_statement"] == [3]
    assert site["warnings"] == ["round 3: it trained, and its statement is missing."]
    assert (site["epsilon"], site["metrics"]) == (0.5, "exact"), "spent is spent"


def test_a_statement_beside_metrics_does_not_make_a_rounds_training_private(tmp_path):
    site = only_site(tmp_path, [given(beside_metrics(n), METRICS) for n in (1, 2, 3)])
    assert (site["private_rounds"], site["rounds_without_statement"]) == ([], [1, 2, 3])


def test_a_round_that_the_site_did_not_train_needs_no_statement(tmp_path):
    site = only_site(tmp_path, [given(private(1)), given(private(3))], trained=(1, 3))
    assert (site["private_rounds"], site["warnings"]) == ([1, 3], [])


def test_a_site_that_states_nothing_is_shown_as_such(tmp_path):
    document = document_of(tmp_path, [given(private(n)) for n in (1, 2, 3)], sites="ab")
    a, b = document["sites"]
    assert (a["note"], b["note"]) == ("", NO_STATEMENT)
    assert (b["rounds_without_statement"], b["epsilon"], b["signature"]) == (
        [1, 2, 3],
        None,
        "none",
    )
    assert b["warnings"] == []


def test_signatures_by_the_sites_keys_also_replaced_ones_are_good_and_no_others(tmp_path):
    new = new_private_key()
    keys = {"a": [KEYS["a"].public_key(), new.public_key()]}

    def judged(name: str, *statements) -> dict:
        (tmp_path / name).mkdir()
        with history_of(tmp_path / name, statements) as history:
            return privacy_document(history, keys, FEDERATION)["sites"][0]

    first, second, third = (private(n) for n in (1, 2, 3))
    both = judged("both", given(first), given(second, key=new), given(third, key=new))
    assert (both["signature"], both["warnings"]) == ("good", [])
    bad = judged("bad", given(first), given(second, key=OTHER), given(third, signature=b"x"))
    assert bad["signature"] == "bad"
    assert bad["warnings"] == ["round 2-3: its statement is signed by no key of this site."]
    none = judged("none", given(first), given(second, signature=b""), given(third))
    assert none["signature"] == "none"
    assert none["warnings"] == ["round 2: its statement is not signed."]
    changed = replace(given(second), signed=Signed(third.text(), given(second).signed.signature))
    assert judged("changed", given(first), changed)["signature"] == "bad"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ledger": "2e" * 16}, "round 3, training: its ledger is another one than before."),
        ({"entries": 1}, "round 3, training: its ledger has 1 entries, before it had 2."),
        ({"entries": 2}, "round 3, training: the last entry of its ledger has changed."),
        ({"epsilon": 0.75}, "round 3, training: epsilon fell from 1 to 0.75."),
        ({"epsilon": 8.5}, "round 3, training: epsilon 8.5 is above its budget 8."),
        ({"epsilon": None}, "round 3, training: it says private, without a possible epsilon"),
        ({"delta": 0.0}, "without a possible epsilon and delta."),
        ({"noise_multiplier": None}, "round 3, training: it says private, without noise."),
        ({"noise_multiplier": 0.0}, "round 3, training: it says private, without noise."),
        ({"federation": "4f" * 16}, "round 3, training: its statement is for another federation."),
    ],
)
def test_what_does_not_fit_is_a_warning(tmp_path, changes, said):
    good = [given(private(1)), given(private(2))]
    text = json.dumps(vars(private(3)) | changes)  # as a site of its own make could write it
    odd = GivenStatement(3, "a", TRAINING, Signed(text, sign(text, KEYS["a"])))
    document = document_of(tmp_path, [*good, odd])
    (warning,) = document["sites"][0]["warnings"]
    assert said in warning
    json.dumps(document, allow_nan=False)


def test_a_warning_compares_with_the_last_statement_that_told_and_not_only_the_one_before(tmp_path):
    silent = beside_metrics(
        2, private=False, epsilon=None, delta=None, ledger="", entries=0, head=""
    )
    statements = [
        given(private(2)),
        given(silent, METRICS),
        given(private(3, entries=1, epsilon=0.1)),
    ]
    assert only_site(tmp_path, statements, trained=(2, 3))["warnings"] == [
        "round 3, training: its ledger has 1 entries, before it had 2.",
        "round 3, training: epsilon fell from 1 to 0.1.",
    ]


def test_a_statement_of_another_version_is_said_and_its_round_counts_as_unknown(tmp_path):
    old = GivenStatement(2, "a", TRAINING, Signed("{}", sign("{}", KEYS["a"])))
    site = only_site(tmp_path, [given(private(1)), old, given(private(3))])
    assert (site["private_rounds"], site["rounds_without_statement"]) == ([1, 3], [2])
    assert any("cannot be read by this version" in warning for warning in site["warnings"])


# ------------------------------------------------------------------------------ as people read it

HOSTILE = "</td><script src=//evil></script>\x1b[2J[red]"


def hostile_document(path) -> dict:
    many = 10**14  # the longest that is read at all
    statement = private(1, metrics=HOSTILE, ledger=HOSTILE, steps=many, patients=many)
    return document_of(path, [given(statement)], trained=(1,))


def shown(document) -> str:
    text = StringIO()
    Console(file=text, width=300).print(report_table(document))
    return text.getvalue()


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_needs_nothing_else_and_shows_what_the_table_shows(tmp_path):
    document = document_of(tmp_path, [given(private(n)) for n in (1, 2)], sites="ab")
    page = report_page(document)
    parsed = Tags(page)
    assert {"a", "b"} <= set(re.findall(r"<td>(\w+)</td>", page))
    assert not {"script", "link", "img", "iframe", "a"} & set(parsed.tags)
    assert not {"src", "href"} & {name for name, _ in parsed.attributes}
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    for cell in ("1-2", "3", "1", "0.01", "8", "2.5", "0.75", "1.5", "4", "withheld", "good"):
        assert f"<td>{cell}</td>" in page, cell
        assert f" {cell} " in shown(document), cell
    for text in ("its statement is missing", NO_STATEMENT):
        assert text in page
        assert text in shown(document)
    for text in EXPLAINED:
        assert text.replace("'", "&#39;") in page
        assert text[:50] in shown(document)


def test_whatever_a_site_writes_is_text(tmp_path):
    document = hostile_document(tmp_path)
    page = report_page(document)
    assert "script" not in Tags(page).tags
    assert "&lt;/td&gt;&lt;script" in page
    for text in (page, shown(document)):
        assert "\x1b" not in text
        assert "?[2J[red]" in text
        assert "1" + "0" * 14 in text
