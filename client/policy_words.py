"""A hospital's policy in plain words, for the consent sheet and for `fed-client policy explain`."""

from __future__ import annotations

from client.policy import ANY, Policy
from client.site_config import PrivacyBudget, SiteConfig
from common.console import many

STATEMENT = (
    "the signed statement that this site trains without differential privacy, with the hash of the "
    "code and, if a ledger is kept, its random number, its length and its last hash"
)
PRIVATE_STATEMENT = (
    "a signed statement of the privacy spent: epsilon, delta and budget, noise, rate, clipping norm "
    "and steps, number of patients, hash of the code, the ledger's random number, length and last "
    "hash (by which two federations can see that a site of each is the same hospital)"
)
ALWAYS = (
    (
        "the text of an error or refusal, free of paths and data, with one of three codes; that the "
        "farewell was heard"
    ),
    (
        "with every answer, number and hash of the last entry of this site's audit log, and of the last "
        "that it has heard of the coordinator's"
    ),
    (
        "as with any connection: this machine's address, when it is connected, this site's public key, "
        "the versions of the programs, and the fingerprint of the configuration"
    ),
)


def leaves(settings: SiteConfig) -> list[str]:
    """What may leave this site, an entry for each kind."""
    policy, privacy = settings.policy, settings.privacy
    secure = (
        "with secure aggregation, this site's keys for a round, sealed shares of its secrets for "
    )
    secure += "the other sites, and the shares of theirs that unmask the sum"
    return [
        update_in_words(policy, privacy),
        *([secure] if policy.send_updates else []),
        name_in_words(policy),
        "the numbers of its training (not with secure aggregation), held-out and left-out subjects",
        training_in_words(policy, privacy),
        metrics_in_words(policy, privacy),
        STATEMENT if privacy is None else PRIVATE_STATEMENT,
        *ALWAYS,
    ]


def stays(settings: SiteConfig) -> list[str]:
    """What never leaves, whatever is asked."""
    few = many(settings.policy.min_subjects, "subject")
    return [
        "every scan, segmentation and subject id, and results of single subjects"
        if settings.policy.min_subjects > 1
        else "every scan, segmentation and subject id; a mean over one subject is its result, and "
        "may leave (min_subjects)",
        (
            f"any mean over fewer than {few}, and any update trained on fewer; several scans of one "
            "patient count as one"
        ),
        "whatever else is in an answer: it is built anew from the list above",
    ]


def does(settings: SiteConfig) -> list[str]:
    """What this site will do for a federation."""
    policy = settings.policy
    hours = (
        f"trains only {', '.join(policy.train_when)}, this machine's time; a task that is not done "
        "when they end is stopped, and outside of them the roll call is refused"
        if policy.train_when
        else "trains at any time"
    )
    return [
        (
            f"accepts {_of(policy.networks, 'network')} and {_of(policy.recipes, 'recipe')} of "
            "preprocessing, of those built in; no code is ever received"
        ),
        f"takes part in {_limit(policy.max_rounds, 'round')} of {_limit(policy.max_epochs, 'epoch')}",
        "stops a task after "
        + (f"{policy.max_hours:g} hours" if policy.max_hours else "the deadline of the terms"),
        "takes "
        + (f"at most {policy.max_gpu_memory_gb:g} GB" if policy.max_gpu_memory_gb else "any amount")
        + " of the GPU's memory",
        hours if policy.send_updates else "does not train",
        "trains only with differential privacy" + _set(settings.privacy)
        if policy.require_privacy
        else "does not demand differential privacy" + _set(settings.privacy),
        "sends updates only through secure aggregation"
        if policy.require_secure_aggregation
        else "does not demand secure aggregation: the coordinator may see this site's own update",
    ]


def who(policy: Policy) -> list[str]:
    """Who may ask."""
    federation = policy.federation or "that of the invitation"
    coordinator = policy.coordinator or "that of the invitation"
    return [
        f"the federation with this id: {federation}",
        f"the coordinator with this CA: {coordinator}",
        "and only for terms to which somebody here has said yes",
    ]


def update_in_words(policy: Policy, privacy: PrivacyBudget | None) -> str:
    if not policy.send_updates:
        return "no model update: this site only evaluates (send_updates)"
    noise = "" if privacy is None else ", with the noise of differential privacy"
    return (
        f"model updates (the network's weights, or with secure aggregation masked ones){noise}, "
        f"trained on at least {_few(policy)}"
    )


def name_in_words(policy: Policy) -> str:
    if policy.show_name:
        return "this site's name, which other sites may read too (show_name)"
    return "this site's name, for the coordinator only: other sites read `another site` (show_name)"


def training_in_words(
    policy: Policy, privacy: PrivacyBudget | None, *, secure: bool | None = None
) -> str:
    """`secure`: with secure aggregation or without; None: whichever a federation has."""
    if privacy is not None:
        return "no loss, time or throughput of training, for they depend on the patients"
    if not policy.training_numbers:
        return "no loss, time or throughput of training (training_numbers)"
    if secure:  # seconds and throughput together tell the number of subjects
        return f"the mean training loss and seconds of each round{_rounded(policy)}"
    hidden = "" if secure is False else " (not with secure aggregation)"
    return f"the mean training loss, seconds and throughput{hidden} of each round{_rounded(policy)}"


def metrics_in_words(policy: Policy, privacy: PrivacyBudget | None) -> str:
    if not policy.metrics:
        return "no metric: only the number of held-out subjects is told (policy.metrics)"
    restricted = f"none over fewer than {many(policy.min_subjects, 'subject')}{_rounded(policy)}"
    if privacy is not None and privacy.metrics == "withheld":
        return "no metric: results of held-out subjects are withheld (privacy.metrics)"
    if privacy is not None and privacy.metrics == "noised":
        return (
            "noised mean Dice of the held-out subjects, within the privacy budget "
            f"(privacy.metrics); {restricted}"
        )
    outside = "" if privacy is None else ", exact, outside of the budget (privacy.metrics)"
    return (
        "means of the metrics over the held-out subjects, with the number of subjects behind "
        f"each{outside}: {', '.join(policy.metrics)}; {restricted}"
    )


def _rounded(policy: Policy) -> str:
    if policy.decimals is None:
        return ", not rounded"
    return f", rounded to {many(policy.decimals, 'decimal')}"


def _few(policy: Policy) -> str:
    return many(policy.min_subjects, "subject")


def _of(chosen: tuple[str, ...] | str, what: str) -> str:
    return f"any {what}" if chosen == ANY else f"the {what}s {', '.join(chosen)}"


def _limit(most: int | None, what: str) -> str:
    return f"as many {what}s as the terms say" if most is None else f"at most {many(most, what)}"


def _set(privacy: PrivacyBudget | None) -> str:
    if privacy is None:
        return " (`privacy` is off)"
    return f" (`privacy` is set: epsilon {privacy.epsilon:g})"
