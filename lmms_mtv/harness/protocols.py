"""The parts of a harness that a fit needs: a model, the prompts of a task, and a logger."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch

from lmms_mtv.fit.examples import Examples
from lmms_mtv.harness.training import Training
from lmms_mtv.models.fitting import DescribedRunner

P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)


class Logger(Protocol):
    """The harness's own logger, whose messages are shown at the harness's command line."""

    def info(self, message: str, /) -> Any: ...

    def warning(self, message: str, /) -> Any: ...


class Model(DescribedRunner[P_contra], Protocol[P_contra]):
    """A runner that answers, with a name and settings."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> torch.device: ...


class Prompts(Examples[P_co], Protocol[P_co]):
    """The training examples of one task of a harness."""

    @property
    def training(self) -> Training: ...

    def digest(self) -> str:
        """Return the SHA-256 of the training examples in the form that the prompts show."""
        ...
