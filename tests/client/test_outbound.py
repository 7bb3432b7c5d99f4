"""The hospital's own account of what left: counted from the reply itself, and kept before it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client import outbound
from client.outbound import (
    Departure,
    Gate,
    OutboundError,
    Released,
    departures,
    in_words,
    inspect,
)
from client.permitted import Own
from client.policy import FAMILIES, Policy
from common.audit_log import AuditLog, append, told
from common.keys import new_private_key, save_private_key
from common.message_words import BUDGET_SPENT, POLICY_REFUSED, WITHHELD
from common.messages import (
    SiteCard,
    SiteReport,
    SiteUpdate,
    pack_site_card,
    pack_site_report,
    pack_site_update,
)
from common.metrics import SiteMetrics
from common.statement import Signed, Statement, attach, attached, read_statement

SHAPES = {"conv.weight": (4, 3, 3, 3, 3), "conv.bias": (4,), "norm.count": (), "norm.scale": ()}
OSLO = Own("Oslo", n_training=12, training_patients=12, held_out_patients=5)
FAILED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
CARD = SiteCard("Oslo", True, 12, 5, 1, "c0ffee")


OPEN = Policy(min_subjects=1, decimals=None, metrics=FAMILIES, show_name=True)


def through(message: Message, record: Path, policy: Policy = OPEN) -> Released:
    return outbound.release(message, asked(), Gate(record, policy, OSLO, lambda t: t[:9].encode()))


def release(message: Message, record: Path) -> Departure:
    """Under a policy that keeps nothing back."""
    return through(message, record).departure


def weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made | {"norm.count": torch.tensor(7)}


@pytest.fixture
def record(tmp_path: Path) -> AuditLog:
    save_private_key(tmp_path / "site.key", new_private_key())
    return AuditLog(tmp_path / "audit.log", tmp_path / "site.key")


def values() -> int:
    """Of the model above, counted by hand: 4 * 81 + 4 + 1 + 1."""
    return 330


def update(round_: int = 3, *, loss: float = 0.5, change: bool = True) -> RecordDict:
    sent = SiteUpdate("Oslo", round_, 12, weights(1.1), loss, 2.5, 4.8)
    return pack_site_update(sent, weights() if change else None)


def report(**means: float) -> RecordDict:
    """With the Dice that a report has to hold."""
    means |= {f"dice/{region}": 0.75 for region in ("WT", "TC", "ET")}
    metrics = SiteMetrics(5, means, {name: 0 if math.isnan(v) else 5 for name, v in means.items()})
    return pack_site_report(SiteReport("Oslo", 3, metrics, 1.5))


def asked() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict(), 2, "train")
    message.metadata.__dict__["_message_id"] = "5f" * 32
    return message


def reply(content: RecordDict | Error) -> Message:
    return Message(content, reply_to=asked())


def everything_in(content: RecordDict) -> dict:
    """Apart from the weights, as JSON would hold it; by another way than `inspect`."""
    return {
        name: dict(record.items())
        for name, record in content.items()
        if not isinstance(record, ArrayRecord)
    }


# -------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("change", [True, False], ids=["fp16", "fp32"])
def test_an_update_is_counted_tensor_by_tensor(change):
    content = update(change=change)
    (array,) = content["weights"].values()
    about = everything_in(content)
    counted = inspect(reply(content))
    assert (counted.kind, counted.round) == ("update", 3)
    assert (counted.tensors, counted.weights) == (len(SHAPES), values())
    assert counted.weights == sum(t.numel() for t in weights().values())
    # round, n_training, loss, seconds, samples_per_second
    assert counted.numbers == 5
    assert counted.bytes == len(array.data) + len(json.dumps(about))
    assert counted.sha256 == hashlib.sha256(array.data).hexdigest()
    assert counted.details == about
    assert counted.details["about"]["loss"] == 0.5
    assert sorted(counted.names) == sorted(SHAPES)


def test_a_card_a_report_and_an_error_are_counted():
    counted = inspect(reply(pack_site_card(CARD)))
    assert astuple(counted)[:4] == ("card", None, 0, 0)
    flags_and_numbers = [v for v in vars(CARD).values() if isinstance(v, int)]
    assert counted.numbers == len(flags_and_numbers) == 5
    assert counted.details["card"] == vars(CARD)
    assert counted.sha256 == ""

    means = {"loss": 0.25, "iou/WT": 0.6}
    counted = inspect(reply(report(**means)))
    assert astuple(counted)[:4] == ("metrics", 3, 0, 0)
    assert counted.numbers == 2 + 5 + (1 + 5), "round and seconds; means; subjects behind each"
    assert counted.details["means"] == {**means, "dice/WT": 0.75, "dice/TC": 0.75, "dice/ET": 0.75}

    counted = inspect(reply(Error(code=2, reason="kein Gd: größer")))
    assert astuple(counted)[:5] == ("error", None, 0, 0, 1)
    assert counted.bytes == len("kein Gd: größer".encode())
    assert counted.details == {"code": 2, "reason": "kein Gd: größer"}


def test_a_departure_is_told_in_a_line():
    update_ = inspect(reply(update()))
    size = f"{update_.bytes / 1000:.1f} kB"
    assert update_.in_words() == f"update of 4 tensors, 330 numbers, {size}"
    card = inspect(reply(pack_site_card(CARD)))
    assert card.in_words() == f"card: 5 numbers, {card.bytes / 1000:.1f} kB"


def test_whatever_else_is_in_a_reply_is_told_too():
    content = RecordDict({"x": ConfigRecord({"secret": b"\x01\xff", "list": [1, 2], "n": 4})})
    counted = inspect(reply(content))
    assert counted.kind == "other"
    assert counted.details == {"x": {"secret": "01ff", "list": [1, 2], "n": 4}}
    assert counted.numbers == 3, "those in a list are numbers too"
    both = RecordDict({**pack_site_card(CARD), "weights": update()["weights"]})
    assert inspect(reply(both)).kind == "update", "weights are never told as anything less"


def test_weights_in_no_known_form_do_not_leave(record):
    """They could not be accounted for; the coordinator hears that much."""
    for data in (b"", b"short", b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", b"\xff" * 40):
        array = Array("uint8", (len(data),), "raw", data)
        about = ConfigRecord({"n_training": 12})
        spoilt = reply(RecordDict({"about": about, "weights": ArrayRecord({"weights": array})}))
        with pytest.raises(OutboundError, match="cannot be accounted for"):
            inspect(spoilt)
        released = through(spoilt, record)
        assert "cannot be accounted for" in released.reply.error.reason
    assert [row["kind"] for row in departures(record)] == ["error"] * 4


# ---------------------------------------------------------------------------------- the gate


def test_what_leaves_and_what_is_recorded_is_what_the_policy_permits(record):
    content = report(loss=0.123456)
    content["about"]["folder"] = "/data/brats"
    released = through(reply(content), record, Policy(decimals=2))
    assert "folder" not in released.reply.content["about"]
    assert released.reply.content["means"]["loss"] == 0.12
    assert released.departure == inspect(released.reply)
    (kept,) = departures(record)
    assert kept["details"] == everything_in(released.reply.content)
    assert released.reply.metadata.reply_to_message_id == "5f" * 32, "it still answers the task"
    assert content["about"]["folder"] == "/data/brats", "the reply itself stays as it was"


def test_what_may_not_leave_becomes_an_error_that_names_the_rule(record):
    released = through(reply(update()), record, Policy(send_updates=False))
    said = "policy rule `send_updates`: no model update leaves this site"
    assert released.reply.error.reason == said
    assert [row["details"] for row in departures(record)] == [
        {"code": POLICY_REFUSED, "reason": said}
    ]
    assert released.reply.error.code == POLICY_REFUSED


def test_nothing_of_a_replys_own_metadata_leaves(record):
    """The worker could write a text into it, or answer somebody else."""
    made = reply(update())
    strange = {"group_id": "Anna", "dst_node_id": 99, "message_type": "train.anna", "run_id": 8}
    made.metadata.__dict__.update({f"_{name}": value for name, value in strange.items()})
    released = through(made, record).reply
    task = asked().metadata
    assert released.metadata.group_id == task.group_id == ""
    assert released.metadata.dst_node_id == task.src_node_id
    assert (released.metadata.run_id, released.metadata.message_type) == (1, "train")
    assert (
        b"Anna" not in message_to_proto(remove_content_from_message(released)).SerializeToString()
    )


@pytest.mark.parametrize(
    ("code", "left"),
    [(123456789, FAILED), (BUDGET_SPENT, BUDGET_SPENT), (POLICY_REFUSED, POLICY_REFUSED)],
)
def test_an_errors_code_is_one_of_three_and_on_record(record, code, left):
    released = through(reply(Error(code, "no Gd")), record)
    assert released.reply.error.code == left
    assert departures(record)[0]["details"] == {"code": left, "reason": "no Gd"}


def test_answers_are_counted_since_the_last_yes_whatever_the_clock_says(record):
    for round_ in (1, 1, 2):
        release(reply(update(round_)), record)
    assert outbound.answered(record, "update") == {1: 2, 2: 1}
    append(record, "terms accepted", {"hash": "ab"})
    assert outbound.answered(record, "update") == {}
    release(reply(update(2)), record)
    assert outbound.answered(record, "update") == {2: 1}
    assert outbound.answered(record, "metrics") == {}


def test_a_statement_is_signed_as_it_leaves(record):
    """Not as it came: the policy may withhold the metrics that it speaks of."""
    stated = Statement("3f" * 16, "Oslo", 3, "ab" * 32, "2026-01-01", True, "exact")
    content = report(loss=0.5)
    attach(content, Signed(stated.text(), b"of the worker"))
    gate = Gate(record, Policy(metrics=()), OSLO, lambda text: text.encode())
    kept = attached(outbound.release(reply(content), asked(), gate).reply.content)
    assert read_statement(kept.text).metrics == WITHHELD
    assert kept.signature == kept.text.encode()


def test_a_long_error_is_cut_to_a_line(record):
    released = through(reply(Error(code=FAILED, reason="a\nb" * 1000)), record)
    assert len(released.reply.error.reason) <= 500
    assert "\n" not in released.reply.error.reason
    assert released.reply.error.code == FAILED


def test_an_undefined_mean_is_kept_as_none(record):
    content = report(**{"loss": 0.5, "hd95/ET": math.nan})
    release(reply(content), record)
    (kept,) = departures(record)
    means = kept["details"]["means"]
    assert (means["loss"], means["hd95/ET"]) == (0.5, None)
    text = record.path.read_text().splitlines()[-1]
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert kept["numbers"] == 2 + 4 + 6, "what is undefined is no number"


# --------------------------------------------------------------------------------- the record


def test_the_record_holds_every_departure_in_order(record):
    begin = datetime.now(UTC).replace(microsecond=0)
    contents = [pack_site_card(CARD), update(1), report(loss=0.5), update(2), Error(2, "no Gd")]
    released = [release(reply(content), record) for content in contents]
    kept = departures(record)
    assert [row["id"] for row in kept] == [2, 3, 4, 5, 6], "after the key"
    assert [row["kind"] for row in kept] == ["card", "update", "metrics", "update", "error"]
    for row, departure in zip(kept, released, strict=True):
        assert begin <= datetime.fromisoformat(row["at"]) <= datetime.now(UTC)
        assert {key: row[key] for key in vars(departure)} == vars(departure)
    json.dumps(kept, allow_nan=False)


def test_in_words_adds_up(record):
    assert in_words(record) == ["nothing"]
    assert departures(record) == []
    assert not record.path.exists(), "looking leaves nothing behind"
    released = release(reply(pack_site_card(CARD)), record)
    assert in_words(record) == ["1 site card (name and numbers of subjects; 5 numbers)"]
    sizes = [release(reply(update(n)), record).bytes for n in (1, 2, 3)]
    metrics = release(reply(report(loss=0.5)), record)
    release(reply(pack_site_card(CARD)), record)
    release(reply(Error(2, "no Gd")), record)
    farewell = RecordDict({"farewell": ConfigRecord({"received": True})})
    release(reply(farewell), record)
    updates = f"{sum(sizes) / 1000:.1f} kB"
    assert in_words(record) == [
        "2 site cards (name and numbers of subjects; 10 numbers)",
        f"3 model updates (4 tensors of 330 numbers each time, 15 other numbers, {updates} in all)",
        f"1 set of mean metrics ({metrics.numbers} numbers, {metrics.bytes / 1000:.1f} kB in all)",
        "1 error text",
        "1 acknowledgement",
    ]
    assert released.kind == "card"


def test_withheld_metrics_are_not_called_metrics(record):
    withheld = pack_site_report(SiteReport("Oslo", 1, SiteMetrics(6, {}, {}), released=WITHHELD))
    released = release(reply(withheld), record)
    assert released.in_words().startswith("number of subjects and privacy statement, metrics with")
    release(reply(report(loss=0.5)), record)
    statements, metrics = sorted(in_words(record))
    assert statements.startswith("1 privacy statement with the number of held-out subjects")
    assert metrics.startswith("1 set of mean metrics (")


def test_large_amounts_are_told_in_megabytes(record):
    released = release(reply(update()), record)
    large = vars(released) | {"bytes": 41_943_040, "weights": 10_485_760}
    append(record, "sent", large)
    assert in_words(record) == [
        "2 model updates (4 tensors of 10,485,760 numbers each time, 10 other numbers, 41.9 MB in all)"
    ]


def test_an_infinite_number_is_kept(record):
    release(reply(update(loss=math.inf)), record)
    assert departures(record)[0]["details"]["about"]["loss"] == "inf"


# --------------------------------------------------------------------- it cannot be written


def not_released(record: AuditLog) -> str:
    with pytest.raises(OutboundError) as caught:
        release(reply(update()), record)
    text = str(caught.value)
    assert str(record.path) in text
    assert "so nothing is sent" in text
    return text


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_nothing_is_released(record):
    with full_disk(0):
        not_released(record)
    released = 0
    with full_disk(20_000), contextlib.suppress(OutboundError):
        while released < 1000:
            release(reply(update()), record)
            released += 1
        pytest.fail("the disk is not full")
    with full_disk(20_000):
        assert "Free disk space" in not_released(record)
    assert len(departures(record)) == released > 0, "exactly what was released"
    release(reply(update()), record)
    assert len(departures(record)) == released + 1


def test_a_damaged_or_foreign_record_is_not_replaced(record, tmp_path):
    record.path.write_bytes(b"not a log at all\n" * 100)
    before = record.path.read_bytes()
    not_released(record)
    with pytest.raises(OutboundError):
        in_words(record)
    assert record.path.read_bytes() == before
    not_released(AuditLog(tmp_path / "gone" / "audit.log", record.key))
    (tmp_path / "folder.log").mkdir()
    not_released(AuditLog(tmp_path / "folder.log", record.key))


def test_a_record_that_was_cut_off_releases_nothing(record):
    release(reply(pack_site_card(CARD)), record)
    release(reply(update()), record)
    content = record.path.read_bytes()
    record.path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])
    assert "its end is missing" in not_released(record)
    assert [entry.kind for entry in told(record)] == ["key", "sent"]


def test_without_the_key_nothing_is_released(record):
    release(reply(pack_site_card(CARD)), record)
    record.key.unlink()
    with pytest.raises(OutboundError, match="private key cannot be read"):
        release(reply(update()), record)
