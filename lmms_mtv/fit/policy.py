"""Policies that choose heads, as probabilities, and policies that choose one of several values for each head.

REINFORCE learns the probabilities of heads from losses alone (MTV, arXiv 2406.15334, section 3.2), and in the same way
the choice among several values. The concrete distribution (arXiv 1611.00712) learns the probabilities of heads from
gradients of losses through masks that are nearly 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import torch
from torch import Tensor

from lmms_mtv.errors import NumericsError

EDGE = 1e-3
"""Least distance of probabilities from 0 and 1, and the constant that is added to the standard deviation of losses."""

TEMPERATURE = 0.5
"""Temperature of the concrete distribution: a lower one brings masks nearer to 0 and 1, and makes gradients rougher."""


_UNCHECKED = 32
"""Number of steps on a GPU after which their losses are checked: a check waits for the GPU."""

WINDOW: Final = 25
"""Number of steps whose spreads are averaged, since the spread of a single step depends on its query."""

P = TypeVar("P", "Policy", "Categorical")

Losses = Callable[[int, Tensor], Tensor]
"""Function of the number of a step and of samples of a policy that returns the losses, float [samples]."""


@dataclass(frozen=True)
class Settling:
    """A rule that ends REINFORCE once the differences between the samples of a step hardly change a loss.

    The spread of a step is the standard deviation of the losses of its samples. At first the policy draws widely
    different samples, and the spread is large. It becomes small as the choices that matter become certain; choices that
    do not matter may stay uncertain. The rule compares the mean spread of the last :data:`WINDOW` steps with the mean
    spread of the first :data:`WINDOW` steps, of which at most 1 nat counts: a larger spread at first does not make a
    larger rest harmless. Losses are the same in all processes, so all processes end at one step.

    Attributes:
        share: REINFORCE ends when the spread is at most this share of the spread at first, or of 1 nat.
    """

    share: float

    def holds(self, spreads: Sequence[float]) -> bool:
        """Return whether REINFORCE ends after steps with these spreads. The two windows never overlap."""
        if len(spreads) < 2 * WINDOW:
            return False
        return sum(spreads[-WINDOW:]) <= self.share * min(sum(spreads[:WINDOW]), WINDOW)


@dataclass(frozen=True)
class Policy:
    """Independent Bernoulli choices, one for each head. ``logits`` is float32 [L, H]."""

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Probability of each head, float32 [L, H], clamped to [1e-3, 1 - 1e-3]."""
        return self.logits.detach().sigmoid().clamp(EDGE, 1 - EDGE)

    def sample(self, count: int, generator: torch.Generator, floor: float = 0.0) -> Tensor:
        """Return ``count`` random masks of heads.

        Args:
            count: the number of masks.
            generator: the source of random numbers.
            floor: heads with a lower probability are never chosen.

        Returns:
            bool [count, L, H], on the device of the logits.
        """
        probabilities = self.probabilities
        likely = probabilities.where(probabilities >= floor, torch.zeros_like(probabilities))
        # The numbers are drawn on the CPU for all devices. Their copy to a GPU does not wait for the GPU.
        return torch.rand(count, *likely.shape, generator=generator).to(likely.device, non_blocking=True) < likely

    def log_probability(self, masks: Tensor) -> Tensor:
        """Return the log-probability of ``masks``, bool [count, L, H], as a differentiable float32 [count]."""
        probabilities = self.logits.sigmoid().clamp(EDGE, 1 - EDGE)
        return torch.where(masks, probabilities, 1 - probabilities).log().flatten(1).sum(1)

    def above(self, threshold: float) -> Tensor:
        """Return the mask, bool [L, H], of the heads whose probability is at least ``threshold``."""
        return self.probabilities >= threshold

    def top(self, count: int) -> Tensor:
        """Return the mask, bool [L, H], of the ``count`` most likely heads; among equal heads the first come first."""
        order = self.logits.detach().flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros(self.logits.numel(), dtype=torch.bool)
        mask[order[:count]] = True
        return mask.view(self.logits.shape)


@dataclass(frozen=True)
class Categorical:
    """Independent choices, for each of N heads, of one of M options. ``logits`` is float32 [N, M] on the CPU."""

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Probability of each option, float32 [N, M], with a sum of 1 for each head."""
        return self.logits.detach().softmax(1)

    @property
    def best(self) -> Tensor:
        """Most likely option of each head, int64 [N]; among equal options the first."""
        return self.logits.detach().sort(dim=1, descending=True, stable=True).indices[:, 0]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` random options for each head, int64 [count, N]."""
        return torch.multinomial(self.probabilities, count, replacement=True, generator=generator).T

    def log_probability(self, options: Tensor) -> Tensor:
        """Return the log-probability of each row of ``options``, int64 [count, N]: float32 [count], differentiable."""
        return self.logits.log_softmax(1).gather(1, options.T).sum(0)


def reinforce(
    losses: Losses,
    shape: tuple[int, int],
    *,
    steps: Iterable[int],
    samples: int,
    lr: float,
    initial_logit: float,
    generator: torch.Generator,
    device: torch.device | None = None,
    settling: Settling | None = None,
) -> tuple[Policy, list[float]]:
    """Learn by REINFORCE a :class:`Policy` that makes ``losses`` small; see :func:`improved`.

    Args:
        losses: function of the number of a step and of masks, bool [samples, L, H], that returns losses, float
            [samples].
        shape: the numbers of layers and of heads.
        steps: the numbers of the steps.
        samples: the number of masks in a step, at least 2.
        lr: the learning rate of Adam.
        initial_logit: the logit of each head before the first step.
        generator: the source of random numbers.
        device: the device of the policy while it learns, and of the masks; the CPU by default.
        settling: the rule that ends the learning before all steps are done; None does all steps.

    Returns:
        The policy, and the mean loss of each step.

    Raises:
        NumericsError: a loss is not finite.
    """
    start = Policy(torch.full(shape, initial_logit))
    return improved(
        start, losses, steps=steps, samples=samples, lr=lr, generator=generator, device=device, settling=settling
    )


def improved(
    policy: P,
    losses: Losses,
    *,
    steps: Iterable[int],
    samples: int,
    lr: float,
    generator: torch.Generator,
    device: torch.device | None = None,
    settling: Settling | None = None,
) -> tuple[P, list[float]]:
    """Return a policy that REINFORCE improved, to make ``losses`` small.

    Each step minimises the sum over samples of ``log p(choice) * (loss - mean) / (std + 1e-3)`` with Adam. On a GPU a
    step does not wait for the losses of the step before, unless there is a rule that may end the learning. Losses that
    are not finite are found some steps later then, and ``losses`` gets their samples again, on the CPU, for an error
    that tells more.

    Args:
        policy: the policy to begin with, which is not changed.
        losses: function of the number of a step and of samples of the policy that returns losses, float [samples].
        steps: the numbers of the steps.
        samples: the number of samples in a step, at least 2.
        lr: the learning rate of Adam.
        generator: the source of random numbers.
        device: the device of the policy while it learns, and of the samples; the CPU by default.
        settling: the rule that ends the learning before all steps are done; None does all steps.

    Returns:
        The policy, on the CPU, and the mean loss of each step.

    Raises:
        NumericsError: a loss is not finite.
    """
    logits = policy.logits.to(device or "cpu").clone().requires_grad_()
    learning = replace(policy, logits=logits)
    optimizer = torch.optim.Adam([logits], lr=lr)
    history: list[Tensor] = []
    spreads: list[float] = []
    unchecked: list[tuple[int, Tensor, Tensor]] = []
    for step in steps:
        choices = learning.sample(samples, generator)
        sample_losses = losses(step, choices).detach().to(logits.device, torch.float32)
        unchecked.append((step, choices, sample_losses))
        if logits.device.type == "cpu" or len(unchecked) == _UNCHECKED:
            _check_finite(unchecked, losses)
            unchecked.clear()
        spread = sample_losses.std()
        advantage = (sample_losses - sample_losses.mean()) / (spread + EDGE)
        optimizer.zero_grad()
        # The caller may have turned gradients off for an evaluation.
        with torch.enable_grad():
            torch.autograd.backward((learning.log_probability(choices) * advantage).sum())
        if logits.grad is not None:
            # Where all samples chose alike the gradient is 0, since advantages sum to 0. Adam would make a whole step
            # of the remaining rounding error, whose sign depends on the batch size of the activations.
            alike = (choices == choices[:1]).all(0)
            logits.grad.masked_fill_(alike.view(*alike.shape, *[1] * (logits.dim() - alike.dim())), 0)
        optimizer.step()
        history.append(sample_losses.mean())
        if settling is not None:
            # The rule waits for the losses, so that a fit ends at the same step on every device.
            spreads.append(spread.item())
            if settling.holds(spreads):
                break
    _check_finite(unchecked, losses)
    return replace(policy, logits=logits.detach().cpu()), [loss.item() for loss in history]


def _check_finite(steps: Sequence[tuple[int, Tensor, Tensor]], losses: Losses) -> None:
    """Raise :class:`NumericsError` if a loss is not finite.

    Args:
        steps: number, samples and losses of each step.
        losses: the function of the losses, which may raise a better error for samples on the CPU.
    """
    if not steps or torch.stack([values for _, _, values in steps]).isfinite().all():
        return
    step, choices, _ = next(one for one in steps if not one[2].isfinite().all())
    if choices.device.type != "cpu":
        losses(step, choices.cpu())
    raise NumericsError(f"a loss of selection step {step} is NaN or infinite: use dtype=float32 or bfloat16")


def concrete(
    loss_gradient: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    shape: tuple[int, int],
    *,
    steps: Iterable[int],
    samples: int,
    lr: float,
    initial_logit: float,
    generator: torch.Generator,
) -> tuple[Policy, list[float]]:
    """Learn a :class:`Policy` from gradients of the losses by the masks.

    Masks are drawn from the binary concrete distribution, ``sigmoid((logit + noise) / 0.5)`` with logistic noise. An
    entry of a mask is above one half as often as the policy would choose the head. Each step minimises the mean loss of
    the masks with Adam.

    Args:
        loss_gradient: function of the number of a step and of masks, float32 [samples, L, H]. The function returns the
            losses, float [samples], and the derivative of each loss by its mask, float [samples, L, H].
        shape: the numbers of layers and of heads.
        steps: the numbers of the steps.
        samples: the number of masks in a step.
        lr: the learning rate of Adam.
        initial_logit: the logit of each head before the first step.
        generator: the source of random numbers.

    Returns:
        The policy, and the mean loss of the mixed masks of each step.

    Raises:
        NumericsError: a loss or a derivative is not finite.
    """
    logits = torch.full(shape, initial_logit, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    history = []
    for step in steps:
        noise = torch.rand(samples, *shape, generator=generator).logit(eps=1e-6)
        with torch.enable_grad():
            masks = ((logits + noise) / TEMPERATURE).sigmoid()
        sample_losses, gradient = loss_gradient(step, masks.detach())
        if not (sample_losses.isfinite().all() and gradient.isfinite().all()):
            raise NumericsError(
                f"a loss of selection step {step} or its gradient is NaN or infinite: use dtype=float32"
            )
        optimizer.zero_grad()
        torch.autograd.backward(masks, gradient / samples)
        optimizer.step()
        history.append(sample_losses.mean().item())
    return Policy(logits.detach()), history
