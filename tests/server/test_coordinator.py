"""A coordinator's folder is made whole or can be finished, and its keys survive everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.code_hash import code_hash
from common.config_file import ConfigError, load_config
from common.invitation import read_invitation, write_invitation
from common.keys import fingerprint, new_private_key
from server.certificates import read_certificate
from server.coordinator import (
    CoordinatorError,
    CoordinatorFolder,
    federation_id,
    host_and_port,
    init_folder,
    invitation,
    load_coordinator,
    renew_certificate,
    terms,
)
from server.enrolment import active, admit

CONFIG = load_config(
    preset="quick", assign=["name=study", "server.address=fed.org", "rounds.min_sites=2"]
)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name -> content and time of change of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    return init_folder(tmp_path / "study", CONFIG, ["10.0.0.5"])


def test_what_was_settled_is_what_is_read(folder):
    load_coordinator(folder.path)
    again = load_config(folder.config)
    assert again == CONFIG
    hosts = read_certificate(folder.server_certificate).hosts
    assert set(hosts) == {"fed.org", "10.0.0.5", "localhost", "127.0.0.1"}
    assert active(folder.enrolled) == []
    assert "split:" not in folder.config.read_text()  # simulations only


def test_only_its_owner_enters_the_folder(folder, tmp_path):
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "there").mkdir(mode=0o755)
    init_folder(tmp_path / "there", CONFIG)
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o700


def test_two_federations_have_nothing_in_common(folder, tmp_path):
    other = init_folder(tmp_path / "other", CONFIG)
    assert federation_id(other) != federation_id(folder)
    for name in ("ca.key", "server.key", "ca.crt"):
        assert (other.path / name).read_bytes() != (folder.path / name).read_bytes()


def test_a_finished_folder_is_refused_and_untouched(folder):
    before = contents(folder.path)
    with pytest.raises(CoordinatorError, match="stays as it is"):
        init_folder(folder.path, load_config(assign=["name=other"]))
    assert contents(folder.path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from common.config_file import load_config
from server.coordinator import init_folder
left, replace = int(sys.argv[2]), Path.replace
def counted(self, target):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)
Path.replace = counted
init_folder(Path(sys.argv[1]), load_config(assign=["name=first"]), ["first.org"])
"""


@pytest.mark.parametrize("written", range(8))
def test_kill_9_after_any_file_and_init_again_keeps_every_key(tmp_path, written):
    path = tmp_path / "study"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(written)])
    assert killed.returncode == -9
    with pytest.raises(CoordinatorError, match="fed-server init"):
        load_coordinator(path)
    kept = ("federation.json", "ca.key", "ca.crt", "server.key")
    before = {name: (path / name).read_bytes() for name in kept if (path / name).exists()}
    assert len(before) == min(written, 4)

    folder = init_folder(path, CONFIG, ["10.0.0.5"])
    assert {name: (path / name).read_bytes() for name in before} == before
    load_coordinator(path)
    assert load_config(folder.config) == CONFIG
    # as if it had been the first time: what the killed attempt was asked for does not linger
    hosts = read_certificate(folder.server_certificate).hosts
    assert set(hosts) == {"fed.org", "10.0.0.5", "localhost", "127.0.0.1"}
    admit(folder.enrolled, "Oslo", new_private_key().public_key())


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    tmp_path.chmod(0o755)
    with pytest.raises(CoordinatorError, match=r"something else already \(thesis\.tex\)"):
        init_folder(tmp_path, CONFIG)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]
    with pytest.raises(CoordinatorError, match="is a file"):
        init_folder(tmp_path / "thesis.tex", CONFIG)
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "federation.yaml").write_text("name: mine")
    with pytest.raises(CoordinatorError, match=r"but no federation\.json"):
        init_folder(tmp_path / "yaml", CONFIG)


@pytest.mark.parametrize("name", ["ca.key", "server.crt", "enrolled.sqlite"])
def test_a_missing_file_is_named(folder, name):
    (folder.path / name).unlink()
    with pytest.raises(CoordinatorError, match=f"{name} is missing"):
        load_coordinator(folder.path)
    with pytest.raises(CoordinatorError, match=f"no {name}"):
        init_folder(folder.path, CONFIG)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"federation": 5}', '{"federation": "ab"}'])
def test_a_damaged_identity_is_never_guessed(folder, content):
    folder.identity.write_text(content)
    with pytest.raises(CoordinatorError, match=r"federation\.json is damaged"):
        load_coordinator(folder.path)


def test_no_folder_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(CoordinatorError, match="fed-server init"):
            load_coordinator(path)


def test_terms_follow_the_file_and_the_code(folder):
    before = terms(folder)
    assert before.federation == federation_id(folder)
    assert before.code_hash == code_hash()
    folder.config.write_text(folder.config.read_text().replace("8443", "9999"))
    assert terms(folder).hash() == before.hash()  # where the server is, is no term
    folder.config.write_text(folder.config.read_text().replace("epochs: 3", "epochs: 4"))
    assert terms(folder).config.training.epochs == 4
    assert terms(folder).hash() != before.hash()
    folder.config.write_text("trainig: {}")
    with pytest.raises(ConfigError, match="did you mean `training`"):
        terms(folder)


def test_an_invitation_brings_all_that_a_hospital_needs(folder, tmp_path):
    key = fingerprint(new_private_key().public_key())
    write_invitation(tmp_path / "i.json", invitation(folder, "Oslo", key))
    read = read_invitation(tmp_path / "i.json")
    assert (read.site, read.key_fingerprint) == ("Oslo", key)
    assert read.address == "fed.org:8443"
    assert read.ca_certificate == folder.ca_certificate.read_text()
    assert read.terms.hash() == terms(folder).hash()


def test_an_ipv6_address_is_bracketed():
    config = load_config(assign=["server.address='fd00::5'", "server.port=99"])
    assert host_and_port(config) == "[fd00::5]:99"


def test_renewal_keeps_the_hosts_unless_told_and_always_the_address_of_the_file(folder):
    assert "10.0.0.5" in renew_certificate(folder).hosts
    folder.config.write_text(folder.config.read_text().replace("fed.org", "moved.org"))
    assert renew_certificate(folder).hosts[:3] == ("moved.org", "fed.org", "10.0.0.5")
    only = renew_certificate(folder, ["new.org"]).hosts
    assert only == ("moved.org", "new.org", "localhost", "127.0.0.1")


def test_weights_to_begin_with_are_meant_from_where_init_was_typed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(assign=["server.init_from=model.safetensors"])
    folder = init_folder(tmp_path / "study", config)
    assert load_config(folder.config).server.init_from == tmp_path / "here" / "model.safetensors"
