"""The process at a hospital that holds the network and the data: prepares, trains, evaluates.

Started by `client.worker_process` and fed by it through one socket pair; it has no other connection.
It lives as long as `fed-client join`, so torch, CUDA and the memory-mapped cache load once, and it
ends when its parent does, however that happens. What it runs is the ClientApp of the installed
package; a message can only hold tasks for it.

Frames on the socket: a JSON object, followed by the bytes it announces with `"bytes": true`.
To here: `prepare`, `answer` (+ message). From here: `progress`, `log`, `prepared`, `failed`,
`reply` (+ message).
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common.environment import prepare_environment

NODE_CONFIG_FOLDER = "site-folder"


def main() -> None:
    """`python -m client.worker DESCRIPTOR HOSPITAL_FOLDER`."""
    prepare_environment()
    channel = Connection(int(sys.argv[1]))
    folder = Path(sys.argv[2])
    orders: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, orders), daemon=True).start()
    lock = threading.Lock()

    def say(event: str, payload: bytes | None = None, **details: Any) -> None:
        with lock:
            channel.send_bytes(
                json.dumps({"event": event, "bytes": payload is not None, **details}).encode()
            )
            if payload is not None:
                channel.send_bytes(payload)

    _log_to(say)
    _show_progress_to(say)
    while True:
        order, payload = orders.get()
        try:
            _require_same_code(order["code"])
            if order["do"] == "prepare":
                say("prepared", **_prepare(folder, order["name"]))
            else:
                say("reply", _answer(folder, payload))
        except Exception as error:
            texts, findings = _explain(error)
            say("failed", text=texts, findings=findings)


def _listen(channel: Connection, orders: queue.SimpleQueue[tuple[dict[str, Any], bytes]]) -> None:
    try:
        while True:
            order = json.loads(channel.recv_bytes())
            orders.put((order, channel.recv_bytes() if order.get("bytes") else b""))
    except (EOFError, OSError):
        # the parent is gone: whatever is running here, or was started here, has nobody to run for
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _log_to(say: Any) -> None:
    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say("log", level=record.levelno, text=self.format(record))

    log = logging.getLogger("fedbrats")
    log.handlers = [Forward()]
    log.setLevel(logging.INFO)
    log.propagate = False


def _show_progress_to(say: Any) -> None:
    from common.progress import hand_over

    hand_over(
        lambda p: say("progress", progress=vars(p), left=p.seconds_left),
    )


def _prepare(folder: Path, name: str) -> dict[str, Any]:
    import torch

    from client.consent import accepted_terms
    from client.device import limit_gpu_memory
    from client.hospital import HospitalFolder
    from client.ledger import open_ledger
    from client.preparation import prepare_hospital
    from client.privacy import require_protectable
    from client.site_config import load_site_config
    from common.model import network_for
    from common.weights import weights_of
    from common.wire import encode

    hospital = HospitalFolder(folder)
    settings = load_site_config(hospital.config)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise NoDevice(
            f"site.yaml asks for device {settings.device}, but torch finds no GPU here; "
            "set `device: auto` or mend the driver."
        )
    limit_gpu_memory(settings.policy.max_gpu_memory_gb)
    terms = accepted_terms(hospital)
    assert terms is not None
    network = network_for(terms.config)
    if settings.privacy is not None:  # before hours go into preparing data
        require_protectable(network, terms.config)
        with open_ledger(settings.privacy_ledger, None, write=False):
            pass
    prepared = prepare_hospital(name, settings, hospital.state, terms, hospital.private_key)
    # how many bytes of weights a task may hold
    return {**vars(prepared), "model_bytes": len(encode(weights_of(network)))}


def _answer(folder: Path, payload: bytes) -> bytes:
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from client.app import app
    from client.device import limit_gpu_memory
    from client.hospital import HospitalFolder
    from client.parcel import pack, unpack
    from client.site_config import load_site_config

    # here too: a worker that replaces one that was ended does not prepare
    limit_gpu_memory(load_site_config(HospitalFolder(folder).config).policy.max_gpu_memory_gb)
    message = unpack(payload)
    node = message.metadata.dst_node_id
    # Message() stamps sender and run from here
    TaskIdentity.task_id, TaskIdentity.run_id = message.metadata.run_id, message.metadata.run_id
    TaskIdentity.node_id = node
    context = Context(
        run_id=message.metadata.run_id,
        node_id=node,
        node_config={NODE_CONFIG_FOLDER: str(HospitalFolder(folder).state)},
        state=RecordDict(),
        run_config={},
    )
    return pack(app(message, context))


def _require_same_code(parents: str) -> None:
    """The parent compares its own code with the federation's; the files may have changed since."""
    from common.code_hash import code_hash

    if code_hash() != parents:
        raise CodeChanged(
            "the installed package was changed while the client ran; stop `fed-client join` and "
            "start it again."
        )


class CodeChanged(RuntimeError):
    """This process has loaded other code than its parent."""


class NoDevice(RuntimeError):
    """The device that the site asks for is not there."""


def _explain(error: Exception) -> tuple[str, list[dict[str, str]]]:
    """Words for this site's own screen and log."""
    from client.ledger import LedgerError
    from client.preparation import UnusableData
    from client.privacy import NotProtectable
    from common.config_file import ConfigError
    from sites.cache import CacheError
    from sites.institutions import SplitError
    from sites.patients import PatientsError

    findings = [finding.as_dict() for finding in getattr(error, "findings", ())]
    foreseen = (
        *(UnusableData, CacheError, SplitError, PatientsError),
        *(ConfigError, NoDevice, CodeChanged, LedgerError, NotProtectable),
    )
    if isinstance(error, foreseen):
        return str(error), findings
    logging.getLogger("fedbrats").exception("the client's worker failed")
    return f"internal error ({type(error).__name__}); the log says more. Please report it.", []


if __name__ == "__main__":
    main()
