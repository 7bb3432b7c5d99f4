"""A federation.yaml says what it means, or is refused in words that name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.brats import MODALITIES
from common.config import PRESETS, FederationConfig
from common.config_file import ConfigError, dump_config, load_config
from tests.common.conftest import every_change


def load(folder: Path, text: str | bytes, **more: Any) -> FederationConfig:
    path = folder / "federation.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, **more)


def refusal(folder: Path, text: str | bytes, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "written", "meant"),
    [
        ("trainig: {}", "trainig", "training"),
        ("training: {epoch: 2}", "training.epoch", "epochs"),
        ("training: {augment: {flips: true}}", "training.augment.flips", "flip"),
        ("network: {chanels: [8]}", "network.chanels", "channels"),
        ("split: {merge_hospital: true}", "split.merge_hospital", "merge_hospitals"),
        ("rounds: {minimum_sites: 2}", "rounds.minimum_sites", "min_sites"),
        ("server: {adress: a}", "server.adress", "address"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(tmp_path, text, written, meant):
    message = refusal(tmp_path, text)
    assert f"`{written}` is not a known key; did you mean `{meant}`?" in message
    assert str(tmp_path / "federation.yaml") in message


def test_unknown_key_far_from_all_names_lists_them(tmp_path):
    message = refusal(tmp_path, "loss: {zzz: 1}")
    assert "valid here: focal_weight, gamma, alpha, include_background." in message
    assert "`training.1` is not a known key" in refusal(tmp_path, "training: {1: 2}")


def test_every_problem_is_named_at_once(tmp_path):
    message = refusal(tmp_path, "seed: x\nrounds: {number: 0}\nnme: a")
    assert len(message.splitlines()) == 3
    assert all(f"`{key}`" in message for key in ("seed", "rounds.number", "nme"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {learning_rate: 1e-4}", "1e-4"),  # YAML 1.1 takes it for a text
        ("training: {learning_rate: 1.0e-4}", "1e-4"),
        ("training: {learning_rate: 0.0001}", "1e-4"),
        ("training: {learning_rate: 1}", "1"),
    ],
)
def test_learning_rate_however_it_is_written(tmp_path, text, expected):
    rate = load(tmp_path, text).training.learning_rate
    assert isinstance(rate, float)
    assert rate == float(expected)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training: {learning_rate: .inf}", "training.learning_rate"),
        ("loss: {gamma: .nan}", "loss.gamma"),
        ("training: {augment: {flip: 7}}", "training.augment.flip"),
        ("held_out_fraction: 1", "held_out_fraction"),
        ("seed: -1", "seed"),
        ("name: ../up", "name"),
        ("training: {patch: [64, 64]}", "training.patch"),
        ("preprocess: {shape: [128, 128, 0]}", "preprocess.shape"),
        ("network: {name: vnet}", "network.name"),
        ("training:", "training"),
        ("training: 5", "training"),
        ("split: {by: csv}", "split"),
        ("split: {by: iid}", "split"),
        ("rounds: {updates: fp8}", "rounds.updates"),
        ("rounds: {max_change: 0}", "rounds.max_change"),
        ("rounds: {max_change: .inf}", "rounds.max_change"),
        ("rounds: {outlier_factor: 1}", "rounds.outlier_factor"),
        ("rounds: {aggregation: mean}", "rounds.aggregation"),
        ("rounds: {trim: 0.5}", "rounds.trim"),
        ("rounds: {bad_sites: -1}", "rounds.bad_sites"),
        ("rounds: {deadline_minutes: 0}", "rounds.deadline_minutes"),
        ("server: {port: 0}", "server.port"),
        ("server: {port: 65536}", "server.port"),
        ("server: {address: 'https://host'}", "server.address"),
        ("server: {address: ''}", "server.address"),
        ("server: {address: 'a b'}", "server.address"),
        ("server: {wait_minutes: 0}", "server.wait_minutes"),
        ("server: {return_minutes: -1}", "server.return_minutes"),
        ("server: {attempts: 0}", "server.attempts"),
    ],
)
def test_values_that_cannot_be_used_are_named(tmp_path, text, key):
    assert f"`{key}`:" in refusal(tmp_path, text)


def test_alpha_is_one_factor_or_one_for_each_class(tmp_path):
    assert load(tmp_path, "loss: {alpha: 0.5}").loss.alpha == 0.5
    assert load(tmp_path, "loss: {alpha: [1, 2, 3, 4]}").loss.alpha == (1, 2, 3, 4)
    for wrong in ("[1, 2, 3]", "[1, 2, 3, 0]", "-1", "abc", "[1, 2, 3, 4, 5]"):
        message = refusal(tmp_path, f"loss: {{alpha: {wrong}}}")
        assert "`loss.alpha`:" in message
        assert len(message.splitlines()) == 1
        assert "constrained" not in message


def test_modalities_take_the_channel_order_of_the_system(tmp_path):
    assert load(tmp_path, "modalities: [flair, t1ce]").modalities == ("t1ce", "flair")
    assert load(tmp_path, "").modalities == MODALITIES
    for wrong in ("[t1, t1]", "[]", "[T1]", "[pet]", "t1ce"):
        assert "`modalities`: must be" in refusal(tmp_path, f"modalities: {wrong}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xff\xfe\x00bad", "UTF-8"),
        (b"a: \x00", "not valid YAML"),
        ("seed: 1\nname: [", "not valid YAML, line 2"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("- seed\n- 1", "found a list"),
        ("hello", "found a str"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("name: 2020-13-45", "not valid YAML"),  # PyYAML raises a bare ValueError
        ("[" * 500, "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("preset: [quick]", "preset ['quick'] is not one of quick, default, reference, private"),
        ("preset: qick", "preset 'qick' is not one of"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_words(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


def test_a_key_given_twice_is_refused(tmp_path):
    text = "training:\n  epochs: 1\nrounds: {number: 3}\ntraining:\n  batch_size: 4\n"
    assert "line 4: the key `training` is given twice" in refusal(tmp_path, text)
    assert "`epochs` is given twice" in refusal(tmp_path, "training: {epochs: 1, epochs: 2}")


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


def test_an_empty_file_means_the_defaults(tmp_path):
    assert load(tmp_path, "") == load_config() == FederationConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_dump_and_load_give_the_same(tmp_path, preset):
    config = load_config(
        preset=preset,
        assign=["loss.alpha=[1, 2, 3, 4]", "split.file=some.csv", "split.hold_out=[a, b]"],
    )
    again = load(tmp_path, dump_config(config))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert load(tmp_path, dump_config(load_config(preset=preset))) == load_config(preset=preset)


def test_presets_are_defaults_that_the_file_overrides(tmp_path):
    config = load(tmp_path, "preset: quick\npreprocess: {normalise: minmax}")
    assert config.preprocess.shape == (48, 48, 48)
    assert config.preprocess.normalise == "minmax"
    assert load(tmp_path, "preset: quick", preset="default").preprocess.mode == "patches"


def test_reference_preset_is_the_published_study():
    study = load_config(preset="reference")
    assert (study.preprocess.mode, study.preprocess.shape) == ("resample", (128, 128, 128))
    assert study.preprocess.normalise == "minmax"
    assert (study.network.name, study.network.norm) == ("unet", "batch")
    assert (study.training.learning_rate, study.training.batch_size) == (1e-4, 2)
    assert (study.rounds.number, study.training.epochs) == (10, 1)
    assert study.rounds.plateau_patience is study.rounds.stop_patience is None


def test_assignments_override_the_file(tmp_path):
    config = load(
        tmp_path,
        "training: {epochs: 5, batch_size: 4}",
        assign=[
            "training.epochs=2",
            " training.augment.flip = false",
            "modalities=[flair]",
            "rounds.plateau_patience=null",
            "loss.alpha=[1, 1, 1, 1]",
            "name=a-b",
        ],
    )
    assert (config.training.epochs, config.training.batch_size) == (2, 4)
    assert config.training.augment.flip is False
    assert config.modalities == ("flair",)
    assert config.rounds.plateau_patience is None
    assert config.name == "a-b"
    assert load_config(assign=["preset=quick"]).preset == "quick"


@pytest.mark.parametrize("text", ["seed", "=2", "", ".=1", "training..epochs=1", "training.=1"])
def test_malformed_assignment_shows_how_to_write_one(text):
    with pytest.raises(ConfigError, match=r"write section\.key=value"):
        load_config(assign=[text])


def test_assignment_with_a_bad_value_names_itself():
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(assign=["name=["])
    with pytest.raises(ConfigError, match=r"`training\.epochs`"):
        load_config(assign=["training.epochs.x=1"])
    with pytest.raises(ConfigError, match="did you mean `flip`"):
        load_config(assign=["training.augment.flp=1"])


def test_a_relative_split_file_is_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = "split: {by: csv, file: lists/sites.csv}"
    assert load(tmp_path, text).split.file == tmp_path / "lists" / "sites.csv"
    assert load(tmp_path, "split: {file: /x.csv}").split.file == Path("/x.csv")
    typed = load(tmp_path, text, assign=["split.file=typed.csv"])
    assert typed.split.file == tmp_path / "elsewhere" / "typed.csv"


def test_split_file_still_means_the_same_in_a_copy_of_the_configuration(tmp_path, monkeypatch):
    """The run folder holds a copy; a resumed run compares it with the original."""
    monkeypatch.chdir(tmp_path)
    Path("federation.yaml").write_text("split: {by: csv, file: sites.csv}")
    config = load_config(Path("federation.yaml"))
    (tmp_path / "run").mkdir()
    assert load(tmp_path / "run", dump_config(config)) == config


def test_fingerprint_covers_every_agreed_value_and_nothing_of_the_split_or_the_server():
    config = load_config()
    seen = set()
    for key, changed in every_change(config):
        section = key.split(".")[0]
        seen.add(section)
        assert changed != config, key
        same = changed.fingerprint() == config.fingerprint()
        assert same == (section == "server"), key
    assert seen >= {"server", "rounds", "training", "network", "loss", "preprocess", "seed"}
    for split in ("by=folders", "min_subjects=3", "hold_out=[a]", "file=x.csv"):
        assert load_config(assign=[f"split.{split}"]).fingerprint() == config.fingerprint()


def test_what_is_agreed_is_all_but_the_split_and_the_server():
    config = load_config()
    everything = config.model_dump(mode="json")
    assert config.agreed() == {k: v for k, v in everything.items() if k not in ("split", "server")}
    assert everything.keys() - config.agreed().keys() == {"split", "server"}
    assert config.agreed()["rounds"]["updates"] == "fp16"
    json.dumps(config.agreed(), allow_nan=False)


def test_fingerprint_is_of_values_and_not_of_how_they_are_written(tmp_path):
    config = load(tmp_path, "training: {learning_rate: 1e-4}\nmodalities: [flair, t2, t1ce, t1]")
    assert config.fingerprint() == load_config().fingerprint()


@pytest.mark.parametrize("way", ["trimmed_mean", "median", "krum"])
def test_what_compares_updates_is_refused_with_secure_aggregation(way):
    with pytest.raises(ConfigError, match="hides from the server"):
        load_config(assign=["secure_aggregation=true", f"rounds.aggregation={way}"])
    with pytest.raises(ConfigError) as caught:
        load_config(assign=["secure_aggregation=true", f"rounds.aggregation={way}"])
    assert len(str(caught.value)) < 300, "not the whole configuration"
    assert "``" not in str(caught.value)
    assert load_config(assign=["secure_aggregation=true"]).secure_aggregation
