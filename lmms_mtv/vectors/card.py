"""The card of a task vector: the record of its origin."""

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

from lmms_mtv.errors import VectorFileError
from lmms_mtv.runtime import tensor_files

logger = logging.getLogger(__name__)

SCHEMA: Final = 1
"""Version of the card's fields."""

LOCAL: Final = "local/"
"""Beginning of the name of a model that is a folder. The digest of the model follows."""

BUNDLED: Final[Mapping[str, str]] = {"lmms-mtv/tiny": "tiny", "lmms-mtv/pictures": "pictures"}
"""Names of the bundled models, with their names in ``pretrained=``."""

Geometry = tuple[tuple[int, str, int, int], ...]
"""Index of the block, name of the module, number of heads and size of a head, for each site."""


@dataclass(frozen=True)
class VectorCard:
    """The origin of a task vector.

    The fields up to ``parents`` are the recipe. The recipe determines the vector and its :attr:`id`.

    Attributes:
        model: name of the model.
        revision: revision of the model, None if unknown.
        dtype: dtype of the model.
        geometry: the sites of the model.
        task: name of the task.
        split: name of the split with the training examples.
        examples: SHA-256 of the ids of the training examples.
        prompt: SHA-256 of the way a prompt is written.
        shots: number of demonstrations in the prompts that the vector is made for.
        seed: seed of the fit.
        method: name of the method.
        config: settings of the method.
        parents: ids and weights of the vectors that this vector combines; or the id, with weight 1, of the vector whose
            heads this vector has.
        versions: versions of the libraries.
        losses: lists of losses, by name.
        seconds: time of the fit in seconds.
        stages: seconds of each stage of the fit, by name.
        memory: peak memory of the fit in bytes, None if unknown.
        replay: the way in which the losses of edits were computed (:attr:`FitSession.replay`); None if there were no
            such losses, or if the way is unknown.
        accuracy: trial of the vector on some training queries: the number of ``queries``, the share of right answers
            without the vector (``unedited``) and with the vector (``edited``), and the share of answers with the vector
            that did not end (``endless``).
        prompt_text: one prompt of the fit in parts: the text before the target, the delimiter before the target, the
            target, and the text after the target. Empty in vectors of older versions.
        used: number of different training examples that the fit drew; None if unknown.
        weights: :func:`~lmms_mtv.hooks.fingerprint.fingerprint` of the model's weights; None if unknown.
        schema: version of the fields.
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
    prompt_text: Sequence[str] = ()
    used: int | None = None
    weights: str | None = None
    schema: int = SCHEMA

    _MADE = ("versions", "losses", "seconds", "stages", "memory", "replay", "accuracy")
    _OUTCOME = (*_MADE, "prompt_text", "used", "weights", "schema")

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the recipe, which are the same on any machine.

        Settings that are None do not count. So vectors keep their ids when their method gets a new setting.
        """
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key not in self._OUTCOME}
        recipe["config"] = {name: value for name, value in self.config.items() if value is not None}
        if not recipe["parents"]:  # vectors without parents keep the ids of versions without parents
            del recipe["parents"]
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the fields and the id as a JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"id": self.id}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str) -> VectorCard:
        """Return the card written by :meth:`to_json`. Unknown fields are left out with a warning.

        Args:
            text: the JSON object.
            source: name of the card's source in messages.

        Raises:
            VectorFileError: the text is no JSON object, a required field is missing, a field has a wrong type, or the
                card has a newer schema.
        """
        try:
            written = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise VectorFileError(f"the card of {source} is not JSON: {error}") from error
        if not isinstance(written, dict):
            raise VectorFileError(f"the card of {source} is no JSON object but {type(written).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(required - written.keys()):
            raise VectorFileError(f"the card of {source} lacks {', '.join(missing)}: fit the vector again")
        if extra := sorted(written.keys() - fields.keys() - {"id"}):
            logger.warning("the card of %s has fields that this version does not know: %s", source, ", ".join(extra))
        try:
            geometry = tuple(
                (int(layer), str(name), int(heads), int(size)) for layer, name, heads, size in written["geometry"]
            )
            values = {name: written[name] for name in fields if name in written} | {"geometry": geometry}
            card = cls(**values)
            for name in ("model", "revision", "dtype", "task", "split", "examples", "prompt", "method"):
                if not isinstance(values[name], str) and (name, values[name]) != ("revision", None):
                    raise TypeError(f"{name} is {type(values[name]).__name__}, not text")
            if not isinstance(card.replay, str | None):
                raise TypeError(f"replay is {type(card.replay).__name__}, not text")
            if not isinstance(card.used, int | None):
                raise TypeError(f"used is {type(card.used).__name__}, not a number")
            if not isinstance(card.weights, str | None):
                raise TypeError(f"weights is {type(card.weights).__name__}, not text")
            for name in ("shots", "seed", "schema"):
                values[name] = int(getattr(card, name))
            for name in ("config", "versions"):
                values[name] = dict(getattr(card, name))
            values["parents"] = {name: float(weight) for name, weight in dict(card.parents).items()}
            values["losses"] = {name: [float(loss) for loss in losses] for name, losses in dict(card.losses).items()}
            values["seconds"] = float(card.seconds)
            values["stages"] = {name: float(seconds) for name, seconds in dict(card.stages).items()}
            if not all(isinstance(part, str) for part in card.prompt_text):
                raise TypeError("prompt_text has something that is not text")
            values["prompt_text"] = tuple(card.prompt_text)
            values["accuracy"] = {name: float(share) for name, share in dict(card.accuracy).items()}
            card = cls(**values)
            if _deeper(written, 32):
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
        """Return the card in a file written by :meth:`TaskVector.save`. The tensors are neither read nor checked.

        Raises:
            VectorFileError: the file does not exist, cannot be read, or has no valid card.
        """
        return cls._of(Path(path), tensor_files.metadata(Path(path)))

    @classmethod
    def _of(cls, path: Path, metadata: Mapping[str, str]) -> VectorCard:
        if metadata.get("format") != "lmms-mtv" or "card" not in metadata:
            raise VectorFileError(f"{path} is a safetensors file, but no task vector written by lmms-mtv")
        return cls.from_json(metadata["card"], str(path))


def _deeper(value: Any, levels: int) -> bool:
    """Return whether a JSON value has ``levels`` or more levels. No method's settings do, and recursion would fail."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(one, levels - 1) for one in inner)
