"""What a reader relies on: imports run one way, start-up is quick, files say what they are."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "common": {"common"},
    "sites": {"common", "sites"},
    "client": {"common", "sites", "client"},
    "server": {"common", "server"},
    "simulation": {"common", "sites", "client", "server", "simulation"},
}
HEAVY = (
    *("torch", "monai", "flwr", "numpy", "scipy", "nibabel", "pydantic", "ray", "opacus"),
    *("cryptography", "matplotlib", "jinja2"),
)
# reading and checking scans must not wait for torch
WITHOUT_TORCH = (
    "sites.subject",
    "sites.finding",
    "sites.checks",
    "sites.volumes",
    "sites.institutions",
    "sites.brats2020",
    "sites.holdout",
    "sites.patients",
    "sites.phantom",
    "sites.phantom_cohort",
)
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            found.add(str(node.module).split(".")[0])
    return found


def test_there_are_modules_to_look_at():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == MAY_IMPORT.keys()
    assert imported(ROOT / "simulation" / "run.py") >= {"client", "server", "common"}


@each_module
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    wrong = imported(path) & (MAY_IMPORT.keys() - MAY_IMPORT[package])
    assert not wrong, f"{package} must not import {', '.join(wrong)}"
    assert "tests" not in imported(path)


@each_module
def test_modules_say_what_they_are_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring[0].isupper() or not docstring[0].isalpha()


@each_module
def test_no_module_is_a_drawer(path):
    words = path.stem.strip("_").split("_")
    for word in ("util", "utils", "helper", "helpers", "manager", "base", "misc", "core"):
        assert word not in words


def loaded_by(*modules: str) -> set[str]:
    """The heavy packages that importing `modules` pulls in, however indirectly."""
    program = f"import {', '.join(modules)}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split()) & set(HEAVY)


def test_command_lines_load_nothing_heavy():
    assert loaded_by("simulation.cli", "client.cli", "server.cli") == set()


def test_checking_scans_loads_no_torch():
    assert not loaded_by(*WITHOUT_TORCH) & {"torch", "monai", "flwr"}


def test_the_coordinators_folder_is_handled_without_torch():
    """Every command of fed-server but `start` and `export` answers within a second."""
    modules = ("server.coordinator", "server.enrolment", "server.running")
    assert not loaded_by(*modules) & {"torch", "monai", "matplotlib"}


@pytest.mark.parametrize("command", ["simulation.cli", "client.cli", "server.cli"])
def test_help_answers_at_once(command):
    program = f"import sys; sys.argv = ['x', '--help']; from {command} import main; main()"
    before = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Usage" in done.stdout
    assert processor_seconds() - before < 1.0


def processor_seconds() -> float:
    """Of all finished child processes: unlike the clock on the wall, not slowed by other programs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
