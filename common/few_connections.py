"""A listening socket that holds few connections, for servers in a process that must not run out of files.

Counted where they are accepted, before TLS, so that a stranger's idle connection costs one of these
places and never another open file. Until somebody says `keep` of it, a connection has a few seconds,
and gives way to a newer one when all places are taken. Who is kept is the server's to decide.

asyncio accepts by way of the socket and uvloop does not: uvicorn needs `loop="asyncio"`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import weakref
from typing import Any

SPARE = 16  # connections that are being closed, and still hold their file for a moment
LEAVING = 1.0  # seconds in which one that was told to go should have gone


class Accepted(socket.socket):
    """One connection; asyncio closes it."""

    peer: tuple[str, int] = ("", 0)
    kept = dropped = False
    dropped_at = 0.0
    late: asyncio.TimerHandle | None = None

    def drop(self) -> None:
        """Make whoever reads from it find its end: the file itself is asyncio's to close."""
        if self.kept or self.dropped or self.fileno() < 0:
            return
        self.dropped, self.dropped_at = True, time.monotonic()
        with contextlib.suppress(OSError):  # the other side has gone
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.late is not None:
            self.late.cancel()
        super().close()


class FewConnections(socket.socket):
    """Takes the place of a listening socket, which is its own from then on.

    At most `most` connections at a time, `most_per_address` of one address (none: as many as in all);
    each has `seconds` from its first packet, TLS included, until `keep`.
    """

    def __init__(
        self,
        listening: socket.socket,
        *,
        most: int,
        seconds: float,
        most_per_address: int | None = None,
    ) -> None:
        family, kind, proto = listening.family, listening.type, listening.proto
        super().__init__(family, kind, proto, fileno=listening.detach())
        self._most, self._seconds = most, seconds
        self._most_per_address = most if most_per_address is None else most_per_address
        self._accepted: weakref.WeakSet[Accepted] = weakref.WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, in an event loop.

        Raises:
            BlockingIOError: there is none, or it waits until those that gave way are closed.
            ConnectionAbortedError: it was closed, as there is no place for it.
        """
        open_ = [one for one in self._accepted if one.fileno() >= 0]
        no_file = len(open_) >= self._most + SPARE
        since = time.monotonic() - LEAVING
        if no_file and any(one.dropped and one.dropped_at > since for one in open_):
            raise BlockingIOError  # it stays in the system's queue, and costs no file here
        plain, address = super().accept()
        new = Accepted(plain.family, plain.type, plain.proto, fileno=plain.detach())
        new.peer = (str(address[0]), int(address[1]))
        here = [one for one in open_ if not one.dropped]
        same = [one for one in here if one.peer[0] == new.peer[0]]
        crowd = same if len(same) >= self._most_per_address else here
        full = crowd is same or len(here) >= self._most
        oldest = min(
            (one for one in crowd if not one.kept and one.late is not None),
            key=lambda one: one.late.when() if one.late else 0.0,
            default=None,
        )
        if (full and oldest is None) or no_file:
            new.close()
            raise ConnectionAbortedError
        if full and oldest is not None:
            oldest.drop()
        self._accepted.add(new)
        new.late = asyncio.get_running_loop().call_later(self._seconds, new.drop)
        return new, address

    def keep(self, peer: object) -> None:
        """Let a connection stay as long as the server wants it: (address, port) of its other end, as
        ASGI's `client`. An unknown one does not matter."""
        known = tuple(peer)[:2] if isinstance(peer, (tuple, list)) else None
        for one in self._accepted:
            if one.peer == known:
                one.kept = True
