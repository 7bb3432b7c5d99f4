"""`fed-client join`: stays in a federation until it is complete, whatever happens in between.

This process holds the connection; what may run is asked of `client.refusals`, and what may leave of
`client.outbound`. The worker (`client.worker_process`) holds network and data. One task at a time: a
newer message replaces the task in hand, for then the coordinator no longer waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from client import consent, outbound, refusals
from client.audit_trail import Trail
from client.connection import (
    AlreadyConnected,
    Connection,
    Refused,
    RunOver,
    TooLarge,
    UnknownKey,
    Unreachable,
)
from client.display import Display
from client.hospital import HospitalFolder
from client.parcel import pack, unpack
from client.permitted import Own
from client.site_config import SiteConfig
from client.worker_process import Event, Worker
from common.audit_log import LogError
from common.code_hash import code_hash
from common.console import plain
from common.invitation import Invitation
from common.keys import BadKey, load_private_key
from common.message_words import POLICY_REFUSED
from common.notices import is_farewell, unpack_farewell, unpack_roll_call
from common.progress import Progress
from common.records import BadMessage
from common.statement import sign
from common.terms import Terms

LOG = logging.getLogger("fedbrats")
HOLD_SECONDS = 1  # that the coordinator may hold its answer while there is no message
POLL_SECONDS = 1.0  # from one question for a message to the next
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts to reach the coordinator
LONGEST_VERDICT = 10_000  # characters
REFUSED_MINUTES = 5.0  # longest wait, once connected, for a refusal to pass: a clock, a proxy
OCCUPIED_MINUTES = 3.0  # longest wait for another client with this key to go away
LOG_LOST = (
    "Restore audit.log and audit.head from the newest backup. If they are lost for good, the two sides "
    "begin anew with a new key: fed-client rotate-key, and at the coordinator fed-server admit --replace."
)
WORK = {MessageType.TRAIN: "training", MessageType.EVALUATE: "evaluating"}
MARGIN_SECONDS = 30.0  # before the deadline, so that the refusal is there in time


class JoinFailed(RuntimeError):
    """The site cannot take part; the text says why and what to do. `findings` are about its scans."""

    def __init__(self, text: str, findings: list[dict[str, str]] | None = None) -> None:
        super().__init__(text)
        self.findings = findings or []


class Stopped(RuntimeError):
    """Somebody asked this client to stop."""


@dataclass
class _Task:
    message: Message
    began: float
    ended: str = ""  # why, if it had to end before it was done


class Membership:
    """One `join`, from the preparation of the data to the farewell."""

    def __init__(
        self,
        folder: HospitalFolder,
        settings: SiteConfig,
        invitation: Invitation,
        display: Display,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._invitation = invitation
        self._display = display
        self._stop = threading.Event()
        self._terms = self._accepted()
        self._trail = Trail(folder.audit)
        self._worker: Worker | None = None
        privacy = None if settings.privacy is None else settings.privacy.metrics
        own = Own(invitation.site, privacy=privacy)
        self._gate = outbound.Gate(folder.audit, settings.policy, own, self._sign)
        self._model_bytes = 0
        self._connection: Connection | None = None  # once it has been open
        self._task: _Task | None = None
        self._runs: dict[int, tuple[str, str]] = {}
        self._kept: list[Event] = []  # what the worker said while the coordinator was away
        self._trouble = ""
        self._in_vain: dict[str, bool] = {}  # answers not taken, and whether that was told
        self._told = ""  # the hash of the changed terms that were last told of
        self._refused = ""  # the refusal that was last told of

    def stop(self, *_: Any) -> None:
        """Ask `run` to end; safe in a signal handler."""
        self._stop.set()

    def run(self) -> bool:
        """Take part until the coordinator says that the federation is over; was it completed?

        Raises:
            JoinFailed, Stopped
        """
        ended = "failed"
        try:
            self._trail.begin(
                site=self._invitation.site,
                address=self._invitation.address,
                code=code_hash(),
                terms=self._terms.hash(),
            )
            self._prepare()
            complete = self._take_part()
            ended = "complete" if complete else "incomplete"
            return complete
        except Stopped:
            ended = "stopped"
            raise
        except (BadKey, LogError) as error:
            raise JoinFailed(str(error)) from error
        finally:
            with contextlib.suppress(BadKey, LogError):  # which has been said already
                self._trail.note("join ended", how=ended)
            if self._worker is not None:
                self._worker.kill()

    # ----------------------------------------------------------------------------------- preparing

    def _prepare(self) -> None:
        """Have the worker check and preprocess the data for the accepted terms."""
        if self._worker is not None:
            self._worker.kill()
        self._display.state("preparing", "checking and preparing the data")
        self._worker = Worker(self._folder.path, self._settings.device)
        self._worker.order("prepare", name=self._invitation.site, code=code_hash())
        while True:
            self._check_stop()
            event = self._worker.event(0.5)
            if event is None or self._shown(event):
                continue
            if event.kind in ("failed", "died"):
                raise JoinFailed(event.details["text"], event.details.get("findings"))
            if event.kind == "prepared":
                d = event.details
                self._model_bytes = d["model_bytes"]
                counts = ("n_training", "training_patients", "held_out_patients")
                own = replace(self._gate.own, **{name: d[name] for name in counts})
                self._gate = replace(self._gate, own=own)
                numbers = {key: d[key] for key in ("n_training", "n_held_out", "n_left_out")}
                self._display.set(**numbers)
                LOG.info(
                    f"{d['n_training']} training, {d['n_held_out']} held out, "
                    f"{d['n_left_out']} left out, {d['warnings']} warnings"
                )
                held_out = d["n_held_out"], d["held_out_patients"]
                kept = refusals.never_given(self._settings.policy, own.trained_on, *held_out)
                for remark in kept:
                    LOG.warning(remark)
                if kept:
                    LOG.warning(
                        "More subjects change that, or another min_subjects in site.yaml and joining "
                        f"again. What may leave: fed-client policy explain {self._folder.path}"
                    )
                return

    # --------------------------------------------------------------------------------- taking part

    def _take_part(self) -> bool:
        key = load_private_key(self._folder.private_key)
        connection = Connection(
            self._invitation.address, self._invitation.ca_certificate, key, self._check_stop
        )
        try:
            self._display.state("connecting", f"connecting to {self._invitation.address}")
            self._persist(connection.open)
            self._connection = connection
            self._trail.note("connected", address=self._invitation.address)
            self._display.state("waiting", f"connected to {self._invitation.address}")
            while True:
                verdict = self._step(connection)
                if verdict is not None:
                    return verdict
        finally:
            connection.hurry()
            self._stop.clear()  # for a last word
            if self._task is not None:  # so that nobody waits for it
                with contextlib.suppress(Exception):
                    task = self._task.message
                    reply = self._error(task, "the site's client was stopped.")
                    released = outbound.release(reply, task, self._gate)
                    connection.send(released.reply)
            connection.close()

    def _step(self, connection: Connection) -> bool | None:
        """One message, or one event of the worker, or a moment's wait. The farewell's verdict ends it."""
        self._check_stop()
        self._notice_acceptance()
        begin = time.monotonic()
        hold = 0 if self._task else HOLD_SECONDS
        received = self._persist(lambda: connection.receive(hold))
        if received is not None and not self._answered_in_vain(connection, *received):
            head, tree = received
            if self._task is None or tree.object_id != _id(self._task.message):
                self._drop_task("a newer message replaces it")
                return self._take(connection, head, tree)
        if self._task is None:
            held = time.monotonic() - begin
            self._stop.wait(min(POLL_SECONDS - held, POLL_SECONDS))
        else:
            self._watch(connection, POLL_SECONDS)
        self._display.set(last_contact=_text(connection.last_contact))
        return None

    def _take(self, connection: Connection, head: Message, tree: Any) -> bool | None:
        """Refuse, answer or begin what a message asks for."""
        self._address_replies(connection, head, tree)
        kind = head.metadata.message_type
        try:
            if reason := self._foreign(connection, head):
                self._refuse(connection, head, reason)
                return None
            largest = self._model_bytes if kind in (MessageType.TRAIN, MessageType.EVALUATE) else 0
            message = self._persist(lambda: connection.fetch(head, tree, largest))
            if problem := self._trail.received(message):
                self._refuse(connection, head, f"{self._invitation.site}: {problem}")
                raise JoinFailed(f"{problem} {LOG_LOST}")
            if kind == MessageType.QUERY and is_farewell(message.content):
                return self._farewell(connection, message)
            if reason := self._unwanted(message):
                self._refuse(connection, message, reason)
                return None
        except RunOver:
            self._in_vain.setdefault(tree.object_id, False)
            return None
        except (TooLarge, BadMessage) as error:
            self._refuse(connection, head, str(error))
            return None
        self._begin(message)
        return None

    @staticmethod
    def _address_replies(connection: Connection, head: Message, tree: Any) -> None:
        """Flower stamps sender and run into a reply from globals."""
        TaskIdentity.task_id = TaskIdentity.run_id = head.metadata.run_id
        TaskIdentity.node_id = connection.node_id
        head.metadata.__dict__["_message_id"] = tree.object_id

    def _answered_in_vain(self, connection: Connection, head: Message, tree: Any) -> bool:
        """Was the answer to it not taken? That it comes again shows that one is waited for: say so."""
        told = self._in_vain.get(tree.object_id)
        if told is False:
            self._in_vain[tree.object_id] = True
            self._address_replies(connection, head, tree)
            self._answer(connection, head, self._error(head, "its answer was not accepted."))
        return told is not None

    def _begin(self, message: Message) -> None:
        kind = message.metadata.message_type
        if self._worker is None:
            self._worker = Worker(self._folder.path, self._settings.device)
        self._task = _Task(message, time.monotonic())
        self._refused = ""
        self._display.set(refused=None)
        payload = pack(message)
        self._worker.order("answer", payload, code=code_hash())
        round_ = _round(message)
        if round_ is not None:
            words = WORK.get(kind, "aggregating")
            self._display.state(words, f"round {round_}: {words}", round=round_)

    def _watch(self, connection: Connection, seconds: float) -> None:
        """Hear the worker for this long; an answer, its death or the deadline end the task."""
        task, worker = self._task, self._worker
        assert task is not None
        until = time.monotonic() + seconds
        while self._task is task and (left := until - time.monotonic()) > 0:
            self._end_if_overdue(task)
            if task.ended or worker is None:
                self._finish(connection, self._error(task.message, task.ended))
                return
            event = self._kept.pop(0) if self._kept else worker.event(min(left, 0.2))
            if self._stop.is_set():
                return
            if event is None or self._shown(event):
                continue
            if event.kind == "reply":
                self._finish(connection, unpack(event.payload))
            else:
                LOG.warning(event.details["text"])
                self._end_worker()
                reason = event.details["text"] if event.kind == "died" else "internal error."
                self._finish(connection, self._error(task.message, reason))

    def _finish(self, connection: Connection, reply: Message) -> None:
        task, self._task = self._task, None
        assert task is not None
        seconds = time.monotonic() - task.began
        round_ = _round(task.message)
        self._display.state("sending")
        if reply.has_error():
            LOG.warning(f"the answer is a refusal: {reply.error.reason}")
        self._trail.done(task.message, reply, seconds)
        departure = self._answer(connection, task.message, reply)
        if departure is not None and departure.kind == outbound.ERROR and not reply.has_error():
            LOG.warning(f"the answer was not let out: {departure.details['reason']}")
        left = outbound.in_words(self._folder.audit)
        if departure is not None and round_ is not None and departure.kind != outbound.ERROR:
            LOG.info(f"round {round_}: {departure.in_words()} sent, {seconds:.1f} s")
            if departure.kind == outbound.METRICS:  # the last that leaves in a round
                LOG.info(f"left this building so far: {'; '.join(left)}")
        self._display.state("waiting", left=left)

    def _sign(self, text: str) -> bytes:
        """The worker does not hold the key, so a privacy statement is signed here."""
        return sign(text, load_private_key(self._folder.private_key))

    # ------------------------------------------------------------------------------ what may happen

    def _foreign(self, connection: Connection, head: Message) -> str:
        """Why a message's run is not one to work for; empty if it is."""
        run_id = head.metadata.run_id
        if run_id not in self._runs:
            self._runs[run_id] = self._persist(lambda: connection.run(run_id))
        kind = head.metadata.message_type
        return refusals.foreign(self._gate.own.site, self._invitation, *self._runs[run_id], kind)

    def _unwanted(self, message: Message) -> str:
        """Why a task that is this federation's is not done all the same; empty if it is."""
        kind, round_ = message.metadata.message_type, _round(message)
        if kind == MessageType.QUERY:
            reason = self._other_terms(unpack_roll_call(message.content))
        else:
            answered = outbound.answered(self._folder.audit, outbound.answer_to(message))
            reason = refusals.too_often(self._gate.own.site, kind, round_, answered)
        broken = refusals.broken_by_task(
            self._settings.policy, kind, round_, self._gate.own.trained_on, datetime.now()
        )
        return reason or self._in_words(broken)

    def _other_terms(self, proposed: Terms) -> str:
        """Why a roll call is not answered; changed terms wait for `fed-client review`."""
        policy, private = self._settings.policy, self._settings.privacy is not None
        updates = refusals.trains(policy, self._gate.own.trained_on)
        broken = refusals.broken_by_terms(
            policy, proposed, self._invitation, private=private, updates=updates
        )
        reason = refusals.other_terms(self._gate.own.site, self._terms, proposed, broken)
        if proposed.hash() == self._terms.hash():
            return reason
        known = consent.proposed_terms(self._folder)
        if known is None or known.hash() != proposed.hash():
            consent.propose(self._folder, proposed)
        if proposed.hash() != self._told:
            self._told = proposed.hash()
            LOG.warning(
                "the coordinator has changed the terms:\n"
                f"{consent.difference(self._terms, proposed)}\n"
                f"Nothing is done for them until you agree: fed-client review {self._folder.path}"
            )
        self._display.state("terms to review")
        return reason

    def _overdue(self, task: _Task) -> str:
        """Why a task has to end before it is done; empty if it may go on."""
        seconds, ttl = time.monotonic() - task.began, task.message.metadata.ttl
        if seconds - ttl > -min(MARGIN_SECONDS, ttl / 10):
            return f"it took longer than the round's deadline of {ttl / 60:g} minutes."
        kind = task.message.metadata.message_type
        broken = refusals.broken_by_running(self._settings.policy, kind, seconds, datetime.now())
        return self._in_words(broken)

    def _in_words(self, broken: refusals.Refusal | None) -> str:
        """A rule that is broken, for the coordinator; empty if none is."""
        return refusals.ByPolicy(f"{self._gate.own.site}: {broken}.") if broken else ""

    def _end_if_overdue(self, task: _Task) -> None:
        """The worker ends at once, also while the coordinator is away and cannot be told."""
        if not task.ended and (reason := self._overdue(task)):
            task.ended = reason
            self._end_worker()

    def _notice_acceptance(self) -> None:
        """Changed terms can be accepted, or the acceptance withdrawn, while this runs."""
        terms = self._accepted()
        if terms.hash() != self._terms.hash():
            LOG.info("the changed terms are accepted")
            self._drop_task("it was for other terms")
            self._terms = terms
            self._prepare()
            self._display.state("waiting")

    def _accepted(self) -> Terms:
        terms = consent.accepted_terms(self._folder)
        if terms is None:
            raise JoinFailed("the terms are not accepted (any more).")
        return terms

    def _refuse(self, connection: Connection, message: Message, reason: str) -> None:
        """`message` may be without its content."""
        if reason != self._refused:  # a coordinator asks again and again
            LOG.warning(f"refused: {plain(reason)}")
        self._refused = reason
        self._display.set(refused=reason)
        self._trail.refused(message, reason)
        self._answer(connection, message, self._error(message, reason))

    def _farewell(self, connection: Connection, message: Message) -> bool:
        farewell = unpack_farewell(message.content)
        self._trail.note("farewell", complete=farewell.complete, verdict=plain(farewell.verdict))
        content = RecordDict({"farewell": ConfigRecord({"received": True})})
        with contextlib.suppress(Unreachable, Refused, RunOver):
            reply = Message(content, reply_to=message)
            self._trail.tell(reply)
            released = outbound.release(reply, message, self._gate)
            connection.send(released.reply)
        LOG.info(f"the federation is over.\n{farewell.verdict[:LONGEST_VERDICT]}")
        return farewell.complete

    # ------------------------------------------------------------------------------------- the rest

    def _answer(
        self, connection: Connection, task: Message, reply: Message
    ) -> outbound.Departure | None:
        """Record a reply, send it, and try again until it has arrived or nobody waits for it."""
        self._trail.tell(reply)
        try:
            released = outbound.release(reply, task, self._gate)
            kept = self._persist(lambda: connection.send(released.reply))
        except RunOver as error:
            LOG.warning(str(error))
            kept = False
        except outbound.OutboundError as error:
            raise JoinFailed(str(error)) from error
        if not kept:
            self._in_vain.setdefault(_id(task), False)
            LOG.info("the coordinator no longer waits for this answer")
            return None
        return released.departure

    def _persist(self, action: Callable[[], Any]) -> Any:
        """Do it, with growing pauses between attempts, until it works or patience is at an end.

        Raises:
            JoinFailed: the coordinator refuses, or was out of reach for too long.
            Stopped
            RunOver, TooLarge: as `action` raises them.
        """
        begin, wait = time.monotonic(), FIRST_WAIT
        refused = False
        while True:
            self._check_stop()
            try:
                if refused and self._connection is not None:  # the server may have begun anew
                    with contextlib.suppress(AlreadyConnected):  # it is this client
                        self._connection.open()
                result = action()
                self._reached(again=wait > FIRST_WAIT)
                return result
            except (RunOver, TooLarge):  # an answer too
                self._reached(again=wait > FIRST_WAIT)
                raise
            except (Unreachable, Refused) as error:
                if refused and isinstance(error, UnknownKey):
                    raise JoinFailed(str(error)) from error  # not even after opening anew
                self._give_up_after(time.monotonic() - begin, error)
                refused = isinstance(error, Refused)
                text = f"{error} Trying again."
                if text != self._trouble:
                    LOG.warning(text)
                self._trouble = text
                if self._task is None:
                    self._display.state("reconnecting", trouble=str(error))
                self._wait(wait * random.uniform(0.8, 1.2))
                wait = min(2 * wait, LONGEST_WAIT)

    def _reached(self, *, again: bool) -> None:
        if again:
            LOG.info("connected again")
            self._trouble = ""
            self._display.set(trouble=None)
            if self._task is None:
                self._display.state("waiting")

    def _give_up_after(self, seconds: float, error: Unreachable | Refused) -> None:
        limit = 3600 * self._settings.patience_hours
        remedy = "Ask the coordinator whether the server runs."
        if isinstance(error, Refused):
            if self._connection is None:
                raise JoinFailed(str(error)) from error
            limit, remedy = min(limit, 60 * REFUSED_MINUTES), ""
        if isinstance(error, AlreadyConnected):
            limit = min(limit, 60 * OCCUPIED_MINUTES)
            remedy = (
                "Is it running on another machine? If not, somebody has your key: type "
                "`fed-client rotate-key` and tell the coordinator."
            )
        if seconds > limit:
            raise JoinFailed(
                f"{error} Given up after {seconds / 60:.0f} minutes. {remedy}".rstrip()
            ) from error

    def _wait(self, seconds: float) -> None:
        """The worker goes on meanwhile, and must be heard or it would get stuck."""
        until = time.monotonic() + seconds
        while not self._stop.is_set() and (left := until - time.monotonic()) > 0:
            if self._task is not None:
                self._end_if_overdue(self._task)
            if self._worker is None or self._kept:
                self._stop.wait(min(left, 0.2))
            elif (event := self._worker.event(min(left, 0.2))) and not self._shown(event):
                self._kept.append(event)

    def _drop_task(self, why: str) -> None:
        if self._task is not None:
            LOG.info(f"the task in hand is dropped: {why}")
            self._task = None
            self._end_worker()

    def _end_worker(self) -> None:
        """The next task starts a new one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        self._kept.clear()

    def _shown(self, event: Event) -> bool:
        """Log lines and progress are shown; anything else is for the caller."""
        if event.kind == "log":
            LOG.log(event.details["level"], event.details["text"])
        elif event.kind == "progress":
            self._display.progress(Progress(**event.details["progress"]))
        else:
            return False
        return True

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    @staticmethod
    def _error(message: Message, reason: str) -> Message:
        """That a rule of the policy refuses is no failure of the site."""
        by_policy = isinstance(reason, refusals.ByPolicy)
        code = POLICY_REFUSED if by_policy else int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
        return Message(Error(code=code, reason=plain(reason)), reply_to=message)


@contextmanager
def stopping(membership: Membership) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask it to stop while the block runs."""
    before = {s: signal.signal(s, membership.stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _id(message: Message) -> str:
    return str(message.metadata.message_id)


def _round(message: Message) -> int | None:
    about = message.content.get("about") if message.has_content() else None
    round_ = about.get("round") if isinstance(about, ConfigRecord) else None
    return round_ if isinstance(round_, int) else None


def _text(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat(timespec="seconds") if moment else None
