"""The versions of the libraries around this package: installed, supported, and tested.

Supported versions are the bounds of ``pyproject.toml``, as the installed package carries them. Tested versions are
the versions in ``constraints.txt``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lmms_mtv.errors import InstallationError

PACKAGE: Final = "lmms-mtv"

WATCHED: Final = ("filelock", "lm-eval", "lmms-eval", "torch", "transformers")
"""Libraries whose internals this package or the harness uses. An untested version gives a warning."""

COUNTING: Final = ("lmms-mtv", "lmms-eval", "lm-eval", "torch", "transformers")
"""Packages on which a number depends."""


def versions() -> dict[str, str]:
    """Return the versions of the packages on which a number depends."""
    return {package: importlib.metadata.version(package) for package in COUNTING}


@dataclass(frozen=True)
class RequiredLibrary:
    """One library that this package needs.

    Attributes:
        name: name of the library.
        installed: the installed version, None if the library is missing.
        supported: the bounds of this package.
        tested: the tested versions, a single version or a range; empty if unknown.
    """

    name: str
    installed: Version | None
    supported: SpecifierSet
    tested: SpecifierSet

    @property
    def is_supported(self) -> bool:
        """True if the installed version is within the bounds."""
        return self.installed is not None and self.supported.contains(self.installed, prereleases=True)

    @property
    def is_newer(self) -> bool:
        """True if the installed version is newer than all tested versions."""
        if self.installed is None or self.tested.contains(self.installed, prereleases=True):
            return False
        bounds = [Version(bound.version) for bound in self.tested if not bound.version.endswith(".*")]
        return bool(bounds) and self.installed > max(bounds)


def libraries() -> list[RequiredLibrary]:
    """Return the libraries that this package needs without its extras, in alphabetical order."""
    tested = {requirement.name: requirement.specifier for requirement in _tested()}
    needed = (Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ())
    needed = (one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""}))
    return [
        RequiredLibrary(one.name, _installed(one.name), one.specifier, tested.get(_normal(one.name), SpecifierSet()))
        for one in sorted(needed, key=lambda one: one.name)
    ]


def problem(required: Sequence[RequiredLibrary]) -> str | None:
    """Return one line with the unsupported libraries and the command that installs supported versions, or None."""
    wrong = [library for library in required if not library.is_supported]
    if not wrong:
        return None
    listed = ", ".join(
        f"{library.name} {library.installed or 'is missing'} (supported: {library.supported})" for library in wrong
    )
    mend = " ".join(f"'{library.name}{library.supported}'" for library in wrong)
    return f"lmms-mtv cannot work with {listed}: python -m pip install {mend}"


def newer(required: Sequence[RequiredLibrary]) -> str | None:
    """Return one line with the libraries of :data:`WATCHED` that are newer than the tested versions, or None."""
    listed = [
        f"{library.name} {library.installed} (tested: {library.tested})"
        for library in required
        if library.name in WATCHED and library.is_newer
    ]
    if not listed:
        return None
    return f"newer than what lmms-mtv {importlib.metadata.version(PACKAGE)} was tested with: {', '.join(listed)}"


def check() -> None:
    """Check the versions of the libraries that this package needs.

    Raises:
        InstallationError: a library is missing, or its version is not supported. The message is one line.
    """
    if (line := problem(libraries())) is not None:
        raise InstallationError(line)


def _tested() -> Iterator[Requirement]:
    """Yield the requirements in ``constraints.txt`` for this Python and this system."""
    package = Path(__file__).resolve().parents[1]
    # The file is inside an installed package, or at the root of the repository in an editable installation.
    places = (folder / "constraints.txt" for folder in (package, package.parent))
    file = next((place for place in places if place.is_file()), None)
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None else ():
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                requirement.name = _normal(requirement.name)
                yield requirement


def _installed(name: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    """Return the normalised name, by which package indexes compare names."""
    return name.lower().replace("_", "-").replace(".", "-")
