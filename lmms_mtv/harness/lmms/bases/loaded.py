"""A loaded base with the model arguments of its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmms_mtv.errors import ArgumentError
from lmms_mtv.harness.arguments import SplitArguments, split_arguments, validate
from lmms_mtv.harness.lmms.bases.base import Base


@dataclass(frozen=True)
class LoadedBase:
    """A loaded base, which serves any number of arms.

    Attributes:
        base: the base.
        names: the names of the base's own arguments.
        model_args: the model arguments by name: arguments of the base, of the plugin and of a method.
    """

    base: Base
    names: tuple[str, ...]
    model_args: Mapping[str, Any]

    def split(self, changes: Mapping[str, Any]) -> SplitArguments:
        """Return the arguments of an arm: ``model_args``, changed by ``changes``.

        Raises:
            ArgumentError: an argument is unknown, or belongs to the base, which is loaded already.
        """
        if fixed := sorted(key for key in changes if key in self.names or key in ("base", "decoder")):
            raise ArgumentError(f"{', '.join(fixed)}: one model is loaded for all arms, so this belongs to the model")
        return split_arguments({**self.model_args, **changes}, self.names)

    def changed(self, changes: Mapping[str, Any]) -> LoadedBase:
        """Return the same base with the arguments of an arm.

        Raises:
            ArgumentError: see :meth:`split`.
            VectorFileError: ``vector=`` or ``heads=`` names a file that is no vector.
        """
        validate(self.split(changes).plugin)
        return dataclasses.replace(self, model_args={**self.model_args, **changes})
