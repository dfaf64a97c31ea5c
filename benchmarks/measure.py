"""Seconds of things that run side by side in one process, and the file they go to."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from tqdm import tqdm

import lmms_mtv
from benchmarks import models

_PACKAGES: Final = ("torch", "transformers", "numpy")


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repetitions: int,
    device: torch.device,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each of ``runs`` in ``repetitions`` rounds, A B A B ..., after one round that does not count.

    Whatever else the machine does meanwhile slows all of them.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    rounds = [(count, name) for count in range(repetitions + 1) for name in runs]
    for count, name in tqdm(rounds, desc="Measuring", disable=not progress, dynamic_ncols=True, leave=False):
        taken = seconds(runs[name], device)
        if count:
            found[name].append(taken)
    return found


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run`` with everything that it asked of ``device``."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Until ``device`` has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(repetitions: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in repetitions.items()}


def ratio(repetitions: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """The median over rounds of the time of ``one`` over that of ``other`` in the same round."""
    return statistics.median(a / b for a, b in zip(repetitions[one], repetitions[other], strict=True))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a benchmark on a random model; the first paragraph of ``description`` says what it is."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    made.add_argument("--model", choices=models.NAMES, default="tiny", help="shape of the model (default: tiny)")
    made.add_argument("--seed", type=int, default=0, help="of weights, prompts and masks (default: 0)")
    add_common(made)
    return made


def add_common(made: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks have."""
    made.add_argument("--device", help="default: the GPU if there is one")
    made.add_argument("--dtype", choices=models.DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    made.add_argument("--threads", type=int, help="threads of a CPU; default: torch's")
    made.add_argument("--repetitions", type=int, default=3, help="of what is measured, interleaved (default: 3)")
    made.add_argument("--quiet", action="store_true", help="no progress bars")
    made.add_argument("--json", metavar="FILE", type=Path, help="where machine, settings and figures are written")


def device_of(given: argparse.Namespace) -> torch.device:
    """The device that was asked for; on a CPU also sets its threads."""
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    return torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(given: argparse.Namespace, device: torch.device) -> torch.dtype:
    name = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def model_of(given: argparse.Namespace, device: torch.device, layers: int | None = None) -> nn.Module:
    """The model that was asked for."""
    return models.build(given.model, device, dtype_of(given, device), given.seed, layers)


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: processor, threads, device, memory in bytes, versions."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    versions = {"lmms-mtv": lmms_mtv.__version__, "python": platform.python_version()} | found
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "memory": _memory(),
        "versions": versions,
    }


def finish(given: argparse.Namespace, device: torch.device, result: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Write ``lines`` to standard output and, with ``--json``, everything to the file."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
    if given.json is None:
        return
    settings = {name: value for name, value in vars(given).items() if name not in ("json", "quiet")}
    settings |= {"device": str(device), "dtype": str(dtype_of(given, device)).removeprefix("torch.")}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(device), "settings": settings} | dict(result)
    given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{given.json}\n")


def _processor() -> str | None:
    """The name of the processor, where the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return platform.processor() or None
    return found[1] if found else None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
