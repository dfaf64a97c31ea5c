"""The model arguments of the arms of a comparison, which share a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from lmms_mtv import methods
from lmms_mtv.errors import ArgumentError
from lmms_mtv.harness.arguments import Arguments, field_names, near_argument, split_arguments
from lmms_mtv.harness.hf_config import HfConfig
from lmms_mtv.runtime.devices import check_device
from lmms_mtv.vectors import HEADS

_OF_ARMS: Final = ("method", HEADS)
"""Arguments of the plugin that an arm can take or leave, as it takes or leaves a setting of a method."""


@dataclass(frozen=True)
class ArmArguments:
    """Model arguments of a comparison.

    Attributes:
        shared: arguments of the loaded model: those of the plugin and of the base that all arms share.
        arms: the further arguments of each arm: its own, and the settings for all arms that its method has.
        left_out: for each setting for all arms that some arms lack: the names of these arms.
    """

    shared: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, Sequence[str]]


def arm_arguments(
    common: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], base: Sequence[str]
) -> ArmArguments:
    """Return the model arguments of all arms, after a check of each.

    A setting of a method in ``common`` applies to the arms whose method has the setting.

    Args:
        common: model arguments for all arms.
        arms: model arguments of each arm.
        base: the names that the base knows.

    Raises:
        ArgumentError: an argument is unknown, wrong, or belongs to the loaded model; or no arm has a setting for all
            arms. The message names the arm.
    """
    of_model = [name for name in (*field_names(Arguments), *base) if name not in _OF_ARMS]
    shared = {name: value for name, value in common.items() if name in of_model}
    settings = {name: value for name, value in common.items() if name not in of_model}
    completed, takers = {}, {name: list[str]() for name in settings}
    for arm, own in arms.items():
        with _naming(arm):
            taken = {name: settings[name] for name in _known_settings(settings, own)}
            completed[arm] = {**taken, **own}
            check_arm(own, base)
            split_arguments({**shared, **completed[arm]}, base)
        for name in taken:
            takers[name].append(arm)
    for name, of in takers.items():
        if not of and name != "method":
            known = {setting for own in arms.values() for setting in _method({**settings, **own}).settings()}
            hint = near_argument(name, {*known, *of_model})
            raise ArgumentError(
                f"unknown model argument {name!r}.{hint} Neither mtv nor the base has it, nor the method of any arm "
                f"({', '.join(arms)})."
            )
    left_out = {name: [arm for arm in arms if arm not in of] for name, of in takers.items() if len(of) < len(arms)}
    return ArmArguments(shared, completed, {name: lacking for name, lacking in left_out.items() if name != "method"})


def check_arm(own: Mapping[str, Any], base: Sequence[str]) -> None:
    """Check that no argument of an arm belongs to the loaded model.

    Args:
        own: the arguments of the arm.
        base: the names that the base knows.

    Raises:
        ArgumentError: an argument belongs to the base.
    """
    if fixed := sorted(key for key in own if key in base or key in ("base", "decoder")):
        raise ArgumentError(f"{', '.join(fixed)}: one model is loaded for all arms, so this belongs to the model")


def check_early(common: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the arguments of a run before a harness is imported, which takes longer than the check.

    Only arguments of the base of this package are checked: those of other bases are known to the harness.

    Args:
        common: model arguments for all arms, or for a run without arms.
        arms: model arguments of each arm.

    Raises:
        ArgumentError: an argument is unknown or wrong.
    """
    if common.get("base", Arguments.base) != Arguments.base:
        return
    names = field_names(HfConfig)
    if arms:
        arm_arguments(common, arms, names)
    else:
        split_arguments(common, names)
    config = HfConfig(**{name: value for name, value in common.items() if name in names})
    check_device(config.device)


def _known_settings(settings: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings for all arms that an arm with arguments of its ``own`` takes."""
    if "vector" in own:
        return []
    method = _method({**settings, **own})
    method.refuse_moved(settings)
    known = method.settings()
    return [name for name in settings if name == "method" or name in known]


def _method(arguments: Mapping[str, Any]) -> methods.Method:
    return methods.get(arguments.get("method", Arguments.method))


@contextmanager
def _naming(arm: str) -> Iterator[None]:
    """Put the name of an arm in front of the message of an :class:`ArgumentError` inside the block."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"arm {arm!r}: {error}") from error
