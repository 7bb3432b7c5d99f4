"""Federations of real processes on this machine: fed-server and fed-client over TLS on loopback.

A test gets a `Federation`: folders of one coordinator and of hospitals on the phantom cohort. It
starts, stops and kills their programs and waits for what they say; everything still running at its
end is killed. Waiting is always for a condition, with a limit that no working program comes near.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from client.hospital import HospitalFolder, init_hospital
from client.outbound import departures
from client.policy import FAMILIES, Policy
from client.site_config import SiteConfig, load_site_config
from common.audit_log import append
from common.code_hash import ROOT
from common.config import FederationConfig
from common.config_file import commented
from common.files import write_text_atomically
from common.invitation import write_invitation
from common.keys import fingerprint, read_public_key
from server import enrolment
from server.coordinator import CoordinatorFolder, init_folder, invitation, terms

BIN = Path(sys.executable).parent
FAULTS = Path(__file__).parent / "faults"
SITES = "site-01", "site-06", "site-13"
EXACT = "rounds.updates=fp32", "rounds.min_sites=3"
# these hospitals have few subjects, and their results are compared to the last digit
OPEN = Policy(min_subjects=1, decimals=None, metrics=FAMILIES, show_name=True)
PATIENCE = 180.0  # seconds for anything to happen, on however busy a machine


def wait_until(happened: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for a true value and return it; fail with `what` if it does not come."""
    until = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < until, f"in {seconds:.0f} s this did not happen: {what}"
        time.sleep(0.05)
    return value


class Program:
    """One running command; what it prints goes to a file of its own."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, env: Mapping[str, str]):
        self.name, self.log = name, log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, *texts: str) -> None:
        """Wait until it has printed all of these, which it must do before it ends."""
        for text in texts:

            def said(text: str = text) -> bool:
                ended = self.process.poll() is not None  # asked before, so that nothing is missed
                found = text in self.text()
                assert found or not ended, f"{self} ended without {text!r}:\n{self.text()}"
                return found

            try:
                wait_until(said, f"{self} says {text!r}")
            except AssertionError as failure:
                raise AssertionError(f"{failure}\n{self.text()}") from None

    def exit_code(self) -> int:
        """Wait for its end."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} does not end:\n{self.text()}") from None

    def ends_well(self) -> None:
        assert self.exit_code() == 0, self.text()

    def fails_saying(self, *texts: str) -> None:
        """It ends with exit code 1 and these words, and without a traceback."""
        code = self.exit_code()
        assert code == 1, f"{self} ended with {code}:\n{self.text()}"
        assert "Traceback" not in self.text()
        for text in texts:
            assert text in self.text()

    def kill(self) -> None:
        """SIGKILL for this one process: what it started has to notice by itself."""
        self.process.kill()
        self.process.wait()

    def kill_group(self) -> None:
        """SIGKILL for it and for what it has started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def __str__(self) -> str:
        return self.name


@dataclass
class Faults:
    """How `faults/sitecustomize.py` makes one client misbehave."""

    folder: Path

    def plan(self, faults: Mapping[int, str]) -> None:
        """What goes wrong in the training of which round."""
        self.folder.mkdir(exist_ok=True)
        write_text_atomically(self.folder / "plan.json", json.dumps(faults))

    def hold(self, *tasks: str) -> None:
        """The client will wait at these tasks (`train-2`, `evaluate-1`) until they are released."""
        for task in tasks:
            (self.folder / f"hold-{task}").touch()

    def until_held(self, task: str) -> None:
        waiting = self.folder / f"holding-{task}"
        wait_until(waiting.exists, f"{self.folder.name} waits at {task}")

    def release(self, task: str) -> None:
        (self.folder / f"hold-{task}").unlink()


@dataclass
class Federation:
    """One coordinator and its hospitals; `programs` is everything that was started for them."""

    path: Path
    coordinator: CoordinatorFolder
    hospitals: dict[str, HospitalFolder] = field(default_factory=dict)
    faults: dict[str, Faults] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)

    def start(self, *, env: Mapping[str, str] | None = None) -> Program:
        return self.run("fed-server", "start", str(self.coordinator.path), env=env)

    def serving(self) -> Program:
        """A server that listens already."""
        server = self.start()
        server.says("serving ")
        return server

    def join(
        self, site: str, *options: str, accept: bool = True, env: Mapping[str, str] | None = None
    ) -> Program:
        """Take part; the first time with the invitation that `admit` wrote."""
        folder = self.hospitals[site]
        if accept:
            options = (*options, "--accept", self.terms_hash())
        if not folder.invitation.exists() and "--invitation" not in options:
            options = (*options, "--invitation", str(self.coordinator.invitation(site)))
        extra = dict(env or {})
        if site in self.faults:
            extra |= {"PYTHONPATH": f"{FAULTS}{os.pathsep}{ROOT}"}
            extra |= {"FAULTS": str(self.faults[site].folder)}
        return self.run("fed-client", "join", str(folder.path), *options, env=extra)

    def typed(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """What a command prints that must succeed at once."""
        program = self.run(*arguments, env=env)
        program.ends_well()
        return program.text()

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> Program:
        number = len(self.programs)
        name = f"{arguments[0]} {arguments[1]} {Path(arguments[2]).name}"
        log = self.path / f"{number:02d} {name}.log"
        program = Program(name, arguments, log, env or {})
        self.programs.append(program)
        return program

    def hospital(self, site: str, scans: Path, cache: Path) -> None:
        """As `fed-client init`, with prepared scans."""
        folder = self.hospitals[site] = init_hospital(self.path / site, site, scans)
        settings = SiteConfig(data=scans, cache=cache, device="cpu", policy=OPEN)
        write_text_atomically(folder.config, commented(settings))

    def put_policy(self, site: str, policy: Policy = OPEN) -> None:
        """As somebody who edits the hospital's site.yaml."""
        path = self.hospitals[site].config
        settings = load_site_config(path).model_copy(update={"policy": policy})
        write_text_atomically(path, commented(settings))

    def may_misbehave(self, site: str) -> Faults:
        """The site's client obeys the returned faults from its next start on."""
        self.faults[site] = Faults(self.path / f"faults of {site}")
        self.faults[site].plan({})
        return self.faults[site]

    def admit(self, site: str) -> None:
        """As `fed-server admit`."""
        key = read_public_key(self.hospitals[site].public_key).key
        enrolled = enrolment.admit(self.coordinator.enrolled, site, key)
        told = {"site": site, "key": enrolled.fingerprint, "replace": False}
        append(self.coordinator.audit, "admitted", told)
        self.invite(site)

    def invite(self, site: str, **changes: str) -> None:
        """Write the invitation, with other values than the true ones where `changes` says so."""
        key = fingerprint(read_public_key(self.hospitals[site].public_key).key)
        self.coordinator.invitations.mkdir(exist_ok=True)
        answer = replace(invitation(self.coordinator, site, key), **changes)
        write_invitation(self.coordinator.invitation(site), answer)

    def terms_hash(self) -> str:
        return terms(self.coordinator).hash()

    def change(self, old: str, new: str) -> None:
        """Edit federation.yaml, as a coordinator would."""
        text = self.coordinator.config.read_text()
        assert old in text
        self.coordinator.config.write_text(text.replace(old, new))

    def status(self) -> dict[str, Any]:
        """What the running server last said of itself; empty if it has not yet."""
        try:
            return json.loads(self.coordinator.status.read_text())
        except FileNotFoundError:
            return {}

    def until(self, site: str, *states: str) -> None:
        """Wait for the server to see the site in one of these states."""

        def seen() -> bool:
            return self.status().get("sites", {}).get(site, {}).get("state") in states

        wait_until(seen, f"{site} is {' or '.join(states)}")

    def results(self) -> dict[str, Any]:
        return json.loads((self.coordinator.run / "results.json").read_text())

    def reasons(self, round_: int) -> dict[str, str]:
        """Why sites did not contribute to a round, by site."""
        record = self.results()["rounds"][round_ - 1]
        return {c["site"]: c["reason"] for c in record["contributions"] if not c["trained"]}

    def left(self, site: str, kind: str = "") -> list[dict[str, Any]]:
        """What has left the hospital by its own record."""
        rows = departures(self.hospitals[site].audit)
        return [row for row in rows if kind in ("", row["kind"])]

    def workers(self, site: str) -> list[int]:
        """The processes that train for this hospital."""
        folder = str(self.hospitals[site].path.resolve())
        return [pid for pid, line in processes() if "client.worker" in line and folder in line]

    def orphans(self) -> list[str]:
        """Every process that has to do with this federation."""
        return [line for _, line in processes() if str(self.path) in line]

    def kill_everything(self) -> None:
        for program in self.programs:
            if program.process.poll() is None:
                program.kill_group()
        for pid, line in processes():  # workers lead process groups of their own
            if str(self.path) in line:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def processes() -> Iterator[tuple[int, str]]:
    """Number and command line of everything that runs on this machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                yield int(entry.name), line


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Proxy:
    """Stands between a client and the server, passes bytes on, and can cut the connection."""

    LARGE = 4096  # bytes at once: no question for news is so long, every model is

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_upload, self.down = threading.Event(), threading.Event()
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self.down.is_set():
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                for ends in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if up and self.cut_upload.is_set() and len(data) > self.LARGE:
                    self.down.set()  # until the test says otherwise
                    self.cut_upload.clear()
                    self.cuts += 1
                    sink.sendall(data[: self.LARGE])
                    break
                sink.sendall(data)
        for end in (source, sink):  # to close them here would not wake the other direction
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def fp32_config(tiny_config: Callable[..., FederationConfig]) -> Callable[..., FederationConfig]:
    """As `tiny_config`, with updates that travel whole, so that results can be compared exactly."""
    return lambda *assign: tiny_config(*EXACT, *assign)


@pytest.fixture(scope="session")
def scans(
    cohort_data: Path,
    tiny_config: Callable[..., FederationConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Each hospital's own folder of scans: those that a simulation gives to the site of that name."""
    from simulation.cohort import find_and_split

    found, split = find_and_split(cohort_data, tiny_config())
    folders = {subject.id: next(iter(subject.images.values())).parent for subject in found.subjects}
    out = tmp_path_factory.mktemp("scans")
    for site, members in split.sites.items():
        for member in members:
            shutil.copytree(folders[member], out / site / member)
        for mapping in cohort_data.rglob("name_mapping.csv"):
            shutil.copy(mapping, out / site)
    return {site: out / site for site in split.sites}


@pytest.fixture(scope="session")
def federation_at() -> Iterator[Callable[[Path], Federation]]:
    """A function: a folder -> a federation to be made in it; all its processes end with the tests."""
    made: list[Federation] = []

    def at(path: Path) -> Federation:
        made.append(Federation(path, CoordinatorFolder(path / "server")))
        return made[-1]

    yield at
    for federation in made:
        federation.kill_everything()


@pytest.fixture(scope="session")
def new_federation(
    federation_at: Callable[[Path], Federation],
    fp32_config: Callable[..., FederationConfig],
    scans: dict[str, Path],
    cohort_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Federation]:
    """A function that makes a federation on a free port, of further `section.key=value` texts."""

    def make(
        *assign: str,
        sites: Sequence[str] = SITES,
        misbehaving: Sequence[str] = (),
        admitted: Sequence[str] | None = None,
        path: Path | None = None,
    ) -> Federation:
        """`misbehaving` sites have `Faults`; `path` is the folder of it all, by default a new one."""
        federation = federation_at(path or tmp_path_factory.mktemp("federation"))
        server = f"server.port={free_port()}", "server.address=127.0.0.1", "server.listen=127.0.0.1"
        init_folder(federation.coordinator.path, fp32_config(*server, *assign))
        for site in sites:
            federation.hospital(site, scans[site], cohort_cache)
        for site in misbehaving:
            federation.may_misbehave(site)
        for site in sites if admitted is None else admitted:
            federation.admit(site)
        return federation

    return make


@pytest.fixture(scope="session")
def waiting() -> Callable[..., Any]:
    """The function `wait_until`."""
    return wait_until


@pytest.fixture(scope="session")
def port() -> Callable[[], int]:
    """The function `free_port`."""
    return free_port


@pytest.fixture(scope="session")
def proxy() -> Iterator[Callable[[int], Proxy]]:
    """A function that puts a `Proxy` before a port."""
    made: list[Proxy] = []

    def make(port: int) -> Proxy:
        made.append(Proxy(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


@dataclass(frozen=True)
class Simulated:
    """What `fed-sim run` makes of the same split, seed and configuration."""

    results: dict[str, Any]
    model: bytes


@pytest.fixture(scope="session")
def exact_arguments(tiny_arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The same configuration as `fp32_config()`, for a command line."""
    return (*tiny_arguments, *(text for key in EXACT for text in ("--set", key)))


@pytest.fixture(scope="session")
def simulated(
    cohort_data: Path,
    cohort_cache: Path,
    exact_arguments: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Simulated:
    out = tmp_path_factory.mktemp("simulated") / "run"
    where = "run", str(cohort_data), "--out", str(out), "--cache", str(cohort_cache)
    program = str(BIN / "fed-sim"), *where, *exact_arguments
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(program, check=True, capture_output=True, env=env)
    results = json.loads((out / "results.json").read_text())
    return Simulated(results, (out / "model.safetensors").read_bytes())
