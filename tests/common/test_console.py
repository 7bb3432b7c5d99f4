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
    with (
        pytest.raises(SystemExit) as ended,
        ending_in_order(),
        TemporaryDirectory() as private,
    ):
        Path(private, "scan.nii.gz").write_bytes(b"voxels")
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert not Path(private).exists()
    assert signal.getsignal(number) == before
