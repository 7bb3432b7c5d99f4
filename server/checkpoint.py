"""The global model after each round, and the run's folder that holds it.

A checkpoint is written whole (temporary file, fsync, rename) before its round is recorded in the
history with its sha256; a file that does not match is refused, never trained on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from common.weights import BadWeights, Weights, file_sha256, load_weights, save_weights


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

    def checkpoint(self, round_: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_:04d}.safetensors"


def save_checkpoint(folder: RunFolder, round_: int, weights: Weights) -> tuple[str, str]:
    """Returns the file's path inside the run folder and its sha256."""
    path = folder.checkpoint(round_)
    path.parent.mkdir(exist_ok=True)
    digest = save_weights(path, weights, {"round": round_})
    return str(path.relative_to(folder.path)), digest


def load_checkpoint(folder: RunFolder, round_: int, sha256: str) -> Weights:
    """Raises:
    BadWeights: missing, damaged or not the file that the history recorded.
    """
    path = folder.checkpoint(round_)
    if not path.exists() or file_sha256(path) != sha256:
        raise BadWeights(
            f"{path}: is missing or changed since round {round_} was recorded; restore it, "
            "or start a new run in another folder."
        )
    return load_weights(path)[0]


def prune_checkpoints(folder: RunFolder, keep: Collection[int]) -> None:
    """Delete the checkpoints of all other rounds, and what a killed run left half written.

    Only for the process that holds the run folder's lock.
    """
    kept = {folder.checkpoint(round_).name for round_ in keep}
    for pattern in ("round-*.safetensors", ".round-*.tmp", ".tmp*"):  # the last: safetensors' own
        for path in (folder.path / "checkpoints").glob(pattern):
            if path.name not in kept:
                path.unlink()
