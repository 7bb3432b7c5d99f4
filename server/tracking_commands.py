"""The `track` command of `fed-server` and of `fed-sim`: a run's numbers for TensorBoard and MLflow.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from common.console import failing_in_words, start_logging

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder of a run, or a coordinator's; finished or not."),
]
TensorBoardFolder = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="LOGDIR", help="Folder for event files.")
]
MLflowPlace = Annotated[
    str | None,
    typer.Option(
        "--mlflow", metavar="URI|FOLDER", help="A tracking server, or a folder for mlflow.db."
    ),
]
HiddenNames = Annotated[
    bool,
    typer.Option(
        "--with-hidden-names",
        help="Tell an MLflow URI the names of sites that hide theirs, too; else they are numbered.",
    ),
]
Follow = Annotated[bool, typer.Option("--follow", help="Go on until the run is complete.")]


def track_coordinator(
    folder: Folder,
    tensorboard: TensorBoardFolder = None,
    mlflow: MLflowPlace = None,
    with_hidden_names: HiddenNames = False,
    follow: Follow = False,
) -> None:
    """Copy the federation's numbers to TensorBoard or MLflow; the same again adds what is new.

    Exit code 0: copied. 1: it cannot be. 2: wrong usage.
    """
    start_logging()
    with failing_in_words("fed-server", _foreseen, interrupted="; the same command continues"):
        from server.coordinator import load_coordinator

        load_coordinator(folder)
        _track(folder, tensorboard, mlflow, with_hidden_names, follow)


def track_run(
    run: Run,
    tensorboard: TensorBoardFolder = None,
    mlflow: MLflowPlace = None,
    with_hidden_names: HiddenNames = False,
    follow: Follow = False,
) -> None:
    """Copy a run's numbers to TensorBoard or MLflow; the same again adds what is new.

    Exit code 0: copied. 1: it cannot be. 2: wrong usage.
    """
    start_logging()
    with failing_in_words("fed-sim", _foreseen, interrupted="; the same command continues"):
        from server.source import Source

        if not Source(run).holds_a_run():
            raise typer.BadParameter(f"{run} holds no run.", param_hint="RUN")
        _track(run, tensorboard, mlflow, with_hidden_names, follow)


def _track(
    path: Path, tensorboard: Path | None, mlflow: str | None, hidden_names: bool, follow: bool
) -> None:
    if tensorboard is None and mlflow is None:
        raise typer.BadParameter("say where to: --tensorboard LOGDIR, --mlflow URI, or both.")
    from server.source import Source
    from server.tracking import Target, track
    from server.tracking_targets import MLflow, TensorBoard

    with contextlib.ExitStack() as stack:
        targets: list[Target] = []
        if tensorboard is not None:
            targets.append(stack.enter_context(TensorBoard.at(tensorboard)))
        if mlflow is not None:
            targets.append(stack.enter_context(MLflow.at(mlflow, hidden_names=hidden_names)))
        for name, count in track(Source(path), targets, follow=follow).items():
            print(f"{name}: {count} new numbers.")
    if tensorboard is not None:
        print(f"Look: tensorboard --logdir {tensorboard}")
    if mlflow is not None and "://" not in mlflow:
        print(f"Look: mlflow ui --backend-store-uri sqlite:///{Path(mlflow).absolute()}/mlflow.db")


def _foreseen() -> tuple[type[Exception], ...]:
    from common.files import AlreadyInUse
    from server.coordinator import CoordinatorError
    from server.history import HistoryError
    from server.tracking import NotTracked

    return (AlreadyInUse, CoordinatorError, HistoryError, NotTracked)
