"""What is inserted into a model, and the record of where it comes from.

The one primitive is ``x' = keep * x + gain * value``, for each attention head (DESIGN: MTV is ``keep`` 0 and ``gain``
1 at the chosen heads; anything learned or scaled is another choice of the three tensors). The other streams of a block
take the same form, as if each were one head of the model's width. A gate lets the query of a head say how much of its
value is added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lmms_mtv import files
from lmms_mtv.errors import GeometryError, NumericsError, VectorFileError

logger = logging.getLogger(__name__)

SCHEMA: Final = 1
"""Version of the card's fields."""

HEADS: Final = "heads"
"""Stream of the attention heads: the input of each block's attention output projection."""

ATTENTION: Final = "attention"
"""Stream of what self-attention adds to a block: the output of its module."""

MLP: Final = "mlp"
"""Stream of what the MLP adds to a block: the output of its module."""

RESIDUAL: Final = "residual"
"""Stream of the hidden state after each block."""

STREAMS: Final = (HEADS, ATTENTION, MLP, RESIDUAL)
"""What can be edited; names of the edits in :attr:`TaskVector.edits`."""

_PARTS: Final = ("value", "keep", "gain")
_GATE: Final = "gate"
_FLAGS: Final = ("everywhere", "once", "renormed")

Geometry = tuple[tuple[int, str, int, int], ...]
"""For each site: index of the block, name of the module, number of heads, size of a head."""


@dataclass(frozen=True)
class Edit:
    """``x' = keep * x + gain * value`` for the heads of all layers, or for another stream of them.

    ``value`` is float32 [L, H, D], ``keep`` and ``gain`` are float32 [L, H]: L layers, H heads, D numbers a head. In a
    stream other than the heads H is 1 and D the model's width. Each of the tensors may have a leading dimension K: then
    row k of a batch of K rows gets edit k.

    The edit is at the last real position of each row, or ``everywhere``, at all positions, or ``once``, at the last
    token of the prompt and not at the tokens that follow it. ``renormed`` scales x' to the Euclidean norm of x, for
    each head (ICV, arXiv 2311.06668; LIVE, arXiv 2406.13185).

    A ``gate``, float32 [L, H, Q + 1] for queries of Q numbers, makes it ``x' = keep * x + mu * gain * value``, with
    ``mu = Z1 / (Z1 + Z2)`` at each position and head: ``log Z1 = w . q + b`` of the head's query q, where w are the
    first Q numbers and b is the last, and Z2 is the sum of the exponentials of the head's attention scores (MimIC, CVPR
    2025). Heads alone have queries.

    Raises :class:`GeometryError` if the shapes do not belong together, or if it is to be both everywhere and once.
    """

    value: Tensor
    keep: Tensor
    gain: Tensor
    everywhere: bool = False
    once: bool = False
    renormed: bool = False
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        wide = [self.value] if self.gate is None else [self.value, self.gate]
        tensors = [self.value, self.keep, self.gain, *wide[1:]]
        shapes = [tuple(t.shape) for t in tensors]
        if any(t.dim() not in (3, 4) for t in wide) or any(t.dim() not in (2, 3) for t in (self.keep, self.gain)):
            raise GeometryError(
                f"an edit needs value [L, H, D], keep [L, H], gain [L, H], gate [L, H, Q + 1] or none, found {shapes}"
            )
        heads = {tuple(t.shape[-3:-1]) for t in wide} | {tuple(t.shape[-2:]) for t in (self.keep, self.gain)}
        if len(heads) > 1 or len(set(self._leading)) > 1:
            raise GeometryError(f"value, keep, gain and gate of an edit disagree in layers, heads or batch: {shapes}")
        if self.gate is not None and self.gate.shape[-1] < 2:
            raise GeometryError(f"a gate has a number for each of a query and one more, found {shapes[-1]}")
        if not all(t.is_floating_point() for t in tensors):
            raise GeometryError("value, keep, gain and gate of an edit must be floating point")
        if self.everywhere and self.once:
            raise GeometryError("an edit is everywhere, or once, not both")

    @classmethod
    def replace(cls, value: Tensor, mask: Tensor) -> Edit:
        """Replace the heads where ``mask`` ([L, H] or [K, L, H], bool or 0 and 1) is set by ``value`` [L, H, D]."""
        gain = mask.to(torch.float32)
        return cls(value.to(torch.float32), 1 - gain, gain)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, size of a head."""
        layers, heads, size = self.value.shape[-3:]
        return layers, heads, size

    @property
    def batch(self) -> int | None:
        """K, or None for an edit that is the same for every row."""
        return next(iter(self._leading), None)

    @property
    def of_rows(self) -> list[Tensor]:
        """The tensors with a leading dimension K: what tells the edits of a batch apart."""
        plain = ((self.value, 3), (self.keep, 2), (self.gain, 2), (self.gate, 3))
        return [t for t, dimensions in plain if t is not None and t.dim() > dimensions]

    @property
    def _leading(self) -> list[int]:
        """The K of each tensor that has one."""
        return [len(tensor) for tensor in self.of_rows]

    def taken(self, index: int | slice | Sequence[int]) -> Edit:
        """Some of a batch of K edits, or one of them; an edit without a batch is itself."""
        return dataclasses.replace(
            self,
            value=self.value[index] if self.value.dim() > 3 else self.value,
            keep=self.keep[index] if self.keep.dim() > 2 else self.keep,
            gain=self.gain[index] if self.gain.dim() > 2 else self.gain,
            gate=self.gate[index] if self.gate is not None and self.gate.dim() > 3 else self.gate,
        )

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The (layer, head) pairs that the edit changes."""
        touched = (self.gain != 0) | (self.keep != 1)
        while touched.dim() > 2:
            touched = touched.any(0)
        return tuple((layer, head) for layer, head in touched.nonzero().tolist())


Edits = Mapping[str, Edit]
"""Edits by the stream they belong to."""


def by_stream(edits: Edit | Edits) -> Edits:
    """``edits`` as a mapping; an edit alone is one of the heads.

    Raises :class:`GeometryError` for a stream that there is not, for a gate in one that has no queries, and for edits
    that are for batches of different sizes.
    """
    found = {HEADS: edits} if isinstance(edits, Edit) else edits
    if unknown := sorted(found.keys() - set(STREAMS)):
        raise GeometryError(f"edits of {', '.join(unknown)}, expected streams among {', '.join(STREAMS)}")
    if gated := sorted(name for name, edit in found.items() if edit.gate is not None and name != HEADS):
        raise GeometryError(
            f"edits of {', '.join(gated)} have a gate, expected one in {HEADS} alone: these have queries"
        )
    if len(batches := {edit.batch for edit in found.values()} - {None}) > 1:
        raise GeometryError(f"edits of several streams are for batches of {sorted(filter(None, batches))} rows")
    return found


def rows_of(edits: Edits) -> int | None:
    """The K of a batch of K edits, or None for edits that are the same for every row."""
    return next((edit.batch for edit in edits.values() if edit.batch is not None), None)


def taken(edits: Edits, index: int | slice | Sequence[int]) -> Edits:
    """Some of a batch of K edits, or one of them, in every stream."""
    return {name: edit.taken(index) for name, edit in edits.items()}


def distinct(edits: Edits) -> tuple[Edits, list[int]]:
    """Return the different edits among a batch of K, and which of them each row is.

    Args:
        edits: edits by stream, a batch of K of them.

    Returns:
        The M different edits in the order in which they first appear, and K indices below M.
    """
    rows = torch.cat([tensor.flatten(1) for edit in edits.values() for tensor in edit.of_rows], 1)
    _, alike = torch.unique(rows, dim=0, return_inverse=True)
    order: dict[int, int] = {}
    which = [order.setdefault(row, len(order)) for row in alike.tolist()]
    first = [which.index(index) for index in range(len(order))]
    return (edits, which) if len(first) == len(which) else (taken(edits, first), which)


@dataclass(frozen=True)
class VectorCard:
    """Where a task vector comes from.

    The fields up to ``parents`` are the recipe: they determine the vector, and its :attr:`id`. ``examples`` and
    ``prompt`` are SHA-256 digests of the ids of the training examples and of the way a prompt is written. ``shots``
    is the number of demonstrations in the prompts that the vector is made for. ``parents`` are the ids of the vectors
    that it was combined of, with their weights, or whose heads it has. ``losses`` are lists of floats by name,
    ``seconds`` is the time of the fit, ``stages`` how much of it each part took, by name, ``memory`` its peak in bytes
    if known. ``replay`` says how the losses of edits were computed (:attr:`FitSession.replay`), if any were and if it
    is known. ``accuracy`` says how a fit was tried on some training queries: the number of ``queries``, the share that
    was answered right without the vector (``unedited``) and with it (``edited``), and the share of answers with it that
    did not end (``endless``).
    """

    model: str
    revision: str | None
    dtype: str
    geometry: Geometry
    task: str
    split: str
    examples: str
    prompt: str
    shots: int
    seed: int
    method: str
    config: Mapping[str, Any]
    parents: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    memory: int | None = None
    replay: str | None = None
    accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA

    _OUTCOME = ("versions", "losses", "seconds", "stages", "memory", "replay", "accuracy", "schema")

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the recipe: the same recipe, the same id, on any machine.

        Settings that are None do not count, so that a method may get another one and its vectors keep their ids.
        """
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key not in self._OUTCOME}
        recipe["config"] = {name: value for name, value in self.config.items() if value is not None}
        if not recipe["parents"]:  # so that a fitted vector has the id that it had before there were parents
            del recipe["parents"]
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"id": self.id}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str) -> VectorCard:
        """The card written by :meth:`to_json`. Unknown fields are left out with a warning.

        Raises :class:`VectorFileError`, with ``source`` in the message, if a field is missing or has a wrong type.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise VectorFileError(f"the card of {source} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise VectorFileError(f"the card of {source} is no JSON object but {type(found).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(required - found.keys()):
            raise VectorFileError(f"the card of {source} lacks {', '.join(missing)}: fit the vector again")
        if extra := sorted(found.keys() - fields.keys() - {"id"}):
            logger.warning("the card of %s has fields that this version does not know: %s", source, ", ".join(extra))
        try:
            geometry = tuple(
                (int(layer), str(name), int(heads), int(size)) for layer, name, heads, size in found["geometry"]
            )
            given = {name: found[name] for name in fields if name in found} | {"geometry": geometry}
            card = cls(**given)
            for name in ("model", "revision", "dtype", "task", "split", "examples", "prompt", "method"):
                if not isinstance(given[name], str) and (name, given[name]) != ("revision", None):
                    raise TypeError(f"{name} is {type(given[name]).__name__}, not text")
            if not isinstance(card.replay, str | None):
                raise TypeError(f"replay is {type(card.replay).__name__}, not text")
            for name in ("shots", "seed", "schema"):
                given[name] = int(getattr(card, name))
            for name in ("config", "versions"):
                given[name] = dict(getattr(card, name))
            given["parents"] = {name: float(weight) for name, weight in dict(card.parents).items()}
            given["losses"] = {name: [float(loss) for loss in losses] for name, losses in dict(card.losses).items()}
            given["seconds"] = float(card.seconds)
            given["stages"] = {name: float(seconds) for name, seconds in dict(card.stages).items()}
            given["accuracy"] = {name: float(share) for name, share in dict(card.accuracy).items()}
            card = cls(**given)
            if _deeper(found, 32):
                raise ValueError("something is nested too deeply")
        except (TypeError, ValueError, OverflowError) as error:
            raise VectorFileError(f"the card of {source} has a field of a wrong type: {error}") from error
        if card.schema > SCHEMA:
            raise VectorFileError(
                f"{source} was written by a newer version of lmms-mtv (card schema {card.schema}, this version reads "
                f"up to {SCHEMA}): upgrade lmms-mtv"
            )
        return card

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VectorCard:
        """The card in a file written by :meth:`TaskVector.save`, whose tensors are neither read nor checked.

        Raises :class:`VectorFileError` if there is no such file or no card in it.
        """
        return cls._of(Path(path), files.metadata(Path(path)))

    @classmethod
    def _of(cls, path: Path, metadata: Mapping[str, str]) -> VectorCard:
        if metadata.get("format") != "lmms-mtv" or "card" not in metadata:
            raise VectorFileError(f"{path} is a safetensors file, but no task vector written by lmms-mtv")
        return cls.from_json(metadata["card"], str(path))


@dataclass(frozen=True)
class TaskVector:
    """Edits by the stream they belong to, and the card that says where they come from.

    ``edits`` holds an :class:`Edit` under each of :data:`STREAMS` that is changed; it is empty for the method ``none``.
    """

    edits: Edits
    card: VectorCard

    @property
    def id(self) -> str:
        return self.card.id

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The (layer, head) pairs that are edited. ``layer`` counts sites; :attr:`VectorCard.geometry` names them."""
        return self.edits[HEADS].heads if HEADS in self.edits else ()

    @property
    def checksum(self) -> str:
        """SHA-256 of the tensors, without the card."""
        return checksum("", self.tensors())

    def described(self) -> str:
        """What is edited, in words: ``15 of 32 heads``, ``residual of 1 of 4 layers``."""
        parts = []
        for name, edit in self.edits.items():
            layers, heads, _ = edit.shape
            what = f"{layers * heads} heads" if name == HEADS else f"{layers} layers"
            gated = "" if edit.gate is None else " (gated)"
            parts.append(("" if name == HEADS else f"{name} of ") + f"{len(edit.heads)} of {what}{gated}")
        return ", ".join(parts) or "nothing"

    def tensors(self) -> dict[str, Tensor]:
        """What a file of this vector holds: float32, on the CPU, by name."""
        # Only what is set, so that a file without gate or flags is what it was before there were any; and copies, since
        # a file takes no tensors that share memory, as keep and gain may.
        parts = {
            f"{name}.{part}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, edit in self.edits.items()
            for part in (*_PARTS, _GATE)
            if (tensor := getattr(edit, part)) is not None
        }
        flags = (f"{name}.{flag}" for name, edit in self.edits.items() for flag in _FLAGS if getattr(edit, flag))
        return parts | {flag: torch.ones(1) for flag in flags}

    def check(self, geometry: Geometry, model: str | None = None) -> None:
        """Raise :class:`GeometryError` unless the vector was made for these sites and, if given, for ``model``."""
        if model is not None and model != self.card.model:
            raise GeometryError(
                f"vector {self.id} was fitted for model {self.card.model!r}, not for {model!r}: pass "
                "pretrained=" + self.card.model + ", or fit a vector for this model"
            )
        if self.card.geometry != geometry:
            raise GeometryError(
                f"vector {self.id} was fitted for {_described(self.card.geometry)}, this model has "
                f"{_described(geometry)}: fit a vector for this model"
            )
        for name, edit in by_stream(self.edits).items():
            heads = geometry[0][2:] if geometry else (0, 0)
            # The card does not tell the model's width: whoever has the model compares it.
            expected = (len(geometry), *(heads if name == HEADS else (1, edit.shape[-1])))
            if edit.shape != expected:
                raise GeometryError(
                    f"edit {name!r} of vector {self.id} has shape {edit.shape}, its card says {expected}"
                )

    def content(self) -> bytes:
        """What :meth:`save` writes: safetensors with the card in its metadata. Raises :class:`NumericsError` on NaN."""
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise NumericsError(f"{name} of vector {self.id} has NaN or infinity: it is not saved")
        card = self.card.to_json()
        return files.packed(tensors, {"format": "lmms-mtv", "card": card, "checksum": checksum(card, tensors)})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with the card in its metadata. The file appears whole or not at all.

        Raises :class:`VectorFileError` if there is no room or no permission, :class:`NumericsError` on NaN.
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

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskVector:
        """Read a file written by :meth:`save`: a regular one, no link, and no larger than :data:`files.LIMIT` bytes.

        Raises :class:`VectorFileError` if there is no such file, if it is not a task vector or not an intact one.
        """
        path = Path(path)
        metadata, tensors = files.read(path)
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


def _deeper(value: Any, levels: int) -> bool:
    """Whether what JSON gave has more levels than that, which no method's settings have and no recursion survives."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(one, levels - 1) for one in inner)


def _described(geometry: Geometry) -> str:
    if not geometry:
        return "no sites"
    return f"{len(geometry)} layers of {geometry[0][2]} heads of size {geometry[0][3]} ({geometry[0][1]}, ...)"


def checksum(card: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a card as it is written, and of the tensors."""
    digest = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
