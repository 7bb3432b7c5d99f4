"""A run's numbers for TensorBoard and MLflow, copied from its history by a process of their own.

So no run waits for them or fails with them. What a target holds already is looked up there, and only
the rest is added: to repeat or to kill this does no harm. No models, no subjects. An MLflow server is
not told the names of sites that hide theirs, unless asked to; folders on this machine hold every name.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from common.config_file import ConfigError, load_config
from common.console import plain
from common.environment import prepare_environment
from common.files import locked
from common.metrics import REGIONS, SiteMetrics, mean_dice
from server.dashboard_state import Source, statements_with_epsilon
from server.history import TRAINING, History, RoundRecord
from server.shown_names import shown_names
from server.tables import average

LOG = logging.getLogger("fedbrats")
LOOK_SECONDS = 2.0
LOCK = "fedbrats.lock"
FEDERATION = ""  # whose the numbers of no single site are
RUN_TAG = "fedbrats.run"
NAMES_TAG, ALL_NAMES, SHOWN_NAMES = "fedbrats.names", "all", "shown"  # which a target is told
CREDENTIALS = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
STAND_IN = re.compile(r"hospital [0-9]+")
BATCH, PARAMETERS, LONGEST = 500, 100, 500  # MLflow takes at most 1000, 100, and 6000 characters


class NotTracked(RuntimeError):
    """The numbers cannot be written there; the text says why and what to do."""


@dataclass(frozen=True)
class Point:
    """One number of a site, or of the FEDERATION, after a round."""

    site: str
    key: str
    round: int
    value: float

    @property
    def place(self) -> tuple[str, str, int]:
        return self.site, self.key, self.round


class Target(Protocol):
    name: str
    hides: bool
    """Whether it gets stand-ins for the names of sites that hide theirs."""

    def open(self, numbers: Numbers) -> None:
        """Look up what is there. Raises NotTracked if it is of another run, or names sites otherwise."""

    def add(self, points: Iterable[Point]) -> int:
        """Write those that are not there yet; returns how many. Raises NotTracked."""

    def finish(self) -> None:
        """Nothing will follow. Raises NotTracked."""


@dataclass(frozen=True)
class Numbers:
    """Everything that is to be tracked of a run, so far. `run` tells it from every other.

    `stand_ins` are what the sites that hide their names are called where they do: `hospital 2`. The
    number is the site's place in the order in which the history first tells of all sites, so that it
    stays when others join or change their minds.
    """

    run: str
    parameters: dict[str, str]
    points: list[Point]
    complete: bool
    stand_ins: dict[str, str] = field(default_factory=dict)

    def without_hidden_names(self) -> list[Point]:
        return [replace(p, site=self.stand_ins.get(p.site, p.site)) for p in self.points]


def track(source: Source, targets: Sequence[Target], *, follow: bool) -> dict[str, int]:
    """Copy what is new; with `follow` until the run is complete. How many numbers were added, by target.

    A target that fails while it is followed, a server that is restarted, say, is tried again.

    Raises:
        NotTracked: no round is complete yet (without `follow`), or a target cannot be used.
        HistoryError: the run's history is damaged.
    """
    added = dict.fromkeys((target.name for target in targets), 0)
    opened, seen, said = False, None, ""
    while True:
        stamp = _stamp(source.run.history)
        numbers = numbers_of(source) if stamp not in (seen, None) else None
        if numbers is not None and not opened:
            for target in targets:
                target.open(numbers)
            opened = True
        if numbers is not None:
            failed = ""
            for target in targets:
                try:
                    points = numbers.without_hidden_names() if target.hides else numbers.points
                    added[target.name] += target.add(points)
                    if numbers.complete:
                        target.finish()
                except NotTracked as error:
                    if not follow:
                        raise
                    failed = str(error)
            if failed and failed != said:
                LOG.warning(f"{failed} (tried again every {LOOK_SECONDS:g} s)")
            if numbers.complete and not failed:
                return added
            said, seen = failed, None if failed else stamp
        if not follow:
            if not opened:
                raise NotTracked(f"{source.path}: no round is complete yet.")
            return added
        time.sleep(LOOK_SECONDS)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_mtime_ns, path.stat().st_size
    except OSError:
        return None


def numbers_of(source: Source) -> Numbers | None:
    """None before the first complete round. Raises HistoryError."""
    with History(source.run.history, copied=True) as history:
        records, final = history.rounds(), history.final()
        stated = statements_with_epsilon(history.statements())
        cards = history.sites()
    if not records:
        return None
    points = [point for record in records for point in _of_round(record)]
    for site, told in stated.items():
        points += [
            Point(site, "epsilon", number, statement.epsilon or 0.0)
            for (number, stage), statement in told.items()
            if stage == TRAINING
        ]
    if final is not None:
        points += _of_final(*final)
    points = [point for point in points if math.isfinite(point.value)]
    by_round = [{c.site for c in r.contributions} | set(r.metrics) for r in records]
    since = set(stated) | (set(final[1]) if final is not None else set())
    order = dict.fromkeys(site for sites in (*by_round, since) for site in sorted(sites))
    names = shown_names(cards, order)
    stand_ins = {
        site: f"hospital {number}"  # no enrolled name holds a space
        for number, site in enumerate(order, start=1)
        if names[site] != site
    }
    parameters = _parameters(source.config)
    return Numbers(records[0].sha256, parameters, points, final is not None, stand_ins)


def _of_round(record: RoundRecord) -> Iterator[Point]:
    number = record.round
    came = [c for c in record.contributions if c.trained]
    whole = {
        "dice/mean": record.mean_dice,
        "dice/worst_site": record.worst[1] if record.worst else None,
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "seconds": record.seconds,
        "bytes": sum(c.bytes or 0 for c in came),
        "sites": len(came),
        **_means(record.metrics, ("dice", "iou")),
    }
    yield from _points(FEDERATION, number, whole)
    for c in came:
        about = {"train_loss": c.train_loss, "seconds": c.seconds, "bytes": c.bytes}
        yield from _points(c.site, number, about)
    for site, metrics in record.metrics.items():
        told = {"dice/mean": mean_dice(metrics), "loss": metrics.means.get("loss")}
        yield from _points(site, number, told | _regions(metrics, ("dice", "iou")))


def _of_final(number: int, metrics: dict[str, SiteMetrics]) -> Iterator[Point]:
    kinds = ("dice", "iou", "hd95")
    whole = {f"final/{key}": value for key, value in _means(metrics, kinds).items()}
    yield from _points(FEDERATION, number, whole)
    for site, of in metrics.items():
        told = {f"final/{key}": value for key, value in _regions(of, kinds).items()}
        yield from _points(site, number, told)


def _means(metrics: dict[str, SiteMetrics], kinds: Sequence[str]) -> dict[str, float]:
    keys = [f"{kind}/{region}" for kind in kinds for region in REGIONS]
    return {key: average(metrics, key, by_subject=False) for key in keys}


def _regions(metrics: SiteMetrics, kinds: Sequence[str]) -> dict[str, float | None]:
    keys = [f"{kind}/{region}" for kind in kinds for region in REGIONS]
    return {key: metrics.means.get(key) for key in keys}


def _points(site: str, number: int, values: Mapping[str, float | None]) -> Iterator[Point]:
    for key, value in values.items():
        if value is not None:
            yield Point(site, key, number, float(value))


def _parameters(path: Path) -> dict[str, str]:
    """What the sites agree on, flat: `training.epochs`; nothing of a configuration that is damaged."""
    try:
        agreed = load_config(path).agreed()
    except (ConfigError, OSError):
        return {}
    return dict(_flat(agreed))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, str(value)[:LONGEST]


def name_there(site: str) -> str:
    """A site's name as a folder and as a part of a metric's; an enrolled site's is as it is."""
    return re.sub(r"^[._-]|[^A-Za-z0-9._-]", lambda found: f"_{ord(found[0]):x}_", site)


# -------------------------------------------------------------------------------- TensorBoard


@dataclass
class TensorBoard:
    """Each site is a "run" in a subfolder of its own, so that TensorBoard draws sites into one chart."""

    folder: Path
    name: str = "TensorBoard"
    hides: bool = False
    _there: set[tuple[str, str, int]] = field(default_factory=set)

    @staticmethod
    @contextlib.contextmanager
    def at(folder: Path) -> Iterator[TensorBoard]:
        """Raises NotTracked, AlreadyInUse, OSError."""
        _require("tensorboard", "TensorBoard")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            yield TensorBoard(folder)

    def open(self, numbers: Numbers) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of a half-written last event
        everything = {"scalars": 0, "tensors": 0}
        known = EventAccumulator(str(self._folder_of(FEDERATION)), size_guidance=everything)
        if self._folder_of(FEDERATION).is_dir():
            known.Reload()
            for tag in known.Tags()["tensors"]:
                text = known.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
                if tag == "run/text_summary" and text != numbers.run:
                    raise NotTracked(f"{self.folder} holds another run; choose another folder.")
        if "run/text_summary" not in known.Tags()["tensors"]:
            with self._writing(FEDERATION) as writer:
                rows = "\n".join(f"    {key}: {value}" for key, value in numbers.parameters.items())
                writer.add_text("parameters", rows)
                writer.add_text("run", numbers.run)
        for folder in (path for path in self.folder.iterdir() if path.is_dir()):
            events = EventAccumulator(str(folder), size_guidance=everything)
            events.Reload()
            for key in events.Tags()["scalars"]:
                self._there |= {(folder.name, key, event.step) for event in events.Scalars(key)}

    def add(self, points: Iterable[Point]) -> int:
        new: dict[str, list[Point]] = {}
        for point in points:
            if (self._folder_of(point.site).name, *point.place[1:]) not in self._there:
                new.setdefault(point.site, []).append(point)
        for site, of_site in new.items():
            with self._writing(site) as writer:
                for point in of_site:
                    writer.add_scalar(point.key, point.value, point.round)
            folder = self._folder_of(site).name
            self._there |= {(folder, *point.place[1:]) for point in of_site}
        return sum(map(len, new.values()))

    def finish(self) -> None:
        """Event files have no end."""

    def _folder_of(self, site: str) -> Path:
        return self.folder / (name_there(site) if site != FEDERATION else "_federation")

    @contextlib.contextmanager
    def _writing(self, site: str) -> Iterator[Any]:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self._folder_of(site))) as writer:
            yield writer


# ------------------------------------------------------------------------------------- MLflow


@dataclass
class MLflow:
    """One MLflow run, found again by its tag, in the experiment of the federation's name.

    It keeps to the names of sites that it began with: under two names a number would be there twice.
    """

    uri: str
    artifacts: str | None = None
    name: str = "MLflow"
    hides: bool = False
    _there: set[tuple[str, int]] = field(default_factory=set)
    _client: Any = None
    _run: str = ""

    @staticmethod
    @contextlib.contextmanager
    def at(place: str, *, hidden_names: bool = False) -> Iterator[MLflow]:
        """A tracking URI, or a folder that then holds `mlflow.db`, with every name of a site.

        `hidden_names`: a tracking URI is told those of sites that hide theirs, too.

        Raises NotTracked, AlreadyInUse, OSError.
        """
        prepare_environment()  # before its first import: nothing phones home
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its 7 take minutes
        _require("mlflow", "MLflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        if "://" in place:
            with _password_apart(place) as uri:
                yield MLflow(uri, hides=not hidden_names)
            return
        folder = Path(place).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            artifacts = (folder / "artifacts").as_uri()  # of its runs; we write none
            yield MLflow(f"sqlite:///{folder / 'mlflow.db'}", artifacts)

    def open(self, numbers: Numbers) -> None:
        run, parameters = numbers.run, numbers.parameters
        naming = SHOWN_NAMES if self.hides else ALL_NAMES
        with _mlflow_in_words():
            from mlflow.entities import Param
            from mlflow.tracking import MlflowClient

            self._client = client = MlflowClient(tracking_uri=self.uri)
            title = parameters.get("name", "fedbrats")
            experiment = client.get_experiment_by_name(title)
            where = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(title, artifact_location=self.artifacts)
            )
            found = client.search_runs([where], f"tags.`{RUN_TAG}` = '{run}'")
            if not found:
                tags = {RUN_TAG: run, NAMES_TAG: naming}
                found = [client.create_run(where, run_name=title, tags=tags)]
            self._require_same(naming, found[0].data.tags.get(NAMES_TAG, ALL_NAMES), numbers)
            self._run = found[0].info.run_id
            new = [
                Param(key, value)
                for key, value in parameters.items()
                if key not in found[0].data.params
            ]
            for part in _parts(new, PARAMETERS):
                client.log_batch(self._run, params=part)
            for key in found[0].data.metrics:
                history = client.get_metric_history(self._run, key)
                self._there |= {(key, metric.step) for metric in history}

    @staticmethod
    def _require_same(naming: str, there: str, numbers: Numbers) -> None:
        if there == naming or not numbers.stand_ins:
            return
        how = "with" if there == ALL_NAMES else "without"
        what = "without --with-hidden-names" if naming == ALL_NAMES else "with --with-hidden-names"
        raise NotTracked(
            f"MLflow: this run is there already, {how} the names of the sites that hide theirs. Type "
            f"the command {what}, or delete the run there first."
        )

    def add(self, points: Iterable[Point]) -> int:
        with _mlflow_in_words():
            from mlflow.entities import Metric

            now = int(1000 * time.time())
            new = [
                Metric(self._key(point), point.value, now, point.round)
                for point in points
                if (self._key(point), point.round) not in self._there
            ]
            for part in _parts(new, BATCH):
                self._client.log_batch(self._run, metrics=part)
                self._there |= {(metric.key, metric.step) for metric in part}
            return len(new)

    def finish(self) -> None:
        with _mlflow_in_words():
            self._client.set_terminated(self._run)

    def _key(self, point: Point) -> str:
        if not point.site:
            return point.key
        site = point.site if STAND_IN.fullmatch(point.site) else name_there(point.site)
        return f"site/{site}/{point.key}"


def _parts(values: Sequence[Any], most: int) -> Iterator[list[Any]]:
    for begin in range(0, len(values), most):
        yield list(values[begin : begin + most])


@contextlib.contextmanager
def _mlflow_in_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow.", "sqlalchemy.")):
            raise
        raise NotTracked(f"MLflow: {plain(without_password(str(error)))}") from error


def without_password(text: str) -> str:
    """The text without what stands before the @ of an address in it."""
    return re.sub(r"://\S*@", "://", text)


@contextlib.contextmanager
def _password_apart(place: str) -> Iterator[str]:
    """The address without user and password, which MLflow meanwhile finds where it prefers them.

    So no message of MLflow's can hold them. A database's address needs them, and keeps them.

    Raises:
        NotTracked: it cannot be told where they end.
    """
    scheme, _, rest = place.partition("://")
    told, at, host = rest.rpartition("@")
    if not at or scheme.lower() not in ("http", "https"):
        yield place
        return
    user, colon, password = told.partition(":")
    if re.search(r"[/?#\s]", told) or not (user and colon and password):
        raise NotTracked(
            "MLflow: the address holds an @, and not a user's name and password before it. Leave it out "
            f"and set {' and '.join(CREDENTIALS)} in the environment."
        )
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(zip(CREDENTIALS, map(unquote, (user, password)), strict=True))
    try:
        yield f"{scheme}://{host}"
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _require(module: str, name: str) -> None:
    try:
        __import__(module)
    except ImportError as error:
        raise NotTracked(
            f"{name} is not installed: pip install -e '.[{module}]' -c constraints.txt"
        ) from error
