"""Site keys are what OpenSSH takes them for, are secret, and are refused in words otherwise."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.keys import (
    BadKey,
    fingerprint,
    load_private_key,
    new_private_key,
    parse_public_key,
    public_line,
    read_public_key,
    save_private_key,
    telephone_number,
)
from common.site_names import BadName, site_name

needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="no ssh-keygen on this machine"
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """site.key and site.pub of one pair."""
    key = new_private_key()
    save_private_key(tmp_path / "site.key", key)
    (tmp_path / "site.pub").write_text(public_line(key.public_key(), "Oslo") + "\n")
    return tmp_path / "site.key", tmp_path / "site.pub"


def ssh_keygen(*arguments: object) -> str:
    done = subprocess.run(
        ["ssh-keygen", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def refusal(path: Path) -> str:
    with pytest.raises(BadKey) as caught:
        load_private_key(path) if path.suffix == ".key" else read_public_key(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@needs_ssh_keygen
def test_openssh_reads_both_files_and_agrees_on_the_fingerprint(pair):
    private, public = pair
    key = load_private_key(private).public_key()
    assert ssh_keygen("-lf", public) == f"384 {fingerprint(key)} Oslo (ECDSA)"
    assert ssh_keygen("-y", "-f", private).split()[:2] == public_line(key, "").split()


@needs_ssh_keygen
def test_a_key_that_openssh_made_is_as_good(tmp_path):
    ssh_keygen("-q", "-t", "ecdsa", "-b", 384, "-N", "", "-C", "Bergen", "-f", tmp_path / "s.key")
    (tmp_path / "s.key.pub").rename(tmp_path / "s.pub")
    sent = read_public_key(tmp_path / "s.pub")
    assert sent.comment == "Bergen"
    assert load_private_key(tmp_path / "s.key").public_key() == sent.key


def test_what_the_private_key_signs_the_sent_public_key_verifies(pair):
    private, public = pair
    signature = load_private_key(private).sign(b"now", ec.ECDSA(hashes.SHA256()))
    read_public_key(public).key.verify(signature, b"now", ec.ECDSA(hashes.SHA256()))


def test_flower_takes_the_private_key_as_its_node_key(pair):
    """As `flower-supernode` loads it, then as it signs and the server verifies."""
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_public_key,
        public_key_to_bytes,
        sign_message,
        uses_nist_ec_curve,
        verify_signature,
    )

    private, public = pair
    key = serialization.load_ssh_private_key(private.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    sent = bytes_to_public_key(public_key_to_bytes(read_public_key(public).key))
    assert uses_nist_ec_curve(sent)
    assert verify_signature(sent, b"now", sign_message(key, b"now"))


def test_digits_to_read_aloud_are_the_same_digest(pair):
    line = pair[1].read_text()
    number = int(hashlib.sha256(base64.b64decode(line.split()[1])).hexdigest(), 16)
    spoken = telephone_number(read_public_key(pair[1]).key)
    assert re.fullmatch(r"(\d{5} ){7}\d{5}", spoken)
    assert int(spoken.replace(" ", "")) == number % 10**40


def test_the_private_key_is_its_owners_alone_and_never_overwritten(pair):
    private = pair[0]
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(BadKey, match="not overwritten"):
        save_private_key(private, new_private_key())
    assert private.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_may_touch_is_refused_with_the_command_to_type(pair, mode):
    pair[0].chmod(mode)
    message = refusal(pair[0])
    assert f"chmod 600 {pair[0]}" in message
    assert f"{mode:04o}" in message
    pair[0].chmod(0o400)
    load_private_key(pair[0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
    ],
)
def test_a_file_that_is_no_private_key(tmp_path, content):
    path = tmp_path / "site.key"
    path.touch(0o600)
    path.write_bytes(content)
    assert "damaged, or no private key" in refusal(path)


def test_a_cut_private_key(pair):
    pair[0].write_bytes(pair[0].read_bytes()[:300])
    assert "damaged" in refusal(pair[0])


def test_a_missing_private_key(tmp_path):
    assert "No such file" in refusal(tmp_path / "site.key")


def test_other_kinds_of_private_key(tmp_path):
    for number, key in enumerate(
        (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1()))
    ):
        path = tmp_path / f"{number}.key"
        save_private_key(path, key)  # type: ignore[arg-type]
        assert "must be an EC P-384 key" in refusal(path)


@needs_ssh_keygen
def test_a_private_key_with_a_passphrase(tmp_path):
    path = tmp_path / "site.key"
    ssh_keygen("-q", "-t", "ecdsa", "-b", 384, "-N", "secret", "-f", path)
    assert f"ssh-keygen -p -f {path}" in refusal(path)


def test_blank_lines_and_windows_line_ends_do_no_harm(pair):
    line = pair[1].read_text().strip()
    key = read_public_key(pair[1]).key
    for text in (f"\r\n{line}\r\n\r\n", f"  {line}  ", line.rsplit(" ", 1)[0]):
        assert parse_public_key(text).key == key
    assert parse_public_key(f"{line} ward 3").comment == "Oslo ward 3"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: "", "found 0 lines"),
        (lambda line: f"{line}\n{line}", "found 2 lines"),
        (lambda line: line[:60], "damaged"),
        (lambda line: line.replace(" AAAA", " BAAA"), "damaged"),
        (lambda line: line.replace("384 ", "384\xa0"), "must begin with ecdsa-sha2-nistp384"),
        (lambda line: f'command="x" {line}', "must begin with"),
        (lambda line: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA== x", "found 'ssh-ed25519'"),
        (lambda line: "ecdsa-sha2-nistp384", "damaged"),
    ],
)
def test_a_file_that_is_no_public_key(pair, change, said):
    pair[1].write_text(change(pair[1].read_text().strip()))
    assert said in refusal(pair[1])


def test_another_curve_under_the_right_name(pair):
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    text = public_line(other, "x").replace("nistp256", "nistp384")
    pair[1].write_text(text)
    assert refusal(pair[1])
    pair[1].write_bytes(b"\xff" * 50)
    assert "no text file" in refusal(pair[1])


def test_a_private_key_that_was_sent_by_mistake_is_said_to_be_one(pair):
    sent = pair[1].with_name("sent.pub")
    sent.write_bytes(pair[0].read_bytes())
    assert "rotate-key" in refusal(sent)


@pytest.mark.parametrize("name", ["a", "Oslo-1", "St.Olav_2", "9", "x" * 64])
def test_names_that_a_site_can_have(name):
    assert site_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "a b", "Ø", "x" * 65, "a\n", "\x1b"])
def test_names_that_would_harm_a_folder_or_a_table(name):
    with pytest.raises(BadName, match="for example"):
        site_name(name)
