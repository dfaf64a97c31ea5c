"""Task vectors (Hendel, Geva and Globerson 2023, arXiv 2310.15916).

Stored: the hidden state after one block, at the last token of demonstrations and a query. Injected: the stored state
replaces the hidden state after this block, once, at the last token of the prompt. Trained: nothing; the layer has the
lowest loss among all layers, on training queries that no stored state comes from. Cost: ``iterations`` few-shot
prefills, then for each of ``examples`` queries one replay of the last token, with as many rows as there are layers.

These choices are ours: the loss chooses the layer instead of the accuracy; the default of ``fit_shots`` is that of MTV;
and the state may be a mean over several prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.examples import Tokens
from lmms_mtv.fit.layers import best_layer
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import RESIDUAL


@dataclass(frozen=True)
class Config:
    """Settings of task vectors.

    The state is the mean over ``iterations`` prompts (the paper: 1) of ``fit_shots`` demonstrations. ``examples``
    training queries choose the layer by ``loss``: the loss of the ``first`` answer token, or the mean over ``all``
    tokens.
    """

    iterations: int = setting(1, "prompts over which the state is averaged (1 in the paper)")
    fit_shots: int = setting(4, "demonstrations in each of these prompts")
    examples: int = setting(32, "training queries that choose the layer")
    loss: Tokens = setting("all", "tokens of the answer that count: `first`, or the mean over `all`")

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.examples < 1 or self.fit_shots < 0:
            raise ArgumentError(
                f"iterations={self.iterations}, examples={self.examples}, fit_shots={self.fit_shots}: expected at "
                "least 1, 1 and 0"
            )


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return the hidden state of few-shot prompts, and the layer where this state replaces demonstrations best.

    Args:
        session: the fit.
        config: the settings.
    """
    prompts = session.episodes(config.iterations, config.fit_shots, "values")
    with session.stage("values"):
        value = session.mean_activations(prompts, RESIDUAL)
    queries = session.episodes(config.examples, session.shots, "selection", unlike=prompts)
    with session.stage("layer"):
        edit, losses = best_layer(
            lambda edits: session.mean_losses(queries, {RESIDUAL: edits}, config.loss, "Choosing the layer"),
            value,
            keep=0,
            once=True,
        )
    return Fitted({RESIDUAL: edit}, losses)
