"""A loaded base with the model arguments of its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmms_mtv.harness.arguments import SplitArguments, split_arguments, validate
from lmms_mtv.harness.arms import check_arm
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
        check_arm(changes, self.names)
        return split_arguments({**self.model_args, **changes}, self.names)

    def changed(self, changes: Mapping[str, Any]) -> LoadedBase:
        """Return the same base with the arguments of an arm.

        Raises:
            ArgumentError: see :meth:`split`.
            VectorFileError: ``vector=`` or ``heads=`` names a file that is no vector.
        """
        validate(self.split(changes).plugin)
        return dataclasses.replace(self, model_args={**self.model_args, **changes})
