"""Everything that can go wrong, by what the reader has to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MtvError(Exception):
    """Base of all errors of this package. The message says what was found, what was expected, and what mends it."""


class ArgumentError(MtvError, ValueError):
    """An argument is unknown, or its value cannot be used."""


class InstallationError(MtvError):
    """A library around this package is missing, or of a version that cannot work."""


class MethodError(MtvError):
    """A method of another package cannot be used: it does not load, or lacks what a method has."""


class DiscoveryError(MtvError):
    """The attention heads of a model could not be found with certainty."""


class GeometryError(MtvError):
    """A vector does not fit the model it is applied to."""


class VectorFileError(MtvError):
    """A file is not a task vector, or not an intact one."""


class LibraryError(VectorFileError):
    """The vector library cannot be read or written, or something in it is not where it belongs."""


class HubError(MtvError):
    """The hub cannot be reached, does not let in, or has no vector there."""


class NumericsError(MtvError):
    """NaN or infinity where a finite number was expected."""


class HookError(MtvError):
    """A hook could not do its work: the model ran in a way that the edit cannot follow."""


class DataError(MtvError):
    """Training examples are missing, too few, or cannot be read."""


class DocumentError(DataError):
    """One document cannot be shown to a model, as with an image that is missing, damaged or too large."""


class LeakageError(DataError):
    """Examples that are evaluated would have been used for fitting."""


class MemoryLimitError(MtvError):
    """A forward does not fit the memory."""


class ResultsError(MtvError):
    """Stored results are not what they say, or what runs again gives something else."""


class ContextLengthError(MtvError):
    """A prompt is longer than the model's context."""


def unknown(kind: str, name: str, known: Iterable[str], listing: str | None = None) -> ArgumentError:
    """Return the error for a ``name`` that is none of the ``known`` ones, with the nearest of them if one is near.

    Args:
        kind: the kind of the name, in words.
        name: the unknown name.
        known: the known names.
        listing: the command that lists the known names, where they are too many for a message: the message then has
            the command and at most five near names.
    """
    choices = sorted(known)
    if listing is not None:
        near = difflib.get_close_matches(name, choices, n=5)
        hint = f" Near it: {', '.join(near)}." if near else ""
        return ArgumentError(f"unknown {kind} {name!r}.{hint} `{listing}` lists all {len(choices):,}.")
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ArgumentError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(choices)}.")
