"""Pieces come back as they were, large ones from files, and what nothing holds is gone from both."""

from __future__ import annotations

import os

import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_utils import get_object_id

from server.pieces import SMALL, PieceStore


def piece(body: bytes, *children: str) -> tuple[str, bytes]:
    """Flower's form: kind, children, length, NUL, body."""
    content = f"ArrayChunk {','.join(children)} {len(body)}".encode() + b"\x00" + body
    return get_object_id(content), content


@pytest.fixture
def store(tmp_path) -> PieceStore:
    return PieceStore(tmp_path / "pieces")


def put(store: PieceStore, *pieces: tuple[str, bytes], run: int = 1) -> None:
    for name, content in pieces:
        store.preregister(run, ObjectTree(object_id=name))
        store.put(name, content)


def files(store: PieceStore) -> set[str]:
    return {path.name for path in store._folder.iterdir()}


def test_large_pieces_lie_in_files_and_small_ones_do_not(store):
    large, small = piece(os.urandom(SMALL + 1)), piece(b"few")
    put(store, large, small)
    assert files(store) == {large[0]}
    assert store._folder.stat().st_mode & 0o077 == 0
    assert store.get(large[0]) == large[1]
    assert store.get(small[0]) == small[1]
    assert store.get("0" * 64) is None
    store.put(*large)  # a second time changes nothing
    assert store.get(large[0]) == large[1]


def test_a_shared_piece_stays_until_nothing_holds_it(store):
    shared = piece(os.urandom(SMALL + 1))
    heads = [piece(bytes([n]), shared[0]) for n in range(2)]
    for name, content in heads:
        tree = ObjectTree(object_id=name, children=[ObjectTree(object_id=shared[0])])
        store.preregister(1, tree)
        store.put(name, content)
    store.put(*shared)
    store.delete(heads[0][0])
    assert store.get(shared[0]) == shared[1]
    store.delete(heads[1][0])
    assert files(store) == set()
    assert len(store) == 0


def test_what_does_not_match_its_name_is_refused_and_not_written(store):
    large, other = piece(os.urandom(SMALL + 1)), piece(os.urandom(SMALL + 1))
    store.preregister(1, ObjectTree(object_id=large[0]))
    with pytest.raises(ValueError, match="does not match"):
        store.put(large[0], other[1])
    assert store.get(large[0]) == b""
    assert files(store) == set()
    store.check()


def test_what_cannot_be_written_is_not_there_and_is_told(store, monkeypatch):
    large = piece(os.urandom(SMALL + 1))
    store.preregister(1, ObjectTree(object_id=large[0]))
    store._folder.rmdir()
    with pytest.raises(OSError, match="No such file"):
        store.put(*large)
    assert store.get(large[0]) == b""
    with pytest.raises(OSError, match=r"pieces: cannot be written \(No such file.*Free disk space"):
        store.check()


def test_a_new_store_begins_with_an_empty_folder(store):
    put(store, piece(os.urandom(SMALL + 1)))
    assert files(PieceStore(store._folder)) == set()
