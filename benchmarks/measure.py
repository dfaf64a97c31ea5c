"""Interleaved time measurements in one process, the arguments of all benchmarks, and the file of the figures."""

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
    """Return the seconds of each of ``runs`` in ``repetitions`` rounds, after a warm-up round that does not count.

    The rounds are interleaved (A B A B ...), so that other load of the machine slows all runs alike.
    """
    measured: dict[str, list[float]] = {name: [] for name in runs}
    rounds = [(count, name) for count in range(repetitions + 1) for name in runs]
    for count, name in tqdm(rounds, desc="Measuring", disable=not progress, dynamic_ncols=True, leave=False):
        duration = seconds(runs[name], device)
        if count:
            measured[name].append(duration)
    return measured


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of ``run`` in seconds, with all the work that ``run`` gives to ``device``."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Wait until ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(repetitions: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median seconds of each run."""
    return {name: statistics.median(durations) for name, durations in repetitions.items()}


def ratio(repetitions: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Return the median over rounds of the time of ``one`` divided by the time of ``other`` in the same round."""
    return statistics.median(a / b for a, b in zip(repetitions[one], repetitions[other], strict=True))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the argument parser of a benchmark on a random model.

    The first paragraph of ``description`` becomes the description of the parser.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument("--model", choices=models.NAMES, default="tiny", help="shape of the model (default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, prompts and masks (default: 0)")
    add_common(parser)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks share."""
    parser.add_argument("--device", help="device (default: the GPU if there is one, else the CPU)")
    parser.add_argument(
        "--dtype", choices=models.DTYPES, help="precision (default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: the number that torch chooses)")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds of measurement (default: 3)")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine, settings and figures to FILE")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """Return the device of the arguments, after setting the number of threads of torch."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(arguments: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return the precision of the arguments, or the default of the device."""
    name = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def model_of(arguments: argparse.Namespace, device: torch.device, layers: int | None = None) -> nn.Module:
    """Return the model of the arguments, with ``layers`` blocks if given."""
    return models.build(arguments.model, device, dtype_of(arguments, device), arguments.seed, layers)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor, threads, device, memory in bytes and versions that a figure depends on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    versions = {"lmms-mtv": lmms_mtv.__version__, "python": platform.python_version()} | packages
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "memory": _memory(),
        "versions": versions,
    }


def finish(
    arguments: argparse.Namespace, device: torch.device, result: Mapping[str, Any], lines: Iterable[str]
) -> None:
    """Write ``lines`` to standard output and, with ``--json``, machine, settings and ``result`` to the file."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
    if arguments.json is None:
        return
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "quiet")}
    settings |= {"device": str(device), "dtype": str(dtype_of(arguments, device)).removeprefix("torch.")}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "settings": settings} | dict(result)
    arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{arguments.json}\n")


def _processor() -> str | None:
    """Return the name of the processor, None if the system does not tell the name."""
    try:
        line = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return platform.processor() or None
    return line[1] if line else None


def _memory() -> int | None:
    """Return the memory of the machine in bytes, None if the system does not tell the size."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
