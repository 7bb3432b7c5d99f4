"""Hospitals with policies of their own in one federation: who refuses is told, and the others go on."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from client.policy import Policy
from common.weights import load_weights

pytestmark = pytest.mark.slow
OPEN, HIDDEN, CLOSED = "site-01", "site-06", "site-13"


def never() -> str:
    """A window of one minute, twelve hours from now."""
    then = datetime.now() + timedelta(hours=12)
    day = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"][then.weekday()]
    return f"{day} {then:%H:%M}-{then + timedelta(minutes=1):%H:%M}"


def test_the_federation_goes_on_without_a_site_whose_policy_refuses(new_federation):
    f = new_federation("rounds.number=2", "rounds.min_sites=2", "server.gather_minutes=0")
    f.put_policy(
        HIDDEN, Policy(min_subjects=1, decimals=2, metrics=("dice",), training_numbers=False)
    )
    f.put_policy(CLOSED, Policy(min_subjects=1, train_when=(never(),)))
    server = f.serving()
    closed = f.join(CLOSED)
    closed.says("policy rule `train_when`: allowed")
    clients = {site: f.join(site) for site in (OPEN, HIDDEN)}
    for client in clients.values():
        client.ends_well()
    server.exit_code()
    for number in (1, 2):
        (reason,) = [why for site, why in f.reasons(number).items() if site == CLOSED]
        assert "policy rule `train_when`: allowed" in reason
    assert "policy rule `train_when`" in server.text(), "the coordinator sees why"
    assert f.left(CLOSED, "update") == f.left(CLOSED, "card") == []

    # what the other one lets out
    record = f.results()["rounds"][0]
    means = record["metrics"][HIDDEN]["means"]
    assert {name.partition("/")[0] for name in means} == {"dice"}
    assert all(value == round(value, 2) for value in means.values())
    (contribution,) = [c for c in record["contributions"] if c["site"] == HIDDEN]
    assert (contribution["train_loss"], contribution["seconds"]) == (None, None)

    # and its name stays with the coordinator
    assert f"{HIDDEN} contributed to every round." in clients[HIDDEN].text()
    told = clients[OPEN].text()
    assert HIDDEN not in told
    assert CLOSED not in told
    assert "another site contributed to every round." in told.replace(" (1)", "")
    assert load_weights(f.coordinator.run / "model.safetensors")[1]["sites"] == [
        "another site",
        OPEN,
    ]
