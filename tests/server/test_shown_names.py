"""Who reads which name: hidden ones are replaced wherever they stand, and nobody's own is."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

import pytest

from common.messages import SiteCard
from server.replies import refuse_change
from server.robust import outliers
from server.rounds import WITHHOLDS
from server.shown_names import (
    NOT_PUBLISHED,
    NOT_PUBLISHED_TEXT,
    named_in,
    reason_to_publish,
    shown_names,
    text_with,
    verdict_to_publish,
    verdict_with,
)
from server.spool import Kept
from server.tables import Verdict


def cards(**shows: bool) -> list[SiteCard]:
    return [SiteCard(site, True, 5, 2, 0, "", shows_name=shown) for site, shown in shows.items()]


def test_one_hidden_site_is_another_site():
    names = shown_names(cards(Oslo=False, Bergen=True))
    assert names == {"Bergen": "Bergen", "Oslo": "another site"}


def test_several_are_told_apart_by_a_number():
    names = shown_names(cards(Oslo=False, Bergen=False, Tromso=True))
    assert names == {
        "Bergen": "another site (1)",
        "Oslo": "another site (2)",
        "Tromso": "Tromso",
    }


def test_a_site_reads_its_own_name():
    assert shown_names(cards(Oslo=False, Bergen=False), reader="Oslo") == {
        "Bergen": "another site",
        "Oslo": "Oslo",
    }


def test_who_never_said_anything_is_not_named():
    judged = Verdict(True, 1, {"Oslo": (1,)}, ((1, "Narvik", "it has never connected."),))
    assert named_in(judged) == {"Oslo", "Narvik"}
    names = shown_names(cards(Oslo=True), named_in(judged))
    assert names == {"Oslo": "Oslo", "Narvik": "another site"}
    assert shown_names(cards(Oslo=True), named_in(judged), "Narvik")["Narvik"] == "Narvik"


def test_no_hidden_name_is_left_in_a_verdict():
    judged = Verdict(
        True,
        3,
        {"Bergen": (1,), "Oslo": (1, 2, 3)},
        (
            (2, "Oslo", "Oslo: policy rule `train_when`: allowed"),
            (3, "Bergen", "like Oslo, Oslo-1."),
        ),
        ((4, "Oslo", "it was off"),),
        ("Oslo",),
        ("Oslo",),
        "after round 3",
    )
    lines = verdict_with(judged, shown_names(cards(Oslo=False, Bergen=True))).lines()
    text = "\n".join(lines)
    assert "Oslo" not in text.replace("Oslo-1", ""), "that is another name"
    assert "Oslo-1" in text
    assert "  another site contributed to every round." in lines
    assert "  Bergen contributed to rounds 1." in lines
    assert (
        "  Round 2: without another site: another site: policy rule `train_when`: allowed" in lines
    )
    assert "  Round 4 failed: another site: it was off" in lines
    assert (
        judged.lines() == verdict_with(judged, shown_names(cards(Oslo=True, Bergen=True))).lines()
    )


def test_the_longest_of_names_that_begin_alike_is_meant():
    names = {"A": "another site (1)", "A.b": "another site (2)"}
    assert text_with("A.b, then A: x", names) == "another site (2), then another site (1): x"


def test_only_whole_names_are_replaced():
    """Whatever a name may hold; a full stop after it is none of it."""
    names = {"Oslo": "another site", "Oslo.1": "Oslo.1"}
    same = "Oslo.1 Oslo..2 x.Oslo Oslo-1 Oslo_2 my-Oslo OSLO2 Oslo.example"
    assert text_with(same, names) == same
    text = "Oslo: no. (Oslo) Oslo's like Oslo. Oslo, and Oslo"
    assert text_with(text, names) == text.replace("Oslo", "another site")
    assert text_with("OSLO, oslo", names) == "another site, another site"
    assert text_with("OSLO oslo", {"Oslo": "another site", "oslo": "oslo"}) == "another site oslo"
    assert text_with("Oslo.1. Then Oslo.", {"Oslo.1": "another site"}) == "another site. Then Oslo."


def test_what_the_coordinator_says_itself_is_left_as_it_is():
    judged = Verdict(True, 3, {"round": (1,)}, (), ended="fewer sites after round 3")
    names = shown_names(cards(round=False))
    assert verdict_with(judged, names).lines() == [
        "Training complete: 3 rounds. It ended there: fewer sites after round 3.",
        "  another site contributed to rounds 1.",
    ]


# what anybody may read

HIDES = {"mercy-west": "another site", "Bergen": "Bergen", "Bergen-mercy-west": "Bergen-mercy-west"}
TELLING = (
    "mercy-west: /data/mercy-west/ledger.json: No space left on device",
    "/srv/fedbrats/mercy-west_2026/cache: No space left",
    "/srv/Mercy-West/cache: Permission denied",
    "/data/mercy-west-site/site.yaml: invalid",
    "policy of mercy_west",
    "mercy west, MERCYWEST",
)


@pytest.mark.parametrize("told", TELLING)
def test_no_text_that_is_published_tells_a_hidden_name(told):
    assert reason_to_publish("mercy-west", told, HIDES) == NOT_PUBLISHED
    shown = reason_to_publish("Bergen", told, HIDES)
    assert "mercy" not in shown.casefold()
    judged = Verdict(
        True, 1, {}, ((1, "mercy-west", f"not evaluated: {told}"),), ((2, "Bergen", told),)
    )
    found = verdict_to_publish(judged, HIDES)
    assert found.absent == ((1, "another site", f"not evaluated: {NOT_PUBLISHED}"),)
    assert "mercy" not in repr(found).casefold()


def test_a_hidden_sites_words_are_not_published_even_where_they_do_not_name_it():
    assert reason_to_publish("mercy-west", "Dr. Who has left", HIDES) == NOT_PUBLISHED


def test_other_sites_words_are_published_but_for_hidden_names():
    same = "Bergen: its disk is full; as Bergen-mercy-west said."
    assert reason_to_publish("Bergen", same, HIDES) == same
    why = "like Mercy-West: off."
    assert reason_to_publish("Bergen", why, HIDES) == "like another site: off."
    assert reason_to_publish("Bergen", "see /mercy-west2", HIDES) == NOT_PUBLISHED_TEXT


def test_the_programs_own_reasons_are_published_as_they_are_and_nothing_that_only_begins_so():
    for own in (
        "it has never connected.",
        f"it is not connected (last heard of {datetime(2026, 11, 2, 3, 4, 5):%d %b %H:%M:%S} UTC).",
        "not evaluated: it evaluated 3 subjects but announced 4.",
        refuse_change(math.inf, 1.5),
        refuse_change(1.25e-7, 1e-9),
        WITHHOLDS,
        *outliers(
            [Kept("a", 8, 9.0, Path()), *[Kept(s, 1, 1e-3, Path()) for s in "bcd"]], 2
        ).values(),
        "",
    ):
        assert reason_to_publish("mercy-west", own, HIDES) == own
        if own:
            assert reason_to_publish("mercy-west", f"{own} x", HIDES).endswith(NOT_PUBLISHED)
