"""The certificates do what TLS needs of them: every check here is a real handshake or openssl's."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.keys import BadKey
from server.certificates import (
    Certificate,
    CertificateError,
    host_name,
    issue_server_certificate,
    make_authority,
    read_certificate,
    renew_server_certificate,
)

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


@dataclass(frozen=True)
class Authority:
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        make_authority(self.folder / "ca.key", self.folder / "ca.crt", "study")

    @property
    def files(self) -> tuple[Path, Path, Path, Path]:
        return tuple(
            self.folder / name for name in ("ca.key", "ca.crt", "server.key", "server.crt")
        )

    @property
    def pem(self) -> str:
        return (self.folder / "ca.crt").read_text()

    def issue(self, hosts: Sequence[str]) -> Certificate:
        return issue_server_certificate(*self.files, hosts)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


def shake_hands(folder: Path, trusted: str, host: str) -> bytes:
    """Connect over loopback as a hospital that trusts `trusted`; returns the server's certificate.

    With the strict checks that Python 3.13 has by default.
    """
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(folder / "server.crt", folder / "server.key")
    client_side = ssl.create_default_context(cadata=trusted)
    client_side.verify_flags |= ssl.VERIFY_X509_STRICT

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        # suppressed: the client refused
        with connection, contextlib.suppress(ssl.SSLError, OSError):
            server_side.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client_side.wrap_socket(plain, server_hostname=host) as secure,
            ):
                shown = secure.getpeercert(binary_form=True)
                assert shown is not None
                return shown
        finally:
            thread.join(timeout=10)


@pytest.mark.parametrize(
    "host", ["fed.hospital.org", "10.1.2.3", "fd00::5", "fed_2.local", "localhost", "127.0.0.1"]
)
def test_trusted_at_every_given_host_and_on_this_machine(authority, host):
    authority.issue(["Fed.Hospital.org.", "10.1.2.3", "[fd00:0::5]", "fed_2.local"])
    assert shake_hands(authority.folder, authority.pem, host)


@pytest.mark.parametrize("host", ["other.hospital.org", "10.1.2.4", "hospital.org", "::1"])
def test_not_trusted_at_any_other_host(authority, host):
    authority.issue(["fed.hospital.org", "10.1.2.3"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(authority.folder, authority.pem, host)


def test_another_authority_of_the_same_name_is_not_trusted(authority, tmp_path):
    impostor = Authority(tmp_path / "theirs")
    impostor.issue([])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(impostor.folder, authority.pem, "localhost")


def test_a_server_certificate_is_no_authority(authority, tmp_path):
    """Who steals the server's key cannot issue certificates for other servers."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    authority.issue([])
    stolen = serialization.load_pem_private_key(
        (authority.folder / "server.key").read_bytes(), None
    )
    server = x509.load_pem_x509_certificate((authority.folder / "server.crt").read_bytes())
    forged = tmp_path / "forged"
    forged.mkdir()
    shutil.copy(authority.folder / "server.key", forged)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(server.subject)
        .issuer_name(server.subject)
        .public_key(stolen.public_key())
        .serial_number(7)
        .not_valid_before(server.not_valid_before_utc)
        .not_valid_after(server.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("evil.org")]), critical=False)
        .sign(stolen, hashes.SHA384())
    )
    chain = certificate.public_bytes(serialization.Encoding.PEM) + server.public_bytes(
        serialization.Encoding.PEM
    )
    (forged / "server.crt").write_bytes(chain)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(forged, authority.pem, "evil.org")


def test_renewal_changes_certificate_and_key_and_nothing_at_the_hospitals(authority):
    authority.issue(["old.org"])
    trusted = authority.pem
    key = (authority.folder / "server.key").read_bytes()
    before = shake_hands(authority.folder, trusted, "old.org")
    renewed = renew_server_certificate(*authority.files, ["new.org"])
    after = shake_hands(authority.folder, trusted, "new.org")
    assert before != after
    assert authority.pem == trusted
    assert (authority.folder / "server.key").read_bytes() != key
    assert renewed.hosts == ("new.org", "localhost", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(authority.folder, trusted, "old.org")
    assert {path.name for path in authority.folder.iterdir()} == {p.name for p in authority.files}


def test_a_renewal_that_fails_leaves_a_working_server(authority):
    authority.issue(["old.org"])
    with pytest.raises(CertificateError, match="no DNS name"):
        renew_server_certificate(*authority.files, ["not a host"])
    (authority.folder / "ca.key").unlink()
    with pytest.raises(BadKey, match=r"ca\.key"):
        renew_server_certificate(*authority.files, ["new.org"])
    assert shake_hands(authority.folder, authority.pem, "old.org")


def test_a_killed_renewal_is_repaired_by_the_next(authority):
    authority.issue([])
    (authority.folder / "server.key.next").write_text("half of a k")
    renew_server_certificate(*authority.files, [])
    assert shake_hands(authority.folder, authority.pem, "localhost")


def test_keys_are_their_owners_alone_and_never_overwritten(authority):
    authority.issue(["a.org"])
    keys = [authority.folder / name for name in ("ca.key", "server.key")]
    before = [key.read_bytes() for key in keys]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    with pytest.raises(CertificateError, match="not overwritten"):
        make_authority(*authority.files[:2], "study")
    authority.issue(["b.org"])
    assert [key.read_bytes() for key in keys] == before
    assert shake_hands(authority.folder, authority.pem, "b.org")


def test_the_key_of_another_authority_or_an_open_one_is_refused(authority, tmp_path):
    other = Authority(tmp_path / "other")
    with pytest.raises(CertificateError, match="does not belong"):
        issue_server_certificate(other.files[0], *authority.files[1:], ["a.org"])
    (authority.folder / "ca.key").chmod(0o644)
    with pytest.raises(BadKey, match="chmod 600"):
        authority.issue(["a.org"])
    assert not (authority.folder / "server.crt").exists()


@needs_openssl
def test_openssl_finds_nothing_wrong_and_the_agreed_lifetimes(authority):
    shown = authority.issue(["fed.hospital.org"])
    ca, server = authority.files[1], authority.files[3]
    strict = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    subprocess.run([*strict, "-CAfile", ca, server], check=True, capture_output=True)
    for path, days in ((ca, 3652), (server, 825)):
        for late, code in ((-1, 0), (1, 1)):
            seconds = str((days + late) * 86400)
            check = ["openssl", "x509", "-noout", "-checkend", seconds, "-in", path]
            assert subprocess.run(check, capture_output=True).returncode == code
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", server]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip().rpartition("=")[2] == shown.fingerprint


def test_a_hospital_whose_clock_is_slow_by_minutes_trusts_a_new_certificate(authority):
    shown = authority.issue([])
    now = datetime.now(UTC)
    for path in authority.files[1::2]:
        begin = read_certificate(path).not_before
        assert timedelta(minutes=4) < now - begin < timedelta(minutes=6)
    assert shown.problem("localhost") == ""


def test_what_is_wrong_with_a_certificate_is_said_with_what_to_do(authority):
    shown = authority.issue(["a.org", "fd00::5"])
    assert shown.problem("A.org") == shown.problem("fd00:0:0::5") == ""
    renew = f"fed-server renew-certificate {authority.folder}"
    assert "is not for b.org, but for a.org" in shown.problem("b.org")
    assert renew in shown.problem("b.org")
    late = shown.problem("a.org", shown.not_after + timedelta(seconds=1))
    assert "expired on" in late
    assert renew in late
    assert "set the clock" in shown.problem("a.org", shown.not_before - timedelta(minutes=1))


@pytest.mark.parametrize(
    "text",
    ["", "a.org:8443", "https://a.org", "a b", "-a.org", "a..b", "*.org", "10.1.2.300", "0.0.0.0",
     "::", "x" * 64 + ".org", "a/b", "ø.no"],
)  # fmt: skip
def test_what_is_no_host(text):
    with pytest.raises(CertificateError):
        host_name(text)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff"])
def test_a_damaged_certificate(authority, content):
    path = authority.folder / "ca.crt"
    path.write_bytes(content)
    with pytest.raises(CertificateError, match=r"ca\.crt: is damaged"):
        read_certificate(path)
    path.unlink()
    with pytest.raises(CertificateError, match=r"ca\.crt: cannot be read"):
        read_certificate(path)
