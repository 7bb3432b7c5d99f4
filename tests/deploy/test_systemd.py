"""The systemd units: verified by systemd where it is installed, and what they promise by reading."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.membership import STOP_SECONDS as CLIENT_STOPS
from server.running import STOP_SECONDS as SERVER_STOPS

ROOT = Path(__file__).resolve().parents[2]
ANALYZE = shutil.which("systemd-analyze")
UNITS = ("fed-client", "fed-server")
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
}

each_unit = pytest.mark.parametrize("name", UNITS)


def text_of(name: str) -> str:
    return (ROOT / "deploy" / f"{name}.service").read_text(encoding="utf-8")


def settings(name: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", text_of(name), re.MULTILINE))


@each_unit
@pytest.mark.skipif(ANALYZE is None, reason="systemd is not installed")
def test_systemd_understands_every_line(name, tmp_path):
    """With a program that exists on this machine in the place of the installed one."""
    unit = tmp_path / f"{name}.service"
    unit.write_text(text_of(name).replace("/opt/fedbrats/bin/", f"{Path(sys.executable).parent}/"))
    done = subprocess.run(
        [ANALYZE, "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    # the check is able to fail
    unit.write_text(unit.read_text() + "\n[Service]\nNoSuchSetting=yes\n")
    done = subprocess.run([ANALYZE, "verify", "--man=no", unit], capture_output=True, text=True)
    assert "NoSuchSetting" in done.stderr


@each_unit
def test_it_is_locked_in(name):
    found = settings(name)
    assert {key: found.get(key) for key in HARDENED} == HARDENED
    assert found["User"] == found["Group"] == "fedbrats"
    # all that it may write is the folder that it is started with; a hospital's ledger lies beside it
    started = Path(found["ExecStart"].split()[-1])
    writable = started.parent if name == "fed-client" else started
    assert Path(found["ReadWritePaths"]) == writable


def test_a_gpu_is_not_taken_away():
    assert (
        not {"PrivateDevices", "ProtectClock", "MemoryDenyWriteExecute"}
        & settings("fed-client").keys()
    )


@pytest.mark.parametrize(
    ("name", "seconds"), [("fed-client", CLIENT_STOPS), ("fed-server", SERVER_STOPS)]
)
def test_it_stops_as_the_program_does(name, seconds):
    found = settings(name)
    assert float(found["TimeoutStopSec"]) > seconds
    assert found["KillMode"] == "mixed", "the parent stops its worker"
    assert found["Restart"] == "on-failure"
    assert int(found["RestartSec"]) >= 10
    assert found["RestartPreventExitStatus"] == "2", "a wrong setting does not heal by itself"
    assert {"StartLimitIntervalSec", "StartLimitBurst"} <= found.keys()


@each_unit
def test_the_page_and_the_unit_name_the_same_places(name):
    page = "hospital.md" if name == "fed-client" else "coordinator.md"
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    program, *arguments = settings(name)["ExecStart"].split()
    assert " ".join((Path(program).name, *arguments)) in text
    assert str(Path(program).parent) in (ROOT / "docs" / "hospital.md").read_text()
    assert f"deploy/{name}.service" in text
