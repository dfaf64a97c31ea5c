"""Checks that a device gives the numbers that the CPU gives, whatever the batch size.

A fit of MTV with ``--steps`` steps of 8 masks runs on random prompts, four times: on the device, on the device again,
on the device with other batches, and, in float32, on the CPU with the same weights. Two checks need a GPU. Batches that
do not fit the memory run: the memory is limited so that an automatic batch size has to be halved. Losses with CUDA
graphs are compared with losses without, also for a model that no graph can hold, because the model waits for the GPU.

Figures: ``values``, the largest difference of a mean activation relative to the largest mean activation, ``losses``,
the largest difference of a step's mean loss, and ``heads``, the selected heads in common and in all, each against
the first fit. The exit status is 1 if the second fit differs at all from the first, if values or first losses are
further apart than the precision allows, if no batch was halved, or if the checks of CUDA graphs fail.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from benchmarks import measure, models, prompts
from lmms_mtv import Edit, Episode, methods
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
    graphs = with_graphs(arguments, model, device)
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
    if graphs and not (graphs["shapes"] and not graphs["shapes_of_waiting"] and graphs["gap"] <= tolerance):
        failed.append("CUDA graphs")
    lines = [
        f"{name}: values differ by {result['values']:.2g}, losses by {result['losses']:.2g}, "
        f"{result['common']} of {result['heads']} heads are the same"
        for name, result in results.items()
    ]
    lines.append(f"a batch was halved when the memory ran out: {halved}")
    lines.append(f"losses with CUDA graphs: {graphs}")
    figures = {"results": results, "halved": halved, "graphs": graphs, "tolerance": tolerance, "failed": failed}
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
def with_graphs(arguments: argparse.Namespace, model: nn.Module, device: torch.device) -> dict[str, Any] | None:
    """Return how far losses with CUDA graphs are from losses without; None without a GPU.

    Returns:
        ``gap``, the largest difference of a loss relative to 1 + the loss, ``shapes``, the number of captured replays,
        and ``shapes_of_waiting``, the number for the same model with a hook that waits for the GPU.
    """
    if device.type != "cuda":
        return None

    def waiting(_: nn.Module, __: Any, output: Any) -> None:
        output.logits.sum().item()

    gap, shapes = 0.0, []
    for waits in (False, True):
        hook = model.register_forward_hook(waiting)
        if not waits:
            hook.remove()
        examples = prompts.examples(model, 8, arguments.tokens, arguments.seed)
        graphs, plain = (prompts.session(model, examples, graphs=wanted) for wanted in (None, False))
        value, generator = prompts.values(model, arguments.seed), torch.Generator().manual_seed(arguments.seed)
        for number in range(24):
            masks = torch.rand(2 + 2 * number, *graphs.shape[:2], generator=generator) < 0.3
            episode = Episode(number % 4, (4, 5, 6, 7)[: number % 3])
            losses, expected = (session.losses(episode, Edit.replace(value, masks)) for session in (graphs, plain))
            gap = max(gap, ((losses - expected).abs() / (1 + expected)).max().item())
        hook.remove()
        shapes.append(graphs.graphs)
    # A capture that failed would leave the random numbers of the GPU in the state of a capture.
    torch.rand(1, device=device)
    return {"gap": gap, "shapes": shapes[0], "shapes_of_waiting": shapes[1]}


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
