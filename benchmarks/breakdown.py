"""Where the time of a fit goes: the parts of a fit, each with the functions and the kernels that take longest.

The parts are the mean activations of ``--prompts`` few-shot prompts, the prefills of as many queries (with the first
replay of each), and ``--steps`` steps of selection on these queries. Each part runs four times: to warm up, for its
time, under cProfile, and, on a GPU, under the profiler of torch, which tells how long the GPU computes.

Figures: for each part its seconds, the seconds in which the GPU computes, and the longest functions and kernels.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import measure, prompts
from lmms_mtv import Edit, FitSession
from lmms_mtv.fit.policy import reinforce

ROUNDS: Final = 4
"""Runs of each part."""

PRINTED: Final = 7
"""Functions and kernels of a part that are printed; the file has ``--rows`` of them."""

Part = Callable[[int], object]
"""A part of a fit, as a function of the number of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    prompts.add_fit_arguments(parser)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a part (default: 8)")
    parser.add_argument("--steps", type=int, default=50, help="steps of the selection (default: 50)")
    parser.add_argument("--masks", type=int, default=32, help="masks of a step (default: 32)")
    parser.add_argument("--rows", type=int, default=40, help="functions and kernels of a part (default: 40)")
    arguments = parser.parse_args(argv)
    device = measure.device_of(arguments)
    lines, figures = [], {}
    for name, part in parts(arguments, device).items():
        part(0)
        seconds = measure.seconds(lambda part=part: part(1), device)  # type: ignore[misc]
        functions = longest_functions(lambda part=part: part(2), arguments.rows)  # type: ignore[misc]
        measure.wait(device)
        busy, kernels = longest_kernels(lambda part=part: part(3), device, arguments.rows)  # type: ignore[misc]
        figures[name] = {"seconds": seconds, "busy": busy, "functions": functions, "kernels": kernels}
        lines += [f"{name}: {seconds:.4g} s, in which the GPU computes {busy:.4g} s"]
        longest = (*functions[:PRINTED], *kernels[:PRINTED])
        lines += [f"  {one['seconds']:8.4f} s {one['calls']:8} x {one['name']:.75}" for one in longest]
    measure.finish(arguments, device, {"parts": figures}, lines)
    return 0


def parts(arguments: argparse.Namespace, device: torch.device) -> dict[str, Part]:
    """Return the parts of a fit by name."""
    model = measure.model_of(arguments, device)
    count = arguments.prompts * ROUNDS + 5
    examples = prompts.examples(model, count, arguments.tokens, arguments.seed, with_images=not arguments.text)
    session = prompts.session_of(arguments, model, examples)
    value = prompts.values(model, arguments.seed)
    few = session.episodes(arguments.prompts * ROUNDS, 4, "few")
    zero = session.episodes(arguments.prompts * ROUNDS, 0, "zero")

    def of_round(number: int, episodes: Sequence[Any]) -> Sequence[Any]:
        return episodes[number * arguments.prompts : (number + 1) * arguments.prompts]

    def prefill(number: int) -> None:
        masks = torch.rand(arguments.masks, *session.shape[:2], generator=torch.Generator().manual_seed(number)) < 0.3
        for episode in of_round(number, zero):
            session.losses(episode, Edit.replace(value, masks))

    return {
        "means": lambda number: session.mean_activations(of_round(number, few)),
        "prefills": prefill,
        "steps": lambda number: selection(session, value, of_round(number, zero), arguments),
    }


def selection(
    session: FitSession[Any], value: torch.Tensor, episodes: Sequence[Any], arguments: argparse.Namespace
) -> None:
    """Run the steps of a selection, as MTV does."""
    moved = value.to(session.device)

    def losses(step: int, masks: torch.Tensor) -> torch.Tensor:
        edit = Edit.replace(moved.to(masks.device), masks)
        return session.losses(episodes[step % len(episodes)], edit, wait=masks.device.type == "cpu")

    reinforce(
        losses,
        session.shape[:2],
        steps=range(arguments.steps),
        samples=arguments.masks,
        lr=0.1,
        initial_logit=-1.0,
        generator=torch.Generator().manual_seed(arguments.seed),
        device=session.device,
    )


def longest_functions(run: Callable[[], object], rows: int) -> list[dict[str, Any]]:
    """Return the Python functions that take longest themselves, with their seconds and calls under cProfile."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats: Any = pstats.Stats(profiler)
    found = [
        {"name": f"{Path(file).name}:{line} {name}", "calls": calls, "seconds": own}
        for (file, line, name), (_, calls, own, _, _) in stats.stats.items()
    ]
    return sorted(found, key=lambda one: -one["seconds"])[:rows]


def longest_kernels(run: Callable[[], object], device: torch.device, rows: int) -> tuple[float, list[dict[str, Any]]]:
    """Return the seconds in which the GPU computes, and the kernels that take longest; (0, []) without a GPU."""
    if device.type != "cuda":
        return 0.0, []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        measure.wait(device)
    found = [
        {"name": event.key[:150], "calls": event.count, "seconds": event.self_device_time_total / 1e6}
        for event in profiler.key_averages()
    ]
    busy = sum(one["seconds"] for one in found)
    return busy, sorted(found, key=lambda one: -one["seconds"])[:rows]


if __name__ == "__main__":
    sys.exit(main())
