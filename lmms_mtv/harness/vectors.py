"""The task vectors of one run of a harness: loaded or fitted, one for each task, and what is recorded of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lmms_mtv import methods
from lmms_mtv.batches import BatchSize
from lmms_mtv.fitting import Episode, Examples, FitSession, Runner
from lmms_mtv.harness import record
from lmms_mtv.harness.arguments import Arguments
from lmms_mtv.harness.training import Training
from lmms_mtv.hooks import Sites
from lmms_mtv.methods import Fitted, Method
from lmms_mtv.ranks import Ranks
from lmms_mtv.vector import TaskVector, VectorCard

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)


class Logger(Protocol):
    """The harness's own logger: its messages are what its command line shows."""

    def info(self, message: str, /) -> Any: ...

    def warning(self, message: str, /) -> Any: ...


class Model(Runner[P_contra], Protocol[P_contra]):
    """A runner that says which model it is. ``batch_size`` is the rows of one forward of a fit."""

    name: str
    revision: str | None
    dtype: str
    batch_size: BatchSize

    def written(self, prompt: P_contra) -> list[str]:
        """All that is written of a prompt with its target, in pieces."""
        ...


class Prompts(Examples[P_co], Protocol[P_co]):
    """The training examples of one task of a harness."""

    @property
    def training(self) -> Training: ...


class Vectors(Generic[P]):
    """The task vectors of one run. ``loaded``, if there is one, stands for all that would be fitted.

    ``record`` has an entry for each task that :meth:`of` was asked for. ``ranks`` gives the processes that fit
    together, known when the first fit begins; only rank 0 of them writes files and messages, and none if ``quiet``.

    Raises :class:`GeometryError` if ``loaded`` was made for another model.
    """

    def __init__(
        self,
        arguments: Arguments,
        method: Method,
        settings: Mapping[str, Any],
        model: Model[P],
        sites: Sites,
        loaded: TaskVector | None,
        logger: Logger,
        ranks: Callable[[], Ranks] = Ranks,
        quiet: bool = False,
    ) -> None:
        self.record: dict[str, dict[str, Any]] = {}
        self._arguments = arguments
        self._method = method
        self._settings = settings
        self._model = model
        self._sites = sites
        self._loaded = loaded
        self._logger = logger
        self._ranks = ranks
        self._quiet = quiet
        if loaded is not None:
            loaded.check(sites.geometry, model.name)
            if loaded.card.revision != model.revision:
                logger.warning(
                    f"vector {loaded.id} was fitted for revision {loaded.card.revision} of {model.name}, this is "
                    f"{model.revision}"
                )
            if loaded.card.dtype != model.dtype:
                logger.warning(f"vector {loaded.id} was fitted in {loaded.card.dtype}, this is {model.dtype}")

    def of(self, prompts: Prompts[P], shots: int, folder: Path | None) -> TaskVector:
        """The vector of a task that is evaluated with ``shots`` demonstrations.

        A fitted one is saved below ``folder``, where the harness writes its results, if it does.
        """
        name = prompts.training.name
        if self._loaded is not None:
            card = self._loaded.card
            if card.task != name:
                self._logger.warning(f"vector {self._loaded.id} was fitted on task {card.task} and is used on {name}")
            if card.shots != shots:
                self._logger.warning(
                    f"vector {self._loaded.id} was fitted for prompts of {card.shots} shots and is used with {shots}"
                )
            self.record[name] = record.of_task(self._loaded, str(self._arguments.vector), self._arguments.seed, shots)
            return self._loaded
        vector = self._fit(prompts, shots)
        source = "nothing to fit"
        if vector.edits:
            source = "fitted"
            if folder is not None and self._leads:
                source = str(vector.save(record.vector_path(folder, vector)).relative_to(folder))
        self.record[name] = record.of_task(vector, source, self._arguments.seed, shots)
        return vector

    @property
    def _leads(self) -> bool:
        return not self._quiet and self._ranks().rank == 0

    def _fit(self, prompts: Prompts[P], shots: int) -> TaskVector:
        training = prompts.training
        every = {name for method in methods.names() for name in methods.get(method).settings()}
        declared = training.settings(sorted(every))
        settings = {name: declared[name] for name in self._method.settings() if name in declared}
        config = self._method.configure(settings | dict(self._settings))
        fits = bool(self._method.settings())
        began = time.perf_counter()
        session = FitSession[P](
            self._model,
            self._sites,
            prompts,
            seed=self._arguments.seed,
            shots=shots,
            batch_size=self._model.batch_size,
            memory=int(self._arguments.cache_gb * 2**30),
            progress=self._leads,
            ranks=self._ranks(),
        )
        fitted: Fitted = self._method.fit(session, config)
        card = VectorCard(
            model=self._model.name,
            revision=self._model.revision,
            dtype=self._model.dtype,
            geometry=self._sites.geometry,
            task=training.name,
            split=training.split if fits else "",
            examples=training.digest() if fits else "",
            prompt=self._prompt_digest(prompts) if fits else "",
            shots=shots,
            seed=self._arguments.seed,
            method=self._method.name,
            config=dataclasses.asdict(config),
            versions=record.versions(),
            losses=fitted.losses,
            seconds=time.perf_counter() - began,
        )
        vector = TaskVector(dict(fitted.edits), card)
        if fits and self._leads:
            self._logger.info(_summary(vector, session))
        return vector

    def _prompt_digest(self, prompts: Prompts[P]) -> str:
        """SHA-256 of a written prompt with its target: of everything that shapes a prompt."""
        example = prompts.prompt(Episode(0, (1,) if len(prompts) > 1 else ()))
        return hashlib.sha256(json.dumps(self._model.written(example)).encode()).hexdigest()


def _summary(vector: TaskVector, session: FitSession[Any]) -> str:
    layers, heads, _ = session.shape
    losses: Mapping[str, Sequence[float]] = vector.card.losses
    loss = f", loss {losses['unedited'][0]:.3f} -> {losses['chosen'][0]:.3f}" if "chosen" in losses else ""
    return (
        f"fitted {vector.card.method} for {vector.card.task} in {vector.card.seconds:.1f} s: vector {vector.id}, "
        f"{len(vector.heads)} of {layers * heads} heads{loss} (without edit -> with it, on training queries), "
        f"{session.forwards} forwards"
    )
