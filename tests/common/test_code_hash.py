"""Both sides compare one hash: whatever changes the code changes it, and nothing else does."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from common.code_hash import PACKAGES, ROOT, code_hash

SOURCES = {
    "client/__init__.py": b"",
    "client/app.py": b"def answer():\n    return 1\n",
    "common/wire.py": b"x = 1\n",
    "server/rounds.py": b"y = 2\n",
    "sites/deep/er/inner.py": b"z = 3\n",
    "sites/links.csv": b"a,b\n1,2\n",
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """It is kept for the life of a process, in which its own code does not change."""
    code_hash.cache_clear()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "installed"
    for name, content in SOURCES.items():
        write(root, name, content)
    return root


def write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def hash_of(root: Path) -> str:
    code_hash.cache_clear()
    return code_hash(root)


def independent(root: Path) -> str:
    """The same, from the description: package by package, in the order of the paths' parts."""
    text = b""
    for package in ("client", "common", "server", "sites"):
        found = [p for p in (root / package).glob("**/*") if p.name.endswith((".py", ".csv"))]
        for path in sorted(found, key=lambda p: p.parts):
            content = b"\n".join(path.read_bytes().split(b"\r\n"))
            name = "/".join(path.relative_to(root).parts)
            text += name.encode() + b"\0" + str(len(content)).encode() + b"\0" + content
    return hashlib.sha256(text).hexdigest()


def test_it_is_what_the_description_says(tree):
    assert hash_of(tree) == independent(tree)
    assert hash_of(ROOT) == code_hash() == independent(ROOT)


def test_it_is_that_of_this_code():
    assert Path(__file__).parents[2] == ROOT
    assert PACKAGES == ("client", "common", "server", "sites")
    assert all((ROOT / package / "__init__.py").is_file() for package in PACKAGES)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_counts(tree, name):
    before = hash_of(tree)
    found = {before}
    path = tree / name
    content = path.read_bytes()
    path.write_bytes(content + b"#")
    found.add(hash_of(tree))
    path.write_bytes(content)
    assert hash_of(tree) == before
    renamed = path.rename(path.with_stem("renamed"))
    found.add(hash_of(tree))
    renamed.unlink()
    found.add(hash_of(tree))
    assert len(found) == 4


@pytest.mark.parametrize(
    "name", ["client/more.py", "sites/deep/more.py", "common/more.csv", "server/__init__.py"]
)
def test_an_added_source_counts_even_if_empty(tree, name):
    before = hash_of(tree)
    write(tree, name, b"")
    empty = hash_of(tree)
    write(tree, name, b"\n")
    assert len({before, empty, hash_of(tree)}) == 3


def test_text_that_moves_from_one_file_to_the_next_counts(tree):
    write(tree, "common/a.py", b"one\ntwo\n")
    write(tree, "common/b.py", b"three\n")
    before = hash_of(tree)
    write(tree, "common/a.py", b"one\n")
    write(tree, "common/b.py", b"two\nthree\n")
    assert hash_of(tree) != before


def test_sources_that_trade_names_or_folders_count(tree):
    before = hash_of(tree)
    write(tree, "common/wire.py", SOURCES["server/rounds.py"])
    write(tree, "server/rounds.py", SOURCES["common/wire.py"])
    traded = hash_of(tree)
    write(tree, "common/wire.py", SOURCES["common/wire.py"])
    write(tree, "server/rounds.py", SOURCES["server/rounds.py"])
    assert hash_of(tree) == before
    (tree / "sites/deep/er/inner.py").rename(tree / "sites/deep/inner.py")
    assert len({before, traded, hash_of(tree)}) == 3


def test_line_endings_do_not_count(tree):
    before = hash_of(tree)
    for name, content in SOURCES.items():
        write(tree, name, content.replace(b"\n", b"\r\n"))
    assert hash_of(tree) == before
    write(tree, "common/wire.py", b"x = 1\r")  # no line ending but another text
    assert hash_of(tree) != before


@pytest.mark.parametrize(
    "name",
    [
        "client/__pycache__/app.cpython-311.pyc",
        "sites/deep/__pycache__/inner.cpython-311.pyc",
        "common/py.typed",
        "common/wire.py.orig",
        "common/wire.pyc",
        "common/notes.txt",
        "simulation/run.py",
        "tests/test_x.py",
        "setup.py",
        "federation.yaml",
    ],
)
def test_what_is_no_source_of_the_federation_does_not_count(tree, name):
    before = hash_of(tree)
    write(tree, name, b"anything")
    assert hash_of(tree) == before


def test_a_folder_named_like_a_source_does_not_count(tree):
    before = hash_of(tree)
    (tree / "common" / "folder.py").mkdir()
    assert hash_of(tree) == before


def test_neither_place_nor_time_of_writing_count(tree, tmp_path):
    other = tmp_path / "elsewhere" / "deeper"
    for name in reversed(SOURCES):
        write(other, name, SOURCES[name])
    assert hash_of(other) == hash_of(tree)
    copy = shutil.copytree(ROOT / "common", tmp_path / "copy" / "common")
    before = hash_of(copy.parent)
    (copy / "wire.py").touch()
    assert hash_of(copy.parent) == before
