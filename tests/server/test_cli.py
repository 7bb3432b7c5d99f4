"""`fed-server` as a coordinator types it: real processes, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.config_file import load_config
from common.invitation import read_invitation
from common.keys import fingerprint, new_private_key, public_line, telephone_number
from common.statement import Signed, Statement, sign
from server.history import Contribution, GivenStatement, History, RoundRecord

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from server.cli import main; main()"]
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


def words(text: str) -> str:
    """Without the frame and line breaks of an error box."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "study"
    assert run("init", path, "--name", "study", "--address", "fed.org").returncode == 0
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.pub"
    path.write_text(public_line(new_private_key().public_key(), "Oslo") + "\n")
    return path


def listed(folder: Path) -> list[dict]:
    result = run("sites", folder, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)["sites"]


def test_init_settles_what_was_typed(tmp_path):
    path = tmp_path / "new" / "study"
    typed = ["--name", "123", "--address", "Fed.org", "--address", "10.0.0.5", "--port", "99"]
    more = ["--preset", "quick", "--set", "rounds.min_sites=7", "--set", "seed=5"]
    result = run("init", path, *typed, *more)
    assert (result.returncode, result.stderr) == (0, "")
    config = load_config(path / "federation.yaml")
    assert (config.name, config.preset, config.seed) == ("123", "quick", 5)
    assert (config.server.address, config.server.port) == ("fed.org", 99)
    assert config.rounds.min_sites == 7
    for said in ("fed.org:99", "10.0.0.5", "needs 7 good replies", "fed-server admit"):
        assert said in result.stdout
    text = (path / "federation.yaml").read_text()
    assert "# good replies a round needs" in text


def test_init_chooses_two_sites_and_says_so(folder, tmp_path):
    assert load_config(folder / "federation.yaml").rounds.min_sites == 2
    assert "needs 2 good replies" in run("init", tmp_path / "b", "--address", "x.org").stdout


@pytest.mark.parametrize("address", [[], ["--address", "127.0.0.1"], ["--address", "localhost"]])
def test_an_address_that_hospitals_cannot_reach_is_warned_of(tmp_path, address):
    result = run("init", tmp_path / "study", *address)
    assert result.returncode == 0
    assert "reachable from this machine only" in result.stderr


def test_init_again_fails_and_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = run("init", folder, "--name", "other")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_hospital_is_enrolled_and_gets_its_invitation(folder, site):
    result = run("admit", folder, site, "--name", "Oslo")
    assert (result.returncode, result.stderr) == (0, "")
    path = folder / "invitations" / "Oslo.fedbrats.json"
    assert str(path) in result.stdout
    invitation = read_invitation(path)
    assert invitation.address == "fed.org:8443"
    for compared in (invitation.key_fingerprint, invitation.ca_digits()):
        assert compared in result.stdout
    (row,) = listed(folder)
    assert (row["name"], row["state"], row["last_contact"]) == ("Oslo", "enrolled", None)
    assert row["fingerprint"] == invitation.key_fingerprint
    path.unlink()
    assert run("admit", folder, site, "--name", "Oslo").returncode == 0  # writes it anew
    assert read_invitation(path) == invitation


def test_the_digits_are_those_of_the_sent_key(folder, site):
    key = new_private_key().public_key()
    site.write_text(public_line(key, "ward\x1b[2J") + "\n")
    out = site.parent / "out.json"
    result = run("admit", folder, site, "--name", "Bergen", "--out", out)
    assert telephone_number(key) in result.stdout
    assert "itself says 'ward?[2J'" in result.stdout
    assert read_invitation(out).key_fingerprint == fingerprint(key)
    assert not (folder / "invitations").exists()


def test_a_rotated_key_a_revocation_and_the_list(folder, site):
    run("admit", folder, site, "--name", "Oslo")
    site.write_text(public_line(new_private_key().public_key(), "Oslo"))
    refused = run("admit", folder, site, "--name", "Oslo")
    assert refused.returncode == 1
    assert "--replace" in refused.stderr
    assert run("admit", folder, site, "--name", "Oslo", "--replace").returncode == 0
    assert run("revoke", folder, "Oslo").returncode == 0
    assert run("revoke", folder, "Oslo").returncode == 0
    (row,) = listed(folder)
    assert row["state"] == "revoked"
    unknown = run("revoke", folder, "Osol")
    assert unknown.returncode == 1
    assert "Did you mean Oslo?" in unknown.stderr


def test_the_last_contact_is_what_the_running_server_wrote(folder, site):
    run("admit", folder, site, "--name", "Oslo")
    at = "2026-11-24T10:00:00+00:00"
    told = {"sites": {"Oslo": {"state": "training", "last_contact": at}}}
    (folder / "status.json").write_text(json.dumps(told))
    assert listed(folder)[0]["last_contact"] == at
    result = run("sites", folder)
    (line,) = [row for row in result.stdout.splitlines() if "Oslo" in row]
    assert at in line
    for broken in (
        "",
        "[]",
        '{"sites": 5}',
        '{"sites": {"Oslo": null}}',
        '{"sites": {"Oslo": {}}}',
    ):
        (folder / "status.json").write_text(broken)
        assert listed(folder)[0]["last_contact"] is None
    assert re.search(r"Oslo.* - ", run("sites", folder).stdout)


def test_renewal_on_the_command_line(folder):
    before = (folder / "server.crt").read_bytes()
    result = run("renew-certificate", folder, "--address", "10.0.0.9")
    assert result.returncode == 0
    assert "fed.org, 10.0.0.9, localhost" in result.stdout
    assert (folder / "server.crt").read_bytes() != before


def test_nobody_is_enrolled_who_cannot_be_invited(folder, site):
    (folder / "federation.yaml").write_text("trainig: {}")
    result = run("admit", folder, site, "--name", "Oslo")
    assert result.returncode == 2
    assert "did you mean `training`" in result.stderr
    assert listed(folder) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["init"], 2, "DIR"),
        (["init", "{}/new", "--address", "fed.org:8443"], 2, "without port"),
        (["init", "{}/new", "--port", "0"], 2, "--port"),
        (["init", "{}/new", "--name", "a b"], 2, "`name`"),
        (["init", "{}/new", "--preset", "qick"], 2, "quick, default, reference"),
        (["init", "{}/new", "--set", "seed"], 2, "section.key=value"),
        (["init", "{}/new", "--set", "server.address=0.0.0.0"], 1, "where a server listens"),
        (["init", "/proc/new"], 1, "/proc/new"),
        (["sites", "{}"], 1, "fed-server init"),
        (["sites", "{}/gone"], 1, "fed-server init"),
        (["admit", "{}/study", "{}/gone.pub", "--name", "Oslo"], 1, "cannot be read"),
        (["admit", "{}/study", "{}/site.pub"], 2, "--name"),
        (["admit", "{}/study", "{}/site.pub", "--name", "../x"], 1, "cannot be a site's name"),
        (["admit", "{}/study", "{}/study/ca.key", "--name", "x"], 1, "private key"),
        (["admit", "{}/study", "{}/site.pub", "--name", "x", "--out", "{}/no/x"], 2, "no folder"),
        (["revoke", "{}/study", "Oslo"], 1, "No site called Oslo"),
        (["renew-certificate", "{}/study", "--address", "a b"], 2, "no DNS name"),
        (["admitt"], 2, "admitt"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(folder, site, tmp_path, arguments, code, said):
    result = run(*(text.replace("{}", str(tmp_path)) for text in arguments))
    assert (result.returncode, result.stdout) == (code, "")
    assert said in words(result.stderr)
    assert not (tmp_path / "new").exists()
    assert listed(folder) == []


def with_statements(folder: Path, key) -> None:
    """A history of one round, in which Oslo trained and stated its privacy."""
    about = {"epsilon": 1.25, "delta": 0.01, "noise_multiplier": 2.0, "ledger": "1e" * 16}
    federation = json.loads((folder / "federation.json").read_text())["federation"]
    stated = Statement(
        federation, "Oslo", 1, "c0de", "2026", private=True, metrics="exact", **about
    )
    signed = Signed(stated.text(), sign(stated.text(), key))
    (folder / "run").mkdir()
    with History(folder / "run" / "history.sqlite") as history:
        record = RoundRecord(1, 0.1, 1.0, None, "c", "s", (Contribution("Oslo", True),), {})
        history.record_round(record, [GivenStatement(1, "Oslo", "training", signed)])


def test_the_privacy_report_as_table_json_and_page(folder, site):
    early = run("privacy-report", folder)
    assert (early.returncode, early.stdout) == (1, "")
    assert "no round is complete yet" in early.stderr
    key = new_private_key()
    site.write_text(public_line(key.public_key(), "Oslo"))
    run("admit", folder, site, "--name", "Oslo")
    site.write_text(public_line(new_private_key().public_key(), "Oslo"))
    run("admit", folder, site, "--name", "Oslo", "--replace")
    with_statements(folder, key)
    shown = run("privacy-report", folder)
    assert (shown.returncode, shown.stderr) == (0, "")
    (row,) = (line for line in shown.stdout.splitlines() if "Oslo" in line)
    assert {"1.25", "exact", "good"} <= set(row.split()), "the replaced key's signature"
    assert "not that it is true" in shown.stdout
    page = folder.parent / "report.html"
    both = run("privacy-report", folder, "--json", "--out", page)
    (oslo,) = json.loads(both.stdout)["sites"]
    assert (oslo["epsilon"], oslo["signature"], oslo["warnings"]) == (1.25, "good", [])
    assert "<td>1.25</td>" in page.read_text()
    nowhere = run("privacy-report", folder, "--out", folder / "none" / "report.html")
    assert nowhere.returncode == 2
    assert "is no folder" in words(nowhere.stderr)
    assert run("privacy-report", folder.parent).returncode == 1
    (folder / "run" / "history.sqlite").write_bytes(b"damaged" * 100)
    damaged = run("privacy-report", folder)
    assert damaged.returncode == 1
    assert "history.sqlite" in damaged.stderr


def test_with_secure_aggregation_every_admission_renews_every_invitation(tmp_path):
    folder = tmp_path / "fed"
    secure = ("--set", "secure_aggregation=true", "--address", "fed.example.org")
    assert run("init", folder, *secure).returncode == 0
    keys = {}
    for name in ("Oslo", "Bergen", "Tromso"):
        key = new_private_key()
        keys[name] = fingerprint(key.public_key())
        public = tmp_path / f"{name}.pub"
        public.write_text(public_line(key.public_key(), name) + "\n")
        done = run("admit", folder, public, "--name", name)
        assert done.returncode == 0, done.stderr
    assert "Admit every hospital first" in words(done.stdout)
    assert "list of all 3 enrolled keys" in words(done.stdout)
    hashes = set()
    for name in keys:
        terms = read_invitation(folder / "invitations" / f"{name}.fedbrats.json").terms
        assert set(terms.roster) == set(keys.values()), "also that of who came first"
        hashes.add(terms.hash())
    assert len(hashes) == 1
    assert run("revoke", folder, "Oslo").returncode == 0
    started = run("start", folder)
    assert started.returncode == 1
    assert "needs at least 3 enrolled hospitals" in words(started.stderr)
    assert "2 are" in words(started.stderr)
