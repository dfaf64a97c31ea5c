"""Peak memory of a block of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_OWN = Path("/proc/self")


@dataclass
class Peak:
    """Peak memory of a :func:`peak` block.

    Attributes:
        bytes: memory allocated on all GPUs, or without a GPU the resident memory of the process, in bytes. None inside
            the block, and after the block if the system does not measure it.
    """

    bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block on ``device``, with memory allocated before. Blocks cannot be nested."""
    memory = Peak()
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        yield memory
        memory.bytes = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
        return
    resets = _reset()
    yield memory
    memory.bytes = _resident() if resets else None


def _reset() -> bool:
    """Reset the system's peak of the resident memory, and return whether the system can do so."""
    try:
        # proc(5): writing 5 resets the peak resident set size.
        (_OWN / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident() -> int | None:
    peak_line = re.search(r"^VmHWM:\s*(\d+) kB", (_OWN / "status").read_text(), re.MULTILINE)
    return int(peak_line[1]) << 10 if peak_line else None
