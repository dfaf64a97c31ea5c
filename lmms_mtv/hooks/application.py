"""The context of :meth:`TaskVector.apply`, which can be entered several times and knows the weights of the fit."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from types import TracebackType

from torch import nn

from lmms_mtv.errors import ArgumentError
from lmms_mtv.hooks.edit import Fired, applied
from lmms_mtv.hooks.fingerprint import fingerprint
from lmms_mtv.hooks.sites import find_sites
from lmms_mtv.vectors import TaskVector

logger = logging.getLogger(__name__)


class Application(AbstractContextManager[Fired]):
    """A context in which every forward of a model is edited by a vector.

    Args:
        model: the model.
        vector: the vector.

    Raises:
        ArgumentError: ``model`` is no module.
        DiscoveryError: the attention heads of the model are not found.
        GeometryError: the vector does not fit the model.
    """

    def __init__(self, model: nn.Module, vector: TaskVector) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"the model is {type(model).__name__}: pass a loaded model")
        self._sites, self._vector = find_sites(model), vector
        vector.check(self._sites.geometry)
        self._entered: list[AbstractContextManager[Fired]] = []
        fitted_on, here = vector.card.weights, fingerprint(self._sites)
        if fitted_on is not None and here is not None and fitted_on != here:
            logger.warning(
                "vector %s was fitted for other weights (%s, revision %s): it fits the heads of this model, but its "
                "values are those of another",
                *(vector.id, vector.card.model, vector.card.revision),
            )

    def __enter__(self) -> Fired:
        context = applied(self._sites, self._vector)
        fired = context.__enter__()
        self._entered.append(context)
        return fired

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, trace)
