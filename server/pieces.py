"""Where the pieces of messages lie while they are on their way: in files, so that models need no memory.

Flower's object store keeps everything in memory: for a round of many sites that is a model for each
reply which waits to be taken. Here only what is small stays there. Nothing in the folder outlives the
process that wrote it, so nothing is synchronised to the disk and a new store empties it first.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

SMALL = 2**16  # bytes that stay in memory
IN_A_FILE = b"in a file"  # compared by identity


class PieceStore(InMemoryObjectStore):
    def __init__(self, folder: Path) -> None:
        """Empties `folder`, which only its owner can read. Raises OSError."""
        super().__init__()
        self._folder = folder
        self._trouble = ""
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)

    def check(self) -> None:
        """Raises OSError if a piece could not be written: who sent it was only told to try again."""
        if self._trouble:
            raise OSError(self._trouble)

    def contradicts(self, tree: ObjectTree) -> bool:
        """Has a piece of this tree other parts elsewhere, in it or in what is stored?

        A piece's name is the hash of it and of the names of its parts, so one of both is false; and a
        tree that bites its tail would never be deleted.
        """
        parts: dict[str, set[str]] = {}
        with self.lock_store:
            for node in iterate_object_tree(tree):
                name, children = node.object_id, {child.object_id for child in node.children}
                stored = self.store.get(name)
                known = parts.setdefault(name, set(stored.child_object_ids) if stored else children)
                if known != children:
                    return True
        return False

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store a piece that was announced.

        Raises:
            ValueError: its content does not match its name, or its parts are not those announced.
            OSError: the disk is full; the piece counts as not there.
        """
        with self.lock_store:
            announced = self.store.get(object_id)
            parts = set(get_object_children_ids_from_object_content(object_content))
            if announced is not None and set(announced.child_object_ids) != parts:
                raise ValueError(f"{object_id} has other parts than announced")
            super().put(object_id, object_content)
            entry = self.store[object_id]
            if entry.content is IN_A_FILE or len(entry.content) <= SMALL:
                return
            try:
                self._file(object_id).write_bytes(entry.content)
            except OSError as error:
                self._trouble = (
                    f"{self._folder}: cannot be written ({error.strerror}). Free disk space; the "
                    "same command continues."
                )
                entry.content, entry.is_available = b"", False
                self._file(object_id).unlink(missing_ok=True)
                raise
            entry.content = IN_A_FILE

    def get(self, object_id: str) -> bytes | None:
        with self.lock_store:
            content = super().get(object_id)
            return self._file(object_id).read_bytes() if content is IN_A_FILE else content

    def delete(self, object_id: str) -> None:
        """Also what nothing else holds of its children (the base class calls this for each)."""
        with self.lock_store:
            entry = self.store.get(object_id)
            super().delete(object_id)
            if entry is not None and entry.content is IN_A_FILE and object_id not in self.store:
                self._file(object_id).unlink(missing_ok=True)

    def _file(self, object_id: str) -> Path:
        return self._folder / object_id  # 64 hexadecimal digits, which `preregister` checks
