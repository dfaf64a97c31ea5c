"""A task vector and its file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from lmms_mtv.errors import GeometryError, NumericsError, VectorFileError
from lmms_mtv.runtime import files, tensor_files
from lmms_mtv.vectors.card import Geometry, VectorCard
from lmms_mtv.vectors.edit import HEADS, Edit, Edits, by_stream

_PARTS: Final = ("value", "keep", "gain")
_GATE: Final = "gate"
_FLAGS: Final = ("everywhere", "once", "renormed")


@dataclass(frozen=True, repr=False, eq=False)
class TaskVector:
    """Edits by stream, and the card with their origin.

    ``vector * 0.5`` moves activations half as far, and ``a + b`` moves them by both changes; see
    :func:`~lmms_mtv.vectors.combine.summed`. Only the same object is equal: compare :attr:`id` and :attr:`checksum`.

    Attributes:
        edits: an :class:`Edit` for each edited stream of :data:`STREAMS`; empty for the method ``none``.
        card: the origin of the edits.
    """

    edits: Edits
    card: VectorCard

    @property
    def id(self) -> str:
        """Id of the recipe: :attr:`VectorCard.id`."""
        return self.card.id

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The edited (layer, head) pairs. ``layer`` is an index of the sites in :attr:`VectorCard.geometry`."""
        return self.edits[HEADS].heads if HEADS in self.edits else ()

    @property
    def checksum(self) -> str:
        """SHA-256 of the tensors, without the card."""
        return checksum("", self.tensors())

    def __repr__(self) -> str:
        card = self.card
        lines = [
            f"TaskVector {self.id}: {card.method} for {card.task}, {self.described()}",
            f"  model: {card.model}, {card.dtype}; shots: {card.shots}; seed: {card.seed}",
        ]
        if tried := card.accuracy:
            lines.append(
                f"  right answers to {tried['queries']:.0f} training queries: {tried['unedited']:.0%} without, "
                f"{tried['edited']:.0%} with the vector"
            )
        return "\n".join(lines)

    def __mul__(self, strength: float) -> TaskVector:
        from lmms_mtv.vectors.combine import summed

        return summed([self], [strength], task=self.card.task)

    __rmul__ = __mul__

    def __add__(self, other: TaskVector) -> TaskVector:
        from lmms_mtv.vectors.combine import summed

        tasks = dict.fromkeys((self.card.task, other.card.task))
        return summed([self, other], [1.0, 1.0], task=" + ".join(tasks))

    def __radd__(self, other: object) -> TaskVector:
        """Return the vector itself for 0, with which ``sum`` begins."""
        return self if other == 0 else NotImplemented

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -1.0 * other

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1 / divisor)

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which every forward of ``model`` is edited, as in :func:`lmms_mtv.applied`.

        The context can be entered several times. If the weights of the model are not those of the fit, the log gets a
        warning: the values of the vector are those of another model then.

        Args:
            model: the model that the vector was fitted for.

        Raises:
            ArgumentError: ``model`` is no module.
            DiscoveryError: the attention heads of the model are not found.
            GeometryError: the vector does not fit the model.
        """
        from lmms_mtv.hooks.application import Application

        return Application(model, self)

    def described(self) -> str:
        """Return a description of the edited parts: ``15 of 32 heads``, ``residual of 1 of 4 layers``."""
        parts = []
        for name, edit in self.edits.items():
            layers, heads, _ = edit.shape
            what = f"{layers * heads} heads" if name == HEADS else f"{layers} layers"
            gated = "" if edit.gate is None else " (gated)"
            parts.append(("" if name == HEADS else f"{name} of ") + f"{len(edit.heads)} of {what}{gated}")
        return ", ".join(parts) or "nothing"

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this vector's file by name, float32 on the CPU."""
        # Gates and flags are stored only if set, so files without them are the same as in versions without them. The
        # tensors are copies, since a file takes no tensors that share memory, and keep and gain may share memory.
        parts = {
            f"{name}.{part}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, edit in self.edits.items()
            for part in (*_PARTS, _GATE)
            if (tensor := getattr(edit, part)) is not None
        }
        flags = (f"{name}.{flag}" for name, edit in self.edits.items() for flag in _FLAGS if getattr(edit, flag))
        return parts | {flag: torch.ones(1) for flag in flags}

    def check(self, geometry: Geometry) -> None:
        """Check that the vector was made for the given sites.

        Args:
            geometry: geometry of the model's sites.

        Raises:
            GeometryError: the vector was made for other sites, or its edits contradict its card.
        """
        if self.card.geometry != geometry:
            raise GeometryError(
                f"vector {self.id} was fitted for {_described(self.card.geometry)}, this model has "
                f"{_described(geometry)}: fit a vector for this model"
            )
        for name, edit in by_stream(self.edits).items():
            heads = geometry[0][2:] if geometry else (0, 0)
            # The card does not have the model's width. The code that has the model compares the width.
            expected = (len(geometry), *(heads if name == HEADS else (1, edit.shape[-1])))
            if edit.shape != expected:
                raise GeometryError(
                    f"edit {name!r} of vector {self.id} has shape {edit.shape}, its card says {expected}"
                )

    def content(self) -> bytes:
        """Return the content of the file that :meth:`save` writes: safetensors with the card in its metadata.

        Raises:
            NumericsError: a tensor has NaN or infinity.
        """
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise NumericsError(f"{name} of vector {self.id} has NaN or infinity: it is not saved")
        card = self.card.to_json()
        return tensor_files.safetensors_bytes(
            tensors, {"format": "lmms-mtv", "card": card, "checksum": checksum(card, tensors)}
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with the card in its metadata, and return its path. The write is atomic.

        Raises:
            VectorFileError: the file cannot be written, as without room or permission.
            NumericsError: a tensor has NaN or infinity.
        """
        path = Path(path)
        content = self.content()
        try:
            files.write(path, content)
        except OSError as error:
            raise VectorFileError(
                f"{path} cannot be written ({error.strerror or error}): make room or choose another place; what was "
                "there before is as it was"
            ) from error
        return path

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the vector and its page to the Hugging Face hub, and return the address of the repository.

        Args:
            repository: ``owner/name``; the repository is created if it does not exist.
            private: True to create a private repository.

        Raises:
            HubError: the hub does not accept the upload.
            ArgumentError: ``repository`` is no such name, or has a revision.
        """
        from lmms_mtv.vectors.library import hub

        with tempfile.TemporaryDirectory() as folder:
            return hub.pushed(self.save(Path(folder, "vector.safetensors")), repository, private=private)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> TaskVector:
        """Return a vector from a file or folder, or else from the repository ``owner/name`` of the Hugging Face hub.

        Args:
            source: the file, the folder or the repository.
            revision: a branch, tag or commit of the repository; None for the newest.

        Raises:
            ArgumentError: ``source`` is neither a path nor a name of a repository.
            HubError: the repository does not exist, has no vector, or cannot be read.
            VectorFileError: the file is not intact.
        """
        from lmms_mtv.vectors.library import hub

        if Path(source).exists():
            return cls.load(source)
        return hub.pulled(f"{source}" if revision is None else f"{source}@{revision}")

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], *, library: str | os.PathLike[str] | None = None, **criteria: Any
    ) -> TaskVector:
        """Return the vector that a reference names.

        Args:
            source: a file written by :meth:`save` or its folder; or as text four or more digits of an id,
                ``task/method``, or ``hub:owner/name``.
            library: the folder of the library with the ids; None for the default folder.
            criteria: ``model``, ``seed``, ``shots`` or ``latest=True``, which choose among several vectors of
                ``task/method``; see :meth:`Library.resolve`.

        Raises:
            VectorFileError: the file does not exist, is a link, is too large, is no task vector, or is not intact.
            ArgumentError: the library has no such vector, or several.
            HubError: the repository on the hub cannot be read.
        """
        from lmms_mtv.vectors.library import Library, reference

        path = reference.file(os.fspath(source))
        if path is None and isinstance(source, str):
            return cls._read(Library(None if library is None else Path(library)).resolve(source, **criteria).path)
        return cls._read(path or Path(source))

    @classmethod
    def _read(cls, path: Path) -> TaskVector:
        """Return the vector in a regular file of at most :data:`tensor_files.LIMIT` bytes."""
        metadata, tensors = tensor_files.read(path)
        card = VectorCard._of(path, metadata)
        if metadata.get("checksum") != checksum(metadata["card"], tensors):
            raise VectorFileError(f"{path} is not as it was saved (its checksum differs): fit the vector again")
        edits = {}
        if extra := sorted(key for key in tensors if key.rpartition(".")[2] not in (*_PARTS, _GATE, *_FLAGS)):
            raise VectorFileError(f"{path} has tensors that this version does not know ({', '.join(extra)}): upgrade")
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            flags = {flag: f"{name}.{flag}" in tensors for flag in _FLAGS}
            try:
                value, keep, gain = (tensors[f"{name}.{part}"] for part in _PARTS)
                edits[name] = Edit(value, keep, gain, **flags, gate=tensors.get(f"{name}.{_GATE}"))
            except (KeyError, GeometryError) as error:
                raise VectorFileError(f"the tensors of {path} are incomplete or do not fit: {error}") from None
            if not all(t.isfinite().all() for key, t in tensors.items() if key.startswith(f"{name}.")):
                raise VectorFileError(f"{path} has NaN or infinity in {name!r}: fit the vector again")
        vector = cls(edits, card)
        try:
            vector.check(card.geometry)
        except GeometryError as error:
            raise VectorFileError(f"{path} does not fit its own card ({error})") from None
        return vector


def _described(geometry: Geometry) -> str:
    if not geometry:
        return "no sites"
    return f"{len(geometry)} layers of {geometry[0][2]} heads of size {geometry[0][3]} ({geometry[0][1]}, ...)"


def checksum(card: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the text of a card and of tensors by name."""
    digest = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
