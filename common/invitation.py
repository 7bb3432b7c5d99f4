"""The one small file that a coordinator sends to a hospital that it has enrolled.

It holds no secret: everybody may read it. But the CA certificate in it decides whom the hospital
will take for its coordinator, so it must arrive unchanged: the two compare its digits by telephone
(`ca_digits`). Making the certificate is `server.certificates`' business.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.files import write_text_atomically
from common.keys import digits_of
from common.site_names import BadName, site_name
from common.terms import FINGERPRINT, BadTerms, Terms, terms_from

FORM = 1  # number of this file's form
LARGEST_FILE = 1_000_000  # bytes; real ones have a few thousand
TEXTS = ("federation", "name", "address", "site", "key_fingerprint", "ca_certificate")


class BadInvitation(ValueError):
    """A file is no invitation that this version understands; the text names it and says why."""


@dataclass(frozen=True)
class Invitation:
    """`address` is host:port, `ca_certificate` PEM text, `key_fingerprint` that of the site's key."""

    federation: str
    name: str
    address: str
    site: str
    key_fingerprint: str
    ca_certificate: str
    terms: Terms

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "fedbrats_invitation": FORM,
            **{key: getattr(self, key) for key in TEXTS},
            "terms": self.terms.document(),
        }

    def ca_fingerprint(self) -> str:
        """As `openssl x509 -fingerprint -sha256` prints it."""
        return certificate_fingerprint(self.ca_certificate)

    def ca_digits(self) -> str:
        """The CA certificate's fingerprint as digits to compare by telephone."""
        return certificate_digits(self.ca_certificate)


def certificate_fingerprint(pem: str) -> str:
    """As `openssl x509 -fingerprint -sha256` prints it. Raises ValueError: no certificate."""
    return _digest(pem).hex(":").upper()


def certificate_digits(pem: str) -> str:
    """The fingerprint as digits to compare by telephone. Raises ValueError: no certificate."""
    return digits_of(_digest(pem))


def _digest(pem: str) -> bytes:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Raises OSError."""
    write_text_atomically(path, json.dumps(invitation.document(), indent=1) + "\n")


def read_invitation(path: Path) -> Invitation:
    """Read what `write_invitation` wrote, wherever it has been meanwhile.

    Raises:
        BadInvitation: the file cannot be read, or a part of it is missing or wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        document = json.loads(content)
    except OSError as error:
        raise BadInvitation(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInvitation(
            f"{path}: is no invitation, or damaged; ask the coordinator for the file again."
        ) from error
    try:
        return _invitation(document)
    except BadInvitation as error:
        raise BadInvitation(f"{path}: {error}") from error


def _invitation(document: Any) -> Invitation:
    if not isinstance(document, dict) or "fedbrats_invitation" not in document:
        raise BadInvitation("is no invitation from `fed-server admit`.")
    if document["fedbrats_invitation"] != FORM:
        raise BadInvitation(
            "was written by another version of fedbrats; both sides need the same version."
        )
    for key in TEXTS:
        if not isinstance(document.get(key), str) or not document[key]:
            raise BadInvitation(f"`{key}` is missing or no text; {_AGAIN}")
    if unknown := document.keys() - {"fedbrats_invitation", "terms", *TEXTS}:
        raise BadInvitation(f"`{min(unknown)}` is not a known part of an invitation; {_AGAIN}")
    texts = {key: document[key] for key in TEXTS}
    if not re.fullmatch(r"[0-9a-f]{32}", texts["federation"]):
        raise BadInvitation(f"`federation` is no federation's id; {_AGAIN}")
    if not re.fullmatch(FINGERPRINT, texts["key_fingerprint"]):
        raise BadInvitation(f"`key_fingerprint` is no key's fingerprint; {_AGAIN}")
    if not _is_address(texts["address"]):
        raise BadInvitation(f"`address` must be host:port, found {texts['address']!r}; {_AGAIN}")
    try:
        site_name(texts["site"])
    except BadName as error:
        raise BadInvitation(f"`site`: {error}") from error
    _check_authority(texts["ca_certificate"])
    terms = document.get("terms")
    if not isinstance(terms, dict):
        raise BadInvitation(f"`terms` is missing; {_AGAIN}")
    try:
        stated = terms_from(terms)
    except BadTerms as error:
        raise BadInvitation(f"`terms`: {error}") from error
    if (stated.federation, stated.config.name) != (texts["federation"], texts["name"]):
        raise BadInvitation(f"`terms` are those of another federation; {_AGAIN}")
    return Invitation(**texts, terms=stated)


_AGAIN = "ask the coordinator for the file again."


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        return False
    if host.startswith("[") and host.endswith("]"):
        try:
            return ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host) is not None


def _check_authority(pem: str) -> None:
    if pem.count("-----BEGIN ") != 1:  # a key or a second authority has no place here
        raise BadInvitation(f"`ca_certificate` must be one certificate; {_AGAIN}")
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise BadInvitation(f"`ca_certificate` is damaged; {_AGAIN}") from error
    if not constraints.value.ca:
        raise BadInvitation(f"`ca_certificate` is not that of a CA; {_AGAIN}")
