"""The global model after each round, and the run's folder that holds it.

With `rounds.average_decay` there are two: the moving average, which is measured and given away, under
the tensors' names, and the model that training continues from, under the same names after RAW. They
are one file, so that a killed run has both or neither.

A checkpoint is written whole (temporary file, fsync, rename) before its round is recorded in the
history with its sha256; a file that does not match is refused, never trained on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from common.weights import BadWeights, Weights, file_sha256, load_weights, save_weights

RAW = "raw/"  # no name of a tensor begins so


@dataclass(frozen=True)
class RunFolder:
    """Names of everything the server keeps of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "federation.yaml"

    @property
    def history(self) -> Path:
        return self.path / "history.sqlite"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def model(self) -> Path:
        """The best model by Dice averaged over sites."""
        return self.path / "model.safetensors"

    @property
    def model_worst_site(self) -> Path:
        """The model whose worst site is best."""
        return self.path / "model-worst-site.safetensors"

    @property
    def secure_sum(self) -> Path:
        """The unmasked mean of the round that is going on: its sites agree to no other."""
        return self.path / "secure-sum.safetensors"

    @property
    def masked_sum(self) -> Path:
        """The same before it was unmasked, while sites are asked to agree to it."""
        return self.path / "masked-sum.safetensors"

    @property
    def updates(self) -> Path:
        """The updates of the round that is going on; there is none between rounds."""
        return self.path / "updates"

    def checkpoint(self, round_: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_:04d}.safetensors"


def save_checkpoint(
    folder: RunFolder, round_: int, weights: Weights, raw: Weights | None = None
) -> tuple[str, str]:
    """Returns the file's path inside the run folder and its sha256.

    Args:
        raw: what training continues from, if that is not `weights`.
    """
    path = folder.checkpoint(round_)
    path.parent.mkdir(exist_ok=True)
    beside = {RAW + name: tensor for name, tensor in (raw or {}).items()}
    digest = save_weights(path, {**weights, **beside}, {"round": round_})
    return str(path.relative_to(folder.path)), digest


def load_checkpoint(folder: RunFolder, round_: int, sha256: str) -> Weights:
    """The model that the round was measured by.

    Raises:
        BadWeights: missing, damaged or not the file that the history recorded.
    """
    return load_to_continue(folder, round_, sha256)[0]


def load_to_continue(folder: RunFolder, round_: int, sha256: str) -> tuple[Weights, Weights]:
    """The model that the round was measured by, and the one that training continues from.

    Raises:
        BadWeights: as `load_checkpoint`.
    """
    path = folder.checkpoint(round_)
    if not path.exists() or file_sha256(path) != sha256:
        raise BadWeights(
            f"{path}: is missing or changed since round {round_} was recorded; restore it, "
            "or start a new run in another folder."
        )
    tensors = load_weights(path)[0]
    weights = {name: t for name, t in tensors.items() if not name.startswith(RAW)}
    raw = {name.removeprefix(RAW): t for name, t in tensors.items() if name.startswith(RAW)}
    return weights, raw or weights


def prune_checkpoints(folder: RunFolder, keep: Collection[int]) -> None:
    """Delete the checkpoints of all other rounds, and what a killed run left half written.

    Only for the process that holds the run folder's lock.
    """
    kept = {folder.checkpoint(round_).name for round_ in keep}
    for pattern in ("round-*.safetensors", ".round-*.tmp", ".tmp*"):  # the last: safetensors' own
        for path in (folder.path / "checkpoints").glob(pattern):
            if path.name not in kept:
                path.unlink()
