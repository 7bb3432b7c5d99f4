"""A hospital's folder and key pair: made on its own machine, kept whole, changed on demand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.hospital import (
    HospitalError,
    HospitalFolder,
    init_hospital,
    load_hospital,
    rotate_key,
)
from client.ledger import anchor_in
from client.policy import Policy
from client.site_config import SiteConfig, load_site_config
from common.audit_log import LogError, verified
from common.config_file import ConfigError
from common.files import AlreadyInUse, locked
from common.keys import BadKey, fingerprint, load_private_key, read_public_key
from common.site_names import BadName

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from client.cli import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd="/",
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path) -> HospitalFolder:
    (tmp_path / "scans").mkdir()
    return init_hospital(tmp_path / "fed", "Oslo", tmp_path / "scans")


def kept(folder: HospitalFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def test_the_two_keys_belong_together_and_carry_the_name(folder):
    load_hospital(folder.path)
    sent = read_public_key(folder.public_key)
    assert sent.comment == "Oslo"
    assert sent.key == load_private_key(folder.private_key).public_key()


def test_only_its_owner_enters_the_folder_or_reads_the_key(folder):
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.private_key.stat().st_mode & 0o777 == 0o600


def test_the_settings_are_those_given_and_the_defaults(folder, tmp_path):
    config = load_site_config(folder.config)
    assert config.data == tmp_path / "scans"
    assert config.cache == folder.cache
    assert (config.device, config.patience_hours) == ("auto", 24)


def test_a_finished_folder_is_refused_and_untouched(folder, tmp_path):
    before = kept(folder)
    with pytest.raises(HospitalError, match="stays as it is"):
        init_hospital(folder.path, "Bergen", tmp_path)
    assert kept(folder) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from client.hospital import init_hospital
left, replace = int(sys.argv[2]), Path.replace
def counted(self, target):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)
Path.replace = counted
init_hospital(Path(sys.argv[1]), "First", Path("/"))
"""


@pytest.mark.parametrize("written", range(5))
def test_kill_9_after_any_file_and_init_again_keeps_the_key(tmp_path, written):
    path = tmp_path / "fed"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(written)])
    assert killed.returncode == -9
    with pytest.raises(HospitalError, match="fed-client init"):
        load_hospital(path)
    key = HospitalFolder(path).private_key
    before = key.read_bytes() if written else None
    init_hospital(path, "Oslo", tmp_path)
    load_hospital(path)
    assert read_public_key(HospitalFolder(path).public_key).comment == "Oslo"
    assert before is None or key.read_bytes() == before
    kinds = [entry.kind for entry in verified(HospitalFolder(path).audit).entries]
    assert kinds == ["key", "folder made"], "once"


def test_a_new_key_is_in_the_audit_log_and_over_a_changed_one_none_is_made(tmp_path):
    folder = init_hospital(tmp_path / "fed", "Oslo", tmp_path)
    first = fingerprint(read_public_key(folder.public_key).key)
    rotate_key(folder)
    second = fingerprint(read_public_key(folder.public_key).key)
    *_, introduced, rotated = verified(folder.audit).entries
    assert (introduced.kind, introduced.details["fingerprint"]) == ("key", second)
    assert (rotated.kind, rotated.details) == ("key rotated", {"old": first, "new": second})
    folder.audit.path.write_bytes(folder.audit.path.read_bytes()[:-9])
    with pytest.raises(LogError, match="its end is missing"):
        rotate_key(folder)
    assert fingerprint(read_public_key(folder.public_key).key) == second


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "BraTS20_Training_001").mkdir()
    with pytest.raises(HospitalError, match="--data"):
        init_hospital(tmp_path, "Oslo", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(BadName):
        init_hospital(tmp_path / "new", "a/b", tmp_path)
    assert not (tmp_path / "new").exists()


def test_rotation_makes_another_pair_and_keeps_the_old(folder):
    first = folder.private_key.read_bytes()
    old = rotate_key(folder)
    assert old is not None
    assert old.name.startswith("site.key.old-2")
    assert old.read_bytes() == first
    assert old.stat().st_mode & 0o777 == folder.private_key.stat().st_mode & 0o777 == 0o600
    second = folder.private_key.read_bytes()
    assert second != first
    load_hospital(folder.path)
    assert read_public_key(folder.public_key).comment == "Oslo"
    again = rotate_key(folder)  # on the same day
    assert again is not None
    assert (old.read_bytes(), again.read_bytes()) == (first, second)


def test_rotation_is_the_way_out_of_a_lost_damaged_or_open_key(folder):
    folder.private_key.chmod(0o644)
    with pytest.raises(BadKey, match="chmod"):
        load_hospital(folder.path)
    assert rotate_key(folder) is not None
    load_hospital(folder.path)
    folder.private_key.write_bytes(b"")
    rotate_key(folder)
    load_hospital(folder.path)
    folder.private_key.unlink()
    assert rotate_key(folder) is None
    load_hospital(folder.path)


def test_rotation_waits_for_a_client_that_runs(folder):
    before = folder.private_key.read_bytes()
    # a lock of another open file, as another process has it
    with locked(folder.lock), pytest.raises(AlreadyInUse):
        rotate_key(folder)
    assert folder.private_key.read_bytes() == before


def test_keys_of_two_pairs_are_noticed(folder, tmp_path):
    other = init_hospital(tmp_path / "other", "Bergen", tmp_path)
    shutil.copy(other.public_key, folder.public_key)
    with pytest.raises(BadKey, match="does not belong"):
        load_hospital(folder.path)


def test_folders_in_the_settings_are_meant_from_the_file(folder, tmp_path):
    folder.config.write_text("data: ../scans\ncache: /fast/cache\ndevice: cuda:1\n")
    config = load_site_config(folder.config)
    assert config.data.resolve() == tmp_path / "scans"
    assert config.cache == Path("/fast/cache")
    assert config.device == "cuda:1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "`data` is missing"),
        ("dat: /x", "`dat` is not a known key; did you mean `data`?"),
        ("data: /x\nzzz: {}", "valid here: data, device, cache, patience_hours, privacy"),
        ("data: /x\nprivacy: on", "`privacy`"),
        ("data: /x\nprivacy: {}", "`privacy.epsilon` is missing"),
        ("data: /x\nprivacy: {epsilon: 0}", "`privacy.epsilon`"),
        ("data: /x\nprivacy: {epsilon: .inf}", "`privacy.epsilon`"),
        ("data: /x\nprivacy: {epsilon: 1, delta: 1}", "`privacy.delta`"),
        ("data: /x\nprivacy: {epsilon: 1, clip: -1}", "`privacy.clip`"),
        ("data: /x\nprivacy: {epsilon: 1, metrics: all}", "`privacy.metrics`"),
        ("data: /x\nprivacy: {epsilon: 1, sigma: 2}", "`privacy.sigma` is not a known key"),
        ("data: /x\ndevice: gpu", "`device`: must be auto, cpu, cuda"),
        ("data: /x\ndevice: 'cuda:0\\n'", "`device`: must be"),
        ("data: /x\npatience_hours: 0", "`patience_hours`"),
        ("data: /x\npatience_hours: .inf", "`patience_hours`"),
        ("data: 5", "`data`"),
        ("data: [", "not valid YAML, line 1"),
        ("data: /x\ndata: /y", "given twice"),
    ],
)
def test_settings_that_cannot_be_used_are_named(folder, text, said):
    folder.config.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site_config(folder.config)
    assert said in str(caught.value)
    assert str(folder.config) in str(caught.value)


def test_every_setting_is_explained():
    """A section says itself what it is."""
    settings = {**SiteConfig.model_fields, **Policy.model_fields}
    unexplained = {name for name, field in settings.items() if not field.description}
    assert unexplained == {"policy"}
    assert Policy.__doc__


def test_init_on_the_command_line(tmp_path):
    (tmp_path / "scans").mkdir()
    result = run("init", tmp_path / "fed", "--name", "Oslo", "--data", tmp_path / "scans")
    assert (result.returncode, result.stderr) == (0, "")
    line = (tmp_path / "fed" / "site.pub").read_text()
    assert line in result.stdout
    if shutil.which("ssh-keygen"):
        shown = subprocess.run(
            ["ssh-keygen", "-lf", tmp_path / "fed" / "site.pub"], capture_output=True, text=True
        ).stdout
        assert shown.split()[1] in result.stdout
    assert "PRIVATE" not in result.stdout
    assert run("init", tmp_path / "fed", "--name", "Oslo", "--data", tmp_path).returncode == 1


def test_rotation_on_the_command_line(folder):
    result = run("rotate-key", folder.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert folder.public_key.read_text() in result.stdout
    assert "--name Oslo --replace" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["init", "{}/new"], 2, "--name"),
        (["init", "{}/new", "--name", "a b", "--data", "{}"], 2, "for example Oslo-1"),
        (["init", "{}/new", "--name", "Oslo", "--data", "{}/gone"], 2, "is no folder"),
        (["init", "/proc/new", "--name", "Oslo", "--data", "{}"], 1, "/proc/new"),
        (["rotate-key", "{}"], 1, "no hospital's folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(tmp_path, arguments, code, said):
    result = run(*(text.replace("{}", str(tmp_path)) for text in arguments))
    assert (result.returncode, result.stdout) == (code, "")
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["privacy: off", 'privacy: "off"', "privacy: false", ""])
def test_privacy_is_off_until_it_is_asked_for(folder, text):
    folder.config.write_text(f"data: /x\n{text}")
    assert load_site_config(folder.config).privacy is None


def test_a_budget_is_read_with_its_defaults(folder):
    folder.config.write_text("data: /x\nprivacy: {epsilon: 8}\nprivacy_ledger: l.sqlite")
    config = load_site_config(folder.config)
    assert vars(config.privacy) == {
        "epsilon": 8,
        "delta": None,
        "clip": None,
        "metrics": "withheld",
    }
    assert config.privacy_ledger == folder.path / "l.sqlite"


def test_init_makes_the_ledger_beside_the_folder_once_for_all_folders(tmp_path):
    first = init_hospital(tmp_path / "a", "Oslo", tmp_path)
    ledger = load_site_config(first.config).privacy_ledger
    assert ledger.resolve() == tmp_path / "privacy-ledger.sqlite"
    before = ledger.read_bytes()
    second = init_hospital(tmp_path / "b", "Oslo", tmp_path)
    assert load_site_config(second.config).privacy_ledger.resolve() == ledger.resolve()
    assert ledger.read_bytes() == before, "a ledger that is there is kept"


def test_init_makes_no_ledger_where_one_was_lost(tmp_path):
    first = init_hospital(tmp_path / "a", "Oslo", tmp_path)
    first.state.mkdir()
    anchor_in(first.state).write_text("{}")
    ledger = tmp_path / "privacy-ledger.sqlite"
    ledger.unlink()
    init_hospital(tmp_path / "b", "Oslo", tmp_path)
    assert not ledger.exists()
