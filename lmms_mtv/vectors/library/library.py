"""The vector library: folders ``<root>/<model>/<task>/<method>-<id>/`` with a vector's file and its page."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lmms_mtv.errors import LibraryError, VectorFileError
from lmms_mtv.runtime import files
from lmms_mtv.vectors import TaskVector, VectorCard
from lmms_mtv.vectors.library import page, reference
from lmms_mtv.vectors.library.entry import Entry, Problem
from lmms_mtv.vectors.library.place import FILE, PAGE, VARIABLE, default_root, folder_name, is_temporary

logger = logging.getLogger(__name__)

_ELSEWHERE = f"choose another place by --library, library= or {VARIABLE}"


class Library:
    """The vectors below a root folder.

    Names in cards and references cannot lead out of the root: they are made safe or compared as texts, and a link below
    the root is an error. A vector is written to a temporary folder and renamed. So a vector is there whole or not at
    all, even if processes are killed or several processes write.

    The methods raise :class:`LibraryError` if the root cannot be read or written.

    Args:
        root: the root folder; None for the folder in ``LMMS_MTV_LIBRARY``, else a folder in the user's cache.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(default_root() if root is None else root)))

    def folder(self, card: VectorCard) -> Path:
        """Return the folder for the vector of this recipe. Vectors of different recipes never share a folder."""
        return self.root / folder_name(card.model) / folder_name(card.task) / f"{folder_name(card.method)}-{card.id}"

    def add(self, vector: TaskVector) -> Path:
        """Write the vector and its page, and return the path of the vector's file.

        Nothing is written if the library has a vector with the same recipe and the same edits. A damaged file of the
        same recipe is replaced, and so is a vector of the same recipe with other edits.

        Raises:
            LibraryError: the vector cannot be written, as without room or permission, or a link is in its place. The
                earlier files are unchanged.
            NumericsError: a tensor has NaN or infinity.
            GeometryError: the edits do not fit the card's geometry.
        """
        vector.check(vector.card.geometry)
        folder = self._own(self.folder(vector.card))
        held = self._intact(folder / FILE)
        if held is not None and held.id == vector.id and same_edits(held, vector):
            return folder / FILE
        content, described = vector.content(), page.of(vector).encode("utf-8", "replace")
        made = files.temporary(folder)
        try:
            made.mkdir(parents=True)
            files.write(made / FILE, content)
            files.write(made / PAGE, described)
            _moved(made, folder)
        except OSError as error:
            raise LibraryError(
                f"vector {vector.id} cannot be written to {folder} ({error.strerror or error}): make room, or "
                f"{_ELSEWHERE}; what was there before is as it was"
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return folder / FILE

    def check_writable(self, card: VectorCard | None = None) -> None:
        """Check before a fit that a vector can be added after the fit. A folder is made for it, and removed.

        Args:
            card: the recipe of the vector; None checks the root alone.

        Raises:
            LibraryError: the folder for the vector cannot be made.
        """
        if (reason := files.obstacle(self.root if card is None else self.folder(card).parent)) is not None:
            raise LibraryError(f"the library {self.root} cannot be written to ({reason}): {_ELSEWHERE}")

    def get(self, card: VectorCard) -> TaskVector | None:
        """Return the vector of exactly this recipe, or None. A damaged file gives a warning and None.

        Raises:
            LibraryError: a link is in the vector's place.
        """
        path = self._own(self.folder(card)) / FILE
        vector = self._intact(path)
        if vector is not None and vector.id != card.id:
            logger.warning("%s holds vector %s: it is passed over, and replaced by what is fitted", path, vector.id)
            return None
        return vector

    def entries(self) -> list[Entry]:
        """Return the entries of the library, sorted by model, task, method, shots and seed.

        Only cards are read; :meth:`verify` reads whole files. Unreadable files are left out with a warning.
        """
        found = (self._readable(folder / FILE) for folder in self._folders())
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.order)

    @staticmethod
    def entry(path: Path) -> Entry:
        """Return the entry of a vector's file, in the library or elsewhere.

        Raises:
            VectorFileError: the file cannot be read, or has no card.
        """
        card = VectorCard.load(path)
        try:
            status = path.stat()
        except OSError as error:
            raise VectorFileError(f"{path} cannot be read ({error.strerror or error})") from error
        return Entry(path, card, status.st_size, status.st_mtime)

    def resolve(
        self,
        wanted: str,
        *,
        model: str | None = None,
        task: str | None = None,
        seed: int | None = None,
        shots: int | None = None,
        latest: bool = False,
    ) -> Entry:
        """Return the entry of the vector that a reference names.

        Args:
            wanted: the path of a vector's file or of its folder, the first four or more digits of an id,
                ``task/method``, or ``hub:owner/name`` with an optional ``@revision``, which is pulled first.
            model, task, seed, shots: of the vector, one after the other, while an id or ``task/method`` names several.
            latest: True takes the newest file, if several vectors are left.

        Raises:
            ArgumentError: the reference names no vector, or several vectors.
            VectorFileError: the file that the reference names cannot be read.
            HubError: the vector cannot be pulled.
        """
        if wanted.startswith(reference.PREFIX):
            return self.pull(wanted.removeprefix(reference.PREFIX))
        if (path := reference.file(wanted)) is not None:
            inside = Path(os.path.abspath(path)).is_relative_to(self.root)
            return self.entry(self._own(Path(os.path.abspath(path))) if inside else path)
        criteria = {"model": model, "task": task, "seed": seed, "shots": shots}
        return reference.chosen(wanted, self.entries(), criteria, self.root, latest=latest)

    def pull(self, repository: str) -> Entry:
        """Add the vector of ``owner/name`` or ``owner/name@revision`` on the hub, and return its entry.

        Raises:
            ArgumentError: ``repository`` is no such name.
            HubError: the vector cannot be downloaded.
            VectorFileError: the downloaded file is refused.
            LibraryError: the library has other edits of the same recipe, which stay, or cannot be written.
        """
        vector = _pulled(repository)
        held = self.get(vector.card)
        if held is not None and not same_edits(held, vector):
            raise LibraryError(
                f"{self.folder(vector.card)} has other edits of the same recipe than {repository} on the hub: remove "
                f"them by `lmms-mtv library rm {vector.id}`, or pull into another library (--library)"
            )
        return self.entry(self.add(vector))

    def remove(self, entry: Entry) -> None:
        """Remove a vector, its page, and the folders that are then empty.

        Raises:
            LibraryError: the vector is not in this library, or cannot be removed.
        """
        folder = self._own(entry.path.parent)
        if len(folder.relative_to(self.root).parts) != 3 or entry.path.name != FILE:
            raise LibraryError(f"{entry.path} is not a vector of the library {self.root}: it is not removed")
        try:
            entry.path.unlink()
            (folder / PAGE).unlink(missing_ok=True)
        except OSError as error:
            raise LibraryError(f"{entry.path} cannot be removed ({error.strerror or error})") from error
        with contextlib.suppress(OSError):  # a folder with other files stays
            for emptied in (folder, folder.parent, folder.parent.parent):
                emptied.rmdir()

    def verify(self) -> list[Problem]:
        """Return the problems of the library: each vector is read and compared with its checksum, card and folder."""
        problems = [*self._strays()]
        for folder in self._folders():
            try:
                vector = TaskVector.load(folder / FILE)
            except VectorFileError as error:
                problems.append(Problem(folder / FILE, f"{error}, or remove {folder}"))
                continue
            place = self.folder(vector.card)
            if not (place.exists() and place.samefile(folder)):
                problems.append(Problem(folder / FILE, f"its card belongs to {place}: move it there, or remove it"))
        return sorted(problems, key=lambda problem: str(problem.path))

    def _readable(self, path: Path) -> Entry | None:
        """Return the entry of a file, or None with a warning if the file has no readable card."""
        try:
            return self.entry(path)
        except VectorFileError as error:
            logger.warning("%s; lmms-mtv library verify lists what is damaged", error)
            return None

    def _intact(self, path: Path) -> TaskVector | None:
        """Return the vector in a file, or None. A damaged file gives a warning."""
        if not path.exists():
            return None
        try:
            return TaskVector.load(path)
        except VectorFileError as error:
            logger.warning("%s; until then it is passed over, and what is fitted replaces it", error)
            return None

    def _own(self, path: Path) -> Path:
        """Return ``path``; raise :class:`LibraryError` if the path leaves the root or leads over a link."""
        path = Path(os.path.normpath(path))
        if not path.is_relative_to(self.root):
            raise LibraryError(f"{path} is not in the library {self.root}")
        for place in (path, *path.parents):
            if place == self.root:
                break
            if place.is_symlink():
                raise LibraryError(f"{place} is a link, and links are not followed in a library: remove it")
        return path

    def _folders(self) -> Iterator[Path]:
        """Yield the folders of the library with a vector's file."""
        for model in self._inside(self.root):
            for task in self._inside(model):
                for folder in self._inside(task):
                    if os.path.lexists(folder / FILE):
                        yield folder

    def _inside(self, folder: Path) -> Iterator[Path]:
        """Yield the folders in a folder that are neither links nor hidden."""
        for path in self._listed(folder):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield path

    def _strays(self) -> Iterator[Problem]:
        """Yield links, files of interrupted writes and vector folders without a vector; ignore other hidden files."""
        waiting = [self.root]
        while waiting:
            folder = waiting.pop()
            depth = len(folder.relative_to(self.root).parts)
            if depth == 3 and not os.path.lexists(folder / FILE):
                yield Problem(folder, f"has no {FILE}: remove it")
            for path in self._listed(folder):
                if path.is_symlink():
                    yield Problem(path, "is a link, and links are not followed: remove it")
                elif is_temporary(path.name):
                    yield Problem(path, "was left by an interrupted write: remove it, unless a process is writing now")
                elif depth < 3 and path.is_dir() and not path.name.startswith("."):
                    waiting.append(path)

    def _listed(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LibraryError(
                f"the library {folder} cannot be read ({error.strerror or error}): {_ELSEWHERE}"
            ) from error


def same_edits(one: TaskVector, other: TaskVector) -> bool:
    """Return whether two vectors have exactly the same edits, in float32 as in a file."""
    if one.edits.keys() != other.edits.keys():
        return False
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _moved(made: Path, folder: Path) -> None:
    """Rename a folder to its place. If the place is a folder, move the files into that folder."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir() or folder.is_symlink():
            raise
        for name in (PAGE, FILE):
            os.replace(made / name, folder / name)


def _pulled(repository: str) -> TaskVector:
    """Return the vector of a repository on the hub, whose client is imported here: it takes half a second to import."""
    from lmms_mtv.vectors.library import hub

    return hub.pulled(repository)
