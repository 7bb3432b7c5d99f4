"""A Flower message as one block of bytes, for the way between `fed-client join` and its worker.

Flower's objects as they travel, one after the other: through a protobuf the weights would be copied
several times, which costs more than sending them. Both ends are this site's own processes, so nothing
is checked here.
"""

from __future__ import annotations

import json
from typing import cast

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


def pack(message: Message) -> bytes:
    """8 bytes of length, a JSON head of that length with names and sizes, then the objects."""
    with no_object_id_recompute():
        root = message.object_id
        pieces = {name: piece.deflate() for name, piece in get_all_nested_objects(message).items()}
    sizes = {name: len(piece) for name, piece in pieces.items()}
    head = {"message": message.metadata.message_id, "root": root, "sizes": sizes}
    text = json.dumps(head).encode()
    return b"".join((len(text).to_bytes(8, "little"), text, *pieces.values()))


def unpack(block: bytes) -> Message:
    """The message, with the id that it had (which is not the hash of what it holds now)."""
    begin = 8 + int.from_bytes(block[:8], "little")
    head = json.loads(block[8:begin])
    pieces = {}
    for name, size in head["sizes"].items():
        pieces[name] = block[begin : begin + size]
        begin += size
    message = cast(Message, inflate_object_from_contents(head["root"], pieces))
    message.metadata.__dict__["_message_id"] = head["message"]
    return message
