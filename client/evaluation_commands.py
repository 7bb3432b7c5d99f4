"""`fed-client evaluate`: a model's scores on a hospital's own labelled subjects.

Heavy imports happen inside the command, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from client.options import (
    Confidence,
    Flips,
    LabelCoding,
    Steps,
    chosen_steps,
    require_coding,
    require_confidence,
)
from common.console import failing_in_words, printable, standard_output, start_logging


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    data: Annotated[Path, typer.Argument(help="Folder with labelled subjects in BraTS layout.")],
    site: Annotated[str, typer.Option(help="Name to report; the folder's by default.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; without it they are only printed.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps prepared subjects, which are scans; default: none is."
        ),
    ] = None,
    confidence: Confidence = 0.95,
    label_coding: LabelCoding = "auto",
    flips: Flips = False,
    postprocess: Steps = "none",
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures",
            help="Draw the best, the median and the worst subject into OUT/pictures.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Measure a model on your own labelled subjects: Dice, IoU, HD95, lesion-wise scores, intervals.

    Nothing leaves the machine. With --out: evaluation.json, subjects.csv, summary.csv. Without flips and
    post-processing the figures are comparable with those of a federation's rounds; fed-client predict
    post-processes by default. Time points of one
    patient are told by their names or by DATA/patients.csv. For research; not a medical device. Exit
    code 0: done, though subjects that cannot be used may be left out. 1: no subject or no model can be
    used. 2: wrong usage.
    """
    start_logging()
    steps = chosen_steps(postprocess)
    require_coding(label_coding)
    require_confidence(confidence)
    with failing_in_words("fed-client", _foreseen):
        if not model.is_file():
            raise typer.BadParameter(f"{model} is no file.", param_hint="MODEL")
        if not data.is_dir():
            raise typer.BadParameter(f"{data} is no folder.", param_hint="DATA")
        for folder, option in ((out, "--out"), (cache, "--cache")):
            if folder is not None and folder.exists() and not folder.is_dir():
                raise typer.BadParameter(f"{folder} is no folder.", param_hint=option)
        if pictures and out is None:
            raise typer.BadParameter("goes with a folder --out.", param_hint="--pictures")
        from client.hospital_evaluation import NoUsableSubject, evaluate_folder
        from client.prediction import Options
        from common.evaluation_document import as_json as json_text
        from common.evaluation_document import write_evaluation
        from common.evaluation_table import evaluation_tables
        from common.files import require_writable

        if out is not None:
            require_writable(out)
        options = Options(flips=flips, postprocess=steps)
        try:
            document = evaluate_folder(
                model,
                data,
                site=site or data.resolve().name,
                cache=cache,
                confidence=confidence,
                label_coding=label_coding,
                options=options,
            )
        except NoUsableSubject as error:
            from client.finding_table import print_findings

            with redirect_stdout(sys.stderr):
                print_findings(error.findings)
            raise
        written = write_evaluation(document, out) if out is not None else ()
        if as_json:
            print(json_text(document), flush=True)
        else:
            from client.finding_table import print_findings
            from sites.finding import Finding

            print_findings([Finding(**found) for found in document["findings"]])
            standard_output().print(evaluation_tables(document))
            if written:
                names = ", ".join(printable(str(path)) for path in written)
                print(f"Results: {names}", flush=True)
        if pictures and out is not None:  # last, so that a failure costs nothing but them
            from client.evaluation_pictures import FOLDER, STAY_HERE, draw_pictures

            draw_pictures(document, model, data, out / FOLDER, cache=cache, options=options)
            about = f"Pictures: {printable(str(out / FOLDER))}. {STAY_HERE}"
            print(about, file=sys.stderr if as_json else sys.stdout)


def _foreseen() -> tuple[type[Exception], ...]:
    from common.evaluation_document import EvaluationError
    from common.weights import BadWeights
    from sites.cache import CacheError
    from sites.institutions import SplitError
    from sites.patients import PatientsError

    return BadWeights, CacheError, EvaluationError, PatientsError, SplitError
