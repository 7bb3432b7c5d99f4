"""`fed-sim evaluate`: the scores of a run's model, per subject, per site and over all of them.

Heavy imports happen inside the command, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.options import Confidence, Flips, Steps, chosen_steps, require_confidence
from common.console import failing_in_words, printable, standard_output, start_logging


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Another model.safetensors, such as RUN/baselines/centralised/model.safetensors."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default RUN/evaluation.")
    ] = None,
    confidence: Confidence = 0.95,
    training: Annotated[
        bool, typer.Option("--training", help="The training subjects instead, to see overfitting.")
    ] = False,
    flips: Flips = False,
    postprocess: Steps = "none",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Measure every held-out subject: Dice, IoU, HD95, lesion-wise scores, with intervals and fairness.

    Writes evaluation.json, subjects.csv and summary.csv. Without flips and post-processing the figures are
    those of the rounds; fed-client predict post-processes by default. For research; not a medical device.
    Exit code 0: done. 1: it is not possible. 2: wrong usage.
    """
    start_logging()
    steps = chosen_steps(postprocess)
    require_confidence(confidence)
    with failing_in_words("fed-sim", _foreseen):
        if not run.is_dir():
            raise typer.BadParameter(f"{run} is no folder.", param_hint="RUN")
        if model is not None and not model.is_file():
            raise typer.BadParameter(f"{model} is no file.", param_hint="--model")
        if out is not None and out.exists() and not out.is_dir():
            raise typer.BadParameter(f"{out} is no folder.", param_hint="--out")
        from client.prediction import Options
        from common.evaluation_document import as_json as json_text
        from common.evaluation_document import write_evaluation
        from common.evaluation_table import evaluation_tables
        from common.files import require_writable
        from simulation.evaluation import evaluate_run, evaluation_folder

        options = Options(flips=flips, postprocess=steps)
        folder = out or evaluation_folder(run, model, training=training, options=options)
        require_writable(folder)
        document = evaluate_run(
            run, model, confidence=confidence, training=training, options=options
        )
        written = write_evaluation(document, folder)
        if as_json:
            print(json_text(document))
            return
        standard_output().print(evaluation_tables(document))
        print("Results: " + ", ".join(printable(str(path)) for path in written))


def _foreseen() -> tuple[type[Exception], ...]:
    from common.evaluation_document import EvaluationError
    from common.weights import BadWeights
    from sites.cache import CacheError

    return BadWeights, CacheError, EvaluationError
