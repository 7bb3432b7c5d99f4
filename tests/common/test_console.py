"""How a program ends when it is asked to: private files are gone, and the caller's handlers are back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from common.console import ending_in_order


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_private_files_are_deleted_when_the_program_is_asked_to_stop(number):
    before = signal.getsignal(number)
    private: list[Path] = []

    def work() -> None:
        with ending_in_order(), TemporaryDirectory() as folder:
            private.append(Path(folder))
            (private[0] / "scan.nii.gz").write_bytes(b"voxels")
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + number
    assert not private[0].exists()
    assert signal.getsignal(number) == before
