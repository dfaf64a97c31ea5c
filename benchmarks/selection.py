"""Selection of heads: replays of the last token against one full forward for each mask.

*loop* is what the authors' code does, written here with plain torch hooks: for each mask one forward of the whole
prompt, with the masked heads replaced at its last token. *ours* is :meth:`FitSession.losses`: a prefill for each
example when it comes for the first time, then one replay of all masks a step. Each round begins with examples that are
new. The reference settings are 600 steps over 100 examples, so the rounds have 6 steps for each example (``--steps``).

The loop is too slow to run whole. Each round times ``--loop`` of its forwards, and a step is ``--masks`` of them: they
all do the same work. The checks that a fit makes once, of sites and replays, are timed once and count for 1/600 in
each step. Both sides compute the logits of the last token alone, which the authors' code does not; this favours the
loop. So does that prompts have no images: the loop would encode them again for each mask.

The losses of those masks have to agree: within 1e-4 in float32, within 5 % in less. Else the exit status is 1.
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
STEPS_OF_AN_EXAMPLE: Final = 6


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[600], help="of a prompt (default: 600)")
    parser.add_argument("--masks", type=int, default=32, help="of a step (default: 32)")
    parser.add_argument("--steps", type=int, default=12, help="in a round, 6 for each example (default: 12)")
    parser.add_argument("--loop", type=int, default=2, help="forwards of the loop in a round (default: 2)")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for prefilled prompts (default: 4)")
    given = parser.parse_args(argv)
    if given.steps < 1 or given.steps % STEPS_OF_AN_EXAMPLE:
        parser.error(f"--steps {given.steps}: expected a multiple of {STEPS_OF_AN_EXAMPLE}")
    if not 1 <= given.loop <= given.masks:
        parser.error(f"--loop {given.loop}: expected 1 to --masks")
    device = measure.device_of(given)
    model = measure.model_of(given, device)
    results = [measured(given, model, device, tokens) for tokens in given.tokens]
    agree = all(result["gap"] <= result["tolerance"] for result in results)
    lines = (
        f"{given.model}, {found['tokens']} tokens, {given.masks} masks: a step takes {found['medians']['loop']:.4g} s "
        f"in the loop and {found['medians']['ours']:.4g} s here, {found['speedup']:.1f} times less; losses differ by "
        f"{found['gap']:.2g}"
        for found in results
    )
    measure.finish(given, device, {"speedup": min(result["speedup"] for result in results), "results": results}, lines)
    if not agree:
        sys.stderr.write("losses of the loop and of the replays differ: no comparison of their times\n")
    return 0 if agree else 1


@torch.no_grad()
def measured(given: argparse.Namespace, model: nn.Module, device: torch.device, tokens: int) -> dict[str, Any]:
    """Seconds of a step on both sides, for prompts of ``tokens`` tokens, and the largest difference of losses."""
    each = given.steps // STEPS_OF_AN_EXAMPLE
    # One example is for the checks of the session, and one round does not count.
    count = 1 + each * (given.repetitions + 1)
    examples = prompts.examples(model, count, tokens, given.seed)
    session = prompts.session(model, examples, seed=given.seed, memory=int(given.memory * 2**30))
    value = prompts.values(model, given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    layers, heads, _ = session.shape
    projections = [site.module for site in session.sites]

    def masks() -> Tensor:
        return torch.rand(given.masks, layers, heads, generator=generator) < 0.3

    checks = measure.seconds(lambda: session.losses(Episode(0, ()), Edit.replace(value, masks())), device)
    loop, first, later, gaps = [], [], [], []
    rounds = range(given.repetitions + 1)
    for number in tqdm(rounds, desc=f"{tokens} tokens", disable=given.quiet, dynamic_ncols=True, leave=False):
        episodes = [Episode(1 + number * each + index, ()) for index in range(each)]
        drawn, plain = masks(), torch.zeros(0)

        def full(episode: Episode = episodes[0], drawn: Tensor = drawn) -> None:
            nonlocal plain
            plain = full_losses(model, projections, examples.prompt(episode), value, drawn[: given.loop])

        of_loop = measure.seconds(full, device) / given.loop * given.masks
        times: list[list[float]] = []
        for turn in range(STEPS_OF_AN_EXAMPLE):
            times.append([])
            for episode in episodes:
                chosen, found = drawn if turn == 0 else masks(), torch.zeros(0)

                def step(episode: Episode = episode, chosen: Tensor = chosen) -> None:
                    nonlocal found
                    found = session.losses(episode, Edit.replace(value, chosen))

                times[-1].append(measure.seconds(step, device))
                if turn == 0 and episode == episodes[0]:
                    gaps.append((found[: given.loop] - plain).abs().max().item())
        if number:
            loop.append(of_loop)
            first.append(statistics.mean(times[0]))
            later.append(statistics.mean(time for turn in times[1:] for time in turn))
    ours = [
        (one + (STEPS_OF_AN_EXAMPLE - 1) * other) / STEPS_OF_AN_EXAMPLE + checks / STEPS_OF_A_FIT
        for one, other in zip(first, later, strict=True)
    ]
    repetitions = {"loop": loop, "ours": ours, "first_step_of_an_example": first, "later_step": later}
    medians = measure.medians(repetitions)
    return {
        "tokens": tokens,
        "speedup": measure.ratio(repetitions, "loop", "ours"),
        "replays": session.replays,
        "gap": max(gaps),
        "tolerance": 1e-4 if measure.dtype_of(given, device) == torch.float32 else 0.05 * plain.abs().max().item(),
        "checks": checks,
        "medians": medians,
        "repetitions": repetitions,
    }


def full_losses(
    model: nn.Module, projections: Sequence[nn.Module], prompt: prompts.Prompt, value: Tensor, masks: Tensor
) -> Tensor:
    """Losses of the first token of the answer, float32 on the CPU: one forward of the whole prompt for each mask."""
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
    """At the last token, heads where ``mask`` [L, H] is set have ``value`` [L, H, D]; one hook for each layer."""

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
