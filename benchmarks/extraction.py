"""Extraction of mean activations, compared with plain forwards of the same prompts.

*plain* runs the prompts of ``--prompts`` episodes of ``--shots`` demonstrations through the model, in batches, and
computes the logits of the last token only. *ours* is :meth:`FitSession.mean_activations` of the same episodes in the
same batches, which also stores the activation of every head at the last tokens. Both build the prompts again in each
round. The batch sizes are measured one after the other.

``ratio`` is the tokens per second of *ours* divided by the tokens per second of *plain*, at the batch size at which
*plain* is fastest.
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
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an example (default: 100)")
    parser.add_argument("--shots", type=int, default=4, help="demonstrations in a prompt (default: 4)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in the mean (default: 16)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="batch sizes (default: 1 4 8)")
    arguments = parser.parse_args(argv)
    device = measure.device_of(arguments)
    model = measure.model_of(arguments, device)
    results = [measured(arguments, model, device, rows) for rows in arguments.batch]
    best = max(results, key=lambda result: result["tokens_per_second"]["plain"])
    lines = (
        f"{arguments.model}, batch {result['batch']}: {result['tokens_per_second']['plain']:.5g} tokens/s in plain "
        f"forwards, {result['tokens_per_second']['ours']:.5g} here, a ratio of {result['ratio']:.3f}"
        for result in results
    )
    measure.finish(arguments, device, {"ratio": best["ratio"], "batch": best["batch"], "results": results}, lines)
    return 0


@torch.no_grad()
def measured(arguments: argparse.Namespace, model: nn.Module, device: torch.device, rows: int) -> dict[str, Any]:
    """Return the tokens per second of both ways, with batches of ``rows`` prompts."""
    examples = prompts.examples(model, max(arguments.prompts, arguments.shots + 1), arguments.tokens, arguments.seed)
    session = prompts.session(model, examples, seed=arguments.seed, batch_size=rows)
    episodes = session.episodes(arguments.prompts, arguments.shots, "extraction")
    runner = prompts.SyntheticRunner(model)

    def plain() -> None:
        for begin in range(0, len(episodes), rows):
            runner.run([examples.prompt(episode) for episode in episodes[begin : begin + rows]])

    runs = {"plain": plain, "ours": lambda: session.mean_activations(episodes)}
    repetitions = measure.interleaved(runs, arguments.repetitions, device, not arguments.quiet)
    medians = measure.medians(repetitions)
    tokens = arguments.prompts * (arguments.shots + 1) * arguments.tokens
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
