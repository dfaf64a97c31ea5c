"""The task vectors of one run of a harness: loaded, reused from the library, or fitted, one for each task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.session import FitSession
from lmms_mtv.harness import record
from lmms_mtv.harness.arguments import Arguments
from lmms_mtv.harness.protocols import Logger, Model, Prompts
from lmms_mtv.harness.recipe import declared_settings, prompt_differs, vector_recipe
from lmms_mtv.harness.record import TaskRecord
from lmms_mtv.harness.training import Training
from lmms_mtv.hooks import Sites
from lmms_mtv.methods import Method
from lmms_mtv.models.fitting import fit_with_card
from lmms_mtv.runtime import files
from lmms_mtv.runtime.distributed import Ranks
from lmms_mtv.runtime.environment import versions
from lmms_mtv.vectors import HEADS, TaskVector, VectorCard
from lmms_mtv.vectors.library import Library

P = TypeVar("P")


class TaskVectorProvider(Generic[P]):
    """The source of the task vectors of one run.

    Args:
        arguments: the plugin's arguments. ``arguments.vector`` names a vector that is used for all tasks, and nothing
            is fitted.
        method: the method that fits vectors.
        settings: the settings that were passed for the method.
        model: the model that the vectors are for.
        sites: the sites of the model.
        logger: the logger of the harness.
        ranks: function that returns the processes that fit together, which are known when the first fit begins. Only
            rank 0 writes files and messages.

    Raises:
        ArgumentError: ``arguments.vector`` or ``arguments.heads`` names no vector, or several vectors.
        GeometryError: the named vector was made for another model.
    """

    def __init__(
        self,
        arguments: Arguments,
        method: Method,
        settings: Mapping[str, Any],
        model: Model[P],
        sites: Sites,
        logger: Logger,
        ranks: Callable[[], Ranks] = Ranks,
    ) -> None:
        self._arguments = arguments
        self._method = method
        self._settings = settings
        self._model = model
        self._sites = sites
        self._logger = logger
        self._ranks = ranks
        self._library = Library(Path(arguments.library) if arguments.library is not None else None)
        self._vector = self._named_vector(arguments.vector)
        self._heads = self._named_vector(arguments.heads)
        if self._heads is not None and HEADS not in self._heads.edits:
            raise ArgumentError(
                f"heads={arguments.heads} names a vector of {self._heads.card.method} ({self._heads.described()}): "
                "name one that edits heads"
            )

    @property
    def identity(self) -> str:
        """The inputs of this run's vectors besides the tasks, as text that names the run in a cache."""
        model, arguments = self._model, dataclasses.asdict(self._arguments)
        for name in ("library", "reuse", "cache_gb", "vector", "heads"):
            del arguments[name]
        checksums = [None if vector is None else vector.checksum for vector in (self._vector, self._heads)]
        parts = [
            model.name,
            model.revision,
            model.dtype,
            dict(model.recipe),
            arguments,
            dict(self._settings),
            checksums,
        ]
        return json.dumps(parts, sort_keys=True, default=str)

    def of(self, prompts: Prompts[P], shots: int, folder: Path | None) -> tuple[TaskVector, TaskRecord]:
        """Return the vector of a task and its record.

        The library gives a vector of the same recipe. Otherwise the method fits a vector, which is added to the
        library.

        Args:
            prompts: the prompts of the task.
            shots: demonstrations in an evaluated prompt.
            folder: the folder of the harness's results, which gets a copy of the vector; None if there is no folder.
        """
        if self._vector is not None:
            return self._vector, self._loaded_record(self._vector, prompts, shots)
        config, declared = self._configured(prompts.training)
        if declared and self._leads:
            listed = ", ".join(f"{key}={value}" for key, value in declared.items())
            self._logger.info(
                f"task {prompts.training.name} declares {listed} for method {self._method.name}: arguments win"
            )
        recipe = self._recipe(prompts, shots, config)
        vector, remarks = self._from_library(recipe), list[str]()
        reused = vector is not None
        if vector is None:
            self._check_writable(recipe, folder)
            vector, remarks = self._fit(prompts, config, recipe)
        return vector, record.task_record(
            vector,
            self._save(vector, folder),
            seed=self._arguments.seed,
            shots=shots,
            reused=reused,
            declared=declared,
            remarks=remarks,
        )

    def recipe(self, prompts: Prompts[P], shots: int) -> VectorCard:
        """Return the card of the vector that a fit for a task would give. Nothing is fitted."""
        return self._recipe(prompts, shots, self._configured(prompts.training)[0])

    @property
    def _leads(self) -> bool:
        return self._ranks().rank == 0

    def _named_vector(self, reference: str | None) -> TaskVector | None:
        """Return the vector that an argument names, after a check that the vector is of this model."""
        if reference is None:
            return None
        arguments, model = self._arguments, self._model
        entry = self._library.resolve(reference, model=model.name, seed=arguments.seed, shots=arguments.shots or 0)
        vector = TaskVector.load(entry.path)
        # The same weights under another name are the same model.
        same_weights = model.revision is not None and vector.card.revision == model.revision
        vector.check(self._sites.geometry)
        if not same_weights:
            self._logger.warning(
                f"vector {vector.id} was fitted for {vector.card.model} (revision {vector.card.revision}), this is "
                f"{model.name} ({model.revision}): it fits the heads of this model, but its values are those of another"
            )
        if vector.card.dtype != model.dtype:
            self._logger.warning(f"vector {vector.id} was fitted in {vector.card.dtype}, this is {model.dtype}")
        return vector

    def _loaded_record(self, vector: TaskVector, prompts: Prompts[P], shots: int) -> TaskRecord:
        """Return the record of a task that is evaluated with the vector that ``arguments.vector`` names."""
        card, task = vector.card, prompts.training.name
        if card.task == task and card.prompt and prompt_differs(card, self._model, prompts):
            self._logger.warning(
                f"vector {vector.id} was fitted for {task} with prompts of another form (prompt_style, chat template, "
                "or processor settings): pass the arguments of its fit; `lmms-mtv library show "
                f"{self._arguments.vector}` shows a prompt of it"
            )
        if card.task != task:
            self._logger.warning(f"vector {vector.id} was fitted on task {card.task} and is used on {task}")
        if card.shots != shots:
            self._logger.warning(
                f"vector {vector.id} was fitted for prompts of {card.shots} shots and is used with {shots}"
            )
        source, seed = str(self._arguments.vector), self._arguments.seed
        return record.task_record(vector, source, seed=seed, shots=shots, reused=True, declared={}, remarks=[])

    def _configured(self, training: Training) -> tuple[Any, dict[str, Any]]:
        """Return the configuration of the method, and the settings in it that the task declares.

        Passed settings win over declared settings, and declared settings over the defaults of the method.
        """
        declared = {
            name: value
            for name, value in declared_settings(self._method, training, self._logger).items()
            if name not in self._settings
        }
        settings = {**declared, **self._settings}
        if self._heads is not None:
            settings[HEADS] = self._heads.heads
        return self._method.configure(settings), declared

    def _recipe(self, prompts: Prompts[P], shots: int, config: Any) -> VectorCard:
        return vector_recipe(
            self._model,
            self._sites.geometry,
            prompts,
            shots=shots,
            seed=self._arguments.seed,
            method=self._method,
            config=config,
            heads=self._heads,
        )

    def _from_library(self, recipe: VectorCard) -> TaskVector | None:
        """Return the vector of this recipe in the library, or None if a process lacks the vector."""
        if not self._arguments.reuse or not self._method.settings():
            return None
        vector, ranks = self._library.get(recipe), self._ranks()
        if ranks.all_reduce(torch.tensor(float(vector is not None))).item() < ranks.count or vector is None:
            return None
        if self._leads:
            self._logger.info(
                f"vector {vector.id} for {vector.card.task} is reused from {self._library.folder(recipe)}, "
                f"{vector.described()}: pass reuse=False to fit it again"
            )
            if older := {k: v for k, v in vector.card.versions.items() if versions().get(k) != v}:
                listed = ", ".join(f"{name} {version}" for name, version in older.items())
                self._logger.warning(f"vector {vector.id} was fitted with {listed}: pass reuse=False to fit it again")
        return vector

    def _check_writable(self, recipe: VectorCard, folder: Path | None) -> None:
        """Check in every process that the vector that is to be fitted can be added to the library."""
        with self._ranks().raise_together():
            if self._method.settings() and self._leads:
                self._library.check_writable(recipe)
                if folder is not None and (reason := record.unwritable(folder)) is not None:
                    self._logger.warning(f"{reason}; the fitted vector will be in the library alone")

    def _save(self, vector: TaskVector, folder: Path | None) -> str:
        """Save a vector in the library and below ``folder``, and return the source for its record."""
        if not vector.edits:
            return "nothing to fit"
        if self._leads:
            # The library comes first: if the copy cannot be written, the fit is not lost.
            kept = self._library.add(vector)
            if folder is not None and record.unwritable(folder) is None:
                path = record.vector_path(folder, vector)
                # The library may have the same edits with the seconds of an earlier fit.
                if VectorCard.load(kept) != vector.card or not files.link(kept, path):
                    vector.save(path)
                return str(path.relative_to(folder))
        return str(self._library.folder(vector.card))

    def _fit(self, prompts: Prompts[P], config: Any, recipe: VectorCard) -> tuple[TaskVector, list[str]]:
        """Return the fitted vector, and the session's remarks on the training split."""
        session = FitSession[P](
            self._model,
            self._sites,
            prompts,
            seed=self._arguments.seed,
            shots=recipe.shots,
            batch_size=self._model.batch_size,
            memory=int(self._arguments.cache_gb * 2**30),
            progress=self._leads,
            ranks=self._ranks(),
        )
        fitted = fit_with_card(
            session,
            self._method,
            config,
            recipe,
            self._model,
            prompts,
            device=self._model.device,
            stops=prompts.training.stops,
        )
        if self._leads:
            for line in (*fitted.warnings, *fitted.remarks):
                self._logger.warning(f"{prompts.training.name}: {line}")
            if self._method.settings():
                self._logger.info(fitted.summary)
        return fitted.vector, list(fitted.remarks)
