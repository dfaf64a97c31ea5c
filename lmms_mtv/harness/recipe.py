"""The recipe of a vector: the settings of its method, and everything else that determines the vector."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from lmms_mtv import methods
from lmms_mtv.errors import DataError, MethodError
from lmms_mtv.harness.protocols import Logger, Model, Prompts
from lmms_mtv.harness.training import Training
from lmms_mtv.methods import Method
from lmms_mtv.models.fitting import example_text, prompt_digest
from lmms_mtv.vectors import Geometry, TaskVector, VectorCard

P = TypeVar("P")


def declared_settings(method: Method, training: Training, logger: Logger) -> dict[str, Any]:
    """Return the settings that a task declares for ``method``, or for the method of which ``method`` is a control.

    A control has the settings class of its method, or a class derived from this class. A wrong name or value is an
    error for every method.

    Args:
        method: the method of the run.
        training: the training examples of the task, with its declarations.
        logger: the logger of the harness.

    Raises:
        ArgumentError: the task declares a method or a setting that does not exist.
    """
    declared: dict[str, Any] = {}
    for name, settings in training.settings(methods.names()).items():
        if _is_control_of(method, name, logger):
            methods.get(name).configure(settings)
            declared |= settings
    return declared


def _is_control_of(method: Method, name: str, logger: Logger) -> bool:
    """Return whether ``method`` is the method ``name``, or a control of that method."""
    try:
        return issubclass(method.config, methods.get(name).config)
    except MethodError as error:
        # The method in use is loaded already. A failure to load another method is no reason to stop.
        logger.warning(f"{error}; the task declares settings for it")
        return False


def vector_recipe(
    model: Model[P],
    geometry: Geometry,
    prompts: Prompts[P],
    *,
    shots: int,
    seed: int,
    method: Method,
    config: Any,
    heads: TaskVector | None,
) -> VectorCard:
    """Return the card of a vector before the fit, which is the recipe alone.

    Args:
        model: the model that the vector is for.
        geometry: the sites of the model.
        prompts: the prompts of the task.
        shots: demonstrations in an evaluated prompt.
        seed: the seed of the fit.
        method: the method. A method without settings fits nothing, and its vector does not depend on the examples.
        config: the settings of the method.
        heads: the vector whose heads are used, or None.
    """
    training, fits = prompts.training, bool(method.settings())
    return VectorCard(
        model=model.name,
        revision=model.revision,
        dtype=model.dtype,
        geometry=geometry,
        task=training.name,
        split=training.split if fits else "",
        examples=prompts.digest() if fits else "",
        prompt=prompt_digest(model, prompts) if fits else "",
        shots=shots,
        seed=seed,
        method=method.name,
        config=dataclasses.asdict(config),
        parents={heads.id: 1.0} if heads is not None else {},
    )


def prompt_differs(card: VectorCard, model: Model[P], prompts: Prompts[P]) -> bool:
    """Return whether the prompts of a task are written otherwise than those of a vector; False if unknown.

    The digest of a prompt covers everything, and the words of the first training example too. So for a vector of other
    examples only what stands around an answer is compared.
    """
    try:
        if len(prompts) == 0:
            return False
        if card.examples == prompts.digest():
            return prompt_digest(model, prompts) != card.prompt
        parts = tuple(example_text(model, prompts))
        return bool(card.prompt_text) and (card.prompt_text[1:2], card.prompt_text[3:]) != (parts[1:2], parts[3:])
    except DataError:
        # The training examples are not here; a vector can be used without them.
        return False
