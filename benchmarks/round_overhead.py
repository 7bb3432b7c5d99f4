"""Seconds and bytes of a round beyond training: fed-server and fed-client against stock Flower.

    python benchmarks/round_overhead.py [--sites 4] [--blocks 3] [--rounds 4] [--json FILE] [--without-stock]

Both do the same work on loopback, over TLS, with node authentication: a
round trains at every site, averages, and evaluates the new model at every site, with the same initial
network of 20 MB in fp32. "Training" adds random numbers about a constant of the site to the weights
and "evaluation" answers fixed numbers, so a round is transfer and overhead.

- ours: the programs `fed-server start` and `fed-client join` with their worker processes;
  `instant_training/sitecustomize.py` replaces training and evaluation and notes when a round is
  recorded. Everything else is the product: checks, averaging, checkpoints, history, records.
- stock: `flower-superlink`, one `flower-supernode` a site, `flwr run` with the app `stock_flower`.

Blocks of both alternate in one run. A round's time is from the end of the round before; the first
round of each block is left out. All traffic of the sites passes a counting TCP relay in this process.
The transfer is estimated by copying as many bytes over TLS through the same relay, down to all sites
at once, then up. overhead = round - transfer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BIN = Path(sys.executable).parent
LONGEST_BLOCK = 600.0  # seconds
PATIENCE = 60.0  # seconds for a server to answer
CHANNELS = "[16,32,64,128,262]"  # residual_unet: 20 MB
NETWORK = ("network.name=residual_unet", f"network.channels={CHANNELS}")
TINY = (
    *NETWORK,
    "preprocess.shape=[32,32,32]",
    "training.threads=1",
    "training.epochs=1",
    "training.precision=fp32",
    "server.gather_minutes=1",
)
COPY_SITE = """
import socket, ssl, sys
host, port, authority, down, up = sys.argv[1], *map(str, sys.argv[2:])
context = ssl.create_default_context(cafile=authority)
with socket.create_connection((host, int(port))) as plain:
    with context.wrap_socket(plain, server_hostname=host) as connection:
        buffer, left = bytearray(1 << 18), int(down)
        print("ready", flush=True)
        while left:
            left -= connection.recv_into(buffer, min(left, len(buffer)))
        connection.sendall(b"d")
        connection.recv_into(buffer, 1)
        connection.sendall(bytes(int(up)))
        connection.recv_into(buffer, 1)
"""


class Relay:
    """A TCP relay on a port of its own that counts what passes: `up` is to the server."""

    def __init__(self) -> None:
        self.up = self.down = 0
        self.port = 0
        self.target = 0
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True).start()
        ready.wait()

    async def _serve(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0, limit=2**20)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await server.serve_forever()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # nobody listens yet: the client is told by a closed connection
            writer.close()
            return
        await asyncio.gather(
            self._pump(reader, there[1], "up"), self._pump(there[0], writer, "down")
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**18):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class Rounds:
    """What was measured of one system, over all its blocks."""

    seconds: list[float] = field(default_factory=list)
    until_averaged: list[float] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)

    def take(self, marks: list[dict[str, Any]], sites: int) -> None:
        """The rounds of one block, from what was noted at their ends; the first is left out.

        Raises:
            RuntimeError: a round lacked a site's update, so it was not the same work.
        """
        ends = [mark for mark in marks if mark["what"] == "round"]
        averaged = [mark for mark in marks if mark["what"] == "averaged"]
        if any(end["good"] != sites for end in ends):
            raise RuntimeError(f"not every site contributed: {ends}")
        for before, middle, end in zip(ends, averaged[1:], ends[1:], strict=False):
            self.seconds.append(end["at"] - before["at"])
            self.until_averaged.append(middle["at"] - before["at"])
        # the counts are read a moment after the mark, so over the block and not by the round
        for way, list_ in (("up", self.up), ("down", self.down)):
            list_.append((ends[-1][way] - ends[0][way]) // (len(ends) - 1))


class Processes:
    """Everything a block starts, each in a process group of its own; ended with the block."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder = folder
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, log: str, *command: object) -> subprocess.Popen[bytes]:
        with (self._folder / f"{log}.log").open("ab") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def call(self, *command: object) -> str:
        return subprocess.run(
            [str(part) for part in command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def end(self) -> None:
        for process in self._started:
            process.terminate()
        until = time.monotonic() + 15
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):  # also what it left behind
                os.killpg(process.pid, 9)
            process.wait()


@contextlib.contextmanager
def processes(folder: Path, **environment: str) -> Iterator[Processes]:
    started = Processes(folder, **environment)
    try:
        yield started
    finally:
        started.end()


@dataclass(frozen=True)
class Federation:
    """One coordinator's folder and its hospitals', enrolled; stock Flower uses its keys too."""

    folder: Path
    port: int
    sites: tuple[str, ...]

    @property
    def server(self) -> Path:
        return self.folder / "server"

    def hospital(self, site: str) -> Path:
        return self.folder / site


def make_federation(
    folder: Path, data: dict[str, Path], relay: Relay, *settings: str
) -> Federation:
    """By the programs' own commands. The invitations name the relay's port instead of the server's."""
    folder.mkdir()
    made = Federation(folder, free_port(), tuple(data))
    texts = [text for key in (*TINY, *settings) for text in ("--set", key)]
    with processes(folder, PYTHONPATH=str(ROOT)) as run:
        address = ("--address", "127.0.0.1", "--port", made.port)
        run.call(BIN / "fed-server", "init", made.server, *address, "--preset", "quick", *texts)
        for site, scans in data.items():
            hospital = made.hospital(site)
            run.call(BIN / "fed-client", "init", hospital, "--name", site, "--data", scans)
            public = hospital / "site.pub"
            run.call(BIN / "fed-server", "admit", made.server, public, "--name", site)
            sent = made.server / "invitations" / f"{site}.fedbrats.json"
            invitation = json.loads(sent.read_text())
            invitation["address"] = f"127.0.0.1:{relay.port}"
            (hospital / "sent.json").write_text(json.dumps(invitation))
    return made


def ours(made: Federation, relay: Relay, rounds: int) -> list[dict[str, Any]]:
    """One block of `fed-server start` and `fed-client join`: the marks at its rounds' ends."""
    from server.coordinator import CoordinatorFolder, terms

    relay.target = made.port
    marks = made.folder / "marks.jsonl"
    path = f"{HERE / 'instant_training'}{os.pathsep}{ROOT}"
    accept = terms(CoordinatorFolder(made.server)).hash()
    with processes(made.folder, PYTHONPATH=path, BENCHMARK_MARKS=str(marks)) as run:
        server = run.start("server", BIN / "fed-server", "start", made.server)
        for site in made.sites:
            hospital = made.hospital(site)
            invitation = ("--invitation", hospital / "sent.json", "--accept", accept)
            run.start(site, BIN / "fed-client", "join", hospital, *invitation)
        return collect(marks, relay, rounds, server)


def stock(
    made: Federation, relay: Relay, rounds: int, initial: Path, block: str
) -> list[dict[str, Any]]:
    """One block of stock Flower with the federation's keys: the marks at its rounds' ends."""
    relay.target = made.port
    folder = made.folder / f"stock-{block}"
    home = folder / "home"
    home.mkdir(parents=True)
    authority = made.server / "ca.crt"
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "fed"\n[superlink.fed]\n'
        f'address = "127.0.0.1:{made.port}"\nroot-certificates = "{authority}"\n'
    )
    marks = folder / "marks.jsonl"
    environment = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
    }
    with processes(folder, **environment) as run:
        tls = (
            *("--ssl-certfile", made.server / "server.crt"),
            *("--ssl-keyfile", made.server / "server.key"),
            *("--ssl-ca-certfile", authority),
        )
        server = run.start(
            "superlink",
            *(BIN / "flower-superlink", "--host", "127.0.0.1", "--port", made.port, *tls),
            *("--enable-supernode-auth", "--database", folder / "state.db"),
            "--disable-runtime-dependency-installation",
        )
        await_health(made.port, authority)
        for number, site in enumerate(made.sites, start=1):
            public = made.hospital(site) / "site.pub"
            run.call(BIN / "flwr", "supernode", "register", public, "--name", site)
            run.start(
                site,
                *(BIN / "flower-supernode", "--superlink", f"127.0.0.1:{relay.port}"),
                *("--root-certificates", authority, "--port", free_port()),
                *("--auth-supernode-private-key", made.hospital(site) / "site.key"),
                *("--node-config", f"number={number}"),
            )
        app = folder / "app"
        shutil.copytree(HERE / "stock_flower", app)
        settings = {
            "rounds": rounds,
            "sites": len(made.sites),
            "initial": f'"{initial}"',
            "marks": f'"{marks}"',
        }
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        run.call(BIN / "flwr", "run", app, "-c", words)
        found = collect(marks, relay, rounds, server)
        expected = rounds * 1e-3 * statistics.mean(range(1, len(made.sites) + 1))
        moved = [mark["moved"] for mark in until(lambda: of(marks, "done"), PATIENCE)]
        if not math.isclose(moved[0], expected, rel_tol=1e-2):
            raise RuntimeError(f"stock Flower averaged something else: {moved}, not {expected}")
        return found


def collect(
    marks: Path, relay: Relay, rounds: int, server: subprocess.Popen[bytes]
) -> list[dict[str, Any]]:
    """Wait for the marks of these rounds; each gets the relay's counts of that moment.

    Raises:
        RuntimeError: the server ended before, or it took too long.
    """
    found: list[dict[str, Any]] = []
    begin = time.monotonic()
    while sum(mark["what"] == "round" for mark in found) < rounds:
        ended = server.poll() is not None
        for mark in read(marks)[len(found) :]:
            found.append(mark | {"up": relay.up, "down": relay.down})
            if mark["what"] == "round":
                print(".", end="", file=sys.stderr, flush=True)
        if ended and sum(mark["what"] == "round" for mark in found) < rounds:
            raise RuntimeError(f"the server ended early; see {marks.parent}")
        if time.monotonic() - begin > LONGEST_BLOCK:
            raise RuntimeError(f"the rounds took too long; see {marks.parent}")
        time.sleep(0.01)
    return found


def read(marks: Path) -> list[dict[str, Any]]:
    text = marks.read_text() if marks.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def of(marks: Path, what: str) -> list[dict[str, Any]]:
    return [mark for mark in read(marks) if mark["what"] == what]


def until(look: Callable[[], Any], seconds: float) -> Any:
    """What `look` finds, once it finds something. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"nothing within {seconds:.0f} s")


def await_health(port: int, authority: Path) -> None:
    context = ssl.create_default_context(cafile=authority)

    def healthy() -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=context, timeout=1)
            return True
        return False

    until(healthy, PATIENCE)


def transfer_seconds(made: Federation, relay: Relay, down: int, up: int) -> float:
    """A raw TLS copy through the relay: `down` bytes to all sites at once, then `up` bytes back."""
    sites = len(made.sites)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.server / "server.crt", made.server / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay.target = listener.getsockname()[1]
        each = (str(made.server / "ca.crt"), str(down // sites), str(up // sites))
        command = [sys.executable, "-c", COPY_SITE, "127.0.0.1", str(relay.port), *each]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(sites)]
        connections = [context.wrap_socket(listener.accept()[0], server_side=True) for _ in started]
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        content = bytes(down // sites)
        barrier = threading.Barrier(sites)

        def serve(connection: ssl.SSLSocket) -> None:
            buffer, left = bytearray(1 << 18), up // sites
            connection.sendall(content)
            connection.recv(1)
            barrier.wait()
            connection.sendall(b"u")
            while left:
                left -= connection.recv_into(buffer, min(left, len(buffer)))
            connection.sendall(b"e")

        threads = [threading.Thread(target=serve, args=(c,)) for c in connections]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begin
        for process, connection in zip(started, connections, strict=True):
            process.wait(10)
            connection.close()
    return seconds


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def hospitals(folder: Path, sites: int) -> dict[str, Path]:
    """Tiny synthetic subjects for each site, as many as a hospital's policy asks for by default."""
    from sites.phantom_cohort import write_cohort

    names = [f"site-{number}" for number in range(1, sites + 1)]
    for number, name in enumerate(names, start=1):
        write_cohort(folder / name, sites=2, subjects_per_site=9, shape=(32, 32, 20), seed=number)
    return {name: folder / name for name in names}


def initial_model(path: Path) -> int:
    """Write the network's initial weights, the same as a federation begins with; its bytes."""
    import safetensors.torch

    from common.config_file import load_config
    from common.model import initial_weights

    weights = initial_weights(load_config(preset="quick", assign=[*TINY]))
    safetensors.torch.save_file(weights, path)
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


SYSTEMS = {
    "fedbrats (fp16 change)": "rounds.updates=fp16",
    "fedbrats (fp32)": "rounds.updates=fp32",
    "stock Flower": "",
}


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    relay = Relay()
    data = hospitals(folder, chosen.sites)
    initial = folder / "initial.safetensors"
    size = initial_model(initial)
    measured = {name: Rounds() for name in SYSTEMS}
    load = [os.getloadavg()[0]]
    for block in range(1, chosen.blocks + 1):
        for name, setting in SYSTEMS.items():
            if chosen.without_stock and not setting:
                continue
            place = folder / f"block-{block}-{list(SYSTEMS).index(name)}"
            # one more than is asked for: our last round is followed by the final evaluation
            settings = (setting or "rounds.updates=fp32", f"rounds.number={chosen.rounds + 1}")
            made = make_federation(
                place, data, relay, *settings, f"rounds.min_sites={chosen.sites}"
            )
            print(f"block {block}, {name} ", end="", file=sys.stderr, flush=True)
            if setting:
                marks = ours(made, relay, chosen.rounds)
            else:
                marks = stock(made, relay, chosen.rounds, initial, str(block))
            measured[name].take(marks, chosen.sites)
            load.append(os.getloadavg()[0])
            last = measured[name].seconds[1 - chosen.rounds :]
            print(" ".join(f"{s:.2f}" for s in last), file=sys.stderr)
    rows = {}
    for name, rounds in measured.items():
        if not rounds.seconds:
            continue
        up, down = (int(statistics.median(sizes)) for sizes in (rounds.up, rounds.down))
        copies = [transfer_seconds(made, relay, down, up) for _ in range(5)]
        transfer, median = statistics.median(copies), statistics.median(rounds.seconds)
        rows[name] = {
            "rounds": len(rounds.seconds),
            "seconds_median": round(median, 3),
            "seconds_least": round(min(rounds.seconds), 3),
            "seconds_most": round(max(rounds.seconds), 3),
            "until_averaged_median": round(statistics.median(rounds.until_averaged), 3),
            "transfer_seconds": round(transfer, 3),
            "overhead_seconds": round(median - transfer, 3),
            "bytes_down": down,
            "bytes_up": up,
            "all_seconds": [round(s, 3) for s in rounds.seconds],
        }
    import flwr
    import torch

    return {
        "sites": chosen.sites,
        "model_bytes": size,
        "blocks": chosen.blocks,
        "rounds_a_block": chosen.rounds,
        "systems": rows,
        "load_average": [round(value, 2) for value in load],
        "cores": os.cpu_count(),
        "versions": {
            "flwr": flwr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def show(result: dict[str, Any]) -> None:
    least, most = min(result["load_average"]), max(result["load_average"])
    print(
        f"{result['sites']} sites, a model of {result['model_bytes'] / 1e6:.1f} MB, "
        f"{result['cores']} cores, load average {least} to {most}"
    )
    print(
        f"{'':24}{'round s':>9}{'range':>14}{'averaged s':>12}{'transfer s':>12}{'overhead s':>12}"
        f"{'MB down':>9}{'MB up':>8}"
    )
    for name, row in result["systems"].items():
        span = f"{row['seconds_least']:.2f}-{row['seconds_most']:.2f}"
        print(
            f"{name:24}{row['seconds_median']:9.2f}{span:>14}{row['until_averaged_median']:12.2f}"
            f"{row['transfer_seconds']:12.2f}{row['overhead_seconds']:12.2f}"
            f"{row['bytes_down'] / 1e6:9.1f}{row['bytes_up'] / 1e6:8.1f}"
        )


def main() -> None:
    options = argparse.ArgumentParser(description="Cost of a round, ours against stock Flower.")
    options.add_argument("--sites", type=int, default=4)
    options.add_argument("--blocks", type=int, default=3)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--json")
    options.add_argument(
        "--without-stock", action="store_true", help="ours alone: a minute a block"
    )
    options.add_argument("--keep", help="a new folder for everything, to look at afterwards")
    chosen = options.parse_args()
    from common.environment import prepare_environment

    prepare_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    with contextlib.ExitStack() as stack:
        if chosen.keep:
            folder = Path(chosen.keep).absolute()
            folder.mkdir(parents=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result = measure(chosen, folder)
    show(result)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
