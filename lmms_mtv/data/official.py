"""The official files of a data set: search, checks and extraction, from archives or unpacked folders."""

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
    """An official file.

    Attributes:
        name: file name.
        url: address of the download.
        unpacked: name of the folder or file that the archive unpacks to; empty for other files.
        md5: MD5 in hexadecimal digits; empty if unknown.
        sha256: SHA-256 in hexadecimal digits; empty if unknown.
    """

    name: str
    url: str
    unpacked: str = ""
    md5: str = ""
    sha256: str = ""


class Member(NamedTuple):
    """A file inside an archive or a folder: name without folders, size in bytes, and a function that opens the file."""

    name: str
    size: int
    open: Callable[[], Any]


@dataclass
class Official:
    """The conversion of official files to the data of a task.

    Attributes:
        task: name of the task.
        source: folder of the official files.
        output: folder of the data of the task.
        partial: True if the files are a part of the official data; counts and checksums are then not checked.
        seed: seed of drawn episodes and splits.
        regenerate: True to draw episodes instead of reading the files of the paper.
        progress: True to show progress bars.
        used: the files that were read, with their checksums or sizes.
        remarks: remarks for the users of the data.
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
        """Return the path of a file, or of its unpacked folder, in the source folder or one folder below.

        Raises:
            DataError: the file is missing, there are several, or its checksum differs.
        """
        for name in filter(None, (file.name, file.unpacked)):
            path = self.source / name
            candidates = [path] if path.exists() else sorted(self.source.glob(f"*/{name}"))
            if len(candidates) > 1:
                raise DataError(
                    f"{self.source} has more than one {name} ({', '.join(map(str, candidates))}): pass --source with "
                    "the folder of the right file"
                )
            if candidates:
                self._check(file, candidates[0])
                return candidates[0]
        unpacked = f", nor {file.unpacked}" if file.unpacked else ""
        raise DataError(
            f"{self.source} has no {file.name}{unpacked}: download {file.url} into it and run the same command again"
        )

    def has(self, file: File) -> bool:
        """Return True if the source folder has the file."""
        names = filter(None, (file.name, file.unpacked))
        return any((self.source / name).exists() or any(self.source.glob(f"*/{name}")) for name in names)

    def json(self, file: File, member: str = "") -> Any:
        """Return the content of ``member`` in an archive or a folder, or of ``file``, parsed as JSON."""
        return json_in(self.find(file), member or file.name, file.url)

    def texts(self, file: File, names: Collection[str]) -> dict[str, str]:
        """Return the text of members of an archive or a folder, by name."""
        path, texts = self.find(file), {}
        with _members(path) as members:
            for member in members:
                if member.name in names:
                    with member.open() as stream:
                        texts[member.name] = stream.read().decode()
        self._check_complete(file, path, set(names) - texts.keys(), len(names))
        return texts

    def images(self, file: File, names: Iterable[str]) -> dict[str, str]:
        """Plan the extraction of images, and return their future paths relative to ``output``, by name."""
        self.find(file)
        requested = dict.fromkeys(names)
        self._planned.setdefault(file, {}).update(requested)
        return {name: f"images/{name}" for name in requested}

    def extract(self) -> None:
        """Extract the images that :meth:`images` planned; equal files in the output folder stay.

        Raises:
            DataError: an image is missing.
        """
        for file, names in self._planned.items():
            path, missing = self.find(file), set(names)
            (self.output / "images").mkdir(parents=True, exist_ok=True)
            bar = tqdm(total=len(names), desc=f"{path.name} -> images", disable=not self.progress, dynamic_ncols=True)
            with bar, _members(path) as members:
                for member in members:
                    if member.name in missing:
                        _extract_member(member, self.output / "images" / member.name)
                        missing.remove(member.name)
                        bar.update()
                        if not missing:
                            break
            self._check_complete(file, path, missing, len(names))

    def _check_complete(self, file: File, path: Path, missing: set[str], expected: int) -> None:
        """Check that no members are missing.

        Raises:
            DataError: members are missing.
        """
        if missing:
            few = ", ".join(sorted(missing)[:3])
            raise DataError(
                f"{path} lacks {len(missing)} of the {expected} files that task {self.task} needs, such as {few}: "
                f"download {file.url} again and run the same command"
            )

    def _check(self, file: File, path: Path) -> None:
        """Record a file in ``used``, and check its checksum.

        Raises:
            DataError: the checksum differs from the official checksum.
        """
        if str(path) in self.used:
            return
        if path.is_dir():
            self.used[str(path)] = "unpacked"
            return
        kind, expected = ("md5", file.md5) if file.md5 else ("sha256", file.sha256)
        if not expected or self.partial:
            self.used[str(path)] = f"{path.stat().st_size} bytes"
            return
        digest = checksum(path, kind, self.progress)
        if digest != expected:
            raise DataError(
                f"{path} has {kind} {digest}, expected {expected}: download {file.url} again (or pass --partial if "
                "the file is a part of the data on purpose)"
            )
        self.used[str(path)] = f"{kind}:{digest}"


def checksum(path: Path, kind: str, progress: bool = False) -> str:
    """Return the checksum of a file in hexadecimal digits; ``kind`` is an algorithm of hashlib."""
    digest, size = hashlib.new(kind), path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"Checking {path.name}", disable=not progress, leave=False)
    with path.open("rb") as stream, bar:
        while block := stream.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def json_in(path: Path, name: str, url: str) -> Any:
    """Return the content of the JSON file ``name``: of ``path``, or of a member of an archive or a folder.

    Args:
        path: the JSON file, or an archive or folder that contains the file.
        name: the name of the JSON file.
        url: the address of the download, for error messages.

    Raises:
        DataError: there is no such member, or the content is not JSON.
    """
    if path.name == name:
        return parsed(path.read_bytes(), path)
    with _members(path) as members:
        for member in members:
            if member.name == name:
                with member.open() as stream:
                    return parsed(stream.read(), path / name)
    raise DataError(f"{path} has no {name} inside: download {url} again")


def parsed(content: bytes, path: Path) -> Any:
    """Return ``content`` parsed as JSON.

    Args:
        content: the bytes of a file.
        path: the path of the file, for error messages.

    Raises:
        DataError: the content is not JSON.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): download it again") from error


@contextmanager
def _members(path: Path) -> Iterator[Iterator[Member]]:
    """Yield the members of a folder, a zip or a tar archive, in the order of the archive."""
    try:
        if path.is_dir():
            # Follow links, because shared data sets often consist of links.
            files = (Path(at, name) for at, _, names in os.walk(path, followlinks=True) for name in sorted(names))
            yield (Member(p.name, p.stat().st_size, functools.partial(p.open, "rb")) for p in files)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                infos = (info for info in archive.infolist() if not info.is_dir())
                yield (Member(Path(i.filename).name, i.file_size, functools.partial(archive.open, i)) for i in infos)
        else:
            with tarfile.open(path) as tar:
                regular = (info for info in tar if info.isfile())
                yield (Member(Path(i.name).name, i.size, functools.partial(_open_tar_member, tar, i)) for i in regular)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not an intact archive ({error}): download it again") from error


def _open_tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(info)
    if stream is None:
        raise tarfile.ReadError(f"{info.name} is not a regular file")
    return stream


def _is_equal(member: Member, path: Path) -> bool:
    """Return True if the file has the content of the member."""
    if not path.is_file() or path.stat().st_size != member.size:
        return False
    with member.open() as stream, path.open("rb") as file:
        return all(stream.read(1 << 20) == block for block in iter(lambda: file.read(1 << 20), b""))


def _extract_member(member: Member, path: Path) -> None:
    """Write a member to ``path`` atomically; an equal file stays."""
    if _is_equal(member, path):
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with member.open() as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
