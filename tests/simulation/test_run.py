"""`fed-sim run` as a user starts it: what it leaves, kills and resumption, and every way to fail."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from client.evaluation import evaluate
from client.site import load_site
from common.config_file import load_config
from common.files import locked
from common.metrics import summarise
from common.model import initial_weights, network_for
from common.weights import file_sha256, load_weights
from server.checkpoint import RunFolder
from server.history import History
from simulation.cli import app
from simulation.grid import run_in_process
from simulation.run import Engine, client_app, server_app, simulate

SITES = ["site-01", "site-06", "site-13"]
Run = Callable[..., Result]


@pytest.fixture
def run(cohort_data: Path, cohort_cache: Path, tiny_arguments, tmp_path: Path) -> Run:
    """A function: run in this process, one round only, with further arguments."""

    def start(*more: str, data: Path = cohort_data, out: Path = tmp_path / "run") -> Result:
        fixed = ("run", str(data), "--out", str(out), "--cache", str(cohort_cache))
        arguments = (*fixed, *tiny_arguments, "--set", "rounds.number=1", *more)
        return CliRunner().invoke(app, arguments)

    return start


@pytest.fixture
def data(cohort_data: Path, tmp_path: Path) -> Path:
    """A copy of the cohort that a test may spoil."""
    return Path(shutil.copytree(cohort_data, tmp_path / "data"))


def results(out: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def timeless(document: Any) -> Any:
    """Without what differs between two equal runs."""
    if isinstance(document, dict):
        times = ("seconds", "samples_per_second")
        return {key: timeless(value) for key, value in document.items() if key not in times}
    return [timeless(value) for value in document] if isinstance(document, list) else document


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---------------------------------------------------------------------------- what a run leaves


def test_a_run_succeeds_and_prints_one_json_document(finished_run):
    assert finished_run.exit_code == 0, finished_run.stderr
    assert json.loads(finished_run.stdout) == results(finished_run.folder)
    assert "Traceback" not in finished_run.stderr
    assert "Warning" not in finished_run.stderr


def test_every_round_has_every_sites_loss_dice_and_iou(finished_run):
    document = results(finished_run.folder)
    assert [one["round"] for one in document["rounds"]] == [1, 2, 3]
    for one in document["rounds"]:
        assert {c["site"]: c["trained"] for c in one["contributions"]} == dict.fromkeys(SITES, True)
        assert all(math.isfinite(c["train_loss"]) for c in one["contributions"])
        assert sorted(one["metrics"]) == SITES
        for site, metrics in one["metrics"].items():
            assert metrics["n"] == len(document["data"]["subjects"][site]["held_out"])
            for region in ("WT", "TC", "ET"):
                dice, iou = (metrics["means"][f"{key}/{region}"] for key in ("dice", "iou"))
                assert 0 <= iou <= dice <= 1
        means = [
            sum(m["means"][f"dice/{region}"] for region in ("WT", "TC", "ET")) / 3
            for m in one["metrics"].values()
        ]
        assert one["mean_dice"] == pytest.approx(sum(means) / 3)
        assert one["worst_dice"] == pytest.approx(min(means))


def test_the_verdict_names_who_contributed(finished_run):
    verdict = results(finished_run.folder)["verdict"]
    assert (verdict["complete"], verdict["everyone"], verdict["rounds"]) == (True, True, 3)
    assert verdict["contributed"] == {site: [1, 2, 3] for site in SITES}
    for site in SITES:
        assert f"{site} contributed to every round." in finished_run.stderr


def test_a_table_was_printed_for_each_round(finished_run):
    for number in (1, 2, 3):
        table = finished_run.stderr.split(f"Round {number}:")[1].split("Round ")[0]
        assert all(site in table for site in SITES)
        assert "Dice WT" in table
        assert "IoU WT" in table


def test_every_subject_is_on_one_side_and_counted(finished_run, cohort_data):
    document = results(finished_run.folder)
    subjects = document["data"]["subjects"]
    everyone = [i for of in subjects.values() for i in (*of["training"], *of["held_out"])]
    assert sorted(everyone) == sorted(p.name for p in cohort_data.iterdir() if p.is_dir())
    for card in document["sites"]:
        assert card["n_training"] == len(subjects[card["site"]]["training"])
        assert card["n_held_out"] == len(subjects[card["site"]]["held_out"])


def test_the_csv_holds_the_same_numbers(finished_run):
    document = results(finished_run.folder)
    with (finished_run.folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["stage"], r["round"], r["site"], r["metric"]): r["mean"] for r in rows}
    assert len(found) == len(rows)
    stages = [("round", one) for one in document["rounds"]] + [("final", document["final"])]
    expected = {
        (stage, str(one["round"]), site, key): value
        for stage, one in stages
        for site, metrics in one["metrics"].items()
        for key, value in metrics["means"].items()
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isnan(float(found[key])) if value is None else float(found[key]) == value


def test_the_final_metrics_are_those_of_the_model_file(finished_run, tiny_config):
    """Measured again from the file that a user takes away, on the held-out subjects."""
    final = results(finished_run.folder)["final"]
    weights, about = load_weights(finished_run.folder / "model.safetensors")
    assert about["round"] == final["round"]
    best = max(results(finished_run.folder)["rounds"], key=lambda one: one["mean_dice"])
    assert final["round"] == best["round"]
    network = network_for(tiny_config())
    network.load_state_dict(weights)
    for name in SITES:
        site = load_site(finished_run.folder / "sites" / name)
        again = summarise(
            evaluate(
                network, site.held_out, tiny_config(),
                what="", surface_distances=True, device=torch.device("cpu"),
            )
        )  # fmt: skip
        for key, value in final["metrics"][name]["means"].items():
            mean = again.means[key]
            assert math.isnan(mean) if value is None else mean == pytest.approx(value, abs=1e-6)
        assert any(key.startswith("hd95/") for key in again.means)


def test_no_subject_reaches_the_servers_database(finished_run):
    """Subject ids are the researcher's to see (results.json), not the server's."""
    content = (finished_run.folder / "history.sqlite").read_bytes()
    assert b"site-13" in content
    assert b"BraTS20_Training" not in content


# ------------------------------------------------------------------------------------- once more


def test_a_finished_run_started_again_trains_nothing(finished_run, run, tmp_path):
    out = Path(shutil.copytree(finished_run.folder, tmp_path / "again"))
    before = results(out)
    again = run("--set", "rounds.number=3", out=out)
    assert again.exit_code == 0, again.output
    assert results(out) == before, "times too: nothing was done again"
    assert "Round 1:" not in again.output
    assert "site-13 contributed to every round." in again.output


def test_another_configuration_in_the_same_folder_is_refused_by_its_keys(finished_run, run):
    before = results(finished_run.folder)
    again = run("--set", "seed=5", "--set", "training.epochs=2", out=finished_run.folder)
    assert again.exit_code == 2
    assert "(differs in: seed, training.epochs, rounds.number)" in again.output
    assert results(finished_run.folder) == before


def test_other_scans_in_the_same_folder_are_refused(finished_run, run, data, tmp_path):
    """Else half of the rounds would be of one cohort and half of another."""
    out = Path(shutil.copytree(finished_run.folder, tmp_path / "again"))
    of_site_06 = results(out)["data"]["subjects"]["site-06"]["training"]
    a, b = (data / subject for subject in of_site_06[:2])
    for path in a.iterdir():
        shutil.copy(path, b / path.name.replace(a.name, b.name))
    shutil.rmtree(a)
    again = run("--set", "rounds.number=3", data=data, out=out)
    assert again.exit_code == 1
    assert "other scans" in again.output
    assert "site-06" in again.output
    assert results(out) == results(finished_run.folder)


def test_a_partition_file_beside_the_user_does_not_hinder_resumption(run, cohort_data, tmp_path):
    """Its path is relative to where the user stands, not to the run's folder."""
    ids = sorted(path.name for path in cohort_data.iterdir() if path.is_dir())
    lines = [f"{number % 2 + 1},{subject}" for number, subject in enumerate(ids)]
    (tmp_path / "parts.csv").write_text("\n".join(["Partition_ID,Subject_ID", *lines]))
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(2):
            done = run("--set", "split.by=csv", "--set", "split.file=parts.csv")
            assert done.exit_code == 0, done.output
    finally:
        os.chdir(here)
    assert list(results(tmp_path / "run")["data"]["subjects"]) == ["part-01", "part-02"]


def test_the_order_in_which_sites_connect_makes_no_difference(finished_run, tmp_path):
    """Node numbers are the network's business; the result is the sites'."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    shutil.copy(finished_run.folder / "federation.yaml", folder.config)
    sites = shutil.copytree(finished_run.folder / "sites", tmp_path / "sites")
    nodes = {17: "site-13", 4: "site-01", 9: "site-06"}
    run_in_process(
        server_app, client_app, folder.path, {n: Path(sites, s) for n, s in nodes.items()}
    )
    expected = (finished_run.folder / "model.safetensors").read_bytes()
    assert folder.model.read_bytes() == expected


def test_updates_as_fp16_change_give_nearly_the_same_model(run, tiny_config, tmp_path):
    """One round, so that the sites train alike and only the way back differs."""
    start = initial_weights(tiny_config())
    models, documents = {}, {}
    for updates in ("fp16", "fp32"):
        out = tmp_path / updates
        assert run("--set", f"rounds.updates={updates}", out=out).exit_code == 0
        models[updates], _ = load_weights(out / "model.safetensors")
        documents[updates] = results(out)
    differ = 0
    for name, exact in models["fp32"].items():
        moved = (exact - start[name]).abs().max()
        error = (models["fp16"][name] - exact).abs().max()
        assert error <= 1e-2 * moved, name  # sites may cancel each other, hence not 2^-11
        differ += bool(error > 0)
    assert differ > len(start) / 2, "they did travel as fp16"
    half, full = (documents[updates]["rounds"][0] for updates in ("fp16", "fp32"))
    for a, b in zip(half["contributions"], full["contributions"], strict=True):
        assert a["train_loss"] == b["train_loss"]
        assert a["bytes"] < b["bytes"]
    assert half["loss"] == pytest.approx(full["loss"], abs=1e-3)
    assert half["mean_dice"] == pytest.approx(full["mean_dice"], abs=0.01)


# ------------------------------------------------------------------------------ kill and continue


@pytest.mark.slow
def test_killed_twice_and_continued_it_ends_as_if_never_interrupted(
    finished_run, run, cohort_data, tiny_arguments, tmp_path
):
    out = tmp_path / "run"
    program = str(Path(sys.executable).parent / "fed-sim")
    command = (program, "run", str(cohort_data), "--out", str(out), *tiny_arguments)

    def kill_once(reached: Callable[[], bool], meanwhile: Callable[[], None] | None = None) -> None:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not reached():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
            if meanwhile:
                process.send_signal(signal.SIGSTOP)
                meanwhile()
            process.send_signal(signal.SIGKILL)

    kill_once(lambda: len(list((out / "cache").glob("[!.]*/about.json"))) >= 5)
    prepared = {p: p.stat().st_ino for p in (out / "cache").glob("[!.]*/image.npy")}
    assert not (out / "history.sqlite").exists()

    def a_second_process_is_refused() -> None:
        second = run("--set", "rounds.number=3", out=out)
        assert second.exit_code == 1
        assert "in use by another process" in second.output

    kill_once(lambda: rounds_of(out) == 2, a_second_process_is_refused)
    assert {p: p.stat().st_ino for p in prepared} == prepared, "nothing was prepared twice"
    assert rounds_of(out) == 2
    assert not (out / "model.safetensors").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing after round 2" in done.stderr
    assert timeless(results(out)) == timeless(results(finished_run.folder))
    for name in ("model.safetensors", "model-worst-site.safetensors"):
        assert (out / name).read_bytes() == (finished_run.folder / name).read_bytes()


def rounds_of(out: Path) -> int:
    if not (out / "history.sqlite").exists():
        return 0
    database = sqlite3.connect(f"file:{out / 'history.sqlite'}?mode=ro", uri=True, timeout=5)
    try:
        return database.execute("SELECT count(*) FROM rounds").fetchone()[0]
    except sqlite3.OperationalError:  # its tables are being made
        return 0
    finally:
        database.close()


def test_a_kill_while_the_folder_was_claimed_does_not_lock_the_user_out(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".federation.yaml.123.tmp").write_text("half")
    assert run().exit_code == 0


# -------------------------------------------------------------------------------- bad data, usage


def test_a_corrupt_subject_fails_the_run_and_is_named(run, data):
    bad = next(data.glob("*/*_t1ce.nii.gz"))
    truncate(bad)
    failed = run("--json", data=data)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert bad.name in failed.stderr
    assert "on_bad_subject: skip" in failed.stderr


def test_a_corrupt_subject_may_be_left_out_and_is_said(run, data, tmp_path):
    bad = next(data.glob("*/*_t1ce.nii.gz"))
    truncate(bad)
    done = run("--set", "on_bad_subject=skip", data=data)
    assert done.exit_code == 0, done.output
    assert f"Left out, unusable: {bad.parent.name}" in done.output
    document = results(tmp_path / "run")
    assert document["data"]["left_out"] == [bad.parent.name]
    assert [f["file"] for f in document["data"]["findings"]] == [bad.name]
    assert bad.parent.name not in json.dumps(document["data"]["subjects"])
    assert sum(card["n_left_out"] for card in document["sites"]) == 1


def test_a_refused_run_may_be_started_again_with_the_advice_it_gave(run, data):
    truncate(next((data / "BraTS20_Training_001").glob("*_t2.nii.gz")))
    assert run(data=data).exit_code == 1
    assert run("--set", "on_bad_subject=skip", data=data).exit_code == 0


def test_a_site_that_lost_all_its_subjects_is_said(run, data, tmp_path):
    members = results_of_split(data)["site-06"]
    for subject in members:
        truncate(data / subject / f"{subject}_t1.nii.gz")
    done = run("--set", "on_bad_subject=skip", data=data)
    assert done.exit_code == 0, done.output
    assert "site-06 took no part: none of its subjects can be used." in done.output
    assert results(tmp_path / "run")["data"]["lost_sites"] == ["site-06"]


def results_of_split(data: Path) -> dict[str, list[str]]:
    done = CliRunner().invoke(app, ["split", str(data), "--json"])
    sites = json.loads(done.stdout)["sites"]
    return {name: site["training"] + site["held_out"] for name, site in sites.items()}


def test_a_run_goes_on_with_the_threads_it_began_with(
    cohort_data, cohort_cache, tiny_arguments, tmp_path
):
    out = tmp_path / "run"
    call = ["run", str(cohort_data), "--out", str(out), "--cache", str(cohort_cache)]
    fixed = [a for a in tiny_arguments if a != "training.threads=1"]
    assert len(fixed) == len(tiny_arguments) - 1
    fixed.pop(tiny_arguments.index("training.threads=1") - 1)  # its --set
    call += [*fixed, "--set", "rounds.number=1"]
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        pytest.skip("needs two cores")
    assert CliRunner().invoke(app, call).exit_code == 0
    assert load_config(out / "federation.yaml").training.threads == len(available)
    os.sched_setaffinity(0, available[:1])
    try:
        again = CliRunner().invoke(app, call)
    finally:
        os.sched_setaffinity(0, available)
    assert again.exit_code == 0, again.output
    assert load_config(out / "federation.yaml").training.threads == len(available)


def test_a_held_out_site_is_measured_every_round_and_never_trains(run, tmp_path):
    done = run("--set", "split.hold_out=[site-06]", "--set", "on_bad_subject=skip")
    assert done.exit_code == 0, done.output
    document = results(tmp_path / "run")
    assert [c["site"] for c in document["rounds"][0]["contributions"]] == ["site-01", "site-13"]
    assert document["rounds"][0]["metrics"]["site-06"]["n"] == 6
    assert sorted(document["verdict"]["contributed"]) == ["site-01", "site-13"]


def test_what_took_no_part_or_was_not_measured_is_said(run, data, tmp_path):
    stranger = data / "Hospital_X_1"
    like = next(path for path in data.iterdir() if path.is_dir())
    stranger.mkdir()
    for path in like.iterdir():
        shutil.copy(path, stranger / path.name.replace(like.name, stranger.name))
    done = run("--set", "held_out_fraction=0.1", "--set", "seed=2", data=data)
    document = results(tmp_path / "run")
    assert "No site for subject Hospital_X_1" in done.output
    assert document["data"]["unmapped"] == ["Hospital_X_1"]
    unmeasured = [card["site"] for card in document["sites"] if card["n_held_out"] == 0]
    assert unmeasured, "the seed was chosen so"
    for site in unmeasured:
        assert f"{site} holds out nobody" in done.output


def test_a_diverging_training_fails_in_words_and_names_the_site(run, tmp_path):
    failed = run("--set", "training.learning_rate=1e30")
    assert failed.exit_code == 1
    assert "site-01" in failed.output
    assert "lower training.learning_rate" in failed.output
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert document["final"] is None
    assert not document["verdict"]["complete"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_full_disk_fails_in_words(run, cohort_data, tmp_path, tiny_arguments):
    """No file may grow beyond 50 kB here, which the scans' copies do and a history does."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from simulation.cli import main; sys.argv[0] = 'fed-sim'; main()"
    )
    command = (
        sys.executable, "-c", limited, "run", str(cohort_data), "--out", str(tmp_path / "run"),
        *tiny_arguments,
    )  # fmt: skip
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "the disk may be full" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": Path("/nowhere")}, "/nowhere does not exist"),
        ({"data": Path(__file__)}, "is a file, not a folder"),
        ({"out": Path(__file__).parent}, "is not empty and holds no run"),
        ({"out": Path(__file__)}, "is not empty and holds no run"),
    ],
)
def test_wrong_folders_are_wrong_usage(run, change, text):
    failed = run(**change)
    assert failed.exit_code == 2
    assert text in " ".join(failed.output.replace("│", " ").split())


def test_an_unknown_key_is_wrong_usage_and_the_nearest_is_named(run, tmp_path):
    failed = run("--set", "training.epoch=2")
    assert failed.exit_code == 2
    assert "`epochs`" in failed.output
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_built_is_wrong_usage(run, tmp_path):
    failed = run("--set", "preprocess.shape=[33,32,32]")
    assert failed.exit_code == 2
    assert "multiples of 16" in failed.output
    assert not (tmp_path / "run").exists()


def test_a_folder_without_subjects_fails_in_words(run, tmp_path):
    (tmp_path / "empty").mkdir()
    failed = run(data=tmp_path / "empty")
    assert failed.exit_code == 1
    assert "no subject was found" in failed.output
    assert "BraTS20_Training_001_t1.nii.gz" in failed.output, "how files must be named"


def test_the_lock_is_held_while_it_works_and_released_after(
    cohort_data, cohort_cache, tiny_config, tmp_path
):
    """Also by a run that failed, in a process that lives on."""
    folder = RunFolder(tmp_path / "run")
    config = tiny_config("training.learning_rate=1e30", "rounds.number=1")
    with pytest.raises(RuntimeError):
        simulate(cohort_data, folder.path, config, cache=cohort_cache, engine=Engine())
    with locked(folder.lock):
        pass


# -------------------------------------------------------------------------- weights to begin with


def test_a_run_begins_from_given_weights_and_goes_on_without_them(
    finished_run, run, cohort_data, tmp_path, monkeypatch
):
    """The path is meant from where the user stands."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(finished_run.folder / "model.safetensors", "start.safetensors")
    given, _ = load_weights(Path("start.safetensors"))
    begin = ("--set", "server.init_from=start.safetensors")
    # a rate of nearly nothing: the first round's model is the one that it began from
    still = ("--set", "training.learning_rate=1e-12", "--set", "rounds.updates=fp32")
    done = run(*begin, *still)
    assert done.exit_code == 0, done.output
    model, _ = load_weights(tmp_path / "run" / "model.safetensors")
    for name, tensor in given.items():
        assert torch.allclose(model[name], tensor, rtol=0, atol=1e-6), name
    with History(tmp_path / "run" / "history.sqlite") as history:
        assert history.noted("init_from") == file_sha256(Path("start.safetensors"))
    kept = load_config(tmp_path / "run" / "federation.yaml").server.init_from
    assert kept == Path("start.safetensors").absolute()
    Path("start.safetensors").unlink()
    assert run(*begin, *still).exit_code == 0, "nothing is begun again"
    changed = run(*still)
    assert changed.exit_code == 2
    assert "(differs in: server.init_from)" in changed.output


def test_weights_that_do_not_fit_are_refused_before_a_scan_is_read(
    finished_run, run, cohort_data, tmp_path
):
    def refused(*more: str) -> str:
        failed = run(*more, data=tmp_path / "no-scans")
        assert failed.exit_code == 2
        assert not (tmp_path / "run").exists()
        return failed.output

    (tmp_path / "no-scans").mkdir()
    start = f"server.init_from={finished_run.folder / 'model.safetensors'}"
    other = refused("--set", start, "--set", "network.channels=[2,2,2,2,4]")
    assert "`server.init_from`" in other
    assert "expected torch.float32" in other
    assert "no file" in refused("--set", "server.init_from=gone.safetensors")
