"""The researcher's command line, `fed-sim`: the whole federation on one machine.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import (
    failing_in_words,
    run_program,
    standard_output,
    start_logging,
)
from server.dashboard_commands import dashboard_of_run
from server.tracking_commands import track_run
from simulation import evaluation_commands

if TYPE_CHECKING:
    from simulation.run import Result

app = typer.Typer(
    help="A whole federation on one machine: BraTS in, a trained 3D U-Net and per-site Dice out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
FAILED = 1  # exit code

Data = Annotated[Path, typer.Argument(help="Folder in BraTS layout.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A federation.yaml; see `fed-sim config`.")
]
Preset = Annotated[str | None, typer.Option(help="quick, default, reference or private.")]
Assign = Annotated[
    list[str] | None,
    typer.Option("--set", help="One key of federation.yaml, as section.key=value. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


class EngineName(StrEnum):
    IN_PROCESS = "in-process"
    RAY = "ray"


@app.command()
def run(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same again continues it.")],
    config: ConfigFile = None,
    preset: Preset = None,
    assign: Assign = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also train each site alone and all data pooled.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for preprocessed subjects; default OUT/cache.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="ray needs the optional extra.")
    ] = EngineName.IN_PROCESS,
    cpus_per_site: Annotated[int, typer.Option(min=1, help="Ray: CPUs of one site.")] = 1,
    gpus_per_site: Annotated[float, typer.Option(min=0, help="Ray: GPUs of one site.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Split by institution, prepare, train, average, evaluate; resumes after an interruption.

    Exit code 0: every round had all the sites it needs. 1: it failed. 2: wrong usage.
    """
    start_logging()
    from common.config_file import load_config

    with _failing_in_words():
        settings = load_config(config, preset=preset, assign=assign or ())
        _require_folder(data)
        from simulation.run import Engine, simulate

        placed = Engine(engine.value, cpus_per_site, gpus_per_site)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = simulate(data, out, settings, cache=cache, engine=placed)
            _print_result(result)
            if baselines:
                from simulation.baselines import compare, comparison_table, record_comparison

                comparison = compare(result.cohort, out, result.config, placed)
                record_comparison(comparison, out)
                standard_output().print(comparison_table(comparison))
            print(f"Results: {out / 'results.json'}, {out / 'results.csv'}")
            print(f"Model: {result.folder.model}")
        if as_json:
            print((out / "results.json").read_text(encoding="utf-8"))
        if not result.verdict.complete:
            raise typer.Exit(FAILED)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the synthetic cohort to.")],
    sites: Annotated[int, typer.Option(help="Number of institutions, 1 to 17.")] = 6,
    subjects: Annotated[int, typer.Option(help="Subjects per institution.")] = 10,
    real_sizes: Annotated[
        bool, typer.Option("--real-sizes", help="The 17 sites and 369 subjects of BraTS 2020.")
    ] = False,
    grid: Annotated[tuple[int, int, int], typer.Option(help="Voxels along x, y, z.")] = (
        240,
        240,
        155,
    ),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    heterogeneity: Annotated[
        float, typer.Option(help="0: identical scanners; 1: realistic; 1.5: strong.")
    ] = 1.0,
    uncompressed: Annotated[
        bool, typer.Option("--uncompressed", help="Write .nii, as in the Kaggle copy.")
    ] = False,
) -> None:
    """Write synthetic subjects in BraTS 2020 layout; the same seed gives the same bytes."""
    start_logging()
    from common.progress import stepping
    from sites.phantom_cohort import plan, write_cohort

    with _failing_in_words():
        try:
            total = len(plan(sites=sites, subjects_per_site=subjects, real_sizes=real_sizes))
            with stepping("phantom", total, "subjects") as step:
                folder = write_cohort(
                    out,
                    sites=sites,
                    subjects_per_site=subjects,
                    real_sizes=real_sizes,
                    shape=grid,
                    seed=seed,
                    heterogeneity=heterogeneity,
                    compressed=not uncompressed,
                    on_subject=lambda *_: step(),
                )
        except ValueError as error:  # an argument out of range, or another cohort in OUT
            raise typer.BadParameter(str(error)) from None
    print(f"{total} synthetic subjects in {folder}. Not for clinical conclusions of any kind.")


@app.command()
def split(
    data: Data,
    config: ConfigFile = None,
    preset: Preset = None,
    assign: Assign = None,
    as_json: AsJson = False,
) -> None:
    """Show which subjects belong to which site, without reading a scan."""
    start_logging()
    from common.config_file import load_config

    with _failing_in_words():
        settings = load_config(config, preset=preset, assign=assign or ())
        _require_folder(data)
        from rich.markup import escape
        from rich.table import Table

        from simulation.split import describe

        described = describe(data, settings)
        if as_json:
            print(json.dumps(described, indent=1))
            return
        table = Table("site", "role", "subjects", "HGG", "LGG", "training", "held out")
        for name, site in described["sites"].items():
            counts = (len(site["training"]) + len(site["held_out"]), site["HGG"], site["LGG"])
            roles = (len(site["training"]), len(site["held_out"]))
            table.add_row(escape(name), site["role"], *map(str, counts), *map(str, roles))
        standard_output().print(table)
        for subject in described["unmapped"]:
            print(f"no site: {subject}")
        if described["absent"]:
            print(f"{described['absent']} subjects of the partition file are not in {data}")


@app.command()
def results(
    out: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    as_json: AsJson = False,
) -> None:
    """Print what a run has recorded: every round, the final model, who contributed."""
    start_logging()
    with _failing_in_words():
        from server.checkpoint import RunFolder
        from server.history import History
        from server.tables import final_table, results_document, round_table, verdict

        folder = RunFolder(out)
        if not folder.history.exists():
            raise typer.BadParameter(f"{out} holds no run.", param_hint="OUT")
        with History(folder.history) as history:
            # what only the end of a run knows, if it came to its end
            stored = out / "results.json"
            end = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
            if as_json:
                document = {**end, **results_document(history)}
                print(json.dumps(document, indent=1, allow_nan=False))
                return
            console = standard_output()
            for record in history.rounds():
                console.print(round_table(record))
            final = history.final()
            if final is not None:
                console.print(final_table(*final, history.final_released()))
            for subject in end.get("data", {}).get("left_out", ()):
                print(f"Left out, unusable: {subject} (fed-client check says why).")
            print("\n".join(verdict(history).lines()))


app.command()(evaluation_commands.evaluate)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html|FOLDER",
            help="Where to write the page; default RUN/report/report.html.",
        ),
    ] = None,
) -> None:
    """Write one page with curves, box plots, overlays, a 3D tumour, cohort, configuration. Read only.

    Also while the run goes on. Exit code 0: written. 1: there is no run, or the page cannot be
    written. 2: wrong usage.
    """
    start_logging()
    with _failing_in_words():
        from common.files import require_writable
        from server.report import page_path
        from server.report_commands import write_and_tell
        from simulation.report import simulations_report

        page = page_path(out or run / "report")
        if out is not None or run.is_dir():  # that there is no RUN is said otherwise
            require_writable(page.parent)
        write_and_tell(simulations_report(run), page)


class Plant(StrEnum):
    """`simulation.planted_faults.PLANTS` without its imports."""

    NO_NOISE = "no-noise"
    SEEDED_NOISE = "seeded-noise"
    BROKEN_CLIPPING = "broken-clipping"
    HALF_NOISE = "half-noise"


@app.command()
def audit_privacy(
    epsilon: Annotated[float, typer.Option(min=0.01, help="The site's budget.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Over which it is spent.")] = 20,
    patients: Annotated[
        int, typer.Option(min=1, max=100, help="Synthetic ones beside the canaries.")
    ] = 4,
    canaries: Annotated[int, typer.Option(min=16, help="About half of them take part.")] = 400,
    out: Annotated[
        Path | None, typer.Option(help="New folder for audit.json and the audited site.")
    ] = None,
    plant: Annotated[
        Plant | None, typer.Option(help="A fault to put into the client, to see it found.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack the differential privacy of this installation's training, on synthetic patients.

    A one-run audit: a lower bound on epsilon from guesses who took part, and direct measurements of
    the noise and of one patient's influence. It finds faults; it proves no privacy.

    Exit code 0: nothing found. 1: a violation. 2: wrong usage, or no audit was possible.
    """
    start_logging()
    with _failing_in_words():
        if not math.isfinite(epsilon):
            raise typer.BadParameter("must be a number.", param_hint="--epsilon")
        if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise typer.BadParameter(f"{out} exists already.", param_hint="--out")
        from tempfile import TemporaryDirectory

        from simulation.privacy_audit import NotAudited, audit, lines, write_audit

        with nullcontext(out) if out else TemporaryDirectory() as name:
            folder = Path(name)
            try:
                result = audit(
                    folder,
                    budget=epsilon,
                    rounds=rounds,
                    patients=patients,
                    canaries=canaries,
                    plant=plant and plant.value,
                )
            except NotAudited as error:
                raise typer.BadParameter(str(error)) from None
            write_audit(result, folder / "audit.json")
        if as_json:
            print(json.dumps(result.document(), indent=1, allow_nan=False))
        else:
            print("\n".join(lines(result)))
        if result.found:
            raise typer.Exit(FAILED)


@app.command(name="config")
def show_config(preset: Preset = None, assign: Assign = None) -> None:
    """Print a federation.yaml with every key, to edit and pass to `run --config`."""
    from common.config_file import commented, load_config

    with _failing_in_words():
        print(commented(load_config(preset=preset, assign=assign or ())), end="")


app.command("dashboard")(dashboard_of_run)
app.command("track")(track_run)


def main() -> None:
    """Entry point of `fed-sim`."""
    run_program("fed-sim", app)


def _print_result(result: Result) -> None:
    from server.history import History
    from server.tables import average, final_table

    console = standard_output()
    with History(result.folder.history) as history:
        final, released = history.final(), history.final_released()
    if final is not None:
        console.print(final_table(*final, released))
    if result.threshold is not None:
        t = result.threshold
        console.print(
            "Naive FLAIR threshold on the same subjects: whole-tumour Dice "
            f"{t.mean_over_sites:.3f} (mean over sites), {t.mean_over_subjects:.3f} (over subjects)."
        )
        if final is not None and final[1]:
            alike, pooled = (average(final[1], "dice/WT", by_subject=by) for by in (False, True))
            console.print(f"The model: {alike:.3f} and {pooled:.3f}.")
    for subject in result.cohort.unmapped:
        print(f"No site for subject {subject}: it took no part.")
    for subject in result.cohort.left_out:
        print(f"Left out, unusable: {subject} (fed-client check says why).")
    for finding in result.cohort.errors_of_no_subject:
        print(f"{finding.file}: {finding.what}. {finding.remedy}")
    for name in result.cohort.lost_sites:
        print(f"{name} took no part: none of its subjects can be used.")
    for site in result.cohort.sites:
        if not site.trains:
            print(f"{site.name} did not train: it only evaluates, on all its subjects.")
        if not site.held_out:
            print(f"{site.name} holds out nobody: it trains, but nothing is measured there.")
    warnings = sum(finding.severity == "warning" for finding in result.cohort.findings)
    if warnings:
        print(f"{warnings} warnings about the scans: data.findings in results.json.")
    print("\n".join(result.verdict.lines()))


def _require_folder(data: Path) -> None:
    if not data.is_dir():
        problem = "is a file, not a folder" if data.exists() else "does not exist"
        raise typer.BadParameter(f"{data} {problem}.", param_hint="DATA")


@contextmanager
def _failing_in_words() -> Iterator[None]:
    """As `common.console.failing_in_words`, after a table of what is wrong with which scan."""
    with failing_in_words("fed-sim", _foreseen, interrupted="; the same command continues"):
        try:
            yield
        except Exception as error:
            if findings := getattr(error, "findings", ()):
                from client.finding_table import print_findings

                with redirect_stdout(sys.stderr):
                    print_findings(findings)
            raise


def _foreseen() -> tuple[type[Exception], ...]:
    """Failures whose texts are written for the user; any other is a defect of the program.

    Called only after a failure, as the modules are heavy.
    """
    from common.files import AlreadyInUse
    from common.weights import BadWeights
    from server.history import HistoryError
    from server.report import ReportError
    from server.roll_call import FederationFailed
    from simulation.cohort import UnusableData
    from simulation.ray_engine import RayMissing
    from sites.cache import CacheError
    from sites.institutions import SplitError
    from sites.patients import PatientsError

    return (
        AlreadyInUse,
        BadWeights,
        CacheError,
        FederationFailed,
        HistoryError,
        PatientsError,
        RayMissing,
        ReportError,
        SplitError,
        UnusableData,
    )


if __name__ == "__main__":
    main()
