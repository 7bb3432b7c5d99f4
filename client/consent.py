"""What a hospital agrees to before anything about its data leaves: the sheet, and the recorded yes.

A yes is given to terms by their hash (`common.terms`), once, and holds until they change. Code that
differs from the installed one cannot be agreed to: it would not run here anyway.
"""

from __future__ import annotations

import json
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from client.hospital import HospitalFolder
from client.policy import Policy
from client.policy_words import (
    ALWAYS,
    PRIVATE_STATEMENT,
    STATEMENT,
    metrics_in_words,
    name_in_words,
    training_in_words,
    update_in_words,
)
from client.refusals import broken_by_terms
from client.site_config import PrivacyBudget, SiteConfig
from common.audit_log import append
from common.code_hash import code_hash
from common.config import FederationConfig
from common.console import many
from common.files import write_text_atomically
from common.invitation import Invitation
from common.masking import fewest_in_sum, most_colluders
from common.terms import Terms, changes, terms_from


class NotAccepted(RuntimeError):
    """The terms are not accepted, or cannot be; the text says what to do."""


def accepted_terms(folder: HospitalFolder) -> Terms | None:
    """The terms that this site said yes to, if any.

    Raises:
        BadTerms: the record is of a version whose configuration this one does not understand.
    """
    stored = _read(folder.accepted)
    return terms_from(stored["terms"]) if stored else None


def proposed_terms(folder: HospitalFolder) -> Terms | None:
    """Terms that the coordinator proposed since, and that await an answer."""
    stored = _read(folder.proposed)
    return terms_from(stored["terms"]) if stored else None


def propose(folder: HospitalFolder, terms: Terms) -> None:
    """Keep changed terms for `fed-client review`."""
    append(folder.audit, "terms proposed", {"hash": terms.hash()})
    _write(folder.proposed, terms, "proposed_at")


def accept(folder: HospitalFolder, terms: Terms, hash_: str) -> None:
    """Record the yes to these terms, given by all digits of their hash.

    A part of it would not do: two terms that share the first 12 digits are found in minutes.

    Raises:
        NotAccepted: the hash is of other terms, or the code is not the installed one.
        BadKey, LogError: the audit log cannot be written.
    """
    require_same_code(terms)
    if not is_hash_of(hash_, terms):
        raise NotAccepted(
            f"The hash {hash_} is not that of these terms ({terms.hash()}). "
            "They may have changed: read them again with `fed-client review`."
        )
    append(folder.audit, "terms accepted", {"hash": terms.hash(), "code": terms.code_hash})
    _write(folder.accepted, terms, "accepted_at")
    folder.proposed.unlink(missing_ok=True)


def is_hash_of(hash_: str, terms: Terms) -> bool:
    """Does a person mean these terms by this hash? Spaces and capitals do not matter."""
    return hash_.strip().lower().replace(" ", "") == terms.hash()


def withdraw(folder: HospitalFolder) -> None:
    """Forget the yes: joining again asks again."""
    folder.accepted.unlink(missing_ok=True)
    folder.proposed.unlink(missing_ok=True)
    append(folder.audit, "terms withdrawn", {})


def require_same_code(terms: Terms) -> None:
    """Raises:
    NotAccepted: the terms are for other code than is installed here.
    """
    here = code_hash()
    if terms.code_hash != here:
        raise NotAccepted(
            f"The federation runs fedbrats code {terms.code_hash[:12]}, installed here is "
            f"{here[:12]}. Nothing but the installed code ever runs here, so both sides need the "
            "same version: ask the coordinator which, and install it."
        )


def require_policy(terms: Terms, invitation: Invitation, settings: SiteConfig) -> None:
    """Raises:
    NotAccepted: the terms break this site's own policy; the text lists every rule that they do.
    """
    private = settings.privacy is not None
    broken = broken_by_terms(settings.policy, terms, invitation, private=private)
    if broken:
        lines = "".join(f"  {refusal}\n" for refusal in broken)
        raise NotAccepted(
            f"These terms are against this site's own policy (policy: in site.yaml):\n{lines}"
            "Nothing was accepted or sent. Ask the coordinator for other terms, or change the policy "
            "(send_updates: false for a site that is only to evaluate)."
        )


def sheet(terms: Terms, invitation: Invitation, settings: SiteConfig) -> str:
    """The consent sheet: everything that matters, in plain words, with this site's own settings."""
    c = terms.config
    t, r = c.training, c.rounds
    updates = (
        "the weighted change of the network's weights, masked: only the sum over all sites can be "
        "read; with it this site's keys for the round and sealed shares of its secrets"
        if c.secure_aggregation
        else "the network's weights (its change since the round's model, rounded to 16-bit numbers)"
        if r.updates == "fp16"
        else "the network's weights (whole, as 32-bit numbers)"
    )
    subjects = (
        "held-out and left-out" if c.secure_aggregation else "training, held-out and left-out"
    )
    view = (
        f"patches of {_grid(t.patch)} voxels"
        if c.preprocess.mode == "patches"
        else f"volumes resampled to {_grid(c.preprocess.shape)} voxels"
    )
    return f"""\
CONSENT SHEET of federation "{c.name}" ({terms.federation}) for {invitation.site}

  Coordinator   {invitation.address}
  Its CA        {invitation.ca_digits()}
                (compare by telephone, with a number you know to be the coordinator's)
  Code          {terms.code_hash[:12]} (that of the package installed here; no code is received)
  Network       {c.network.name}, feature maps {", ".join(map(str, c.network.channels))}, \
{c.network.norm} norm
  Data          modalities {", ".join(c.modalities)}; {view}
  Loss          Dice + {c.loss.focal_weight:g} x focal (gamma {c.loss.gamma:g})
  Training      at most {r.number} rounds of {_round(settings.privacy, c)};
                {c.held_out_fraction:.0%} of the subjects are held out and only measured on

  What leaves this building, and nothing else:
{_leaving(settings, updates, subjects, secure=c.secure_aggregation)}
  For each round at most 10 updates and 10 sets of means, should connections break; no update for an
  earlier round than the last.
  What stays: every scan, segmentation and subject id{_single(settings.policy)}.
  What else this site's policy (site.yaml) allows and refuses: fed-client policy explain

{_privacy(settings, c)}

{_aggregation(terms, invitation)}

  Everything that the yes covers:
{_listed(terms)}

  Hash of these terms: {terms.hash()}
"""


def _round(privacy: PrivacyBudget | None, config: FederationConfig) -> str:
    if privacy is not None:
        return many(config.privacy.steps, "noisy step") + ", see Privacy"
    return f"{many(config.training.epochs, 'epoch')} over this site's training subjects"


def _leaving(settings: SiteConfig, updates: str, subjects: str, *, secure: bool) -> str:
    """Weights and numbers, as the site's policy lets them."""
    policy, privacy = settings.policy, settings.privacy
    update = f"after each round, {updates}"
    if not policy.send_updates:
        update = update_in_words(policy, privacy)
    entries = [
        update,
        name_in_words(policy),
        f"the numbers of its {subjects} subjects",
        training_in_words(policy, privacy, secure=secure),
        metrics_in_words(policy, privacy),
        STATEMENT if privacy is None else PRIVATE_STATEMENT,
        *ALWAYS,
    ]
    return "\n".join(
        textwrap.fill(entry, 96, initial_indent="   - ", subsequent_indent="     ")
        for entry in entries
    )


def _single(policy: Policy) -> str:
    return "; results of single subjects" if policy.min_subjects > 1 else ""


def _privacy(settings: SiteConfig, config: FederationConfig) -> str:
    privacy = settings.privacy
    if privacy is None:
        text = """\
  Privacy       NO differential privacy (privacy: off in site.yaml).
                Weights and means can reveal facts about training data to whoever sees them."""
        if settings.policy.min_subjects == 1:
            text += " A mean\n"
            text += (
                " " * 16
                + "over a single held-out subject is that subject's result, and may leave\n"
            )
            text += " " * 16 + "(policy.min_subjects)."
        return text
    delta = "1/(10 N)" if privacy.delta is None else f"{privacy.delta:g}"
    recipe = config.privacy
    sample = (
        "every patient"
        if recipe.expected_batch is None
        else f"on average {recipe.expected_batch:g} patients, drawn at random,"
    )
    text = f"""\
  Privacy       differential privacy for every patient of this site: at most epsilon
                {privacy.epsilon:g} at delta {delta}, over all federations together (site.yaml).
                {many(recipe.steps, "noisy step")} a round with {sample} in each.
                The noise is added here, so it holds against the coordinator, the other sites and
                whoever gets the model, with or without secure aggregation.
                What is not covered: fed-client privacy-report, docs/privacy.md"""
    if config.network.norm == "batch":
        text += """
                This federation's network (norm: batch) CANNOT be protected: join will refuse."""
    return text


def _aggregation(terms: Terms, invitation: Invitation) -> str:
    if not terms.config.secure_aggregation:
        text = """\
  Aggregation   NO secure aggregation: the coordinator sees this site's own update."""
        if terms.config.rounds.aggregation == "krum":
            text += """
                With krum each round's model IS one site's update, and every site receives it."""
        return text
    sites, own = len(terms.roster), invitation.key_fingerprint
    colluders = most_colluders(sites)
    keys = "\n".join(
        f"                  {mark}{' (this site)' if mark == own else ''}" for mark in terms.roster
    )
    words = textwrap.fill(
        "secure: the coordinator learns one sum of updates a round, of at least "
        f"{fewest_in_sum(terms.config, sites)} of the {sites} sites below, and no single update of that "
        f"round, as long as no more than {colluders} of them "
        f"{'colludes' if colluders == 1 else 'collude'} with it. By comparing rounds, or by models made "
        "for the purpose, a dishonest one can learn more: only a privacy budget limits that "
        "(docs/security.md). Ask the other hospitals by telephone for their keys: a key that is "
        "nobody's is a site that the coordinator has made up.",
        96,
        initial_indent="  Aggregation   ",
        subsequent_indent=" " * 16,
    )
    return f"{words}\n{keys}"


def _listed(terms: Terms) -> str:
    text = yaml.safe_dump(terms.config.agreed(), sort_keys=False, default_flow_style=None, width=90)
    return textwrap.indent(text.rstrip(), "    ")


def difference(before: Terms, after: Terms) -> str:
    """One line for each value that changed."""
    lines = [f"  {key}: {_shown(old)} -> {_shown(new)}" for key, old, new in changes(before, after)]
    return "\n".join(lines) or "  nothing"


def _grid(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NotAccepted(
            f"{path} cannot be read ({error}); delete it to be asked again."
        ) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("terms"), dict):
        raise NotAccepted(f"{path} holds no terms; delete it to be asked again.")
    return stored


def _write(path: Path, terms: Terms, when: str) -> None:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"hash": terms.hash(), when: at, "terms": terms.document()}
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")
