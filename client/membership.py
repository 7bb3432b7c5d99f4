"""The commands with which a hospital takes part: `fed-client join`, `review`, `status`, `leave`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import failing_in_words, start_logging

if TYPE_CHECKING:
    from client.hospital import HospitalFolder
    from client.site_config import SiteConfig
    from common.invitation import Invitation
    from common.terms import Terms

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="This hospital's folder.")]
Accept = Annotated[
    str, typer.Option("--accept", metavar="HASH", help="Say yes to the terms of this hash.")
]
STOP_SECONDS = 40.0  # a request in progress may take half of it to give up


def join(
    folder: Folder,
    invitation: Annotated[
        Path | None, typer.Option(help="The coordinator's file; needed the first time.")
    ] = None,
    accept: Accept = "",
) -> None:
    """Check and prepare the data, connect, and train until the federation is complete.

    Stop it with Ctrl-C or `fed-client leave`; the same command joins again. Exit code 0: the
    federation is complete, or somebody stopped this client. 1: it failed. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.display import display
        from client.hospital import load_hospital
        from client.join import JoinFailed, Membership, Stopped, stopping
        from client.outbound import in_words
        from client.site_config import load_site_config
        from common.files import locked

        hospital = load_hospital(folder)
        with locked(hospital.lock):
            settings = load_site_config(hospital.config)
            invited = _invitation(hospital, invitation)
            _consent(hospital, invited, settings, accept)
            facts = {"site": invited.site, "coordinator": invited.address}
            try:
                with display(hospital.status, **facts) as shown:
                    membership = Membership(hospital, settings, invited, shown)
                    with stopping(membership):
                        complete = membership.run()
            except Stopped:
                print("Stopped. The same command joins again.")
                complete = True
            except JoinFailed as failure:
                _print_findings(failure.findings)
                raise
            finally:
                print("What has left this building so far:")
                for line in in_words(hospital.audit):
                    print(f"  {line}")
        if not complete:
            raise typer.Exit(1)


def review(folder: Folder, accept: Accept = "") -> None:
    """Show the terms that await this site's yes, and what changed since the last yes.

    Exit code 0: nothing waits, or it was accepted. 1: not accepted. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.consent import NotAccepted, accepted_terms, difference, is_hash_of, sheet
        from client.hospital import load_hospital
        from client.site_config import load_site_config

        hospital = load_hospital(folder)
        settings = load_site_config(hospital.config)
        invited = _invitation(hospital, None)
        before = accepted_terms(hospital)
        terms = _pending(hospital, invited)
        if terms is None:
            assert before is not None
            print(sheet(before, invited, settings))
            if accept and not (before and is_hash_of(accept, before)):
                raise NotAccepted(
                    "No terms await an answer here, and the accepted ones have another hash: `join` "
                    "fetches new terms from the coordinator."
                )
            print("These terms are accepted; nothing else awaits an answer.")
            return
        print(sheet(terms, invited, settings))
        if before is not None:
            print(f"Changed since the last yes:\n{difference(before, terms)}\n")
        if not _agree(hospital, invited, settings, terms, accept):
            raise NotAccepted(f"Not accepted. To accept: {_command('review', hospital, terms)}")


def status(
    folder: Folder,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Show whether the client runs, what it is doing, and what has left the building.

    Exit code 0: it runs. 1: it does not. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.consent import accepted_terms, proposed_terms
        from client.hospital import load_hospital
        from client.outbound import departures, in_words
        from common.files import lock_holder

        hospital = load_hospital(folder)
        running = lock_holder(hospital.lock) is not None
        try:
            told = dict(json.loads(hospital.status.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            told = {}
        accepted, proposed = accepted_terms(hospital), proposed_terms(hospital)
        document = {
            **told,
            "running": running,
            "state": told.get("state", "never started") if running else "not running",
            "accepted": accepted.hash() if accepted else None,
            "proposed": proposed.hash() if proposed else None,
            "left": in_words(hospital.audit),
        }
        if as_json:
            print(json.dumps({**document, "departures": departures(hospital.audit)}, indent=1))
        else:
            _print_status(document, hospital)
    if not running:
        raise typer.Exit(1)


def leave(folder: Folder) -> None:
    """Stop the client if it runs, and withdraw the yes: joining again asks again.

    What has left the building stays with the coordinator. Exit code 0: left. 1: it could not be
    stopped. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.consent import withdraw
        from client.hospital import HospitalError, load_hospital
        from client.outbound import in_words
        from common.audit_log import append
        from common.files import ask_to_stop

        hospital = load_hospital(folder)
        try:
            withdraw(hospital)
        finally:  # it stops, even if that cannot be recorded
            stopped = ask_to_stop(hospital.lock, STOP_SECONDS)
        if not stopped:
            raise HospitalError(f"The client in {folder} did not stop within {STOP_SECONDS:.0f} s.")
        append(hospital.audit, "left", {})
        print("This site has left. Joining again asks for consent again.")
        print("What has left this building and stays with the coordinator:")
        for line in in_words(hospital.audit):
            print(f"  {line}")
        print("Tell the coordinator, who types: fed-server revoke DIR NAME")


def _invitation(hospital: HospitalFolder, given: Path | None) -> Invitation:
    """The coordinator's answer; a new one is kept in the folder.

    Raises:
        BadInvitation: there is none, or it is for another key or federation.
    """
    from common.audit_log import append
    from common.invitation import BadInvitation, read_invitation, write_invitation
    from common.keys import fingerprint, read_public_key

    known = read_invitation(hospital.invitation) if hospital.invitation.exists() else None
    invited = read_invitation(given) if given is not None else known
    if invited is None:
        raise BadInvitation(
            f"{hospital.path} has no invitation yet. Send {hospital.public_key} to the coordinator "
            "and type: fed-client join DIR --invitation FILE with the file that comes back."
        )
    key = fingerprint(read_public_key(hospital.public_key).key)
    if invited.key_fingerprint != key:
        raise BadInvitation(
            f"{given or hospital.invitation} is for the key {invited.key_fingerprint}, but this "
            f"site's is {key}. Send {hospital.public_key} to the coordinator and use the answer."
        )
    if known is not None and known.federation != invited.federation:
        raise BadInvitation(
            f"{given} is from another federation than {hospital.path} belongs to. One folder is for "
            "one federation: make another with fed-client init."
        )
    if known is not None and known.ca_fingerprint() != invited.ca_fingerprint():
        raise BadInvitation(
            f"{given} names another CA than {hospital.invitation} does, which a coordinator has no "
            "need to do: it may be forged. If the coordinator confirms by telephone, with a number "
            f"you know, the digits {invited.ca_digits()}: delete {hospital.invitation} and type the "
            "command again."
        )
    if invited != known:
        taken = {
            "site": invited.site,
            "federation": invited.federation,
            "address": invited.address,
            "ca": invited.ca_fingerprint(),
            "key": key,
            "terms": invited.terms.hash(),
        }
        append(hospital.audit, "invitation taken", taken)
        write_invitation(hospital.invitation, invited)
    return invited


def _pending(hospital: HospitalFolder, invited: Invitation) -> Terms | None:
    """Terms that await a yes: the coordinator's newest, or the invitation's before the first yes."""
    from client.consent import accepted_terms, proposed_terms

    proposed = proposed_terms(hospital)
    if proposed is not None:
        return proposed
    return invited.terms if accepted_terms(hospital) is None else None


def _consent(
    hospital: HospitalFolder, invited: Invitation, settings: SiteConfig, accept: str
) -> None:
    """Nothing leaves before there is a yes.

    Raises:
        NotAccepted: there is none, and none was given; or the policy was changed and forbids it.
    """
    from client.consent import NotAccepted, accepted_terms, is_hash_of, require_policy, sheet

    accepted = accepted_terms(hospital)
    if accepted is not None and (not accept or is_hash_of(accept, accepted)):
        require_policy(accepted, invited, settings)
        return
    # a new invitation may hold changed terms, which the coordinator has not proposed otherwise yet
    offered = [terms for terms in (_pending(hospital, invited), invited.terms) if terms is not None]
    terms = next((terms for terms in offered if is_hash_of(accept, terms)), offered[0])
    print(sheet(terms, invited, settings))
    if not _agree(hospital, invited, settings, terms, accept):
        raise NotAccepted(
            "Nothing has left this building: the terms above are not accepted. "
            f"To accept: {_command('join', hospital, terms)}"
        )


def _agree(
    hospital: HospitalFolder,
    invited: Invitation,
    settings: SiteConfig,
    terms: Terms,
    accept: str,
) -> bool:
    from client import consent

    consent.require_same_code(terms)
    consent.require_policy(terms, invited, settings)
    if not accept and sys.stdin.isatty():
        answer = input("Do you accept these terms for this site? Type yes: ")
        accept = terms.hash() if answer.strip().lower() == "yes" else ""
    if not accept:
        return False
    consent.accept(hospital, terms, accept)
    print(f"Accepted: {terms.hash()}")
    return True


def _command(name: str, hospital: HospitalFolder, terms: Terms) -> str:
    return f"fed-client {name} {hospital.path} --accept {terms.hash()}"


def _print_status(document: dict[str, object], hospital: HospitalFolder) -> None:
    print(f"{document.get('site', hospital.path)}: {document['state']}")
    progress = document.get("progress")
    if document["running"] and isinstance(progress, dict):
        left = progress["seconds_left"]
        rest = f", {left:.0f} s left" if left is not None else ""
        said = f", {progress['remark']}" if progress["remark"] else ""
        print(f"  {progress['what']}: {progress['done']}/{progress['total']}{rest}{said}")
    for key, words in (
        ("coordinator", "coordinator"),
        ("last_contact", "last contact"),
        ("trouble", "last trouble"),
        ("refused", "last refusal"),
        ("n_training", "training subjects"),
        ("n_held_out", "held-out subjects"),
    ):
        if document.get(key) is not None:
            print(f"  {words}: {document[key]}")
    if document["proposed"]:
        print(f"  Changed terms await your answer: fed-client review {hospital.path}")
    print("  What has left this building so far:")
    for line in document["left"]:  # type: ignore[attr-defined]
        print(f"    {line}")


def _print_findings(findings: list[dict[str, str]]) -> None:
    if findings:
        from client.finding_table import print_findings
        from sites.finding import Finding

        print_findings([Finding(**finding) for finding in findings])  # type: ignore[arg-type]


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-client", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from client.consent import NotAccepted
    from client.hospital import HospitalError
    from client.join import JoinFailed
    from client.outbound import OutboundError
    from common.audit_log import LogError
    from common.files import AlreadyInUse
    from common.flower import WrongFlower
    from common.invitation import BadInvitation
    from common.keys import BadKey
    from common.terms import BadTerms

    return (
        AlreadyInUse,
        BadInvitation,
        BadKey,
        BadTerms,
        HospitalError,
        JoinFailed,
        LogError,
        NotAccepted,
        OutboundError,
        WrongFlower,
    )
