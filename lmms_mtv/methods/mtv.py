"""Multimodal Task Vectors (arXiv 2406.15334).

Stored: the mean activation of every head at the last token of many few-shot prompts, and the set of heads that
REINFORCE finds. Injected: at these heads the mean replaces the activation, at the last prompt token and at every
generated token. Trained: one probability for each head; all weights are frozen. Cost: ``iterations`` few-shot prefills,
then ``steps`` replays of the last token with ``samples`` masks each.

The defaults are those of the authors' code, except ``loss`` and ``settle``. docs/concepts.md lists all differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.policy import Policy, Settling, reinforce
from lmms_mtv.fit.selection import Selection, mean_values, select
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import HEADS, Edit

MOVED: Final = {
    "optimizer": "method=gradient_mask",
    "gradient_steps": "method=gradient_mask with steps=",
    "gradient_samples": "method=gradient_mask with samples=",
    "gradient_lr": "method=gradient_mask with lr=",
}
"""Settings of version 0.1, and the arguments that replace them."""


@dataclass(frozen=True)
class Config(Selection):
    """Settings of MTV, besides the settings of the selection.

    ``heads``, as (layer, head), are used as given, and nothing is selected (heads of another task, section 4).
    ``settle`` ends REINFORCE before ``steps`` steps, see :class:`~lmms_mtv.fit.policy.Settling`; then the heads of at
    least even probability are one more candidate. None runs all steps, as the authors' code does.
    """

    heads: tuple[tuple[int, int], ...] | None = setting(
        None, "heads to replace, as (layer, head); nothing is selected then (section 4 of the paper)"
    )
    settle: float | None = setting(
        0.1,
        "stop before `steps` once the losses of a step's masks differ by at most this share of their difference at "
        "first, or of 1 nat if that is less; None runs all steps (the authors' code)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            # A single loss cannot be better than its own mean.
            raise ArgumentError(f"samples={self.samples}, expected at least 2: masks are compared with each other")
        if self.settle is not None and not 0 < self.settle < 1:
            raise ArgumentError(f"settle={self.settle}, expected between 0 and 1, or None for all steps")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return mean activations, and the heads that they replace.

    Args:
        session: the fit.
        config: the settings.

    Raises:
        ArgumentError: ``top_k`` or ``diverse`` is more than there are, or no head reaches ``threshold``.
    """
    value = mean_values(session, config)
    if config.heads is not None:
        return Fitted({HEADS: Edit.replace(value, _mask(config.heads, session.shape[:2]))})

    def learn(queries: Sequence[Episode]) -> tuple[Policy, list[float]]:
        chosen = session.random_queries(queries, config.steps)
        moved = value.to(session.device)

        def losses(step: int, masks: Tensor) -> Tensor:
            edit = Edit.replace(moved.to(masks.device), masks)
            if masks.device.type == "cpu":
                return session.losses(chosen[step], edit, config.loss)
            return session.losses(chosen[step], edit, config.loss, wait=False)

        return reinforce(
            losses,
            session.shape[:2],
            steps=session.bar(range(config.steps), "Selecting heads"),
            samples=config.samples,
            lr=config.lr,
            initial_logit=config.initial_logit,
            generator=session.generator("masks"),
            device=session.device,
            settling=None if config.settle is None else Settling(config.settle),
        )

    mask, losses = select(session, config, value, learn)
    return Fitted({HEADS: Edit.replace(value, mask)}, losses)


def reselected(fitted: Fitted, mask: Tensor) -> Fitted:
    """Return a fit with the same values at the heads of another mask, for controls.

    The losses of MTV's own masks are left out, since they are of other heads.

    Args:
        fitted: the fit of MTV.
        mask: the heads to replace, [L, H].
    """
    names = ("policy", "probabilities", "unedited")
    losses = {name: fitted.losses[name] for name in names if name in fitted.losses}
    return Fitted({HEADS: Edit.replace(fitted.edits[HEADS].value, mask)}, losses)


def _mask(heads: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Tensor:
    """Return the mask of ``heads``, bool [L, H]."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask
