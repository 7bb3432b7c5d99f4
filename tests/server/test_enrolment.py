"""Exactly the right keys count, whatever is typed in whatever order and by how many processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.keys import fingerprint, new_private_key, public_line
from server.enrolment import (
    EnrolmentError,
    active,
    admit,
    all_sites,
    create_registry,
    keys_of_all,
    revoke,
)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "enrolled.sqlite"
    create_registry(path)
    return path


def keys(number: int) -> list:
    return [new_private_key().public_key() for _ in range(number)]


def counting(path: Path) -> dict:
    """name -> the key that counts."""
    return {site.name: site.key() for site in active(path)}


def test_admitted_keys_count_and_are_kept(registry):
    a, b = keys(2)
    admit(registry, "Oslo", a)
    admit(registry, "Bergen", b)
    create_registry(registry)  # again: nothing is lost
    assert counting(registry) == {"Bergen": b, "Oslo": a}
    assert [site.name for site in all_sites(registry)] == ["Bergen", "Oslo"]
    assert active(registry)[1].public_key == public_line(a, "Oslo")


def test_the_same_again_changes_nothing(registry):
    (a,) = keys(1)
    first = admit(registry, "Oslo", a)
    assert admit(registry, "Oslo", a) == admit(registry, "Oslo", a, replace=True) == first
    assert all_sites(registry) == [first]


def test_another_key_under_an_active_name_needs_replace(registry):
    a, b, c = keys(3)
    old = admit(registry, "Oslo", a)
    admit(registry, "Bergen", c)
    with pytest.raises(EnrolmentError, match="--replace") as caught:
        admit(registry, "Oslo", b)
    assert old.fingerprint in str(caught.value)
    assert counting(registry) == {"Oslo": a, "Bergen": c}
    admit(registry, "Oslo", b, replace=True)
    assert counting(registry) == {"Oslo": b, "Bergen": c}
    assert [site.name for site in all_sites(registry)] == ["Bergen", "Oslo"]
    admit(registry, "Oslo", a, replace=True)  # back to the old pair
    assert counting(registry)["Oslo"] == a


def test_a_key_has_one_name(registry):
    a, b = keys(2)
    admit(registry, "Oslo", a)
    admit(registry, "Bergen", b)
    for replace in (False, True):
        with pytest.raises(EnrolmentError, match="already enrolled as Oslo"):
            admit(registry, "Bergen", a, replace=replace)
    assert counting(registry) == {"Oslo": a, "Bergen": b}
    revoke(registry, "Oslo")
    admit(registry, "Bergen", a, replace=True)
    assert counting(registry) == {"Bergen": a}


def test_revoked_keys_do_not_count_until_admitted_again(registry):
    a, b = keys(2)
    admit(registry, "Oslo", a)
    gone = revoke(registry, "Oslo")
    assert not gone.active
    assert active(registry) == []
    assert all_sites(registry) == [gone]
    assert revoke(registry, "Oslo") == gone
    admit(registry, "Oslo", a)
    assert counting(registry) == {"Oslo": a}
    revoke(registry, "Oslo")
    admit(registry, "Oslo", b)  # no --replace: there is nothing to replace
    assert counting(registry) == {"Oslo": b}


def test_names_that_cannot_be_told_apart_everywhere(registry):
    a, b = keys(2)
    admit(registry, "Oslo", a)
    for _ in range(2):
        with pytest.raises(EnrolmentError, match="capital letters only"):
            admit(registry, "OSLO", b, replace=True)
        revoke(registry, "Oslo")  # also then, as its results stay
    with pytest.raises(EnrolmentError, match="cannot be a site's name"):
        admit(registry, "../Oslo", b)


def test_an_unknown_name_is_answered_with_the_nearest(registry):
    (a,) = keys(1)
    with pytest.raises(EnrolmentError, match="No site called Oslo is enrolled"):
        revoke(registry, "Oslo")
    admit(registry, "Oslo", a)
    for typed in ("Olso", "oslo"):
        with pytest.raises(EnrolmentError, match="Did you mean Oslo"):
            revoke(registry, typed)
    assert counting(registry) == {"Oslo": a}


MANY = """
import sys
from pathlib import Path
from common.keys import new_private_key
from server.enrolment import EnrolmentError, admit, revoke
path, me = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
for number in range(20):
    admit(path, f"{me}-{number}", new_private_key().public_key())
    if number % 2:
        revoke(path, f"{me}-{number}")
try:
    admit(path, "contested", new_private_key().public_key())
    print("mine")
except EnrolmentError:
    print("refused")
"""


def test_several_processes_at_once_lose_nothing(registry):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, str(registry), f"p{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    while any(process.poll() is None for process in processes):
        active(registry)  # a server that looks in meanwhile
    said = sorted(process.communicate()[0].strip() for process in processes)
    assert said == ["mine", "refused", "refused"]
    expected = {f"p{p}-{n}" for p in range(3) for n in range(0, 20, 2)} | {"contested"}
    assert {site.name for site in active(registry)} == expected
    assert len(all_sites(registry)) == 61


def test_files_that_cannot_be_used_are_named(registry, tmp_path):
    gone = tmp_path / "gone.sqlite"
    for use in (active, all_sites, lambda path: admit(path, "Oslo", keys(1)[0])):
        with pytest.raises(EnrolmentError, match=r"gone\.sqlite"):
            use(gone)
        assert not gone.exists()
    registry.write_bytes(b"not a database, but long enough to be looked at" * 30)
    with pytest.raises(EnrolmentError, match=r"enrolled\.sqlite.*backup"):
        active(registry)


def test_every_key_that_a_site_ever_had_is_kept(registry):
    old, new, other = (new_private_key().public_key() for _ in range(3))
    admit(registry, "Oslo", old)
    admit(registry, "Oslo", new, replace=True)
    admit(registry, "Bergen", other)
    revoke(registry, "Bergen")
    found = {site: [fingerprint(key) for key in of] for site, of in keys_of_all(registry).items()}
    assert found == {"Oslo": [fingerprint(old), fingerprint(new)], "Bergen": [fingerprint(other)]}
