"""How a server is stopped; what it does while it runs is shown by tests/federation."""

from __future__ import annotations

import os
import signal

import pytest

from server.start import Stopped, _stopping


def test_a_signal_that_a_library_turns_into_its_own_error_stops_all_the_same():
    def swallows() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ValueError("from a library") from None

    with pytest.raises(Stopped, match="continues after the last complete round"), _stopping():
        swallows()


def test_an_error_without_a_signal_stays_what_it_is():
    before = signal.getsignal(signal.SIGTERM)  # Ray leaves its own behind in a process that ran it
    with pytest.raises(ValueError, match="of its own"), _stopping():
        raise ValueError("of its own")
    assert signal.getsignal(signal.SIGTERM) is before
