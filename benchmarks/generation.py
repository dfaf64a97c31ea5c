"""Generation with a vector, without one, and with demonstrations in the prompt instead.

For each batch size, the same prompts of ``--tokens`` tokens are answered greedily with ``--new`` tokens: *plain*,
*edited* (the hooks are entered within the time, as once for an evaluation), and with 4, 8 and 16 demonstrations, which
makes prompts 5, 9 and 17 times as long. All run in turn. Figures: seconds, new tokens a second, peak memory (of the
GPU, or the resident memory of the process, weights among it).

``ratio`` is the time of *edited* over that of *plain* at batch 8, or at the largest batch if 8 is not among them.
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

OF_RATIO: Final = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=100, help="of a prompt without demonstrations (default: 100)")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows (default: 1 8 32)")
    parser.add_argument(
        "--shots", type=int, nargs="*", default=[4, 8, 16], help="demonstrations to compare with (default: 4 8 16)"
    )
    given = parser.parse_args(argv)
    device = measure.device_of(given)
    model = measure.model_of(given, device)
    results = [measured(given, model, device, rows) for rows in given.batch]
    chosen = next((found for found in results if found["batch"] == OF_RATIO), results[-1])
    figures = {"ratio": chosen["ratio"], "memory_ratio": chosen["memory_ratio"], "batch": chosen["batch"]}
    lines = (
        f"{given.model}, batch {found['batch']}: {found['tokens_per_second'][name]:.4g} tokens/s {name}, "
        f"{measure.ratio(found['repetitions'], name, 'plain'):.3f} times the time of plain"
        for found in results
        for name in found["medians"]
    )
    measure.finish(given, device, figures | {"results": results}, lines)
    return 0


@torch.no_grad()
def measured(given: argparse.Namespace, model: nn.Module, device: torch.device, rows: int) -> dict[str, Any]:
    """Seconds and bytes of a batch of ``rows`` answers in each way."""
    examples = prompts.examples(model, rows + max(given.shots, default=0), given.tokens, given.seed)
    sites = find_sites(model)
    layers, heads, _ = sites.shape
    # As many heads as a fit at its beginning chooses.
    mask = torch.rand(layers, heads, generator=torch.Generator().manual_seed(given.seed)) < 0.3
    edit = Edit.replace(prompts.values(model, given.seed), mask)
    memory: dict[str, list[int | None]] = {}

    def way(name: str, shots: int, edited: bool) -> Callable[[], None]:
        episodes = [Episode(row, tuple(range(rows, rows + shots))) for row in range(rows)]
        inputs = prompts.batch(model, [examples.prompt(episode) for episode in episodes])
        memory[name] = []

        def run() -> None:
            with peak(device) as taken, applied(sites, edit) if edited else nullcontext() as fired:
                generate: Any = model.generate
                generate(**inputs, max_new_tokens=given.new, min_new_tokens=given.new, do_sample=False, pad_token_id=0)
            if fired is not None and fired.count != given.new:
                raise RuntimeError(f"the edit ran in {fired.count} forwards, expected {given.new}")
            memory[name].append(taken.bytes)

        return run

    ways = {"plain": way("plain", 0, False), "edited": way("edited", 0, True)}
    ways |= {f"{shots} shots": way(f"{shots} shots", shots, False) for shots in given.shots}
    repetitions = measure.interleaved(ways, given.repetitions, device, not given.quiet)
    medians = measure.medians(repetitions)
    # The round that does not count is left out here as well.
    most = {name: _median(taken[1:]) for name, taken in memory.items()}
    plain, edited = most["plain"], most["edited"]
    return {
        "batch": rows,
        "ratio": measure.ratio(repetitions, "edited", "plain"),
        "memory_ratio": edited / plain if plain and edited else None,
        "tokens_per_second": {name: rows * given.new / median for name, median in medians.items()},
        "memory": most,
        "medians": medians,
        "repetitions": repetitions,
    }


def _median(found: Sequence[int | None]) -> float | None:
    known = [one for one in found if one is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    sys.exit(main())
