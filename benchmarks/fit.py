"""A whole fit of MTV with the reference settings, from the first prompt to the chosen heads.

100 prompts of 4 demonstrations are averaged, 600 steps of 32 masks ask 100 queries without demonstrations, and 10 masks
are judged on 50 queries more; ``--scale`` divides the numbers of prompts, steps and queries. Where the model sees
images, each example has one, before ``--tokens`` tokens of text; ``--text`` leaves images out. Preprocessing of images
is not part of it. Every repetition is a session of its own, with all of its checks; the first one does not count.

Figures: ``seconds`` (median), of that by stage, peak memory (weights among it), forwards.
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
    parser.add_argument("--tokens", type=int, default=30, help="of text in an example (default: 30)")
    parser.add_argument("--text", action="store_true", help="no images")
    parser.add_argument("--scale", type=int, default=1, help="what the reference settings are divided by (default: 1)")
    parser.add_argument("--batch", type=int, default=4, help="rows of an extracting forward (default: 4)")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB for prefilled prompts (default: 16)")
    given = parser.parse_args(argv)
    if given.scale < 1:
        parser.error(f"--scale {given.scale}: expected at least 1")
    device = measure.device_of(given)
    found = measured(given, device)
    stages = ", ".join(f"{name} {taken:.4g} s" for name, taken in found["stages"].items())
    lines = [
        f"{given.model}: a fit takes {found['seconds']:.4g} s ({stages}) and {found['forwards']} forwards; prompts "
        f"have {found['tokens']['few_shot']} and {found['tokens']['zero_shot']} tokens"
    ]
    measure.finish(given, device, found, lines)
    return 0


def measured(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds and bytes of some whole fits."""
    model = measure.model_of(given, device)
    method = methods.get("mtv")
    reference = method.configure({})
    settings = {name: max(getattr(reference, name) // given.scale, 1) for name in SCALED}
    config = method.configure(settings)
    count = max(settings["examples"] + settings["candidate_examples"], reference.fit_shots + 1)
    examples = prompts.examples(model, count, given.tokens, given.seed, with_images=not given.text)
    seconds, stages, memory, forwards = [], [], [], 0
    rounds = range(given.repetitions + 1)
    for number in tqdm(rounds, desc="Fits", disable=given.quiet, dynamic_ncols=True, leave=False):
        session = prompts.session(
            model, examples, seed=given.seed, batch_size=given.batch, memory=int(given.memory * 2**30)
        )

        def run(session: FitSession[prompts.Prompt] = session) -> None:
            method.fit(session, config)

        with peak(device) as taken:
            time = measure.seconds(run, device)
        if number:
            seconds.append(time)
            stages.append(dict(session.stages))
            memory.append(taken.bytes)
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
        "repetitions": {"fit": seconds},
    }


if __name__ == "__main__":
    sys.exit(main())
