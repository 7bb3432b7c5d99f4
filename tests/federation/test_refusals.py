"""Who cannot or must not take part gets exit code 1 and words, and nothing leaves its building.

One server that is fine, and hospitals that each have another thing wrong; beside it listeners with
certificates that are not. Outsiders with nothing but the CA's certificate, too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from flwr.supercore.routers.runtime.router import router as runtime_router
from flwr.superlink.routers.control.router import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router

from client.connection import Connection, Refused
from common.invitation import read_invitation
from common.keys import fingerprint, new_private_key
from server import certificates, enrolment
from server.gate import ALLOWED, LARGEST_REQUEST

pytestmark = pytest.mark.slow
PROTOBUF = {"content-type": "application/protobuf"}
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *at)
{
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, at);
    if (clock == CLOCK_REALTIME)
        at->tv_sec += atol(getenv("CLOCK_SHIFT"));
    return result;
}

time_t time(time_t *at)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at)
        *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *at, void *zone)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
WRONG = {  # site: what its client must say
    "wrong-ca": ["is not from the CA in this site's invitation", "Ask the coordinator."],
    "not-admitted": ["does not know this site's key", "Send site.pub to the coordinator"],
    "expired": ["the server's certificate has expired", "`fed-server renew-certificate`"],
    "other-host": ["certificate is for another name or address", "`fed-server renew-certificate`"],
    "behind": ["this machine's clock is 10 minutes behind the coordinator's", "Set the clock"],
    "ahead": ["this machine's clock is 10 minutes ahead of the coordinator's", "Set the clock"],
    "behind-a-new-certificate": ["is not valid yet: check this machine's clock"],
}
SHIFTS = {"behind": -600, "ahead": 600, "behind-a-new-certificate": -600}


@contextlib.contextmanager
def handing_out(folder: Path) -> Iterator[str]:
    """A listener that shows this certificate to whoever comes; yields its address."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # also what ends it
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        context.wrap_socket(client, server_side=True).recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def certificate(
    federation: Any, name: str, *hosts: str, age: timedelta = timedelta(minutes=5)
) -> Path:
    """The folder of a certificate of the federation's own CA, for these hosts only."""
    folder = federation.path / f"certificate {name}"
    folder.mkdir()
    ca = federation.coordinator.ca_key, federation.coordinator.ca_certificate
    made_so = mock.patch.multiple(certificates, BACKDATED=age, ALWAYS=())
    with made_so:
        certificates.issue_server_certificate(
            *ca, folder / "server.key", folder / "server.crt", hosts
        )
    return folder


@pytest.fixture(scope="module")
def clock(tmp_path_factory) -> Path:
    """A library that shifts the clock of a program that is started with it by $CLOCK_SHIFT seconds."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, so no program can be given another clock")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    library = folder / "clock.so"
    build = [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c")]
    subprocess.run(build, check=True)
    return library


@pytest.fixture(scope="module")
def federation(new_federation, scans, cohort_cache):
    """A federation whose server waits for its sites; site-01 is fine, those of `WRONG` are not."""
    with mock.patch.object(certificates, "BACKDATED", timedelta(days=1)):  # older than any shift
        made = new_federation(sites=["site-01"])
    made.server = made.serving()
    for site in WRONG:
        made.hospital(site, scans["site-01"], cohort_cache)
        made.invite(site) if site == "not-admitted" else made.admit(site)
    yield made
    made.typed("fed-server", "stop", str(made.coordinator.path))
    made.server.fails_saying("stopped; the same command continues")


@pytest.fixture(scope="module")
def refused(federation, clock):
    """The clients of all sites of `WRONG`, which run at the same time."""
    other = certificate(federation, "authority", "127.0.0.1")
    certificates.make_authority(other / "ca.key", other / "ca.crt", "another")
    federation.invite("wrong-ca", ca_certificate=(other / "ca.crt").read_text())
    served = {
        "expired": certificate(federation, "expired", "127.0.0.1", age=timedelta(days=1000)),
        "other-host": certificate(federation, "other host", "elsewhere.example"),
        "behind-a-new-certificate": certificate(federation, "new", "127.0.0.1"),
    }
    clients = {}
    with contextlib.ExitStack() as listeners:
        for site in WRONG:
            if site in served:
                federation.invite(site, address=listeners.enter_context(handing_out(served[site])))
            env = {}
            if site in SHIFTS:
                env = {"LD_PRELOAD": str(clock), "CLOCK_SHIFT": str(SHIFTS[site])}
            clients[site] = federation.join(site, env=env)
        for client in clients.values():
            client.exit_code()
    return clients


@pytest.mark.parametrize("site", WRONG)
def test_the_client_says_what_is_wrong_and_what_to_do(federation, refused, site):
    refused[site].fails_saying(*WRONG[site], "What has left this building so far:\n  nothing")
    assert federation.left(site) == []
    assert federation.workers(site) == []
    assert (
        federation.status()["sites"].get(site, {"state": "never connected"})["state"]
        == "never connected"
    )


def test_without_a_yes_the_sheet_is_shown_and_nothing_leaves(federation):
    client = federation.join("site-01", accept=False)
    client.fails_saying(
        "CONSENT SHEET",
        "What leaves this building, and nothing else",
        "Nothing has left this building: the terms above are not accepted.",
        f"fed-client join {federation.hospitals['site-01'].path} --accept {federation.terms_hash()}",
    )
    assert federation.left("site-01") == []
    assert not federation.hospitals["site-01"].accepted.exists()
    federation.join("site-01", "--accept", "0" * 64, accept=False).fails_saying(
        "is not that of these terms"
    )


# ---------------------------------------------------------------------------------- the outsider


def ask(
    federation: Any, method: str, path: str, body: Any = b"", headers: Any = (), **more: Any
) -> int:
    """The status that somebody gets who has only the CA's certificate."""
    address = read_invitation(federation.coordinator.invitation("site-01")).address
    context = ssl.create_default_context(cafile=federation.coordinator.ca_certificate)
    with contextlib.closing(http.client.HTTPSConnection(address, context=context)) as https:
        https.request(method, path, body, dict(headers), **more)
        return https.getresponse().status


def paths(router: Any) -> set[str]:
    found: set[str] = set()
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        found |= paths(inner) if inner is not None else {route.path}
    return found


def state(federation: Any) -> list[Any]:
    """What the server says of itself and its sites; and who is enrolled."""
    said = json.loads(federation.coordinator.status.read_text())
    sites = {site: about["state"] for site, about in said["sites"].items()}
    return [
        said["state"],
        said["rounds_done"],
        sites,
        enrolment.all_sites(federation.coordinator.enrolled),
    ]


def test_an_outsider_lists_registers_starts_and_stops_nothing(federation, refused):
    before = state(federation)
    stock = paths(control_router) | paths(runtime_router) | paths(fleet_router)
    named = {f"/v1/fleet/{name}" for name in ("register-node", "unregister-node", "get-fab")}
    assert named | {"/v1/control/start-run", "/v1/control/stop-run"} <= stock
    pages = {"/", "/docs", "/redoc", "/openapi.json"}
    for path in sorted((stock | pages) - ALLOWED):
        assert ask(federation, "POST", path, headers=PROTOBUF) == 404, path
        assert ask(federation, "GET", path) == 404, path
    assert ask(federation, "GET", "/health") == 200
    assert state(federation) == before
    assert federation.server.process.poll() is None


def test_an_outsider_s_key_opens_nothing(federation, refused):
    before = state(federation)
    for path in sorted(ALLOWED - {"/health"}):
        assert ask(federation, "POST", path, headers=PROTOBUF) == 401, path
    invited = read_invitation(federation.coordinator.invitation("site-01"))
    key = new_private_key()
    stranger = Connection(invited.address, invited.ca_certificate, key)
    with pytest.raises(Refused, match="does not know this site's key") as refusal:
        stranger.open()
    assert fingerprint(key.public_key()) in str(refusal.value)
    stranger.close()
    assert state(federation) == before


def test_an_outsider_cannot_fill_the_memory(federation):
    path = "/v1/fleet/push-object"
    announced = {**PROTOBUF, "content-length": str(LARGEST_REQUEST + 1)}
    assert ask(federation, "POST", path, None, announced) == 413
    assert ask(federation, "POST", path, iter([b"x"]), PROTOBUF, encode_chunked=True) == 411


# ------------------------------------------------------------------------------ nobody comes


def test_a_server_waits_not_for_ever_and_says_who_is_missing(new_federation):
    federation = new_federation(
        "server.wait_minutes=0.1", "rounds.min_sites=2", sites=["site-01", "site-06"]
    )
    client = federation.join("site-01")
    client.says("nothing listens there now")
    server = federation.start()
    server.fails_saying(
        "needed sites came within 0.1 minutes",
        "site-06: it has never connected.",
        "Start again when they are ready; nothing is lost.",
        "Training NOT complete: 0 rounds.",
    )
    assert client.process.poll() is None, "the hospital need not do anything for the next attempt"
    client.process.terminate()
    client.ends_well()
    assert "Stopped. The same command joins again." in client.text()
    assert federation.left("site-01", "update") == []
    assert federation.workers("site-01") == []
