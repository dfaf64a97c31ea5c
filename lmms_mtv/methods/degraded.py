"""A control of MTV (arXiv 2406.15334): its selection made worse on purpose.

Stored, Injected, Trained and Cost: as ``mtv``. A share of the heads that MTV chose is dropped, or other heads are
added, as many as a share of the chosen heads. Both are drawn at random. The control shows how much depends on exactly
these heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted, mtv
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import HEADS

CONTROL: Final = True
"""A vector of this method may be worse than no vector."""


@dataclass(frozen=True)
class Config(mtv.Config):
    """Settings of the MTV fit, and two shares of its heads: ``drop`` is left out, and ``add`` is added."""

    drop: float = setting(0.0, "share of MTV's heads that is left out")
    add: float = setting(0.0, "heads that are added, as a share of MTV's heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1 or self.add < 0:
            raise ArgumentError(f"drop={self.drop}, add={self.add}: expected drop in [0, 1] and add of at least 0")
        if not (self.drop or self.add):
            raise ArgumentError("method=degraded with drop=0 and add=0 is MTV itself, no control: pass drop= or add=")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return MTV's fit with ``round(drop * n)`` of its n heads dropped and ``round(add * n)`` other heads added.

    Args:
        session: the fit.
        config: the settings.
    """
    fitted = mtv.fit(session, config)
    edit, generator = fitted.edits[HEADS], session.generator("degraded heads")
    mask = edit.gain.flatten().bool()
    drawn = torch.randperm(len(mask), generator=generator)
    inside, outside = drawn[mask[drawn]], drawn[~mask[drawn]]
    mask[inside[: round(config.drop * len(inside))]] = False
    mask[outside[: round(config.add * len(inside))]] = True
    return mtv.reselected(fitted, mask.view(edit.gain.shape))
