"""The official files of a data set: found in a folder, as archives or unpacked, checked and taken out."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from lmms_mtv.errors import DataError


@dataclass(frozen=True)
class File:
    """An official file: its name, the folder it unpacks to, its checksum where it is known, and where it comes from."""

    name: str
    url: str
    unpacked: str = ""
    md5: str = ""
    sha256: str = ""


class Member(NamedTuple):
    """A file inside an archive or a folder, and what opens it. Names are unique without their folders."""

    name: str
    size: int
    open: Callable[[], Any]


@dataclass
class Official:
    """One preparation: official files in ``source``, the task's data in ``output``.

    ``partial``: the files hold only a part of the official data, so that counts and checksums are not compared.
    ``seed`` and ``regenerate``: of what is drawn here instead of taken from published files. ``used`` collects what
    was read, with checksums or sizes; ``remarks`` what users of the data should know.
    """

    task: str
    source: Path
    output: Path
    partial: bool = False
    seed: int = 0
    regenerate: bool = False
    progress: bool = True
    used: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    _planned: dict[File, dict[str, None]] = field(default_factory=dict)

    def find(self, file: File) -> Path:
        """Return the file, or the folder it unpacks to: in the source folder, or in one folder inside it.

        Raises :class:`DataError` if there is none, or more than one, or it is another file than expected.
        """
        for name in filter(None, (file.name, file.unpacked)):
            here = self.source / name
            found = [here] if here.exists() else sorted(self.source.glob(f"*/{name}"))
            if len(found) > 1:
                raise DataError(
                    f"{self.source} has more than one {name} ({', '.join(map(str, found))}): pass --source with the "
                    "folder of the one that is meant"
                )
            if found:
                self._check(file, found[0])
                return found[0]
        unpacked = f", nor {file.unpacked}" if file.unpacked else ""
        raise DataError(
            f"{self.source} has no {file.name}{unpacked}: download {file.url} into it and run the same command again"
        )

    def has(self, file: File) -> bool:
        """Return whether there is one for :meth:`find` to find."""
        names = filter(None, (file.name, file.unpacked))
        return any((self.source / name).exists() or any(self.source.glob(f"*/{name}")) for name in names)

    def json(self, file: File, member: str = "") -> Any:
        """Return the content of a JSON file: of ``member`` in an archive or folder, or of ``file`` itself."""
        return json_in(self.find(file), member or file.name, file.url)

    def texts(self, file: File, names: Collection[str]) -> dict[str, str]:
        """Return the contents of members, by name."""
        path, found = self.find(file), {}
        with _members(path) as members:
            for member in members:
                if member.name in names:
                    with member.open() as stream:
                        found[member.name] = stream.read().decode()
        self._complete(file, path, set(names) - found.keys(), len(names))
        return found

    def images(self, file: File, names: Iterable[str]) -> dict[str, str]:
        """Return the paths, relative to ``output``, at which :meth:`extract` will put members of an archive or a
        folder.
        """
        self.find(file)
        wanted = dict.fromkeys(names)
        self._planned.setdefault(file, {}).update(wanted)
        return {name: f"images/{name}" for name in wanted}

    def extract(self) -> None:
        """Take out everything that was asked for by :meth:`images`; files already there are left.

        Raises :class:`DataError` if one is missing.
        """
        for file, names in self._planned.items():
            path, missing = self.find(file), set(names)
            (self.output / "images").mkdir(parents=True, exist_ok=True)
            bar = tqdm(total=len(names), desc=f"{path.name} -> images", disable=not self.progress, dynamic_ncols=True)
            with bar, _members(path) as members:
                for member in members:
                    if member.name in missing:
                        _place(member, self.output / "images" / member.name)
                        missing.remove(member.name)
                        bar.update()
                        if not missing:
                            break
            self._complete(file, path, missing, len(names))

    def _complete(self, file: File, path: Path, missing: set[str], wanted: int) -> None:
        if missing:
            few = ", ".join(sorted(missing)[:3])
            raise DataError(
                f"{path} lacks {len(missing)} of the {wanted} files that task {self.task} needs, such as {few}: "
                f"download {file.url} again and run the same command"
            )

    def _check(self, file: File, path: Path) -> None:
        if str(path) in self.used:
            return
        if path.is_dir():
            self.used[str(path)] = "unpacked"
            return
        kind, expected = ("md5", file.md5) if file.md5 else ("sha256", file.sha256)
        if not expected or self.partial:
            self.used[str(path)] = f"{path.stat().st_size} bytes"
            return
        found = checksum(path, kind, self.progress)
        if found != expected:
            raise DataError(
                f"{path} has {kind} {found}, expected {expected}: download {file.url} again (or pass --partial if it "
                "holds a part of the data on purpose)"
            )
        self.used[str(path)] = f"{kind}:{found}"


def checksum(path: Path, kind: str, progress: bool = False) -> str:
    """Hexadecimal digest of a file."""
    digest, size = hashlib.new(kind), path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"Checking {path.name}", disable=not progress, leave=False)
    with path.open("rb") as stream, bar:
        while block := stream.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def json_in(path: Path, name: str, url: str) -> Any:
    """Return the content of the JSON file ``name``: ``path`` itself, or a member of an archive or a folder."""
    if path.name == name:
        return parsed(path.read_bytes(), path)
    with _members(path) as members:
        for member in members:
            if member.name == name:
                with member.open() as stream:
                    return parsed(stream.read(), path / name)
    raise DataError(f"{path} has no {name} inside: download {url} again")


def parsed(content: bytes, path: Path) -> Any:
    """``content`` as JSON. Raises :class:`DataError`, with the path, if it is not."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): download it again") from error


@contextmanager
def _members(path: Path) -> Iterator[Iterator[Member]]:
    """The files of a folder, a zip or a tar, in its own order."""
    try:
        if path.is_dir():
            # Folders may be links, as they often are where data sets are shared.
            files = (Path(at, name) for at, _, names in os.walk(path, followlinks=True) for name in sorted(names))
            yield (Member(p.name, p.stat().st_size, functools.partial(p.open, "rb")) for p in files)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                infos = (info for info in archive.infolist() if not info.is_dir())
                yield (Member(Path(i.filename).name, i.file_size, functools.partial(archive.open, i)) for i in infos)
        else:
            with tarfile.open(path) as tar:
                regular = (info for info in tar if info.isfile())
                yield (Member(Path(i.name).name, i.size, functools.partial(_taken, tar, i)) for i in regular)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no intact archive ({error}): download it again") from error


def _taken(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(info)
    if stream is None:
        raise tarfile.ReadError(f"{info.name} is no regular file")
    return stream


def _same(member: Member, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != member.size:
        return False
    with member.open() as stream, path.open("rb") as file:
        return all(stream.read(1 << 20) == block for block in iter(lambda: file.read(1 << 20), b""))


def _place(member: Member, path: Path) -> None:
    """Make ``path`` a copy of a member, whole or not at all; one that is there already is left."""
    if _same(member, path):
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with member.open() as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
