"""An invitation arrives as it was written, or is refused in words that say what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from common.config_file import load_config
from common.invitation import BadInvitation, Invitation, read_invitation, write_invitation
from common.keys import fingerprint, new_private_key
from common.terms import Terms

FEDERATION = "0123456789abcdef" * 2


def certificate(*, ca: bool) -> str:
    key = new_private_key()
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(key, hashes.SHA384())
    )
    return made.public_bytes(Encoding.PEM).decode()


@pytest.fixture
def invitation() -> Invitation:
    return Invitation(
        federation=FEDERATION,
        name="study",
        address="fed.hospital.org:8443",
        site="Oslo",
        key_fingerprint=fingerprint(new_private_key().public_key()),
        ca_certificate=certificate(ca=True),
        terms=Terms(FEDERATION, "c0de", load_config(preset="quick", assign=["name=study"])),
    )


@pytest.fixture
def refusal(invitation: Invitation, tmp_path: Path) -> Callable[..., str]:
    """A function: a change of the written document -> why it is refused."""

    def refused(**changes: Any) -> str:
        document = invitation.document()
        for key, value in changes.items():
            if value is None:
                del document[key]
            else:
                document[key] = value
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(document))
        with pytest.raises(BadInvitation) as caught:
            read_invitation(path)
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value)

    return refused


@pytest.mark.parametrize("address", ["fed.hospital.org:8443", "10.0.0.5:1", "[fd00::5]:65535"])
def test_what_is_read_is_what_was_written(invitation, tmp_path, address):
    sent = Invitation(**{**vars(invitation), "address": address})
    path = tmp_path / "Oslo.fedbrats.json"
    write_invitation(path, sent)
    read = read_invitation(path)
    assert read == sent
    assert read.terms.hash() == invitation.terms.hash()
    assert "PRIVATE" not in path.read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_the_authoritys_fingerprint_is_openssls_and_so_are_the_digits(invitation):
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256"]
    shown = subprocess.run(
        command, input=invitation.ca_certificate, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert invitation.ca_fingerprint() == shown.rpartition("=")[2]
    number = int(shown.rpartition("=")[2].replace(":", ""), 16)
    assert int(invitation.ca_digits().replace(" ", "")) == number % 10**40


@pytest.mark.parametrize(
    "key",
    ["federation", "name", "address", "site", "key_fingerprint", "ca_certificate", "terms"],
)
@pytest.mark.parametrize("value", [None, "", 5, ["x"]])
def test_a_part_that_is_missing_or_of_another_kind_is_named(refusal, key, value):
    assert f"`{key}`" in refusal(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation", "XYZ"),
        ("federation", FEDERATION + "\n"),
        ("address", "fed.hospital.org"),
        ("address", "fed.hospital.org:0"),
        ("address", "fed.hospital.org:65536"),
        ("address", "https://fed.hospital.org:8443"),
        ("address", "fd00::5:8443"),
        ("address", "[fed]:8443"),
        ("address", "a b:8443"),
        ("address", "a@b:8443"),
        ("site", "../Oslo"),
        ("site", "Oslo\n"),
        ("key_fingerprint", "SHA256:abc"),
        ("key_fingerprint", "MD5:00"),
        ("ca_certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("ca_certificate", certificate(ca=False)),
        ("ca_certificate", certificate(ca=True) + certificate(ca=True)),
        ("terms", {"federation": FEDERATION}),
    ],
)
def test_values_that_cannot_be_used_are_named(refusal, key, value):
    assert f"`{key}`" in refusal(**{key: value})


def test_terms_of_another_federation_are_refused(refusal, invitation):
    other = Terms("f" * 32, "c0de", invitation.terms.config)
    assert "another federation" in refusal(terms=other.document())
    assert "another federation" in refusal(name="other")


def test_what_this_version_does_not_know_is_refused(refusal, invitation):
    assert "`run_this` is not a known part" in refusal(run_this="rm -r /")
    assert "another version" in refusal(fedbrats_invitation=2)
    document = invitation.terms.document()
    document["config"]["loss"]["new_key"] = 1
    assert "same version" in refusal(terms=document)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"{", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[]", "is no invitation"),
        (b"{}", "is no invitation"),
        (b"5", "is no invitation"),
        (b'"' + b"x" * 2_000_000 + b'"', "damaged"),  # not read to its end
    ],
)
def test_a_file_that_is_no_invitation(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(BadInvitation, match=said):
        read_invitation(path)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(BadInvitation, match="cannot be read"):
            read_invitation(path)
