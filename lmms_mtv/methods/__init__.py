"""The methods: one file each, found by listing this folder and the entry points of the group ``lmms_mtv.methods``.

A method's module has ``Config``, a frozen dataclass of its settings, and ``fit(session, config)``, which returns a
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
"""Entry-point group of methods from other packages: name of the method = its module."""

_UNIONS = (types.UnionType, typing.Union)
"""How ``X | None`` is written, with and without a Literal in it."""

_FIRST = ("none", "mtv", "random")

_Points = dict[str, list[EntryPoint]]
"""Entry points of other packages, by the name of the method."""


@dataclass(frozen=True)
class Fitted:
    """What a fit gives: edits by stream, and losses by name for the card."""

    edits: Mapping[str, Edit] = field(default_factory=dict)
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Setting(NamedTuple):
    """A setting of a method: ``kind`` is the type in words."""

    name: str
    kind: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Method:
    """A registered method.

    ``summary`` is the first line of its documentation, with the paper. ``moved`` are names of settings that the method
    once had, with the arguments that replace them: the method's module has them as ``MOVED``, if there are any.
    """

    name: str
    config: type[Any]
    fit: Callable[[FitSession[Any], Any], Fitted]
    summary: str = ""
    moved: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> tuple[str, ...]:
        """Return the names of its configuration's fields."""
        return tuple(f.name for f in dataclasses.fields(self.config))

    def described(self) -> list[Setting]:
        """Return the settings with their types, their defaults and what they mean."""
        hints = typing.get_type_hints(self.config)
        return [
            Setting(f.name, _called(hints[f.name]), f.default, str(f.metadata.get("help", "")))
            for f in dataclasses.fields(self.config)
        ]

    def refuse_moved(self, names: Iterable[str]) -> None:
        """Raise :class:`ArgumentError` if one of ``names`` is a setting that the method no longer has."""
        for name in names:
            if name in self.moved:
                raise ArgumentError(f"method {self.name} has no setting {name}= any more: pass {self.moved[name]}")

    def configure(self, values: Mapping[str, Any]) -> Any:
        """Return the configuration with ``values`` for the fields that they name.

        Raises :class:`ArgumentError` on a wrong name or type.
        """
        self.refuse_moved(values)
        hints = typing.get_type_hints(self.config)
        for name, value in values.items():
            if name not in hints:
                raise unknown(f"setting of method {self.name}", name, self.settings())
            if not _fits(value, hints[name]):
                raise ArgumentError(f"{name}={value!r} of method {self.name}: expected {_called(hints[name])}")
        return self.config(**values)


def names() -> list[str]:
    """Return the registered methods: ``none``, ``mtv``, ``random``, then the others, none of which is loaded for it."""
    return _names(_points())


def own() -> list[str]:
    """Return the methods of this package."""
    return _names({})


def get(name: str) -> Method:
    """Return the method called ``name``. One of this package wins over another package's, and a warning says so.

    Raises :class:`ArgumentError`, with the nearest name, if there is none, and :class:`MethodError` if the package
    that it comes from cannot be used.
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
    return Method(name, module.Config, module.fit, summary, getattr(module, "MOVED", {}))


def _own() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _points() -> _Points:
    """Return the entry points of other packages, which takes a look at every installed one."""
    points: _Points = {}
    for point in entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    return points


def _origin(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist is not None else f"entry point {point.value}"


def _loaded(name: str, points: Sequence[EntryPoint]) -> types.ModuleType:
    """Return the module of a method of another package, once it has what a method has."""
    if len(points) > 1:
        origins = " and ".join(sorted(map(_origin, points)))
        raise MethodError(f"method {name} comes from {origins}: uninstall all but one of them")
    (point,) = points
    mend = "install a version of it that works with this lmms-mtv, or uninstall it"
    try:
        module: types.ModuleType = point.load()
    # Whatever the code of another package raises.
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise MethodError(f"method {name} of {_origin(point)} cannot be loaded ({told}): {mend}") from error
    # A frozen dataclass has its parameters under this name.
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
