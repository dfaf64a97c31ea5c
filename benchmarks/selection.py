"""Selection of heads: replays of the last token, compared with one full forward for each mask.

*loop* does the same as the authors' code, with plain torch hooks: for each mask, one forward of the whole prompt with
the masked heads replaced at the last token. *ours* is :meth:`FitSession.losses`: one prefill when an example comes for
the first time, then one replay of all masks for each step. Each round starts with new examples. The reference settings
have 600 steps over 100 examples, so each round has 6 steps for each example (``--steps``).

The loop is too slow to measure completely. Each round times ``--loop`` forwards of the loop and multiplies the time to
``--masks`` forwards, because all forwards do the same work. The checks of sites and replays run once in a fit; they are
timed once, and each step counts 1/600 of this time. Both sides compute the logits of the last token only, and the
authors' code does not; this favours the loop. Prompts without images favour the loop too: the loop would encode the
images again for each mask.

The losses of both sides must agree: within 1e-4 in float32, within 5 % in lower precision. Else the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks import measure, prompts
from lmms_mtv import Edit, Episode

STEPS_OF_A_FIT: Final = 600
"""Steps of a fit with the reference settings."""

STEPS_OF_AN_EXAMPLE: Final = 6
"""Steps for each example with the reference settings."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[600], help="tokens of a prompt (default: 600)")
    parser.add_argument("--masks", type=int, default=32, help="masks of a step (default: 32)")
    parser.add_argument("--steps", type=int, default=12, help="steps in a round, 6 for each example (default: 12)")
    parser.add_argument("--loop", type=int, default=2, help="measured forwards of the loop in a round (default: 2)")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for the prefill cache (default: 4)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.steps % STEPS_OF_AN_EXAMPLE:
        parser.error(f"--steps {arguments.steps}: expected a multiple of {STEPS_OF_AN_EXAMPLE}")
    if not 1 <= arguments.loop <= arguments.masks:
        parser.error(f"--loop {arguments.loop}: expected 1 to --masks")
    device = measure.device_of(arguments)
    model = measure.model_of(arguments, device)
    results = [measured(arguments, model, device, tokens) for tokens in arguments.tokens]
    agree = all(result["gap"] <= result["tolerance"] for result in results)
    lines = (
        f"{arguments.model}, {result['tokens']} tokens, {arguments.masks} masks: a step takes "
        f"{result['medians']['loop']:.4g} s in the loop and {result['medians']['ours']:.4g} s here, "
        f"{result['speedup']:.1f} times less; losses differ by {result['gap']:.2g}"
        for result in results
    )
    measure.finish(
        arguments, device, {"speedup": min(result["speedup"] for result in results), "results": results}, lines
    )
    if not agree:
        sys.stderr.write("the losses of the loop and of the replays differ: the times cannot be compared\n")
    return 0 if agree else 1


@torch.no_grad()
def measured(arguments: argparse.Namespace, model: nn.Module, device: torch.device, tokens: int) -> dict[str, Any]:
    """Return the seconds of a step on both sides for prompts of ``tokens`` tokens, and the largest loss difference."""
    each = arguments.steps // STEPS_OF_AN_EXAMPLE
    # One example is for the checks of the session, and the warm-up round needs examples too.
    count = 1 + each * (arguments.repetitions + 1)
    examples = prompts.examples(model, count, tokens, arguments.seed)
    session = prompts.session(model, examples, seed=arguments.seed, memory=int(arguments.memory * 2**30))
    value = prompts.values(model, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    layers, heads, _ = session.shape
    projections = [site.module for site in session.sites]

    def masks() -> Tensor:
        return torch.rand(arguments.masks, layers, heads, generator=generator) < 0.3

    checks = measure.seconds(lambda: session.losses(Episode(0, ()), Edit.replace(value, masks())), device)
    loop, first, later, gaps = [], [], [], []
    rounds = range(arguments.repetitions + 1)
    for number in tqdm(rounds, desc=f"{tokens} tokens", disable=arguments.quiet, dynamic_ncols=True, leave=False):
        episodes = [Episode(1 + number * each + index, ()) for index in range(each)]
        first_masks, full_forward_losses = masks(), torch.zeros(0)

        def full(episode: Episode = episodes[0], batch: Tensor = first_masks) -> None:
            nonlocal full_forward_losses
            full_forward_losses = full_losses(
                model, projections, examples.prompt(episode), value, batch[: arguments.loop]
            )

        of_loop = measure.seconds(full, device) / arguments.loop * arguments.masks
        times: list[list[float]] = []
        for turn in range(STEPS_OF_AN_EXAMPLE):
            times.append([])
            for episode in episodes:
                step_masks, losses = first_masks if turn == 0 else masks(), torch.zeros(0)

                def step(episode: Episode = episode, batch: Tensor = step_masks) -> None:
                    nonlocal losses
                    losses = session.losses(episode, Edit.replace(value, batch))

                times[-1].append(measure.seconds(step, device))
                if turn == 0 and episode == episodes[0]:
                    gaps.append((losses[: arguments.loop] - full_forward_losses).abs().max().item())
        if number:
            loop.append(of_loop)
            first.append(statistics.mean(times[0]))
            later.append(statistics.mean(time for turn in times[1:] for time in turn))
    ours = [
        (first_step + (STEPS_OF_AN_EXAMPLE - 1) * later_step) / STEPS_OF_AN_EXAMPLE + checks / STEPS_OF_A_FIT
        for first_step, later_step in zip(first, later, strict=True)
    ]
    repetitions = {"loop": loop, "ours": ours, "first_step_of_an_example": first, "later_step": later}
    medians = measure.medians(repetitions)
    return {
        "tokens": tokens,
        "speedup": measure.ratio(repetitions, "loop", "ours"),
        "replays": session.replays,
        "gap": max(gaps),
        "tolerance": 1e-4
        if measure.dtype_of(arguments, device) == torch.float32
        else 0.05 * full_forward_losses.abs().max().item(),
        "checks": checks,
        "medians": medians,
        "repetitions": repetitions,
    }


def full_losses(
    model: nn.Module, projections: Sequence[nn.Module], prompt: prompts.SyntheticPrompt, value: Tensor, masks: Tensor
) -> Tensor:
    """Return the losses of the first token of the target, float32 [masks] on the CPU.

    Each mask takes one forward of the whole prompt.
    """
    inputs = prompts.batch(model, [prompt])
    expected = torch.tensor(prompt.target[:1])
    losses = []
    for mask in masks:
        with replaced(projections, value, mask):
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
        losses.append(functional.cross_entropy(logits, expected))
    return torch.stack(losses)


@contextmanager
def replaced(projections: Sequence[nn.Module], value: Tensor, mask: Tensor) -> Iterator[None]:
    """Replace the masked heads at the last token within the block, with one hook for each layer.

    Args:
        projections: the attention output projection of each layer.
        value: the values of the heads, [layers, heads, size].
        mask: True for the heads to replace, bool [layers, heads].
    """

    def hook(layer: int) -> Any:
        heads = mask[layer].nonzero().flatten()

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            changed = args[0].clone()
            last = changed[0, -1].view(*value.shape[1:])
            last[heads.to(last.device)] = value[layer, heads].to(last)
            return (changed, *args[1:])

        return before

    with ExitStack() as stack:
        for layer, projection in enumerate(projections):
            stack.callback(projection.register_forward_pre_hook(hook(layer)).remove)
        yield


if __name__ == "__main__":
    sys.exit(main())
