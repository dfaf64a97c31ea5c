"""Peak memory of a block."""

from __future__ import annotations

import sys

import pytest
import torch

from lmms_mtv.runtime import memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told by Linux")
def test_what_a_block_takes_and_no_other_block():
    with memory.peak(CPU) as before:
        pass
    with memory.peak(CPU) as large:
        taken = torch.ones(50 << 20)
        del taken
    with memory.peak(CPU) as after:
        pass
    assert large.bytes - before.bytes > 150 << 20
    assert large.bytes - after.bytes > 100 << 20


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_OWN", tmp_path / "nothing")
    with memory.peak(CPU) as found:
        pass
    assert found.bytes is None
