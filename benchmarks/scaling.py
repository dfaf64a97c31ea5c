"""The cost of a fit against the length of prompts, the numbers of masks, layers and examples, and of processes.

A small fit runs at each point of an axis, with the other axes at their first values. *extraction* computes the mean
activations of ``--examples`` prompts of ``--shots`` demonstrations. *selection* runs 6 steps for each of as many new
examples, as the reference settings do, with the prefills. The sessions and their checks come before the measurement.
The points of an axis run in turn. ``growth`` is the time divided by the time at the first point of the axis.

For the axis of processes, the benchmark starts ``--processes`` processes with one thread each. In turn, the first
process does the fit alone while the others wait; all processes share one fit; and each process does a whole fit without
the others. ``ratio`` is the time of one process divided by the time of the shared fit, at best the number of processes.
``ceiling`` is the ratio that the machine would reach without communication: cores share caches and memory. Processes do
not share a GPU: with fewer GPUs than processes, ``ratio`` is null.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from benchmarks import measure, prompts
from lmms_mtv import Edit, Episode
from lmms_mtv.runtime.distributed import Ranks, current

AXES: Final = ("tokens", "masks", "layers", "examples")
STEPS_OF_AN_EXAMPLE: Final = 6

Fit = dict[str, Callable[[], object]]
"""The two parts of a small fit by name; each selection uses new examples."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="tokens of an example")
    parser.add_argument("--masks", type=int, nargs="+", default=[8, 16, 32, 64], help="masks of a step")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="blocks of the model")
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[2, 4, 8], help="prompts of the extraction and of the selection"
    )
    parser.add_argument(
        "--shots", type=int, default=4, help="demonstrations in a prompt of the extraction (default: 4)"
    )
    parser.add_argument(
        "--axes", nargs="*", choices=AXES, default=AXES, help="axes to measure beside processes (default: all)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="number of processes; 0 or 1 leaves this axis out (default: 2)"
    )
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for the prefill cache (default: 4)")
    arguments = parser.parse_args(argv)
    device = measure.device_of(arguments)
    axes = {axis: measured_along(arguments, device, axis) for axis in arguments.axes}
    processes = in_processes(arguments, device)
    lines = [
        f"{arguments.model}, {axis} {point['value']}: extraction {point['medians']['extraction']:.4g} s "
        f"({point['growth']['extraction']:.2f}), selection {point['medians']['selection']:.4g} s "
        f"({point['growth']['selection']:.2f})"
        for axis, points in axes.items()
        for point in points
    ]
    if processes is not None:
        lines.append(
            f"{arguments.model}, {arguments.processes} processes: {processes['ratio']:.2f} times as fast as one; "
            f"{processes['ceiling']:.2f} without communication"
        )
    figures = {"ratio": None if processes is None else processes["ratio"], "axes": axes, "processes": processes}
    measure.finish(arguments, device, figures, lines)
    return 0


def measured_along(arguments: argparse.Namespace, device: torch.device, axis: str) -> list[dict[str, Any]]:
    """Return the seconds of both parts at each point of ``axis``."""
    runs: Fit = {}
    by_layers: dict[int, nn.Module] = {}
    for value in getattr(arguments, axis):
        point = {name: getattr(arguments, name)[0] for name in AXES} | {axis: value}
        if point["layers"] not in by_layers:
            by_layers[point["layers"]] = measure.model_of(arguments, device, point["layers"])
        for part, run in fit(arguments, by_layers[point["layers"]], point, Ranks()).items():
            runs[f"{value} {part}"] = run
    seconds = measure.interleaved(runs, arguments.repetitions, device, not arguments.quiet)
    first = str(getattr(arguments, axis)[0])
    points = []
    for value in getattr(arguments, axis):
        parts = ("extraction", "selection")
        repetitions = {part: seconds[f"{value} {part}"] for part in parts}
        growth = {part: measure.ratio(seconds, f"{value} {part}", f"{first} {part}") for part in parts}
        medians = measure.medians(repetitions)
        points.append({"value": value, "growth": growth, "medians": medians, "repetitions": repetitions})
    return points


def fit(arguments: argparse.Namespace, model: nn.Module, point: dict[str, int], ranks: Ranks) -> Fit:
    """Return both parts of a fit on ``model``, in a session that has done its checks."""
    many = point["examples"]
    # One example for the checks, and new examples for each round and the warm-up round; twice as many because each
    # process also runs a fit without the others.
    count = max(1 + 2 * many * (arguments.repetitions + 1), arguments.shots + 1)
    examples = prompts.examples(model, count, point["tokens"], arguments.seed)
    memory = int(arguments.memory * 2**30)
    session = prompts.session(model, examples, seed=arguments.seed, ranks=ranks, memory=memory)
    value = prompts.values(model, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    episodes = session.episodes(many, arguments.shots, "extraction")
    fresh = itertools.count(1)

    def losses(query: int) -> None:
        masks = torch.rand(point["masks"], *session.shape[:2], generator=generator) < 0.3
        session.losses(Episode(query, ()), Edit.replace(value, masks))

    def selection() -> None:
        queries = [next(fresh) for _ in range(many)]
        session.prefetch([Episode(query, ()) for query in queries])
        for query in queries * STEPS_OF_AN_EXAMPLE:
            losses(query)

    losses(0)
    return {"extraction": lambda: session.mean_activations(episodes), "selection": selection}


def in_processes(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """Return the seconds of a fit in one process and in several, or None if there are not enough processes or GPUs."""
    if arguments.processes < 2 or (device.type == "cuda" and torch.cuda.device_count() < arguments.processes):
        return None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "seconds.json")
        rendezvous = Path(folder, "rendezvous").as_uri()
        spawn(  # type: ignore[no-untyped-call]
            run_process, (arguments, device.type, rendezvous, str(output)), nprocs=arguments.processes
        )
        repetitions = json.loads(output.read_text(encoding="utf-8"))
    return {
        "count": arguments.processes,
        "ratio": measure.ratio(repetitions, "one", "all"),
        "ceiling": arguments.processes * measure.ratio(repetitions, "one", "apart"),
        "medians": measure.medians(repetitions),
        "repetitions": repetitions,
    }


def run_process(rank: int, arguments: argparse.Namespace, kind: str, rendezvous: str, output: str) -> None:
    """Run process number ``rank``; process 0 writes the seconds of all rounds to ``output``."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=arguments.processes)
    try:
        point = {name: getattr(arguments, name)[0] for name in AXES}
        model = measure.model_of(arguments, device, point["layers"])
        single, shared = (fit(arguments, model, point, ranks) for ranks in (Ranks(), current()))
        repetitions: dict[str, list[float]] = {"one": [], "all": [], "apart": []}
        rounds = range(arguments.repetitions + 1)
        for number in tqdm(
            rounds, desc="Processes", disable=arguments.quiet or rank > 0, dynamic_ncols=True, leave=False
        ):
            for name, parts in (("one", single), ("all", shared), ("apart", single)):
                distributed.barrier()
                timed = parts.values() if name != "one" or rank == 0 else ()
                slowest = torch.tensor(math.fsum(measure.seconds(run, device) for run in timed))
                distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
                if number:
                    repetitions[name].append(slowest.item())
        if rank == 0:
            Path(output).write_text(json.dumps(repetitions), encoding="utf-8")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
