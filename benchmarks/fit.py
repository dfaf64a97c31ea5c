"""A whole fit of MTV with the reference settings, from the first prompt to the selected heads.

The fit averages the activations of 100 prompts of 4 demonstrations, runs 600 steps of 32 masks on 100 queries without
demonstrations, and evaluates 10 candidate masks on 50 validation queries. ``--scale`` divides the numbers of prompts,
steps and queries. If the model takes images, each example has an image before ``--tokens`` tokens of text; ``--text``
leaves the images out. The preprocessing of images is not measured. ``--no-graphs`` replays without CUDA graphs. Every
repetition is a new session with all its checks. A tenth of a fit is the warm-up, which does not count.

Figures: ``seconds`` (median), the seconds of each stage, the peak memory with the weights, and the forwards.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from tqdm import tqdm

from benchmarks import measure, prompts
from lmms_mtv import FitSession, methods
from lmms_mtv.runtime.memory import peak

SCALED: Final = ("iterations", "steps", "examples", "candidate_examples")


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    prompts.add_fit_arguments(parser)
    parser.add_argument("--scale", type=int, default=1, help="divisor of the reference settings (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.scale < 1:
        parser.error(f"--scale {arguments.scale}: expected at least 1")
    device = measure.device_of(arguments)
    figures = measured(arguments, device)
    stages = ", ".join(f"{name} {stage_seconds:.4g} s" for name, stage_seconds in figures["stages"].items())
    lines = [
        f"{arguments.model}: a fit takes {figures['seconds']:.4g} s ({stages}) and {figures['forwards']} forwards, "
        f"with {figures['graphs']} CUDA graphs; "
        f"prompts have {figures['tokens']['few_shot']} and {figures['tokens']['zero_shot']} tokens"
    ]
    measure.finish(arguments, device, figures, lines)
    return 0


def measured(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the seconds, the peak memory in bytes and the forwards of ``--repetitions`` fits."""
    model = measure.model_of(arguments, device)
    method = methods.get("mtv")
    reference = method.configure({})
    warm_up, settings = (
        {name: max(getattr(reference, name) // scale, 1) for name in SCALED}
        for scale in (10 * arguments.scale, arguments.scale)
    )
    count = max(settings["examples"] + settings["candidate_examples"], reference.fit_shots + 1)
    examples = prompts.examples(model, count, arguments.tokens, arguments.seed, with_images=not arguments.text)
    seconds, stages, memory, forwards = [], [], [], 0
    rounds = range(arguments.repetitions + 1)
    for number in tqdm(rounds, desc="Fits", disable=arguments.quiet, dynamic_ncols=True, leave=False):
        session = prompts.session_of(arguments, model, examples)

        config = method.configure({**(settings if number else warm_up), "settle": None})

        def run(session: FitSession[prompts.SyntheticPrompt] = session, config: Any = config) -> None:
            method.fit(session, config)

        with peak(device) as peak_memory:
            time = measure.seconds(run, device)
        if number:
            seconds.append(time)
            stages.append(dict(session.stages))
            memory.append(peak_memory.bytes)
            forwards = session.forwards
    few, zero = (session.episodes(1, shots, "lengths")[0] for shots in (reference.fit_shots, 0))
    return {
        "seconds": statistics.median(seconds),
        "stages": {name: statistics.median(one[name] for one in stages) for name in stages[0]},
        "memory": memory[-1],
        "forwards": forwards,
        "tokens": {"few_shot": len(examples.prompt(few).text), "zero_shot": len(examples.prompt(zero).text)},
        "fit": settings | {"fit_shots": reference.fit_shots, "samples": reference.samples},
        "replays": session.replays,
        "graphs": session.graphs,
        "repetitions": {"fit": seconds},
    }


if __name__ == "__main__":
    sys.exit(main())
