"""What TensorBoard and MLflow read back is the history's, once each, whatever was interrupted."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.config_file import dump_config
from common.messages import SiteCard
from server import tracking, tracking_targets
from server.history import Contribution, History, HistoryError, RoundRecord
from server.source import Source
from server.tracking import FEDERATION, NotTracked, numbers_of, track
from server.tracking_targets import MLflow, TensorBoard, name_there, without_password
from simulation.cli import app
from tests.server.test_dashboard_state import HOSTILE, a_round, metrics, stated

pytestmark = pytest.mark.usefixtures("undisturbed_log")
needs_tensorboard = pytest.mark.skipif(not find_spec("tensorboard"), reason="no tensorboard here")
needs_mlflow = pytest.mark.skipif(not find_spec("mlflow"), reason="no mlflow here")


@pytest.fixture
def run(tmp_path: Path, tiny_config: Callable[..., Any]) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "federation.yaml").write_text(dump_config(tiny_config("name=study")))
    with History(folder / "history.sqlite") as history:
        history.record_round(
            RoundRecord(
                1, 0.01, 12.0, 0.4, "c", "s" * 64,
                (Contribution("a", True, "", 0.7, 3.0, 1.0, 1000), Contribution("b", False, "off")),
                {"a": metrics(0.6, 0.5, 0.4), "b": metrics(0.9, 0.8, 0.7)},
            ),
            [stated("a", 1, 2.5)],
        )  # fmt: skip
    return folder


def another_round(run: Path, number: int) -> None:
    with History(run / "history.sqlite") as history:
        history.record_round(a_round(number, {"a": metrics(0.5, 0.5, 0.5)}))


def finish(run: Path) -> None:
    with History(run / "history.sqlite") as history:
        of = metrics(0.6, 0.5, 0.4)
        of.means["hd95/WT"], of.means["hd95/ET"] = 7.5, math.nan
        history.record_final(1, {"a": of}, {})


def tensorboard(run: Path, place: Path, *, follow: bool = False) -> int:
    with TensorBoard.at(place) as target:
        return track(Source(run), [target], follow=follow)["TensorBoard"]


def mlflow(run: Path, place: Path) -> int:
    with MLflow.at(str(place)) as target:
        return track(Source(run), [target], follow=False)["MLflow"]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def test_the_numbers_of_a_round(run):
    finish(run)
    numbers = numbers_of(Source(run))
    assert numbers is not None
    found = {(p.site, p.key): p.value for p in numbers.points}
    assert len(found) == len(numbers.points)
    assert found[FEDERATION, "dice/mean"] == pytest.approx((0.5 + 0.8) / 2)
    assert found[FEDERATION, "dice/WT"] == pytest.approx((0.6 + 0.9) / 2)
    assert found[FEDERATION, "iou/ET"] == pytest.approx((0.4 / 1.6 + 0.7 / 1.3) / 2)
    assert found[FEDERATION, "dice/worst_site"] == pytest.approx(0.5)
    wanted = {"loss": 0.4, "learning_rate": 0.01, "seconds": 12, "bytes": 1000, "sites": 1}
    assert {key: found[FEDERATION, key] for key in wanted} == wanted
    assert found["a", "train_loss"] == 0.7
    assert found["a", "iou/WT"] == pytest.approx(0.6 / 1.4)
    assert found["a", "epsilon"] == 2.5
    assert ("a", "final/hd95/ET") not in found, "undefined there"
    assert ("b", "train_loss") not in found
    assert found["a", "final/hd95/WT"] == found[FEDERATION, "final/hd95/WT"] == 7.5
    assert numbers.parameters["rounds.number"] == "3"
    assert numbers.parameters["training.augment.flip"] == "True"
    assert not any(key.startswith(("server.", "split.")) for key in numbers.parameters)


@needs_tensorboard
def test_tensorboard_reads_back_every_number_once(run, tmp_path):
    place = tmp_path / "logs"
    first = tensorboard(run, place)
    assert first == len(numbers_of(Source(run)).points)
    assert tensorboard(run, place) == 0
    another_round(run, 2)
    finish(run)
    assert tensorboard(run, place) == len(numbers_of(Source(run)).points) - first
    assert tensorboard(run, place) == 0
    for point in numbers_of(Source(run)).points:
        read = dict(events(place / (point.site or "_federation"))[point.key])
        assert read[point.round] == pytest.approx(point.value, rel=1e-6)
    assert [step for step, _ in events(place / "a")["dice/WT"]] == [1, 2]


@needs_tensorboard
def test_an_event_that_was_half_written_is_written_again(run, tmp_path):
    place = tmp_path / "logs"
    tensorboard(run, place)
    (file,) = (place / "a").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 10])
    assert tensorboard(run, place) == 1
    wanted = [p for p in numbers_of(Source(run)).points if p.site == "a"]
    assert events(place / "a") == {p.key: [(1, pytest.approx(p.value, rel=1e-6))] for p in wanted}


@needs_mlflow
def test_mlflow_reads_back_every_number_once_also_after_a_kill(run, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    place = tmp_path / "store"
    monkeypatch.setattr(tracking_targets, "BATCH", 5)
    log_batch, calls = MlflowClient.log_batch, []

    def killed(self: Any, *rest: Any, **batch: Any) -> None:
        calls.append(batch)
        if len([c for c in calls if "metrics" in c]) == 3:
            raise KeyboardInterrupt
        log_batch(self, *rest, **batch)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            mlflow(run, place)
    assert mlflow(run, place) == len(numbers_of(Source(run)).points) - 2 * 5
    assert mlflow(run, place) == 0
    another_round(run, 2)
    finish(run)
    assert mlflow(run, place) > 0

    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "study"]
    (found,) = client.search_runs([experiment.experiment_id])
    for point in numbers_of(Source(run)).points:
        key = f"site/{point.site}/{point.key}" if point.site else point.key
        history = client.get_metric_history(found.info.run_id, key)
        assert [m.value for m in history if m.step == point.round] == [point.value], key
    assert found.data.params["training.learning_rate"] == "0.02"
    assert found.info.status == "FINISHED"
    assert client.list_artifacts(found.info.run_id) == []
    assert {p.name for p in place.iterdir()} == {"mlflow.db", tracking_targets.LOCK}
    assert not Path("mlruns").exists()


@needs_mlflow
def test_a_tracking_address_is_not_told_the_names_of_sites_that_hide_theirs(run, tmp_path):
    from mlflow.tracking import MlflowClient

    def cards(**shows: bool) -> None:
        with History(run / "history.sqlite") as history:
            history.record_sites(
                [SiteCard(s, True, 5, 2, 0, "", shows_name=x) for s, x in shows.items()]
            )

    def typed(place: object, *more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["track", str(run), "--mlflow", str(place), *more])
        return result.exit_code, result.output

    with History(run / "history.sqlite") as history:
        history.record_round(a_round(2, {"mercy-west": metrics(0.5, 0.5, 0.5)}))
        history.record_final(2, {"mercy-west": metrics(0.5, 0.5, 0.5)}, {})
    cards(**{"a": True, "b": True, "mercy-west": False})
    place = f"sqlite:///{tmp_path / 'there.db'}"
    total = len(numbers_of(Source(run)).points)
    assert typed(place) == (0, f"MLflow: {total} new numbers.\n")
    assert b"mercy" not in (tmp_path / "there.db").read_bytes()
    client = MlflowClient(place)
    experiment = client.get_experiment_by_name("study").experiment_id

    def there() -> dict[str, float]:
        (found,) = client.search_runs([experiment])
        return found.data.metrics

    keys = set(there())
    assert {"site/hospital 3/dice/WT", "site/hospital 3/final/dice/WT", "site/a/dice/WT"} <= keys
    # a site that joins later gets another number, also if it comes first in the alphabet
    another_round(run, 3)
    with History(run / "history.sqlite") as history:
        history.record_round(a_round(4, {"Aa": metrics(0.9, 0.9, 0.9)}))
    cards(**{"Aa": False, "a": True, "b": True, "mercy-west": False})
    assert typed(place)[0] == 0
    assert typed(place) == (0, "MLflow: 0 new numbers.\n")
    assert there()["site/hospital 3/dice/WT"] == 0.5
    assert there()["site/hospital 4/dice/WT"] == 0.9
    # neither naming is mixed with the other
    before = there()
    code, said = typed(place, "--with-hidden-names")
    assert (code, "Type the command without --with-hidden-names" in said) == (1, True)
    assert there() == before
    (found,) = client.search_runs([experiment])
    client.set_tag(found.info.run_id, tracking_targets.NAMES_TAG, tracking_targets.ALL_NAMES)
    code, said = typed(place)
    assert (code, "Type the command with --with-hidden-names" in said) == (1, True)
    assert typed(place, "--with-hidden-names")[0] == 0
    assert there()["site/mercy-west/dice/WT"] == 0.5


@needs_mlflow
def test_no_password_is_in_a_message_or_in_the_address(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "before")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    with MLflow.at("http://dr.who:s3cret%2F@127.0.0.1:1/x") as target:
        assert target.uri == "http://127.0.0.1:1/x"
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "dr.who"
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s3cret/"
        with pytest.raises(NotTracked) as failed:
            track(Source(run), [target], follow=False)
        assert "s3cret" not in repr(target)
    assert "API request to http://127.0.0.1:1/" in str(failed.value)
    assert "s3cret" not in str(failed.value)
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "before"
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    for typed in ("http://dr.who:s3cret/x@127.0.0.1:1", "http://s3cret@127.0.0.1:1"):
        result = CliRunner().invoke(app, ["track", str(run), "--mlflow", typed])
        assert result.exit_code == 1
        assert "MLFLOW_TRACKING_PASSWORD" in result.stderr
        assert "s3cret" not in result.output
    result = CliRunner().invoke(app, ["track", str(run), "--mlflow", "nosql://who:s3cret@h/x"])
    assert result.exit_code == 1
    assert "s3cret" not in result.output


def test_what_stands_before_the_at_sign_of_an_address_is_in_no_text():
    text = "API request to http://who:p@ss/w@h:1/x failed, postgresql://u:pw@h/db"
    assert without_password(text) == "API request to http://h:1/x failed, postgresql://h/db"


@needs_mlflow
def test_mlflow_does_not_phone_home_whatever_the_environment_says():
    program = (
        "from common.environment import prepare_environment; prepare_environment()\n"
        "import mlflow, mlflow.telemetry as t; print(t.get_telemetry_client())"
    )
    # which it takes for signs that it is tested itself
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI"))}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "false", "DO_NOT_TRACK": "0"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "None"


@needs_mlflow
@needs_tensorboard
def test_a_target_of_another_run_and_one_that_does_not_answer(run, tmp_path):
    place = tmp_path / "logs"
    tensorboard(run, place)
    (run / "history.sqlite").unlink()
    another_round(run, 1)
    with pytest.raises(NotTracked, match="holds another run"):
        tensorboard(run, place)
    arguments = ["track", str(run), "--mlflow", "http://127.0.0.1:1"]
    result = CliRunner().invoke(app, arguments, env={"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert result.exit_code == 1
    assert "fed-sim: MLflow: API request to http://127.0.0.1:1/" in result.stderr
    assert "Traceback" not in result.stderr


@needs_tensorboard
def test_following_ends_with_the_run_and_outlives_a_target_that_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "LOOK_SECONDS", 0.05)
    add, calls = TensorBoard.add, []

    def sometimes(self: TensorBoard, points: Any) -> int:
        calls.append(any(point.key.startswith("final/") for point in points))
        if calls.count(True) == 1 and calls[-1]:
            raise NotTracked("it is away")
        return add(self, points)

    monkeypatch.setattr(TensorBoard, "add", sometimes)
    found = []
    place = tmp_path / "logs"
    following = threading.Thread(target=lambda: found.append(tensorboard(run, place, follow=True)))
    following.start()
    for number in (2, 3):
        seen = len(calls)
        while len(calls) == seen:
            time.sleep(0.01)
        another_round(run, number)
    finish(run)
    following.join(30)
    assert found == [len(numbers_of(Source(run)).points)]
    assert [step for step, _ in events(place / "a")["dice/WT"]] == [1, 2, 3]


@needs_tensorboard
def test_following_outlives_a_history_that_cannot_be_read_for_a_while(
    run, tmp_path, monkeypatch, log
):
    monkeypatch.setattr(tracking, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr("server.history.COPY_SECONDS", 0.02)
    finish(run)
    looks, numbers_as_told = [], tracking.numbers_of
    holder = sqlite3.connect(run / "history.sqlite", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")

    def watched(source: Source) -> Any:
        looks.append(source)
        if len(looks) == 4:
            holder.rollback()
        return numbers_as_told(source)

    monkeypatch.setattr(tracking, "numbers_of", watched)
    with pytest.raises(HistoryError, match="locked"):
        tensorboard(run, tmp_path / "logs")
    assert tensorboard(run, tmp_path / "logs", follow=True) == len(
        numbers_as_told(Source(run)).points
    )
    holder.close()
    assert len(looks) == 4
    assert sum("tried again every" in line for line in log) == 1, log


@needs_tensorboard
def test_a_hostile_name_stays_inside_the_folder(run, tmp_path):
    for name in (HOSTILE, "../../x", "..", "a/b", "_federation"):
        there = name_there(name)
        assert "/" not in there
        assert not there.startswith(".")
        assert there != "_federation"
    assert name_there("site-01.b_c") == "site-01.b_c"
    with History(run / "history.sqlite") as history:
        history.record_round(a_round(2, {"../../x": metrics(0.5, 0.5, 0.5)}))
    before = set(tmp_path.iterdir())
    tensorboard(run, tmp_path / "logs")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "logs"}


def test_as_it_is_typed(run, tmp_path, monkeypatch):
    def typed(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["track", *map(str, arguments)], env={"COLUMNS": "300"})
        return result.exit_code, result.output

    code, said = typed(run)
    assert (code, "say where to" in said) == (2, True)
    code, said = typed(tmp_path / "none", "--tensorboard", tmp_path / "t")
    assert (code, "holds no run" in said) == (2, True)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    for module, option in (("tensorboard", "--tensorboard"), ("mlflow", "--mlflow")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            code, said = typed(run, option, tmp_path / module)
        assert code == 1
        assert f"is not installed: pip install -e '.[{module}]' -c constraints.txt" in said
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.lock").touch()
    code, said = typed(tmp_path / "empty", "--tensorboard", tmp_path / "t")
    assert (code, "no round is complete yet" in said) == (1, True)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
