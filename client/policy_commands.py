"""`fed-client policy explain`: in plain words, what a hospital's own policy allows and refuses.

What the words are is in `client.policy_words`, what the rules do in `client.refusals` and
`client.permitted`. Heavy imports happen inside the command, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import failing_in_words, start_logging

if TYPE_CHECKING:
    from client.hospital import HospitalFolder
    from client.site_config import SiteConfig

policy = typer.Typer(
    help="This site's own policy: what may leave, what it will do, who may ask.",
    no_args_is_help=True,
)
TITLES = {
    "leaves": "What may leave this site, and nothing else",
    "stays": "What never leaves",
    "does": "What this site does for a federation",
    "who": "Who may ask",
}
OFFERED = {"accepted": "accepted", "proposed": "proposed since", "invited": "of the invitation"}


@policy.callback()
def _several_commands() -> None:
    """This site's own policy: what may leave, what it will do, who may ask."""


@policy.command()
def explain(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="This hospital's folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.")
    ] = False,
) -> None:
    """Tell in plain words what `policy:` in site.yaml allows, and which terms break it.

    Changes to site.yaml hold from the next `join` on. Exit code 0: the terms that this site has
    accepted or is offered keep to the policy, or there are none. 1: they break it, or the settings
    cannot be read. 2: wrong usage.
    """
    start_logging()
    with failing_in_words("fed-client", _foreseen):
        from client.hospital import load_hospital
        from client.policy_words import does, leaves, stays, who
        from client.site_config import load_site_config

        hospital = load_hospital(folder)
        settings = load_site_config(hospital.config)
        document: dict[str, Any] = {
            "policy": settings.policy.model_dump(mode="json"),
            "leaves": leaves(settings),
            "stays": stays(settings),
            "does": does(settings),
            "who": who(settings.policy),
            "terms": _broken(hospital, settings),
        }
        print(json.dumps(document, indent=1) if as_json else _in_words(document))
    if any(terms["broken"] for terms in document["terms"]):
        raise typer.Exit(1)


def _broken(hospital: HospitalFolder, settings: SiteConfig) -> list[dict[str, Any]]:
    """Of all terms that this site knows, the rules that they break."""
    from client.consent import accepted_terms, proposed_terms
    from client.refusals import broken_by_terms
    from common.invitation import read_invitation

    if not hospital.invitation.exists():
        return []
    invited = read_invitation(hospital.invitation)
    private = settings.privacy is not None
    offered = {"accepted": accepted_terms(hospital), "proposed": proposed_terms(hospital)}
    if offered["accepted"] is None:
        offered["invited"] = invited.terms
    return [
        {
            "terms": name,
            "hash": terms.hash(),
            "broken": [
                {"rule": refusal.rule, "why": refusal.why}
                for refusal in broken_by_terms(settings.policy, terms, invited, private=private)
            ],
        }
        for name, terms in offered.items()
        if terms is not None
    ]


def _in_words(document: dict[str, Any]) -> str:
    lines: list[str] = []
    for key, title in TITLES.items():
        lines += [f"{title}:", *map(_entry, document[key]), ""]
    if not document["terms"]:
        lines.append("There are no terms yet to hold against it.")
    for terms in document["terms"]:
        told = f"The terms {OFFERED[terms['terms']]} ({terms['hash'][:12]})"
        if not terms["broken"]:
            lines.append(f"{told} keep to this policy.")
            continue
        lines.append(f"{told} are refused:")
        lines += [_entry(f"policy rule `{b['rule']}`: {b['why']}") for b in terms["broken"]]
    return "\n".join(lines)


def _entry(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent="  - ", subsequent_indent="    ")


def _foreseen() -> tuple[type[Exception], ...]:
    from client.consent import NotAccepted
    from client.hospital import HospitalError
    from common.invitation import BadInvitation
    from common.keys import BadKey
    from common.terms import BadTerms

    return BadInvitation, BadKey, BadTerms, HospitalError, NotAccepted
