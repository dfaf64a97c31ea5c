"""Peak memory of a block, and free memory of the machine."""

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


def test_free_memory_is_at_most_the_limit_of_the_container(monkeypatch, tmp_path):
    machine, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_MACHINE", machine)
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "of another version", limit))
    assert memory.free_host_bytes() == 0, "nothing tells it"
    machine.write_text("MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    assert memory.free_host_bytes() == 5000 << 10
    for text, found in (("max\n", 5000 << 10), ("1048576\n", 1 << 20), ("99999999999\n", 5000 << 10)):
        limit.write_text(text)
        assert memory.free_host_bytes() == found
