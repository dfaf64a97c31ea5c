"""What a fit costs against the length of prompts, the number of masks, layers, examples and processes.

A small fit at each point of an axis, the others at their first values: *extraction* is the mean activations of
``--examples`` prompts of ``--shots`` demonstrations, *selection* is 6 steps for each of that many new examples, as in
the reference settings, prefills among them. Sessions are made before, so that their checks are not in the times. The
points of an axis run in turn. ``growth`` is time over that of the axis's first point.

For processes, ``--processes`` of them with one thread each are started. The first does the fit alone while the others
wait, then all do it together, then each does all of it without the others, in turn. ``ratio`` is the time of one over
that of all, at best their number; ``ceiling`` is what the machine would allow if they had nothing to tell each other:
cores share caches and memory. A GPU is not shared: without as many GPUs, ``ratio`` is null.
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
"""The two parts of a small fit; each selection takes examples that were not there before."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="of an example")
    parser.add_argument("--masks", type=int, nargs="+", default=[8, 16, 32, 64], help="of a step")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="blocks of the model")
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[2, 4, 8], help="prompts of extraction and selection"
    )
    parser.add_argument("--shots", type=int, default=4, help="demonstrations of extraction's prompts (default: 4)")
    parser.add_argument("--axes", nargs="*", choices=AXES, default=AXES, help="to measure beside processes; all")
    parser.add_argument("--processes", type=int, default=2, help="0 or 1 leaves them out (default: 2)")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for prefilled prompts (default: 4)")
    given = parser.parse_args(argv)
    device = measure.device_of(given)
    axes = {axis: along(given, device, axis) for axis in given.axes}
    shared = in_processes(given, device)
    lines = [
        f"{given.model}, {axis} {point['value']}: extraction {point['medians']['extraction']:.4g} s "
        f"({point['growth']['extraction']:.2f}), selection {point['medians']['selection']:.4g} s "
        f"({point['growth']['selection']:.2f})"
        for axis, points in axes.items()
        for point in points
    ]
    if shared is not None:
        lines.append(
            f"{given.model}, {given.processes} processes: {shared['ratio']:.2f} times as fast as one; "
            f"{shared['ceiling']:.2f} if each had work of its own"
        )
    figures = {"ratio": None if shared is None else shared["ratio"], "axes": axes, "processes": shared}
    measure.finish(given, device, figures, lines)
    return 0


def along(given: argparse.Namespace, device: torch.device, axis: str) -> list[dict[str, Any]]:
    """Seconds of both parts at each point of ``axis``."""
    runs: Fit = {}
    built: dict[int, nn.Module] = {}
    for value in getattr(given, axis):
        point = {name: getattr(given, name)[0] for name in AXES} | {axis: value}
        if point["layers"] not in built:
            built[point["layers"]] = measure.model_of(given, device, point["layers"])
        for part, run in fit(given, built[point["layers"]], point, Ranks()).items():
            runs[f"{value} {part}"] = run
    found = measure.interleaved(runs, given.repetitions, device, not given.quiet)
    begin = str(getattr(given, axis)[0])
    points = []
    for value in getattr(given, axis):
        parts = ("extraction", "selection")
        repetitions = {part: found[f"{value} {part}"] for part in parts}
        growth = {part: measure.ratio(found, f"{value} {part}", f"{begin} {part}") for part in parts}
        medians = measure.medians(repetitions)
        points.append({"value": value, "growth": growth, "medians": medians, "repetitions": repetitions})
    return points


def fit(given: argparse.Namespace, model: nn.Module, point: dict[str, int], ranks: Ranks) -> Fit:
    """Both parts of a fit on ``model``, whose session has made its checks."""
    many = point["examples"]
    # One for the checks, and those of each round, the one that does not count among them; twice where processes also
    # run apart.
    count = max(1 + 2 * many * (given.repetitions + 1), given.shots + 1)
    examples = prompts.examples(model, count, point["tokens"], given.seed)
    memory = int(given.memory * 2**30)
    session = prompts.session(model, examples, seed=given.seed, ranks=ranks, memory=memory)
    value = prompts.values(model, given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    episodes = session.episodes(many, given.shots, "extraction")
    fresh = itertools.count(1)

    def losses(query: int) -> None:
        masks = torch.rand(point["masks"], *session.shape[:2], generator=generator) < 0.3
        session.losses(Episode(query, ()), Edit.replace(value, masks))

    def selection() -> None:
        chosen = [next(fresh) for _ in range(many)]
        session.prefetch([Episode(query, ()) for query in chosen])
        for query in chosen * STEPS_OF_AN_EXAMPLE:
            losses(query)

    losses(0)
    return {"extraction": lambda: session.mean_activations(episodes), "selection": selection}


def in_processes(given: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """Seconds of extraction and selection together in one process and in several, or None where that cannot be."""
    if given.processes < 2 or (device.type == "cuda" and torch.cuda.device_count() < given.processes):
        return None
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "seconds.json")
        rendezvous = Path(folder, "rendezvous").as_uri()
        spawn(  # type: ignore[no-untyped-call]
            one_of, (given, device.type, rendezvous, str(written)), nprocs=given.processes
        )
        repetitions = json.loads(written.read_text(encoding="utf-8"))
    return {
        "count": given.processes,
        "ratio": measure.ratio(repetitions, "one", "all"),
        "ceiling": given.processes * measure.ratio(repetitions, "one", "apart"),
        "medians": measure.medians(repetitions),
        "repetitions": repetitions,
    }


def one_of(rank: int, given: argparse.Namespace, kind: str, rendezvous: str, written: str) -> None:
    """Process number ``rank``; the first writes the seconds of all rounds."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=given.processes)
    try:
        point = {name: getattr(given, name)[0] for name in AXES}
        model = measure.model_of(given, device, point["layers"])
        alone, together = (fit(given, model, point, ranks) for ranks in (Ranks(), current()))
        repetitions: dict[str, list[float]] = {"one": [], "all": [], "apart": []}
        rounds = range(given.repetitions + 1)
        for number in tqdm(rounds, desc="Processes", disable=given.quiet or rank > 0, dynamic_ncols=True, leave=False):
            for name, parts in (("one", alone), ("all", together), ("apart", alone)):
                distributed.barrier()
                taking = parts.values() if name != "one" or rank == 0 else ()
                slowest = torch.tensor(math.fsum(measure.seconds(run, device) for run in taking))
                distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
                if number:
                    repetitions[name].append(slowest.item())
        if rank == 0:
            Path(written).write_text(json.dumps(repetitions), encoding="utf-8")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
