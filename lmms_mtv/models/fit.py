"""A fit from Python: a model of transformers, its processor, and examples."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn

from lmms_mtv import methods
from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.session import FitSession
from lmms_mtv.models.examples import ExampleList
from lmms_mtv.models.fitting import fit_with_card, prompt_digest
from lmms_mtv.models.identity import identity_of
from lmms_mtv.models.runner import PromptRunner
from lmms_mtv.runtime.settings import check_whole
from lmms_mtv.vectors import TaskVector, VectorCard

logger = logging.getLogger(__name__)


def fit_vector(
    model: nn.Module,
    processor: Any,
    examples: Any,
    /,
    method: str = "mtv",
    *,
    task: str = "examples",
    seed: int = 0,
    shots: int = 0,
    batch_size: int = 1,
    prompt_style: str = "raw",
    image_placeholder: str | None = None,
    description: str = "",
    target_delimiter: str = " ",
    fewshot_delimiter: str = "\n\n",
    cache_gb: float = 4.0,
    progress: bool = True,
    **settings: Any,
) -> TaskVector:
    """Fit a task vector on examples.

    The vector equals the one that a harness fits from the same prompts with the same seed and settings, to the last
    bit.

    Args:
        model: an image-text or text model of transformers, on its device and in evaluation mode.
        processor: the processor of the model, or the tokenizer of a text model.
        examples: the training examples, see :class:`~lmms_mtv.models.examples.ExampleList`.
        method: the name of a method, see ``lmms-mtv methods``.
        task: the name of the task on the vector's card.
        seed: the seed of all random draws.
        shots: demonstrations in the prompts that the vector will be used with.
        batch_size: prompts in one forward that extracts activations; the vector differs in the last bits at most.
        prompt_style: ``raw`` writes the texts alone; ``chat`` uses the chat template.
        image_placeholder: the text for an image in a raw prompt, if the processor does not show this text.
        description, target_delimiter, fewshot_delimiter: as in :class:`~lmms_mtv.models.examples.ExampleList`.
        cache_gb: memory for prefilled prompts, on the model's device, in GiB.
        progress: True shows progress bars.
        settings: settings of the method, see ``lmms-mtv methods NAME``.

    Raises:
        ArgumentError: the method, a setting or the style of prompts is unknown, an argument has a value that cannot be
            used, or the processor does not fit the model.
        DataError: there are too few examples, or an example has an unknown form, an empty answer, an image that cannot
            be opened, or a text that stands for an image.
        DiscoveryError: the attention heads of the model are not found.
    """
    chosen = methods.get(method)
    config = chosen.configure(settings)
    _check(model, task, seed=seed, shots=shots)
    check_whole("batch_size", batch_size, 1)
    marks = {str(mark) for mark in (image_placeholder, getattr(processor, "image_token", None)) if mark}
    rows = ExampleList(examples, description, target_delimiter, fewshot_delimiter, sorted(marks))
    digest = rows.digest()
    known = identity_of(model)
    runner = PromptRunner(
        model,
        processor,
        known.name,
        prompt_style=prompt_style,
        image_placeholder=image_placeholder,
        batch_size=batch_size,
    )
    recipe = VectorCard(
        model=known.name,
        revision=known.revision,
        dtype=runner.dtype,
        geometry=runner.sites.geometry,
        task=task,
        split="",
        examples=digest,
        prompt=prompt_digest(runner, rows),
        shots=shots,
        seed=seed,
        method=method,
        config=dataclasses.asdict(config),
    )
    session = FitSession(
        runner,
        runner.sites,
        rows,
        seed=seed,
        shots=shots,
        batch_size=batch_size,
        memory=int(cache_gb * 2**30),
        progress=progress,
    )
    fitted = fit_with_card(session, chosen, config, recipe, runner, rows, device=runner.device)
    for line in (*fitted.warnings, *fitted.remarks):
        logger.warning("%s: %s", task, line)
    logger.info("%s", fitted.summary)
    return fitted.vector


def _check(model: object, task: object, **counts: object) -> None:
    """Check arguments of :func:`fit_vector`: the model, the name of the task, and numbers of at least 0."""
    if not isinstance(model, nn.Module):
        load = "AutoModelForImageTextToText.from_pretrained(...)"
        raise ArgumentError(f"model is a {type(model).__name__}: pass a loaded model ({load})")
    if not isinstance(task, str) or not task.strip():
        raise ArgumentError(f"task={task!r}, expected a name, which the vector's card has")
    for name, value in counts.items():
        check_whole(name, value)
