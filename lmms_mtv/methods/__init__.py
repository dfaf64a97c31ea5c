"""The methods, one file each, found in this folder and in the entry points of the group ``lmms_mtv.methods``.

The module of a method has ``Config``, a frozen dataclass of its settings, and ``fit(session, config)``, which returns a
:class:`Fitted`.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from lmms_mtv.errors import ArgumentError, MethodError, unknown
from lmms_mtv.fit.session import FitSession
from lmms_mtv.vectors import Edit

logger = logging.getLogger(__name__)

GROUP = "lmms_mtv.methods"
"""Entry-point group of methods from other packages: the name of the method and its module."""

_UNIONS = (types.UnionType, typing.Union)
"""Types of ``X | None``, with and without a Literal in the union."""

_FIRST = ("none", "mtv", "random")

_Points = dict[str, list[EntryPoint]]
"""Entry points of other packages, by the name of the method."""


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Attributes:
        edits: the edits by stream.
        losses: the losses by name, for the card.
    """

    edits: Mapping[str, Edit] = field(default_factory=dict)
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Setting(NamedTuple):
    """A setting of a method. ``kind`` is the type in words."""

    name: str
    kind: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: the name of the method.
        config: the class of the settings.
        fit: the function that fits a vector.
        summary: the first paragraph of the documentation, with the paper.
        moved: former settings of the method, with the arguments that replace them: ``MOVED`` of the method's module, if
            the module has it.
        control: True if the method is a control, whose vectors may be worse than no vector: ``CONTROL`` of the method's
            module, if the module has it.
    """

    name: str
    config: type[Any]
    fit: Callable[[FitSession[Any], Any], Fitted]
    summary: str = ""
    moved: Mapping[str, str] = field(default_factory=dict)
    control: bool = False

    def settings(self) -> tuple[str, ...]:
        """Return the names of the settings, the fields of the configuration."""
        return tuple(f.name for f in dataclasses.fields(self.config))

    def described(self) -> list[Setting]:
        """Return the settings with their types, defaults and meanings."""
        hints = typing.get_type_hints(self.config)
        return [
            Setting(f.name, _called(hints[f.name]), f.default, str(f.metadata.get("help", "")))
            for f in dataclasses.fields(self.config)
        ]

    def refuse_moved(self, names: Iterable[str]) -> None:
        """Check that no name is a former setting of the method.

        Raises:
            ArgumentError: one of ``names`` is a former setting.
        """
        for name in names:
            if name in self.moved:
                raise ArgumentError(f"method {self.name} has no setting {name}= any more: pass {self.moved[name]}")

    def configure(self, values: Mapping[str, Any]) -> Any:
        """Return the configuration with ``values`` for the fields that they name.

        The text ``None``, which a command line gives for None, is None where no text is expected.

        Raises:
            ArgumentError: a name or a type is wrong.
        """
        self.refuse_moved(values)
        hints = typing.get_type_hints(self.config)
        settings = {}
        for name, value in values.items():
            if name not in hints:
                raise unknown(f"setting of method {self.name}", name, self.settings())
            hint = hints[name]
            settings[name] = None if value == "None" and not _fits(value, hint) and _fits(None, hint) else value
            if not _fits(settings[name], hint):
                raise ArgumentError(f"{name}={value!r} of method {self.name}: expected {_called(hint)}")
        return self.config(**settings)


def names() -> list[str]:
    """Return the names of the registered methods: ``none``, ``mtv``, ``random``, then the others. Load none of them."""
    return _names(_points())


def own() -> list[str]:
    """Return the names of the methods of this package."""
    return _names({})


def get(name: str) -> Method:
    """Return the method called ``name``.

    A method of this package wins over a method of another package with the same name, and a warning is logged.

    Raises:
        ArgumentError: there is no such method; the message has the nearest name.
        MethodError: the package of the method cannot be used.
    """
    return _get(name, _points())


def _names(points: _Points) -> list[str]:
    return [*_FIRST, *sorted((_own() | points.keys()) - set(_FIRST))]


def _get(name: str, points: _Points) -> Method:
    own = _own()
    if name not in own | points.keys():
        raise unknown("method", name, _names(points))
    if name in own:
        for point in points.get(name, ()):
            logger.warning("method %s is that of lmms-mtv; the one of %s needs another name", name, _origin(point))
        module = importlib.import_module(f"{__name__}.{name}")
    else:
        module = _loaded(name, points[name])
    summary = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    moved, control = getattr(module, "MOVED", {}), getattr(module, "CONTROL", False)
    return Method(name, module.Config, module.fit, summary, moved, control)


def _own() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _points() -> _Points:
    """Return the entry points of other packages, by a search of all installed packages."""
    points: _Points = {}
    for point in entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    return points


def _origin(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist is not None else f"entry point {point.value}"


def _loaded(name: str, points: Sequence[EntryPoint]) -> types.ModuleType:
    """Return the module of a method of another package, after a check that the module has ``Config`` and ``fit``."""
    if len(points) > 1:
        origins = " and ".join(sorted(map(_origin, points)))
        raise MethodError(f"method {name} comes from {origins}: uninstall all but one of them")
    (point,) = points
    mend = "install a version of it that works with this lmms-mtv, or uninstall it"
    try:
        module: types.ModuleType = point.load()
    # The code of another package may raise anything.
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise MethodError(f"method {name} of {_origin(point)} cannot be loaded ({told}): {mend}") from error
    # A dataclass has its parameters under this name.
    frozen = getattr(getattr(getattr(module, "Config", None), "__dataclass_params__", None), "frozen", False)
    lacking = [
        *(() if frozen else ["a frozen dataclass Config"]),
        *(() if callable(getattr(module, "fit", None)) else ["a function fit(session, config)"]),
    ]
    if lacking:
        raise MethodError(f"method {name} of {_origin(point)}: {point.value} lacks {' and '.join(lacking)}: {mend}")
    return module


def _fits(value: object, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in _UNIONS:
        return any(_fits(value, option) for option in typing.get_args(hint))
    if (container := typing.get_origin(hint)) is not None:
        return isinstance(value, container)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def _called(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in _UNIONS:
        return " or ".join(_called(option) for option in typing.get_args(hint) if option is not types.NoneType)
    return getattr(hint, "__name__", str(hint))
