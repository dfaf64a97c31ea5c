"""Peak memory of a block of code, and free memory of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_OWN = Path("/proc/self")

_MACHINE = Path("/proc/meminfo")

# The limit of a container, in the first and the second version of Linux's control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory.max"))


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


def free_host_bytes() -> int:
    """Return the free memory of the machine, or the limit of the container if it is lower; 0 if nothing tells it."""
    try:
        free = re.search(r"^MemAvailable:\s*(\d+) kB", _MACHINE.read_text(), re.MULTILINE)
        limits = [path.read_text().strip() for path in _LIMITS if path.is_file()]
    except OSError:
        return 0
    # A control group without a limit says "max".
    return min([int(free[1]) << 10, *(int(limit) for limit in limits if limit.isdigit())]) if free else 0
