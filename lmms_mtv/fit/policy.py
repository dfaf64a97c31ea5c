"""Which heads to edit, as probabilities: learned from losses alone by REINFORCE (MTV, arXiv 2406.15334, section 3.2),
or from their gradients through masks that are nearly 0 or 1 (concrete distribution, arXiv 1611.00712). And, by the same
REINFORCE, which one of several values to put there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lmms_mtv.errors import NumericsError

EDGE = 1e-3
"""Probabilities are kept this far from 0 and 1, and the spread of losses from 0."""

TEMPERATURE = 0.5
"""Of the concrete distribution: the lower, the nearer masks are to 0 and 1, and the rougher gradients."""


P = TypeVar("P", "Policy", "Categorical")


@dataclass(frozen=True)
class Policy:
    """Independent Bernoulli choices, one for each head. ``logits`` is float32 [L, H] on the CPU."""

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """float32 [L, H], clamped to [1e-3, 1 - 1e-3]."""
        return self.logits.detach().sigmoid().clamp(EDGE, 1 - EDGE)

    def sample(self, count: int, generator: torch.Generator, floor: float = 0.0) -> Tensor:
        """Return ``count`` masks, bool [count, L, H]. Heads less likely than ``floor`` are never chosen."""
        probabilities = self.probabilities
        likely = probabilities.where(probabilities >= floor, torch.zeros_like(probabilities))
        return torch.rand(count, *likely.shape, generator=generator) < likely

    def log_probability(self, masks: Tensor) -> Tensor:
        """Return the log-probability of the bool [count, L, H] ``masks``, float32 [count], differentiable."""
        probabilities = self.logits.sigmoid().clamp(EDGE, 1 - EDGE)
        return torch.where(masks, probabilities, 1 - probabilities).log().flatten(1).sum(1)

    def above(self, threshold: float) -> Tensor:
        """Return the mask of the heads at least as likely as ``threshold``, bool [L, H]."""
        return self.probabilities >= threshold

    def top(self, count: int) -> Tensor:
        """Return the mask of the ``count`` most likely heads, bool [L, H]; of equal ones the first."""
        order = self.logits.detach().flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros(self.logits.numel(), dtype=torch.bool)
        mask[order[:count]] = True
        return mask.view(self.logits.shape)


@dataclass(frozen=True)
class Categorical:
    """Independent choices of one of M options each, for each of N heads. ``logits`` is float32 [N, M] on the CPU."""

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """float32 [N, M], with a sum of 1 for each head."""
        return self.logits.detach().softmax(1)

    @property
    def best(self) -> Tensor:
        """The most likely option of each head, int64 [N]; of equal ones the first."""
        return self.logits.detach().sort(dim=1, descending=True, stable=True).indices[:, 0]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` options for each head, int64 [count, N]."""
        return torch.multinomial(self.probabilities, count, replacement=True, generator=generator).T

    def log_probability(self, options: Tensor) -> Tensor:
        """Return the log-probability of each row of int64 ``options`` [count, N], float32 [count], differentiable."""
        return self.logits.log_softmax(1).gather(1, options.T).sum(0)


def reinforce(
    losses: Callable[[int, Tensor], Tensor],
    shape: tuple[int, int],
    *,
    steps: Iterable[int],
    samples: int,
    lr: float,
    initial_logit: float,
    generator: torch.Generator,
) -> tuple[Policy, list[float]]:
    """Learn a :class:`Policy` that makes ``losses`` small.

    ``losses(step, masks)`` gives the float [samples] losses of the bool [samples, L, H] masks. The rest is as
    :func:`improved` has it, from ``initial_logit`` for each head.
    """
    start = Policy(torch.full(shape, initial_logit))
    return improved(start, losses, steps=steps, samples=samples, lr=lr, generator=generator)


def improved(
    policy: P,
    losses: Callable[[int, Tensor], Tensor],
    *,
    steps: Iterable[int],
    samples: int,
    lr: float,
    generator: torch.Generator,
) -> tuple[P, list[float]]:
    """Return the ``policy`` that REINFORCE makes of another one, to make ``losses`` small.

    ``losses(step, choices)`` gives the float [samples] losses of what was sampled from the policy. Each step minimises
    the sum over samples of ``log p(choice) * (loss - mean) / (std + 1e-3)`` with Adam. Returns the policy and the mean
    loss of each step. ``samples`` is at least 2. Raises :class:`NumericsError` on a loss that is not finite.
    """
    logits = policy.logits.clone().requires_grad_()
    learning = replace(policy, logits=logits)
    optimizer = torch.optim.Adam([logits], lr=lr)
    history = []
    for step in steps:
        choices = learning.sample(samples, generator)
        sample_losses = losses(step, choices).detach().to("cpu", torch.float32)
        if not sample_losses.isfinite().all():
            raise NumericsError(f"a loss of selection step {step} is NaN or infinite: use dtype=float32 or bfloat16")
        advantage = (sample_losses - sample_losses.mean()) / (sample_losses.std() + EDGE)
        optimizer.zero_grad()
        # Also where the caller evaluates and has turned gradients off.
        with torch.enable_grad():
            torch.autograd.backward((learning.log_probability(choices) * advantage).sum())
        if logits.grad is not None:
            # Where all samples chose alike the gradient is 0, since advantages sum to 0. Adam would make a whole step
            # of the rounding error that is left, and of its sign, which depends on the batch size of the activations.
            logits.grad[(choices == choices[:1]).all(0)] = 0
        optimizer.step()
        history.append(sample_losses.mean().item())
    return replace(policy, logits=logits.detach()), history


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
    """Learn a :class:`Policy` from gradients.

    ``loss_gradient(step, masks)`` gives the float [samples] losses of the float32 [samples, L, H] masks, and the
    derivative of each with respect to its mask, float [samples, L, H]. Masks are drawn from the binary concrete
    distribution, ``sigmoid((logit + noise) / 0.5)`` with logistic noise: more than one half just as often as the policy
    would choose the head. Each step minimises their mean loss with Adam. Returns the policy and the mean loss of
    each step, of mixed masks. Raises :class:`NumericsError` on a loss or derivative that is not finite.
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
