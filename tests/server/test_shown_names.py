"""Who reads which name: hidden ones are replaced wherever they stand, and nobody's own is."""

from __future__ import annotations

from common.messages import SiteCard
from server.shown_names import named_in, shown_names, text_with, verdict_with
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
    same = "Oslo.1 Oslo..2 x.Oslo Oslo-1 Oslo_2 my-Oslo OSLO oslo Oslo.example"
    assert text_with(same, names) == same
    text = "Oslo: no. (Oslo) Oslo's like Oslo. Oslo, and Oslo"
    assert text_with(text, names) == text.replace("Oslo", "another site")
    assert text_with("Oslo.1. Then Oslo.", {"Oslo.1": "another site"}) == "another site. Then Oslo."


def test_what_the_coordinator_says_itself_is_left_as_it_is():
    judged = Verdict(True, 3, {"round": (1,)}, (), ended="fewer sites after round 3")
    names = shown_names(cards(round=False))
    assert verdict_with(judged, names).lines() == [
        "Training complete: 3 rounds. It ended there: fewer sites after round 3.",
        "  another site contributed to rounds 1.",
    ]
