"""All checks and benchmarks of one GPU, in one command and one file.

First the checks of :mod:`benchmarks.exactness`, then the benchmarks, each in a process of its own. One that fails or
exceeds ``--limit`` does not stop the others. All of them together take at most ``--total`` seconds, and those for which
no time is left count as stopped. ``--json`` is written again after each of them, so that a run that is stopped leaves
what it has measured. The exit status is 1 if one of them failed.

``--quick`` runs the same list with small models and settings, also on a CPU: a test of the command, not a measurement.

Figures: for each run its command, its exit status, its seconds, the end of its output, and the figures of its own file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import measure

RUNS: Final[dict[str, tuple[str, ...]]] = {
    "exactness": ("exactness", "--model", "half", "--dtype", "float32", "--layers", "8"),
    "exactness bfloat16": ("exactness", "--model", "half", "--layers", "8"),
    "fit idefics2-8b": ("fit", "--model", "idefics2-8b", "--repetitions", "1", "--memory", "16"),
    "fit qwen2.5-vl-7b": ("fit", "--model", "qwen2.5-vl-7b", "--repetitions", "1", "--memory", "16"),
    "fit half": ("fit", "--model", "half", "--repetitions", "1"),
    "selection idefics2-8b": ("selection", "--model", "idefics2-8b", "--memory", "16"),
    "selection half": ("selection", "--model", "half", "--tokens", "600", "2000"),
    "generation idefics2-8b": ("generation", "--model", "idefics2-8b", "--batch", "1", "8", "32"),
    "extraction idefics2-8b": ("extraction", "--model", "idefics2-8b"),
}
"""The arguments of each run, after ``python -m benchmarks.``."""

QUICK: Final[dict[str, tuple[str, ...]]] = {
    "exactness": ("exactness", "--steps", "20"),
    "fit": ("fit", "--repetitions", "1", "--scale", "50", "--tokens", "6"),
    "selection": ("selection", "--repetitions", "1", "--tokens", "9", "--masks", "4", "--steps", "6"),
    "generation": ("generation", "--repetitions", "1", "--tokens", "6", "--new", "3", "--batch", "2", "--shots", "1"),
    "extraction": ("extraction", "--repetitions", "1", "--tokens", "5", "--shots", "1", "--prompts", "2"),
}
"""The same benchmarks with the tiny model."""

_LONGEST_OUTPUT: Final = 3000
"""Characters of the output of a run that are kept."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models and settings, to test the command")
    parser.add_argument("--device", help="device (default: the GPU if there is one, else the CPU)")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="only the runs whose names contain one of these texts")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of one run at most (default: 150)")
    parser.add_argument("--total", type=float, default=590.0, help="seconds of all runs at most (default: 590)")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True, help="file for all figures")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and not arguments.quick:
        parser.error(f"--device {device}: these runs need a GPU; --quick runs small ones on a CPU")
    runs = QUICK if arguments.quick else RUNS
    if arguments.only:
        runs = {name: given for name, given in runs.items() if any(text in name for text in arguments.only)}
    figures: dict[str, Any] = {"machine": measure.machine(device), "quick": arguments.quick, "runs": {}}
    began = time.perf_counter()
    for name, given in runs.items():
        left = arguments.total - (time.perf_counter() - began)
        figures["runs"][name] = run = run_alone(given, device, max(min(arguments.limit, left), 0))
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        outcome = "" if run["status"] == 0 else f"FAILED ({run['status']}): "
        sys.stdout.write(f"{name}, {run['seconds']:.0f} s: {outcome}{run['output'].strip()}\n")
        sys.stdout.flush()
    return int(any(run["status"] != 0 for run in figures["runs"].values()))


def run_alone(given: Sequence[str], device: torch.device, limit: float) -> dict[str, Any]:
    """Run one benchmark in a process of its own.

    Args:
        given: the benchmark and its arguments.
        device: the device.
        limit: seconds after which the process is stopped.

    Returns:
        The command, the seconds, the exit status ("limit" if the process was stopped), the end of the output, and the
        figures of the benchmark (None if it wrote none).
    """
    name, *options = given
    status: int | str
    command = ["-m", f"benchmarks.{name}", *options, "--device", str(device), "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, *command, "--json", str(path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
            status, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            status, said = "limit", error.stdout or b""
        seconds = time.perf_counter() - began
        figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        output = said.decode(errors="replace").replace(f"{path}\n", "")[-_LONGEST_OUTPUT:]
    return {
        "command": "python " + " ".join(command),
        "seconds": seconds,
        "status": status,
        "output": output,
        "figures": figures,
    }


if __name__ == "__main__":
    sys.exit(main())
