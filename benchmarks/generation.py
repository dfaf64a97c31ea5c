"""Generation with a vector, compared with generation without a vector and with demonstrations in the prompt.

For each batch size, the model answers the same prompts of ``--tokens`` tokens greedily with ``--new`` tokens: *plain*;
*edited*, where the time includes the installation of the hooks; and with 4, 8 and 16 demonstrations, which make the
prompts 5, 9 and 17 times as long. The ways run in turn. Figures: seconds, new tokens per second, and the peak memory of
the GPU or the resident memory of the process, with the weights.

``ratio`` is the time of *edited* divided by the time of *plain* at batch size 8, or at the last batch size if 8 is not
measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import nn

from benchmarks import measure, prompts
from lmms_mtv import Edit, Episode, applied, find_sites
from lmms_mtv.runtime.memory import peak

RATIO_BATCH: Final = 8
"""Batch size at which ``ratio`` is taken."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, default=100, help="tokens of a prompt without demonstrations (default: 100)"
    )
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)")
    parser.add_argument(
        "--shots", type=int, nargs="*", default=[4, 8, 16], help="demonstrations to compare with (default: 4 8 16)"
    )
    arguments = parser.parse_args(argv)
    device = measure.device_of(arguments)
    model = measure.model_of(arguments, device)
    results = [measured(arguments, model, device, rows) for rows in arguments.batch]
    reference = next((result for result in results if result["batch"] == RATIO_BATCH), results[-1])
    figures = {"ratio": reference["ratio"], "memory_ratio": reference["memory_ratio"], "batch": reference["batch"]}
    lines = (
        f"{arguments.model}, batch {result['batch']}: {result['tokens_per_second'][name]:.4g} tokens/s {name}, "
        f"{measure.ratio(result['repetitions'], name, 'plain'):.3f} times the time of plain generation"
        for result in results
        for name in result["medians"]
    )
    measure.finish(arguments, device, figures | {"results": results}, lines)
    return 0


@torch.no_grad()
def measured(arguments: argparse.Namespace, model: nn.Module, device: torch.device, rows: int) -> dict[str, Any]:
    """Return the seconds and the peak memory in bytes of a batch of ``rows`` answers, for each way."""
    examples = prompts.examples(model, rows + max(arguments.shots, default=0), arguments.tokens, arguments.seed)
    sites = find_sites(model)
    layers, heads, _ = sites.shape
    # About the share of heads that the policy chooses at the start of a fit.
    mask = torch.rand(layers, heads, generator=torch.Generator().manual_seed(arguments.seed)) < 0.3
    edit = Edit.replace(prompts.values(model, arguments.seed), mask)
    memory: dict[str, list[int | None]] = {}

    def way(name: str, shots: int, edited: bool) -> Callable[[], None]:
        episodes = [Episode(row, tuple(range(rows, rows + shots))) for row in range(rows)]
        inputs = prompts.batch(model, [examples.prompt(episode) for episode in episodes])
        memory[name] = []

        def run() -> None:
            with peak(device) as peak_memory, applied(sites, edit) if edited else nullcontext() as edited_forwards:
                generate: Any = model.generate
                generate(
                    **inputs,
                    max_new_tokens=arguments.new,
                    min_new_tokens=arguments.new,
                    do_sample=False,
                    pad_token_id=0,
                )
            if edited_forwards is not None and edited_forwards.count != arguments.new:
                raise RuntimeError(f"the edit ran in {edited_forwards.count} forwards, expected {arguments.new}")
            memory[name].append(peak_memory.bytes)

        return run

    ways = {"plain": way("plain", 0, False), "edited": way("edited", 0, True)}
    ways |= {f"{shots} shots": way(f"{shots} shots", shots, False) for shots in arguments.shots}
    repetitions = measure.interleaved(ways, arguments.repetitions, device, not arguments.quiet)
    medians = measure.medians(repetitions)
    # The first round is a warm-up, as for the times.
    peaks = {name: _median(values[1:]) for name, values in memory.items()}
    plain, edited = peaks["plain"], peaks["edited"]
    return {
        "batch": rows,
        "ratio": measure.ratio(repetitions, "edited", "plain"),
        "memory_ratio": edited / plain if plain and edited else None,
        "tokens_per_second": {name: rows * arguments.new / median for name, median in medians.items()},
        "memory": peaks,
        "medians": medians,
        "repetitions": repetitions,
    }


def _median(values: Sequence[int | None]) -> float | None:
    """Return the median of the values that are known, None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    sys.exit(main())
