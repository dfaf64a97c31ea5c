"""Checks that a device gives the numbers that the CPU gives, whatever the batch size.

A fit of MTV with ``--steps`` steps of 8 masks runs on random prompts, four times: on the device, on the device again,
on the device with other batches, and, in float32, on the CPU with the same weights. Then batches that do not fit the
memory run on the device: its memory is limited so that an automatic batch size has to be halved (on a GPU only).

Figures: ``values``, the largest difference of a mean activation relative to the largest mean activation, ``losses``,
the largest difference of a step's mean loss, and ``heads``, the selected heads in common and in all, each against
the first fit. The exit status is 1 if the second fit differs at all from the first, if values or first losses are
further apart than the precision allows, or if no batch was halved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from benchmarks import measure, models, prompts
from lmms_mtv import methods
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.vectors import HEADS

TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Accepted difference of values, relative to the largest."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=20, help="tokens of an example (default: 20)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a fit (default: 100)")
    parser.add_argument("--layers", type=int, help="blocks of the model (default: those of its shape)")
    arguments = parser.parse_args(argv)
    device = measure.device_of(arguments)
    precision = measure.dtype_of(arguments, device)
    dtype = str(precision).removeprefix("torch.")
    # Drawn on the CPU, so that the weights of both sides are the same.
    model = models.build(arguments.model, torch.device("cpu"), precision, arguments.seed, arguments.layers).to(device)
    first = fitted(arguments, model, batch=1)
    fits = {"again": fitted(arguments, model, batch=1), "batches of 4": fitted(arguments, model, batch=4)}
    halved = halved_batch(arguments, model, device)
    if dtype == "float32" and device.type != "cpu":
        fits["CPU"] = fitted(arguments, model.to("cpu"), batch=1)
    results = {name: difference(first, fit) for name, fit in fits.items()}
    tolerance = TOLERANCE[dtype]
    failed = [
        name
        for name, result in results.items()
        if max(result["values"], result["first_loss"]) > (0 if name == "again" else tolerance)
    ]
    if halved is False:
        failed.append("out of memory")
    lines = [
        f"{name}: values differ by {result['values']:.2g}, losses by {result['losses']:.2g}, "
        f"{result['common']} of {result['heads']} heads are the same"
        for name, result in results.items()
    ]
    lines.append(f"a batch was halved when the memory ran out: {halved}")
    figures = {"results": results, "halved": halved, "tolerance": tolerance, "failed": failed}
    measure.finish(arguments, device, figures, lines)
    if failed:
        sys.stderr.write(f"not the same: {', '.join(failed)}\n")
    return int(bool(failed))


def fitted(arguments: argparse.Namespace, model: nn.Module, batch: int) -> Fitted:
    """Return a small fit of MTV with batches of ``batch`` prompts."""
    method = methods.get("mtv")
    settings = {"iterations": 16, "steps": arguments.steps, "samples": 8, "examples": 8, "candidate_examples": 4}
    examples = prompts.examples(model, 16, arguments.tokens, arguments.seed)
    session = prompts.session(model, examples, seed=arguments.seed, batch_size=batch)
    result: Fitted = method.fit(session, method.configure(settings))
    return result


def difference(first: Fitted, other: Fitted) -> dict[str, Any]:
    """Return how far the values, the losses and the heads of two fits are apart."""
    values, changed = (fit.edits[HEADS].value for fit in (first, other))
    losses, later = (torch.as_tensor(fit.losses["policy"]) for fit in (first, other))
    masks = [fit.edits[HEADS].gain.bool() for fit in (first, other)]
    return {
        "values": ((values - changed).abs().max() / values.abs().max()).item(),
        "first_loss": (losses[0] - later[0]).abs().item(),
        "losses": (losses - later).abs().max().item(),
        "common": int((masks[0] & masks[1]).sum()),
        "heads": int((masks[0] | masks[1]).sum()),
    }


@torch.no_grad()
def halved_batch(arguments: argparse.Namespace, model: nn.Module, device: torch.device) -> bool | None:
    """Return whether an automatic batch size was halved and every prompt ran once; None without a GPU."""
    if device.type != "cuda":
        return None
    examples = prompts.examples(model, 64, 100, arguments.seed)
    runner = prompts.SyntheticRunner(model)

    def run(batch: Sequence[prompts.SyntheticPrompt]) -> torch.Tensor:
        runner.run(batch)
        # Some memory for each row, as long inputs take it.
        return torch.zeros(len(batch), 64 * 2**20, dtype=torch.uint8, device=device).sum(1).cpu()

    given = [examples.prompt(episode) for episode in prompts.session(model, examples).episodes(64, 1, "memory")]
    rows = BatchSize(64, automatic=True)
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    _, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    torch.cuda.set_per_process_memory_fraction((reserved + 2 * 2**30) / total, index)
    try:
        done = [len(batch) for batch, _ in rows.run_batches(given, run)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
    return sum(done) == 64 and rows.rows < 64


if __name__ == "__main__":
    sys.exit(main())
