"""``lmms-mtv doctor``: versions, device, folders and bases of this installation."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_mtv.errors import MtvError
from lmms_mtv.runtime import environment


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show versions, device, folders and bases of this installation",
        description="Show the versions of the libraries beside the supported and tested versions, the device and its "
        "memory, the folders of the data and of the vector library, and the bases that import. The exit status is 1 if "
        "the version of a library is not supported.",
    )
    parser.add_argument(
        "--no-bases", action="store_true", help="leave out the bases, because their import takes a minute"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    libraries = environment.libraries()
    wrong, newer = environment.problem(libraries), environment.newer(libraries)
    _show(f"lmms-mtv {version(environment.PACKAGE)}", _system())
    _show("libraries", (_library(library) for library in libraries))
    _show("device", _device())
    _show("folders", _folders())
    if not arguments.no_bases:
        _show("bases", ["not checked, because lmms-eval may not import"] if wrong else _bases())
    if newer is not None:
        _show("warning", [newer])
    if wrong is not None:
        raise SystemExit(f"lmms-mtv: {wrong}")


def _show(title: str, lines: Iterator[str] | list[str]) -> None:
    """Write a title and the lines below it, indented."""
    sys.stdout.write(f"{title}\n")
    for line in lines:
        sys.stdout.write(f"  {line}\n")
    sys.stdout.flush()


def _system() -> list[str]:
    return [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}: {sys.prefix}"]


def _library(library: environment.RequiredLibrary) -> str:
    installed = "missing" if library.installed is None else str(library.installed)
    state = "not supported" if not library.is_supported else "newer than tested" if library.is_newer else "ok"
    tested = str(library.tested).removeprefix("==") or "-"
    return f"{library.name:<18}{installed:<14}{state:<19}supported {library.supported}; tested {tested}"


def _device() -> Iterator[str]:
    try:
        import torch
    except ImportError as error:
        yield f"unknown: torch does not import ({error})"
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index} {torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} GiB free"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    memory_text = "" if memory is None else f", {_gib(memory)} GiB of memory"
    yield f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads{memory_text}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _folders() -> Iterator[str]:
    from lmms_mtv.data.source import FOLDER
    from lmms_mtv.vectors.library import Library
    from lmms_mtv.vectors.library.place import VARIABLE

    if data := os.environ.get(FOLDER):
        folder = Path(data).expanduser()
        tasks = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else None
        yield f"data     {data} ({FOLDER}): {'no such folder' if tasks is None else ', '.join(tasks) or 'empty'}"
    else:
        yield f"data     from the hub ({FOLDER} is not set)"
    library = Library()
    try:
        library.check_writable()
        state = f"{len(library.entries())} vectors"
    except MtvError as error:
        state = str(error)
    yield f"library  {library.root} ({VARIABLE} sets another folder): {state}"


def _bases() -> Iterator[str]:
    from lmms_mtv.harness.lmms import bases

    logging.disable(logging.ERROR)
    try:
        import_errors = bases.survey()
    finally:
        logging.disable(logging.NOTSET)
    usable = [name for name, reason in import_errors.items() if reason is None]
    yield from _wrap(f"{len(usable)} import: {', '.join(usable)}")
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in import_errors.items():
        if reason is not None:
            names_by_reason.setdefault(reason, []).append(name)
    for reason, names in sorted(names_by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        yield from _wrap(f"{', '.join(names)}: {reason}")


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
