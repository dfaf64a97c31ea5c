"""Extraction of mean activations against plain forwards of the same prompts.

*plain* runs the prompts of ``--prompts`` episodes of ``--shots`` demonstrations through the model, in batches, with the
logits of the last token alone. *ours* is :meth:`FitSession.mean_activations` of the same episodes, in the same batches:
it keeps every head's activation at the last tokens. Both make the prompts anew. Each batch size is measured in turn.

``ratio`` is tokens a second of *ours* over those of *plain*, at the batch size at which *plain* is fastest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import measure, prompts


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=100, help="of an example (default: 100)")
    parser.add_argument("--shots", type=int, default=4, help="demonstrations in a prompt (default: 4)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts that are averaged (default: 16)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="rows of a forward (default: 1 4 8)")
    given = parser.parse_args(argv)
    device = measure.device_of(given)
    model = measure.model_of(given, device)
    results = [measured(given, model, device, rows) for rows in given.batch]
    best = max(results, key=lambda found: found["tokens_per_second"]["plain"])
    lines = (
        f"{given.model}, batch {found['batch']}: {found['tokens_per_second']['plain']:.5g} tokens/s in plain forwards, "
        f"{found['tokens_per_second']['ours']:.5g} here, {found['ratio']:.3f} of it"
        for found in results
    )
    measure.finish(given, device, {"ratio": best["ratio"], "batch": best["batch"], "results": results}, lines)
    return 0


@torch.no_grad()
def measured(given: argparse.Namespace, model: nn.Module, device: torch.device, rows: int) -> dict[str, Any]:
    """Tokens a second of both with batches of ``rows`` prompts."""
    examples = prompts.examples(model, max(given.prompts, given.shots + 1), given.tokens, given.seed)
    session = prompts.session(model, examples, seed=given.seed, batch_size=rows)
    episodes = session.episodes(given.prompts, given.shots, "extraction")
    runner = prompts.Runner(model)

    def plain() -> None:
        for begin in range(0, len(episodes), rows):
            runner.run([examples.prompt(episode) for episode in episodes[begin : begin + rows]])

    runs = {"plain": plain, "ours": lambda: session.mean_activations(episodes)}
    repetitions = measure.interleaved(runs, given.repetitions, device, not given.quiet)
    medians = measure.medians(repetitions)
    tokens = given.prompts * (given.shots + 1) * given.tokens
    return {
        "batch": rows,
        "ratio": measure.ratio(repetitions, "plain", "ours"),
        "tokens": tokens,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "medians": medians,
        "repetitions": repetitions,
    }


if __name__ == "__main__":
    sys.exit(main())
