"""How numbers of a run come into TensorBoard's event files and into MLflow, each once.

Which numbers, and when: `server.tracking`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from common.console import plain
from common.environment import prepare_environment
from common.files import locked
from server.tracking import FEDERATION, NotTracked, Numbers, Point

LOCK = "fedbrats.lock"
RUN_TAG = "fedbrats.run"
NAMES_TAG, ALL_NAMES, SHOWN_NAMES = "fedbrats.names", "all", "shown"  # which a target is told
CREDENTIALS = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
STAND_IN = re.compile(r"hospital [0-9]+")
BATCH, PARAMETERS = 500, 100  # MLflow takes at most 1000 and 100


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
