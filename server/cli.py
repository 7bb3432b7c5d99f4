"""The coordinator's command line, `fed-server`.

What a federation is and who takes part is said here; `server.running` has the commands of a running
federation, `server.dashboard_commands`, `server.report_commands`, `server.tracking_commands` and
`server.audit_commands` those to look at it; hospitals have `fed-client`. Heavy imports happen inside
the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from common.console import (
    complain,
    failing_in_words,
    printable,
    run_program,
    standard_output,
    start_logging,
)
from server import (
    audit_commands,
    dashboard_commands,
    report_commands,
    running,
    tracking_commands,
)

app = typer.Typer(
    help="What the coordinator runs: make a federation and enrol its hospitals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
MIN_SITES = 2  # how many will come is not known yet; with fewer it is no federation

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


@app.callback()
def _several_commands() -> None:
    """Makes typer expect the name of a command."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder to make.")],
    name: Annotated[str | None, typer.Option(help="The federation's name; default brats.")] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or IP address of this server; the first is the one hospitals use. "
            "Repeatable."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="TCP port; default 8443.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="quick, default, reference or private.")
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="One key of federation.yaml, as section.key=value. Repeatable."),
    ] = None,
) -> None:
    """Make a federation: its settings, a certificate authority and a server certificate.

    Exit code 0: made. 1: it could not be, or DIR is one already. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.config_file import load_config
        from server.certificates import read_certificate
        from server.coordinator import host_and_port, init_folder

        hosts = _hosts(address)
        given = [f"rounds.min_sites={MIN_SITES}", *(assign or ())]
        if name is not None:
            given.append(f"name={json.dumps(name)}")
        if hosts:
            given.append(f"server.address={json.dumps(hosts[0])}")
        if port is not None:
            given.append(f"server.port={port}")
        config = load_config(preset=preset, assign=given)
        made = init_folder(folder, config, hosts[1:])
        certificate = read_certificate(made.server_certificate)
        authority = read_certificate(made.ca_certificate)

    print(
        f"Federation {config.name} made in {folder}. Hospitals reach it at {host_and_port(config)}."
    )
    print(f"Certificate for {', '.join(certificate.hosts)} until {certificate.not_after:%Y-%m-%d}.")
    print(f"CA, to compare with each hospital by telephone: {authority.digits}")
    print(
        f"A round needs {config.rounds.min_sites} good replies (rounds.min_sites): set it when you "
        "know how many hospitals train."
    )
    if config.secure_aggregation:
        print(
            "With secure_aggregation it needs more than two thirds of all admitted hospitals too, and "
            "three at least."
        )
    print(
        f"Next: look through {made.config}, then enrol each hospital by the site.pub that it sends:"
    )
    print(f"  fed-server admit {folder} SITE.pub --name NAME")
    print(f"{made.ca_key} and {made.server_key} are secret. Back the folder up.")
    if _is_this_machine_only(config.server.address):
        complain(
            "fed-server",
            f"warning: {config.server.address} is reachable from this machine only. For hospitals "
            f"elsewhere set server.address in {made.config}, then: "
            f"fed-server renew-certificate {folder}",
        )


@app.command()
def admit(
    folder: Folder,
    public_key: Annotated[
        Path, typer.Argument(metavar="SITE.pub", help="The file the hospital sent.")
    ],
    name: Annotated[str, typer.Option(help="The site's name in this federation.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="The site has a new key; the old one stops counting.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Invitation to write; default DIR/invitations/NAME.fedbrats.json."),
    ] = None,
) -> None:
    """Enrol a hospital by its public key and write the invitation to send back.

    Exit code 0: enrolled; the same again writes the invitation anew. 1: refused. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.audit_log import append
        from common.invitation import write_invitation
        from common.keys import fingerprint, read_public_key, telephone_number
        from server import enrolment
        from server.coordinator import invitation, load_coordinator

        if out is not None and not out.absolute().parent.is_dir():
            raise typer.BadParameter(f"{out.parent} is no folder.", param_hint="--out")
        coordinator = load_coordinator(folder)
        sent = read_public_key(public_key)
        # first, so that nobody is enrolled who cannot be invited
        answer = invitation(coordinator, name, fingerprint(sent.key))
        site = enrolment.admit(coordinator.enrolled, name, sent.key, replace=replace)
        admitted = {"site": name, "key": site.fingerprint, "replace": replace}
        append(coordinator.audit, "admitted", admitted)
        path = out or coordinator.invitation(name)
        if out is None:
            path.parent.mkdir(exist_ok=True)
        if answer.terms.config.secure_aggregation:
            # the terms name every enrolled key, so each invitation changes with each admission
            answer = invitation(coordinator, name, fingerprint(sent.key))
            for other in enrolment.active(coordinator.enrolled):
                if coordinator.invitation(other.name).exists():
                    again = invitation(coordinator, other.name, other.fingerprint)
                    write_invitation(coordinator.invitation(other.name), again)
        write_invitation(path, answer)

    print(f"{name} is enrolled since {site.admitted_at}.")
    if sent.comment and sent.comment != name:
        print(f"Note: {public_key} itself says {printable(sent.comment)!r}.")
    print("Compare by telephone, with a number you know to be the hospital's:")
    print(f"  its key          {telephone_number(sent.key)}")
    print(f"                   {site.fingerprint}")
    print(f"  your CA          {answer.ca_digits()}")
    print(f"Differs? fed-server revoke {folder} {name}")
    print(f"Send the hospital: {path}")
    if answer.terms.config.secure_aggregation:
        print(
            f"Secure aggregation: hospitals agree to the list of all {len(answer.terms.roster)} "
            f"enrolled keys. Admit every hospital first, then send the files in "
            f"{coordinator.invitations}: each was written anew just now."
        )


@app.command()
def sites(folder: Folder, as_json: AsJson = False) -> None:
    """List the enrolled hospitals, also those revoked, and when each was last heard of.

    Exit code 0: listed. 1: DIR cannot be read. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.files import lock_holder
        from server.coordinator import load_coordinator
        from server.enrolment import all_sites

        coordinator = load_coordinator(folder)
        told = _told(coordinator.status)
        running = lock_holder(coordinator.lock) is not None
        rows = [
            {
                "name": site.name,
                "state": "enrolled" if site.active else "revoked",
                "fingerprint": site.fingerprint,
                "admitted_at": site.admitted_at,
                "revoked_at": site.revoked_at,
                "connection": told.get(site.name, {}).get("state") if running else None,
                "last_contact": told.get(site.name, {}).get("last_contact"),
            }
            for site in all_sites(coordinator.enrolled)
        ]
    if as_json:
        print(json.dumps({"sites": rows}, indent=1))
        return
    from rich.box import ASCII2, ROUNDED
    from rich.table import Table

    console = standard_output()
    table = Table(box=ROUNDED if console.is_terminal else ASCII2)
    for heading in ("site", "state", "now", "key", "admitted", "last contact"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["state"] if row["revoked_at"] is None else f"revoked {row['revoked_at']}",
            row["connection"] or "-",
            row["fingerprint"],
            row["admitted_at"],
            row["last_contact"] or "-",
        )
    console.print(table)


@app.command()
def revoke(
    folder: Folder, name: Annotated[str, typer.Argument(metavar="NAME", help="The site's name.")]
) -> None:
    """A hospital's key no longer counts: it can take part in no further round.

    Exit code 0: revoked, now or before. 1: there is no such site. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.audit_log import append
        from server import enrolment
        from server.coordinator import load_coordinator

        coordinator = load_coordinator(folder)
        site = enrolment.revoke(coordinator.enrolled, name)
        append(coordinator.audit, "revoked", {"site": name, "key": site.fingerprint})
    print(
        f"{name} is revoked since {site.revoked_at}. What it has contributed stays in the model; "
        "`admit` lets it in again."
    )


@app.command()
def renew_certificate(
    folder: Folder,
    address: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or IP address of this server, beside server.address; default: those of "
            "the present certificate. Repeatable."
        ),
    ] = None,
) -> None:
    """Issue a new server certificate with a new key; hospitals need nothing new.

    Exit code 0: renewed. 1: it could not be; the present one stays. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from server.coordinator import load_coordinator
        from server.coordinator import renew_certificate as renew

        hosts = _hosts(address)
        certificate = renew(load_coordinator(folder), hosts)
    print(f"Certificate for {', '.join(certificate.hosts)} until {certificate.not_after:%Y-%m-%d}.")
    print("A server that is running uses it from its next start on.")


@app.command()
def privacy_report(
    folder: Folder,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write it as one HTML page.")
    ] = None,
) -> None:
    """Show what each hospital states about its patients' privacy, and whether that fits together.

    Exit code 0: shown, also if there are warnings. 1: there is nothing to show, or FILE cannot be
    written. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from common.files import write_text_atomically
        from server.checkpoint import RunFolder
        from server.coordinator import CoordinatorError, federation_id, load_coordinator
        from server.enrolment import keys_of_all
        from server.history import History
        from server.privacy_report import privacy_document, report_page, report_table

        if out is not None and not out.absolute().parent.is_dir():
            raise typer.BadParameter(f"{out.parent} is no folder.", param_hint="--out")
        coordinator = load_coordinator(folder)
        run = RunFolder(coordinator.run)
        if not run.history.exists():
            raise CoordinatorError(
                f"{folder}: no round is complete yet, so no site has stated any."
            )
        with History(run.history) as history:
            keys = keys_of_all(coordinator.enrolled)
            document = privacy_document(history, keys, federation_id(coordinator))
        if out is not None:
            write_text_atomically(out, report_page(document))
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False))
        return
    standard_output().print(report_table(document))
    if out is not None:
        print(f"Page: {out}")


for command in (
    running.start,
    running.status,
    running.stop,
    running.export,
    report_commands.report,
):
    app.command()(command)
app.command("dashboard")(dashboard_commands.dashboard_of_coordinator)
app.command("track")(tracking_commands.track_coordinator)
app.add_typer(audit_commands.app, name="audit")


def _hosts(address: list[str] | None) -> list[str]:
    """The names and addresses given with --address, as certificates write them."""
    from server.certificates import CertificateError, host_name

    try:
        return [host_name(host) for host in address or ()]
    except CertificateError as error:
        raise typer.BadParameter(str(error), param_hint="--address") from None


def _told(status: Path) -> dict[str, dict[str, str]]:
    """By site, what the running server last wrote; what cannot be read counts as never."""
    try:
        told = json.loads(status.read_text(encoding="utf-8"))["sites"]
        return {
            name: {key: text for key, text in about.items() if isinstance(text, str)}
            for name, about in told.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _is_this_machine_only(address: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost" or address.endswith(".localhost")


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-server", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from common.audit_log import LogError
    from common.files import AlreadyInUse
    from common.keys import BadKey
    from server.certificates import CertificateError
    from server.coordinator import CoordinatorError
    from server.enrolment import EnrolmentError
    from server.history import HistoryError

    return (
        AlreadyInUse,
        BadKey,
        CertificateError,
        CoordinatorError,
        EnrolmentError,
        HistoryError,
        LogError,
    )


def main() -> None:
    """Entry point of `fed-server`."""
    run_program("fed-server", app)


if __name__ == "__main__":
    main()
