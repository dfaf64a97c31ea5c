"""The model arguments: arguments of this plugin, settings of the method, and arguments of the base."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from lmms_mtv import methods
from lmms_mtv.errors import ArgumentError
from lmms_mtv.methods import Method
from lmms_mtv.runtime.settings import check_whole
from lmms_mtv.vectors import HEADS, TaskVector


@dataclass(frozen=True)
class Arguments:
    """The plugin's own model arguments.

    Attributes:
        base: the model that answers.
        method: the name of the method that fits the task vector.
        shots: demonstrations in every evaluated prompt; None takes ``--num_fewshot``.
        vector: a vector to use instead of a fit: a file or another reference that
            :meth:`~lmms_mtv.vectors.library.Library.resolve` knows.
        heads: a vector whose heads are used, while the values are fitted for this task.
        library: the folder of the vector library.
        reuse: True takes a vector of the same recipe from the library instead of a new fit.
        demonstrations: the split of the task's dataset, or ``path:split``, for the fit and for shots; None takes the
            split that the task declares.
        wrong: the share of the demonstrations that get a wrong answer.
        seed: the seed of everything random.
        decoder: the dotted name of the module with the decoder's blocks, for models where the module is not found.
        cache_gb: memory for prefilled prompts during a fit, on the model's device, in GB.
    """

    base: str = "hf"
    method: str = "mtv"
    shots: int | None = None
    vector: str | None = None
    heads: str | None = None
    library: str | None = None
    reuse: bool = True
    demonstrations: str | None = None
    wrong: float = 0.0
    seed: int = 0
    decoder: str | None = None
    cache_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.shots is not None:
            check_whole("shots", self.shots)
        for name in ("vector", "heads", "library", "demonstrations", "decoder"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ArgumentError(
                    f"{name}={value!r} is of type {type(value).__name__}, expected text: put it in quotes"
                )
        check_whole("seed", self.seed)
        if not isinstance(self.reuse, bool):
            raise ArgumentError(f"reuse={self.reuse!r}, expected True or False")
        if not isinstance(self.wrong, int | float) or not 0 <= self.wrong <= 1:
            raise ArgumentError(f"wrong={self.wrong!r}, expected a share of the demonstrations between 0 and 1")
        if not isinstance(self.cache_gb, int | float) or self.cache_gb < 0:
            raise ArgumentError(f"cache_gb={self.cache_gb!r}, expected a number of gigabytes, 0 or more")


def validate(arguments: Arguments) -> None:
    """Open the files that ``vector`` and ``heads`` name, if they name files: an error shows before a model is loaded.

    Raises:
        VectorFileError: a file cannot be used.
    """
    for reference in (arguments.vector, arguments.heads):
        if reference is not None and Path(reference).is_file():
            TaskVector.load(reference)


_TEXT: Final = (
    "vector",
    "heads",
    "library",
    "demonstrations",
    "decoder",
    "pretrained",
    "revision",
    "peft",
    "tokenizer",
)
"""Arguments that are text even if they look like a number, such as an id of digits."""


def with_text_restored(parsed: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the model arguments of a command line, with text arguments as text again.

    The harnesses make a number of any text that looks like a number: of the reference ``0012`` the number 12.

    Args:
        parsed: the model arguments as the harness parsed them.
        text: ``name=value,name=value``.
    """
    pairs = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    texts = {name.strip(): value.strip() for name, value in pairs.items()}
    return {
        name: texts[name] if name in _TEXT and name in texts and not isinstance(value, str | None) else value
        for name, value in parsed.items()
    }


def field_names(config: type[Any]) -> tuple[str, ...]:
    """Return the fields of a configuration class."""
    return tuple(field.name for field in dataclasses.fields(config))


def near_argument(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that asks if the nearest of the ``known`` names was meant; empty if none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class SplitArguments(NamedTuple):
    """Model arguments by owner: the plugin, the method with its settings, and the base."""

    plugin: Arguments
    method: Method
    settings: dict[str, Any]
    base: dict[str, Any]


def split_arguments(
    model_args: Mapping[str, Any], base: Sequence[str], own: Sequence[str] | None = None
) -> SplitArguments:
    """Return model arguments by owner.

    Args:
        model_args: model arguments by name.
        base: the names that the base knows.
        own: the names of the plugin's arguments that a harness takes; all by default.

    Raises:
        ArgumentError: a name has no owner (the message has all names), or arguments contradict each other.
    """
    own = field_names(Arguments) if own is None else own
    arguments = Arguments(**{key: model_args[key] for key in own if key in model_args})
    method = methods.get(arguments.method)
    # A method with a setting heads gets the heads of heads=.
    of_method = tuple(name for name in method.settings() if name not in own)
    known = {"mtv": own, f"method {method.name}": of_method, "base": base}
    method.refuse_moved(key for key in model_args if key not in (*own, *base))
    for key in model_args:
        if not any(key in group for group in known.values()):
            hint = near_argument(key, [name for group in known.values() for name in group])
            listed = "; ".join(f"{owner}: {', '.join(group) or 'nothing'}" for owner, group in known.items())
            raise ArgumentError(f"unknown model argument {key!r}.{hint} Known to {listed}.")
    settings = {key: model_args[key] for key in of_method if key in model_args}
    if arguments.vector is not None and (fixed := [key for key in ("method", *settings) if key in model_args]):
        raise ArgumentError(
            f"vector={arguments.vector} carries its own method and settings: leave out {', '.join(fixed)}, or vector= "
            "to fit anew"
        )
    if arguments.heads is not None and (arguments.vector is not None or HEADS not in method.settings()):
        other = f"vector={arguments.vector}" if arguments.vector is not None else f"method={method.name}"
        raise ArgumentError(f"heads={arguments.heads} is for methods that choose heads, and does not go with {other}")
    method.configure(settings)
    return SplitArguments(arguments, method, settings, {key: model_args[key] for key in base if key in model_args})
