"""Site keys: EC P-384, in OpenSSH's formats, so that `ssh-keygen` can read and compare them.

A hospital makes its key pair itself and sends the public key; the private one never leaves its
machine. Which keys count is the business of `server.enrolment`; certificates are another matter
(`server.certificates`).
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from common.files import write_atomically

ALGORITHM = "ecdsa-sha2-nistp384"  # OpenSSH's name of what a public-key line must begin with
LARGEST_KEY_FILE = 100_000  # bytes; real ones have a few hundred


class BadKey(ValueError):
    """A key or its file cannot be used; the text names the file and says what to do."""


@dataclass(frozen=True)
class PublicKey:
    """A public key and the comment at the end of its line, which by custom is the site's name."""

    key: ec.EllipticCurvePublicKey
    comment: str


def new_private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on.

    Raises:
        BadKey: there is such a file already; a key is never overwritten.
        OSError: it cannot be written.
    """
    if os.path.lexists(path):
        raise BadKey(f"{path} exists already and is not overwritten; move it away first.")
    write_atomically(path, lambda temporary: _write_bytes(temporary, content), private=True)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def read_private(path: Path) -> bytes:
    """The content of a file that only its owner may read.

    Raises:
        BadKey: it cannot be read, or others than its owner can read it, too.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(LARGEST_KEY_FILE)
    except OSError as error:
        raise BadKey(
            f"{path}: the private key cannot be read ({error.strerror}); restore it from a backup."
        ) from error
    if mode & 0o077:
        raise BadKey(
            f"{path}: others than its owner can read this private key (mode {mode:04o}). "
            f"If nobody has copied it, type: chmod 600 {path}"
        )
    return content


def save_private_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a site's private key in OpenSSH's format, without passphrase, readable by its owner.

    Raises:
        BadKey: there is such a file already.
        OSError: it cannot be written.
    """
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read what `save_private_key` wrote.

    Raises:
        BadKey: it cannot be read, others can read it, or it is no P-384 key without passphrase.
    """
    content = read_private(path)
    try:
        key = serialization.load_ssh_private_key(content, password=None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise BadKey(
            f"{path}: has a passphrase, which nobody can type when the program starts by itself. "
            f"Remove it: ssh-keygen -p -f {path}"
        ) from error
    except ValueError as error:
        raise BadKey(
            f"{path}: is damaged, or no private key in OpenSSH's format; restore it from a backup, "
            "or make a new key pair."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadKey(f"{path}: must be an EC P-384 key, is another kind; make a new key pair.")
    return key


def load_signing_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's private key, or a server's (PEM).

    Raises:
        BadKey: it cannot be read, others can read it, or it is no EC key without passphrase.
    """
    content = read_private(path)
    if b"OPENSSH PRIVATE KEY" in content:
        return load_private_key(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise BadKey(f"{path}: is damaged; restore it from a backup.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadKey(f"{path}: must be an EC P-384 key, is another kind.")
    return key


def public_line(key: ec.EllipticCurvePublicKey, comment: str) -> str:
    """The public key as OpenSSH's one line of text, without line break."""
    return f"{_encoded(key)} {comment}".rstrip()


def _encoded(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def parse_public_key(text: str) -> PublicKey:
    """Read a line of `public_line`; blank lines around it do not matter.

    Raises:
        BadKey: it is no such line, or another kind of key. The text names no file.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "PRIVATE KEY" in text:
        raise BadKey(
            "this is a private key. It must never be sent: the hospital makes a new pair with "
            "`fed-client rotate-key` and sends the file that ends in .pub."
        )
    if len(lines) != 1:
        raise BadKey(f"must hold one public key in one line, found {len(lines)} lines.")
    kind, _, rest = lines[0].partition(" ")
    if kind != ALGORITHM:
        raise BadKey(
            f"must begin with {ALGORITHM} (`fed-client init` makes such a key), "
            f"found {kind[:40]!r}."
        )
    try:
        key = serialization.load_ssh_public_key(lines[0].encode())
    except (ValueError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise BadKey("the public key is damaged; copy the file again, unchanged.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadKey("must be an EC P-384 key, is another kind.")
    return PublicKey(key, rest.partition(" ")[2].strip())


def read_public_key(path: Path) -> PublicKey:
    """Read a `.pub` file.

    Raises:
        BadKey: it cannot be read, or does not hold one P-384 public key.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_KEY_FILE).decode("utf-8")
        return parse_public_key(text)
    except OSError as error:
        raise BadKey(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise BadKey(f"{path}: is no text file, so no public key.") from error
    except BadKey as error:
        raise BadKey(f"{path}: {error}") from error


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """As `ssh-keygen -lf` prints it: SHA256:..."""
    digest = base64.b64encode(_digest(key)).decode("ascii").rstrip("=")
    return f"SHA256:{digest}"


def telephone_number(key: ec.EllipticCurvePublicKey) -> str:
    """The same digest as digits to read aloud (`digits_of`)."""
    return digits_of(_digest(key))


def digits_of(digest: bytes) -> str:
    """A sha256 as 40 digits in groups of five: its remainder by 10^40.

    Letters of two cases and "+" are not safe by telephone, digits are, in every language. Finding
    another key with the same digits would take 10^40 tries.
    """
    digits = f"{int.from_bytes(digest) % 10**40:040d}"
    return " ".join(digits[start : start + 5] for start in range(0, 40, 5))


def _digest(key: ec.EllipticCurvePublicKey) -> bytes:
    return hashlib.sha256(base64.b64decode(_encoded(key).split()[1])).digest()
