"""The coordinator's own certificate authority, and the server certificate that it issues.

Hospitals trust the CA's certificate alone (it is in their invitation), so the server certificate can
be renewed without them. Keys are never overwritten but by a renewal, and are readable by their owner
only. Site keys are another matter (`common.keys`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.files import write_text_atomically
from common.invitation import certificate_digits, certificate_fingerprint
from common.keys import new_private_key, read_private, write_private

AUTHORITY_DAYS = 3652
SERVER_DAYS = 825  # the longest that common TLS clients accept
BACKDATED = timedelta(minutes=5)  # for hospitals whose clock is a little slow
ALWAYS = ("localhost", "127.0.0.1")
LONGEST_COMMON_NAME = 64  # characters, X.509's limit


class CertificateError(ValueError):
    """A certificate or its key cannot be made or used; the text names the file and says what to do."""


@dataclass(frozen=True)
class Certificate:
    """What is in a certificate's file. `fingerprint` is openssl's, `digits` the same to read aloud."""

    path: Path
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    fingerprint: str
    digits: str

    def problem(self, address: str, at: datetime | None = None) -> str:
        """Why hospitals could not trust it at `address` (at that time; default now), or "".

        The text says what to do. `address` is a host without port.
        """
        now = at or datetime.now(UTC)
        if now < self.not_before:
            return (
                f"{self.path}: is valid from {_day(self.not_before)} on, but this machine's clock "
                f"says {_day(now)}; set the clock."
            )
        renew = f"renew it: fed-server renew-certificate {self.path.parent}"
        if now > self.not_after:
            return f"{self.path}: expired on {_day(self.not_after)}; {renew}"
        if self.hosts and host_name(address) not in self.hosts:
            return f"{self.path}: is not for {address}, but for {', '.join(self.hosts)}; {renew}"
        return ""


def host_name(text: str) -> str:
    """A DNS name or IP address as certificates write it.

    Raises:
        CertificateError: it is neither, or no hospital can reach a server there.
    """
    host = text.strip().removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        host = host.lower().removesuffix(".")
        labels = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
        if len(host) > 253 or not re.fullmatch(rf"({labels}\.)*{labels}", host):
            raise CertificateError(
                f"{text!r} is no DNS name and no IP address; write it without port and protocol, "
                "for example fed.hospital.org or 10.0.0.5."
            ) from None
        if host.rpartition(".")[2].isdigit():
            raise CertificateError(f"{text!r} is no IP address.") from None
        return host
    if address.is_unspecified:
        raise CertificateError(
            f"{text} is where a server listens, not where it is reached; give its own address."
        )
    return str(address)


def make_authority(key_path: Path, certificate_path: Path, name: str) -> None:
    """Write a CA's key, unless it is there already, and its certificate for ten years.

    Raises:
        CertificateError: the certificate is there already, or the key cannot be used.
        BadKey: others can read the key that is there.
        OSError: a file cannot be written.
    """
    if certificate_path.exists():
        raise CertificateError(f"{certificate_path} exists already and is not overwritten.")
    key = _load_key(key_path) if key_path.exists() else _new_key(key_path)
    subject = _common_name(f"fedbrats {name}"[:LONGEST_COMMON_NAME])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_certificate(certificate_path, certificate)


def issue_server_certificate(
    ca_key: Path, ca_certificate: Path, key_path: Path, certificate_path: Path, hosts: Iterable[str]
) -> Certificate:
    """Write a server's key, unless it is there already, and a certificate for `hosts`.

    localhost and 127.0.0.1 are always among them. For a folder that is being made; one in use is
    renewed.

    Raises:
        CertificateError: a host is none, or the CA or the key cannot be used.
        BadKey: others can read one of the keys.
        OSError: a file cannot be written.
    """
    names = _hosts(hosts)
    authority = _authority(ca_key, ca_certificate)
    key = _load_key(key_path) if key_path.exists() else _new_key(key_path)
    _write_certificate(certificate_path, _server_certificate(*authority, key, names))
    return read_certificate(certificate_path)


def renew_server_certificate(
    ca_key: Path, ca_certificate: Path, key_path: Path, certificate_path: Path, hosts: Iterable[str]
) -> Certificate:
    """Put a new key and a new certificate of the same CA in the place of the server's present ones.

    Raises:
        CertificateError, BadKey, OSError: as `issue_server_certificate`; the old ones then still work.
    """
    names = _hosts(hosts)
    authority = _authority(ca_key, ca_certificate)
    key = new_private_key()
    certificate = _server_certificate(*authority, key, names)
    # both are ready before either is replaced; if a kill comes between, renewing again repairs it
    key_next = key_path.with_name(f"{key_path.name}.next")
    key_next.unlink(missing_ok=True)
    write_private(key_next, _pem(key))
    _write_certificate(certificate_path, certificate)
    key_next.replace(key_path)
    return read_certificate(certificate_path)


def read_certificate(path: Path) -> Certificate:
    """What the certificate says.

    Raises:
        CertificateError: it cannot be read.
    """
    certificate = _load_certificate(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [str(name.value) for name in names]
    except x509.ExtensionNotFound:
        hosts = []
    pem = certificate.public_bytes(Encoding.PEM).decode("ascii")
    return Certificate(
        path,
        tuple(hosts),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        certificate_fingerprint(pem),
        certificate_digits(pem),
    )


def _authority(
    key_path: Path, certificate_path: Path
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    certificate = _load_certificate(certificate_path)
    key = _load_key(key_path)
    if certificate.public_key() != key.public_key():
        raise CertificateError(
            f"{key_path} does not belong to {certificate_path}; restore both from one backup."
        )
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise CertificateError(
            f"{certificate_path}: the CA expired on {_day(certificate.not_valid_after_utc)}; make a "
            "new federation folder and invite the hospitals again, or set this machine's clock."
        )
    return key, certificate


def _server_certificate(
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    hosts: tuple[str, ...],
) -> x509.Certificate:
    ski = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)
    subject = _common_name("fedbrats server")
    server_use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    latest = ca.not_valid_after_utc
    return (
        _builder(subject, ca.subject, key.public_key(), SERVER_DAYS, latest)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(server_use, critical=False)
        .add_extension(x509.SubjectAlternativeName(map(_general_name, hosts)), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    begin = datetime.now(UTC) - BACKDATED
    end = begin + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(min(end, latest) if latest else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """Each once, in order, then those that every server has."""
    return tuple(dict.fromkeys([*map(host_name, hosts), *ALWAYS]))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = new_private_key()
    write_private(path, _pem(key))
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    content = read_private(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (TypeError, ValueError) as error:
        raise CertificateError(f"{path}: is damaged; restore it from a backup.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path}: is no EC key; restore the one of `fed-server init`.")
    return key


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CertificateError(
            f"{path}: cannot be read ({error.strerror}); restore it from a backup."
        ) from error
    except ValueError as error:
        raise CertificateError(f"{path}: is damaged; restore it from a backup.") from error


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    write_text_atomically(path, certificate.public_bytes(Encoding.PEM).decode("ascii"))


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
