"""`fed-server start`: one process that serves the hospitals and drives every round to the end.

Killed at any moment, the same command continues after the last complete round: rounds live in the
run's history and checkpoints, never in the link state, which ends with the process.
"""

from __future__ import annotations

import logging
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from flwr.app import Message, MessageType

from common.config_file import anchored
from common.console import PlainFormatter
from common.files import locked, write_text_atomically
from common.masking import FEWEST_SITES
from common.messages import SiteCard
from common.model import initial_weights
from common.notices import Farewell, pack_farewell
from common.terms import Terms
from common.wire import encode
from server import enrolment
from server.attendance import Attendance, note_terms
from server.audit_trail import Witness
from server.background import every
from server.beginning import beginning
from server.certificates import read_certificate
from server.checkpoint import RunFolder
from server.coordinator import CoordinatorFolder, host_and_port, terms
from server.exchange import send
from server.history import History, RoundRecord
from server.link_grid import LinkGrid
from server.link_state import LinkState, new_link_state
from server.live import Board, showing
from server.roll_call import FederationFailed
from server.rounds import run_rounds
from server.shown_names import named_in, shown_names, verdict_with
from server.superlink import begin_run, fleet_app, listening, place_nodes
from server.tables import Verdict, results_json, verdict

LOG = logging.getLogger("fedbrats")
RENEW_DAYS = 30
FAREWELL_SECONDS = 15.0  # that sites have to hear the end
REPLY_OVERHEAD = 2**20  # bytes of a reply beside the weights
OPEN_FILES = 4096


class Stopped(BaseException):
    """Somebody asked the server to stop. Like KeyboardInterrupt, nothing on the way may swallow it."""


def start(folder: CoordinatorFolder) -> Verdict:
    """Serve until every round is done, or this cannot go on; continues what an earlier call began.

    Raises:
        AlreadyInUse: another process serves this folder.
        FederationFailed: too few sites, or a round with too few good replies; nothing is lost.
        CannotListen, CertificateError, ConfigError, CoordinatorError, EnrolmentError
        BadKey, LogError: the audit log was changed, or cannot be written.
        BadWeights, HistoryError: what is needed to continue is damaged.
        OSError: the disk is full or not writable.
        Stopped: by SIGTERM or Ctrl-C.
    """
    _quieten_flower()
    _allow_many_files()
    with locked(folder.lock), _stopping():
        stated = terms(folder)
        config = anchored(stated.config, folder.path)
        _require_certificate(folder, config.server.address)
        run = RunFolder(folder.run)
        run.path.mkdir(exist_ok=True)
        with History(run.history) as history:
            done = history.final() is not None
            if not done:  # else the terms of the model stay those that it was trained under
                note_terms(history, stated)
            before = len(history.rounds())
        if not done and not before:
            beginning(config)  # what is wrong with its file is said now, not after the wait
        if done:
            LOG.info("the federation is complete; there is nothing left to do")
            return _write_results(run)
        if not enrolment.active(folder.enrolled):
            raise FederationFailed(
                f"No hospital is enrolled yet: fed-server admit {folder.path} SITE.pub --name NAME"
            )
        _require_roster(stated)
        witness = Witness(folder.audit)
        witness.begin(stated, before)
        state = new_link_state(folder.pieces)
        sites = _Enrolled(folder, state, stated)
        run_id = begin_run(state, stated.federation, stated.code_hash)
        own: set[str] = set()
        grid = LinkGrid(
            state,
            run_id,
            return_seconds=60 * config.server.return_minutes,
            largest_reply=len(encode(initial_weights(config))) + REPLY_OVERHEAD,
            own=own,
            witness=witness,
        )
        board = Board(
            folder.status,
            lambda: sites.names,
            grid.contacts,
            grid.doing,
            rounds=config.rounds.number,
            rounds_before=before,
            name=config.name,
            address=host_and_port(config),
            terms=stated.hash(),
        )
        attend = Attendance(grid, stated, lambda: sites.names, board.waiting)
        app = fleet_app(state, own)
        files = folder.server_certificate, folder.server_key

        def on_round(record: RoundRecord) -> None:
            witness.round_done(record)
            board.round_done(record)

        with (
            witness.until_the_end(),
            listening(app, config.server.listen, config.server.port, *files),
            every(1.0, sites.refresh),
            showing(board),
        ):
            LOG.info(f"serving {config.name} at {host_and_port(config)}; terms {stated.hash()}")
            try:
                run_rounds(
                    grid,
                    config,
                    run,
                    on_round,
                    attend=attend,
                    attempts=config.server.attempts,
                )
            except FederationFailed:
                _write_results(run)  # what was reached can be looked at
                raise
            judged = _write_results(run)
            with History(run.history) as history:
                cards = history.sites()
            _say_farewell(grid, judged, cards)
        return judged


def _quieten_flower() -> None:
    """Its import makes it talkative; and a refused request is told to who sent it, not to this log."""
    log = logging.getLogger("flwr")
    log.setLevel(logging.ERROR)
    log.addFilter(_is_own_fault)
    handler = logging.StreamHandler()  # Flower's own has colours, always
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)


def _is_own_fault(record: logging.LogRecord) -> bool:
    return "[ApiError:" not in record.getMessage()


def _require_certificate(folder: CoordinatorFolder, address: str) -> None:
    certificate = read_certificate(folder.server_certificate)
    if problem := certificate.problem(address):
        raise FederationFailed(problem)
    left = certificate.not_after - datetime.now(UTC)
    if left < timedelta(days=RENEW_DAYS):
        LOG.warning(
            f"the server's certificate expires in {left.days} days: "
            f"fed-server renew-certificate {folder.path}"
        )


class _Enrolled:
    """The enrolled sites; `admit` and `revoke` take effect within a second or two of `refresh`."""

    def __init__(self, folder: CoordinatorFolder, state: LinkState, terms: Terms) -> None:
        self._folder, self._state, self._terms = folder, state, terms
        self._placed: set[enrolment.EnrolledSite] = set()
        self._left_out: set[enrolment.EnrolledSite] = set()
        self.names: tuple[str, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        sites = set(enrolment.active(self._folder.enrolled))
        if self._terms.config.secure_aggregation:
            unknown = {site for site in sites if site.fingerprint not in self._terms.roster}
            for site in sorted(unknown - self._left_out, key=lambda site: site.name):
                LOG.warning(
                    f"{site.name} takes no part yet: with secure aggregation every hospital must "
                    "agree to its key. Stop and start this server to ask them."
                )
            self._left_out |= unknown
            sites -= unknown
        if sites != self._placed:
            place_nodes(self._state, {site.name: site.key() for site in sites})
            self._placed = sites
            self.names = tuple(sorted(site.name for site in sites))


def _require_roster(terms: Terms) -> None:
    if terms.config.secure_aggregation and len(terms.roster) < FEWEST_SITES:
        raise FederationFailed(
            f"Secure aggregation needs at least {FEWEST_SITES} enrolled hospitals, so that a sum "
            f"tells none of them another's update; {len(terms.roster)} are. Admit more, or set "
            "secure_aggregation: false in federation.yaml."
        )


def _allow_many_files() -> None:
    """Every connection is an open file; the usual limit of 1024 is the machine's default, not its end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say_farewell(grid: LinkGrid, judged: Verdict, cards: Sequence[SiteCard]) -> None:
    """Tell everybody who is connected that it is over; who cannot hear it is not waited for.

    Each reads the names of the sites that show theirs, and its own.
    """
    waiting = {}
    for contact in grid.contacts().values():
        if contact.online:
            told = verdict_with(judged, shown_names(cards, named_in(judged), contact.site))
            content = pack_farewell(Farewell(told.complete, "\n".join(told.lines())))
            message = Message(content, contact.node, MessageType.QUERY, ttl=FAREWELL_SECONDS)
            waiting[contact.site] = send(grid, message)
    until = time.monotonic() + FAREWELL_SECONDS
    waiting = {site: message_id for site, message_id in waiting.items() if message_id}
    while waiting and time.monotonic() < until:
        for site, message_id in list(waiting.items()):
            if list(grid.pull_messages([message_id])):
                del waiting[site]
        time.sleep(0.1)
    for site in waiting:
        LOG.warning(f"{site} did not confirm that it heard of the end")


def _write_results(run: RunFolder) -> Verdict:
    with History(run.history) as history:
        judged = verdict(history)
        write_text_atomically(run.path / "results.json", results_json(history))
    return judged


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block by `Stopped`; what is recorded stays.

    A library written in another language may catch it and raise an error of its own instead.
    """
    text = "stopped; the same command continues after the last complete round."
    asked = threading.Event()

    def stop(*_: Any) -> None:
        asked.set()
        raise Stopped(text)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Exception as error:
        if asked.is_set():
            raise Stopped(text) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
