"""deploy/Containerfile, read and linted: no container engine is at hand to build it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = ROOT / "deploy" / "Containerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, its rest) by stage; those before the first are under ""."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            stage = rest.rpartition(" AS ")[2]
            found[stage] = []
        found[stage].append((instruction, rest.strip()))
    return found


def inherited(stages: dict[str, list[tuple[str, str]]], stage: str) -> list[tuple[str, str]]:
    """A stage's instructions after those of the stages that it is built on."""
    parent = stages[stage][0][1].split(" ")[0]
    before = inherited(stages, parent) if parent in stages else []
    return [*before, *stages[stage]]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no build for this machine")
def test_the_linter_finds_nothing():
    done = subprocess.run([HADOLINT, CONTAINERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_not_ignored(stages):
    copied = [
        source
        for instructions in stages.values()
        for instruction, rest in instructions
        if instruction == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    assert set(copied) == allowed
    assert set(copied) >= {*packages, "pyproject.toml", "constraints.txt", "README.md"}
    assert all((ROOT / source).exists() for source in copied)
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines(), "all else stays outside"


@pytest.mark.parametrize(
    ("target", "program", "arguments", "volume"),
    [
        ("client", "fed-client", ["join", "/site"], "/site"),
        ("server", "fed-server", ["start", "/federation"], "/federation"),
    ],
)
def test_an_image_runs_the_program_as_nobody_in_particular(
    stages, target, program, arguments, volume
):
    instructions = inherited(stages, target)
    last = dict(instructions)
    assert json.loads(last["ENTRYPOINT"]) == [program]
    assert json.loads(last["CMD"]) == arguments
    assert last["VOLUME"] == volume
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", last["USER"]), "a number, and not root's"
    order = [instruction for instruction, _ in instructions]
    assert "RUN" not in order[order.index("USER") :], "nothing is done as root after all"
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts
    path = dict(instructions)["ENV"] if target == "server" else stages["base"][3][1]
    assert path.startswith("PATH=/opt/fedbrats/bin:")
    made = next(rest for instruction, rest in stages["base"] if instruction == "RUN")
    uid = last["USER"].split(":")[0]
    assert f"--owner={uid}" in made
    assert volume in made, "the volume's folder belongs to the user"
    # the command line exists, and takes these arguments
    done = subprocess.run(
        [Path(sys.executable).parent / program, arguments[0], "--help"], capture_output=True
    )
    assert done.returncode == 0


def test_nothing_secret_is_in_an_image(stages):
    everything = CONTAINERFILE.read_text().lower()
    for word in ("site.key", "ca.key", "server.key", "password", "token", "secret"):
        assert word not in everything
    assert not [rest for all_ in stages.values() for i, rest in all_ if i == "ADD"]


def test_cpu_or_cuda_is_chosen_by_an_argument_that_pip_reads(stages):
    names = [rest.split("=")[0] for i, rest in stages["installed"] if i == "ARG"]
    assert names == ["PIP_EXTRA_INDEX_URL"]
    install = next(rest for i, rest in stages["installed"] if i == "RUN")
    assert "--constraint constraints.txt" in install
