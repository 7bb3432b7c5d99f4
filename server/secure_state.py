"""What the server keeps of a secure round until the round is recorded.

Once a site may have agreed to a sum, the round can have no other. So the masked sum is on the disk
before anybody is asked to agree, and the mean as soon as the masks are off: a server that is killed,
or has lost too many sites, goes on from there, with whoever of the members is there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.files import write_atomically
from common.masking import Advert
from common.statement import Signed
from common.weights import BadWeights, Weights, load_weights, save_weights
from common.wire import encode
from server.checkpoint import RunFolder
from server.exchange import PolicyRefused
from server.history import Contribution, GivenStatement
from server.updates import Gathered

TOTAL = "total"  # the one tensor of the masked sum


@dataclass(frozen=True)
class MaskedSum:
    """`adverts`, `contributions` and `signatures` (over the list of those present) are by site's name;
    `present` are all towards whom the vectors are masked. `sites` is the size of the roster, `base`
    the hash of the model that the sites began from (`base_of`)."""

    round: int
    base: str
    session: str
    sites: int
    adverts: dict[str, Advert]
    present: list[str]
    signatures: dict[str, bytes]
    contributions: list[Contribution]
    spent: dict[str, str]
    statements: list[GivenStatement]
    total: np.ndarray


def base_of(weights: Weights) -> str:
    """sha256 (hex): a sum of changes is of use for the model that they are changes of only."""
    return hashlib.sha256(encode(weights)).hexdigest()


def begun(folder: RunFolder, number: int) -> bool:
    """Is there a sum of this round already, masked or not?"""
    return any(_about(path).get("round") == number for path in _files(folder))


def forget(folder: RunFolder) -> None:
    for path in _files(folder):
        path.unlink(missing_ok=True)


def keep_masked(folder: RunFolder, masked: MaskedSum) -> None:
    """Raises OSError."""
    m = masked
    about = {
        "round": m.round,
        "base": m.base,
        "session": m.session,
        "sites": m.sites,
        "adverts": {site: [a.text, a.signature.hex()] for site, a in m.adverts.items()},
        "present": m.present,
        "signatures": {site: signature.hex() for site, signature in m.signatures.items()},
        **_plain(m.contributions, m.spent, m.statements),
    }
    metadata = {"fedbrats": json.dumps(about)}
    write_atomically(
        folder.masked_sum,
        lambda temporary: save_file({TOTAL: m.total}, temporary, metadata=metadata),
        private=True,
    )


def kept_masked(folder: RunFolder, number: int, base: str) -> MaskedSum | None:
    """Raises BadWeights: the file is damaged."""
    about = _about(folder.masked_sum)
    if (about.get("round"), about.get("base")) != (number, base):
        return None
    try:
        with safe_open(folder.masked_sum, framework="np") as file:
            total = np.array(file.get_tensor(TOTAL))
    except (OSError, SafetensorError) as error:
        raise _damaged(folder.masked_sum) from error
    contributions, spent, statements = _typed(about)
    return MaskedSum(
        number,
        base,
        about["session"],
        about["sites"],
        {site: Advert(text, bytes.fromhex(s)) for site, (text, s) in about["adverts"].items()},
        about["present"],
        {site: bytes.fromhex(signature) for site, signature in about["signatures"].items()},
        contributions,
        spent,
        statements,
        total,
    )


def keep_mean(folder: RunFolder, number: int, mean: Weights, masked: MaskedSum) -> None:
    """Raises OSError."""
    about = {
        "round": number,
        "base": masked.base,
        **_plain(masked.contributions, masked.spent, masked.statements),
    }
    save_weights(folder.secure_sum, mean, about)
    folder.masked_sum.unlink(missing_ok=True)


def kept_mean(folder: RunFolder, number: int, base: str) -> Gathered | None:
    """Raises BadWeights: the file is damaged."""
    about = _about(folder.secure_sum)
    if (about.get("round"), about.get("base")) != (number, base):
        return None
    weights, _ = load_weights(folder.secure_sum)
    contributions, spent, statements = _typed(about)
    return Gathered(weights, contributions=contributions, spent=spent, statements=statements)


def _files(folder: RunFolder) -> tuple[Path, Path]:
    return folder.secure_sum, folder.masked_sum


def _plain(
    contributions: list[Contribution], spent: dict[str, str], statements: list[GivenStatement]
) -> dict[str, Any]:
    return {
        "contributions": [asdict(contribution) for contribution in contributions],
        "spent": spent,
        "refused": [c.site for c in contributions if isinstance(c.reason, PolicyRefused)],
        "statements": [
            [s.round, s.site, s.stage, s.signed.text, s.signed.signature.hex()] for s in statements
        ],
    }


def _typed(
    about: dict[str, Any],
) -> tuple[list[Contribution], dict[str, str], list[GivenStatement]]:
    statements = [
        GivenStatement(round_, site, stage, Signed(text, bytes.fromhex(signature)))
        for round_, site, stage, text, signature in about["statements"]
    ]
    for contribution in about["contributions"]:
        if contribution["site"] in about["refused"]:
            contribution["reason"] = PolicyRefused(contribution["reason"])
    return [Contribution(**c) for c in about["contributions"]], about["spent"], statements


def _about(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            return dict(json.loads((file.metadata() or {})["fedbrats"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> BadWeights:
    return BadWeights(
        f"{path}: the sum of the round that was going on is damaged; restore it from a backup. Without "
        "it the round can only be repeated if every site in it takes part again: delete the file."
    )
