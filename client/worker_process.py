"""The handle of `fed-client join` on its worker: start, give orders, hear events, kill.

The worker leads a process group of its own, so that a kill reaches whatever it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

START = "-m", "client.worker"
ROOT = Path(__file__).resolve().parent.parent  # so that the worker finds the same packages


@dataclass(frozen=True)
class Event:
    """`kind` as in `client.worker`, or `died` with the reason as `text` in the details."""

    kind: str
    details: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""


class Worker:
    def __init__(self, folder: Path, device: str) -> None:
        """Start it. `device` is the site's choice: auto, cpu, cuda or cuda:N."""
        ours, theirs = Pipe()
        self._channel: Connection = ours
        environment = dict(os.environ)
        # torch reads this when it loads: the one way that binds every library in the process
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif ":" in device:
            environment["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *START, str(theirs.fileno()), str(folder.resolve())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=ROOT,
                env=environment,
            )

    def order(self, do: str, payload: bytes | None = None, **details: Any) -> None:
        """Never raises: that it is gone is an event."""
        with contextlib.suppress(OSError):
            order = {"do": do, "bytes": payload is not None, **details}
            self._channel.send_bytes(json.dumps(order).encode())
            if payload is not None:
                self._channel.send_bytes(payload)

    def event(self, seconds: float) -> Event | None:
        """The next event, waiting at most this long for it."""
        try:
            if not self._channel.poll(seconds):
                return None
            details = json.loads(self._channel.recv_bytes())
            payload = self._channel.recv_bytes() if details.pop("bytes") else b""
            return Event(details.pop("event"), details, payload)
        except (EOFError, OSError):
            return Event("died", {"text": self._obituary()})

    def kill(self) -> None:
        """End it and everything it started, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()

    def _obituary(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the training process closed its connection."
        if code == -signal.SIGKILL:
            return (
                "the training process was killed (signal 9; often the machine ran out of memory)."
            )
        if code < 0:
            return f"the training process ended with signal {-code}."
        return f"the training process ended with exit code {code}."
