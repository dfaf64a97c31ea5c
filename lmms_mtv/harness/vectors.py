"""The task vectors of one run of a harness: loaded or fitted, one for each task, and what is recorded of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

from lmms_mtv import methods
from lmms_mtv.errors import ArgumentError, MethodError
from lmms_mtv.fit.examples import Episode, Examples, Runner
from lmms_mtv.fit.session import FitSession
from lmms_mtv.harness import record
from lmms_mtv.harness.arguments import Arguments
from lmms_mtv.harness.prompts import Reply
from lmms_mtv.harness.training import Training
from lmms_mtv.hooks import Sites, applied
from lmms_mtv.methods import Fitted, Method
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.runtime.distributed import Ranks
from lmms_mtv.runtime.memory import peak
from lmms_mtv.vectors import HEADS, Edit, TaskVector, VectorCard
from lmms_mtv.vectors.library import Library

_TRIED: Final = 16
"""Training queries that are answered after a fit."""

_MORE: Final = 8
"""Tokens that an answer may have beyond the longest target, to see whether it ends."""

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

    @property
    def device(self) -> torch.device: ...

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that differ from the default and change what the model computes of the same text."""
        ...

    def text_parts(self, prompt: P_contra) -> list[str]:
        """Return all that is written of a prompt with its target, in pieces."""
        ...

    def answered(self, prompts: Sequence[P_contra], new_tokens: int, edited: bool) -> list[Reply]:
        """Greedy answers of at most ``new_tokens`` tokens, or none where answers are not generated.

        ``edited`` says that an edit is in place.
        """
        ...


class Prompts(Examples[P_co], Protocol[P_co]):
    """The training examples of one task of a harness."""

    @property
    def training(self) -> Training: ...

    def digest(self) -> str:
        """Return SHA-256 of the training examples as they are shown."""
        ...


class TaskVectorProvider(Generic[P]):
    """The task vectors of one run. What ``arguments.vector`` names, if it does, stands for all that would be fitted.

    ``made`` and ``record`` have an entry for each task that :meth:`of` was asked for. ``ranks`` gives the processes
    that fit together, known when the first fit begins; only rank 0 of them writes files and messages, and none if
    ``quiet``.

    Raises :class:`ArgumentError` if ``arguments.vector`` or ``arguments.heads`` name no vector, or several, and
    :class:`GeometryError` if it was made for another model.
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
        quiet: bool = False,
    ) -> None:
        self.record: dict[str, dict[str, Any]] = {}
        self.made: dict[str, TaskVector] = {}
        self._arguments = arguments
        self._method = method
        self._settings = settings
        self._model = model
        self._sites = sites
        self._logger = logger
        self._ranks = ranks
        self._quiet = quiet
        self._library = Library(Path(arguments.library) if arguments.library is not None else None)
        self._loaded = self._named(arguments.vector)
        self._heads = self._named(arguments.heads)
        if self._heads is not None and HEADS not in self._heads.edits:
            raise ArgumentError(
                f"heads={arguments.heads} names a vector of {self._heads.card.method} ({self._heads.described()}): "
                "name one that edits heads"
            )

    @property
    def identity(self) -> str:
        """What the vectors of this run depend on beside the tasks, as text: for caches that know a run by its name."""
        model, arguments = self._model, dataclasses.asdict(self._arguments)
        for name in ("library", "reuse", "cache_gb", "vector", "heads"):
            del arguments[name]
        named = [None if each is None else each.checksum for each in (self._loaded, self._heads)]
        parts = [model.name, model.revision, model.dtype, dict(model.recipe), arguments, dict(self._settings), named]
        return json.dumps(parts, sort_keys=True, default=str)

    def _named(self, reference: str | None) -> TaskVector | None:
        """Return the vector that an argument names, made sure to be of this model."""
        if reference is None:
            return None
        arguments, model = self._arguments, self._model
        entry = self._library.resolve(reference, model=model.name, seed=arguments.seed, shots=arguments.shots or 0)
        found = TaskVector.load(entry.path)
        # The same weights under another name are the same model.
        same = model.revision is not None and found.card.revision == model.revision
        found.check(self._sites.geometry, None if same else model.name)
        if not same:
            self._logger.warning(
                f"vector {found.id} was fitted for revision {found.card.revision} of {model.name}, this is "
                f"{model.revision}"
            )
        if found.card.dtype != model.dtype:
            self._logger.warning(f"vector {found.id} was fitted in {found.card.dtype}, this is {model.dtype}")
        return found

    def of(self, prompts: Prompts[P], shots: int, folder: Path | None) -> TaskVector:
        """Return the vector of a task that is evaluated with ``shots`` demonstrations.

        One of the same recipe is taken from the library, or it is fitted and kept there; a copy goes below
        ``folder``, where the harness writes its results, if it does.
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
            source = str(self._arguments.vector)
            self.record[name] = record.of_task(self._loaded, source, self._arguments.seed, shots, reused=True)
            self.record[name] |= {"declared": {}, "remarks": []}
            self.made[name] = self._loaded
            return self._loaded
        declared = {k: v for k, v in self._declared(prompts.training).items() if k not in self._settings}
        config = self._config(declared)
        if declared and self._leads:
            named = ", ".join(f"{key}={value}" for key, value in declared.items())
            self._logger.info(f"task {name} declares {named} for method {self._method.name}: arguments win")
        recipe = self._recipe(prompts, shots, config)
        vector = self._kept(recipe)
        reused, remarks = vector is not None, list[str]()
        if vector is None:
            with self._ranks().raise_together():
                if self._method.settings() and self._leads:
                    self._library.check_writable()
                    if folder is not None and (reason := record.unwritable(folder)) is not None:
                        self._logger.warning(f"{reason}; the fitted vector will be in the library alone")
            vector, remarks = self._fit(prompts, config, recipe)
        source = "nothing to fit"
        if vector.edits:
            source = str(self._library.folder(vector.card))
            if self._leads:
                # First where it is found again: whatever happens to the copy, the fit is not lost.
                self._library.add(vector)
            if folder is not None and self._leads and record.unwritable(folder) is None:
                source = str(vector.save(record.vector_path(folder, vector)).relative_to(folder))
        self.record[name] = record.of_task(vector, source, self._arguments.seed, shots, reused)
        self.record[name] |= {"declared": declared, "remarks": remarks}
        self.made[name] = vector
        return vector

    @property
    def _leads(self) -> bool:
        return not self._quiet and self._ranks().rank == 0

    def _config(self, declared: Mapping[str, Any]) -> Any:
        """Return the method's settings: given ones, then those that the task declares, then its own."""
        settings = {**declared, **self._settings}
        if self._heads is not None:
            settings[HEADS] = self._heads.heads
        return self._method.configure(settings)

    def _declared(self, training: Training) -> dict[str, Any]:
        """Return the settings that the task declares for this method, or for the method that this one is a control of.

        A control has the settings class of its method, or one derived from it.
        """
        found: dict[str, Any] = {}
        for name, settings in training.settings(methods.names()).items():
            if self._is_control_of(name):
                # A wrong name or value is an error, whichever method is used.
                methods.get(name).configure(settings)
                found |= settings
        return found

    def _is_control_of(self, name: str) -> bool:
        """Return whether this method is the one called ``name``, or a control of that one."""
        try:
            return issubclass(self._method.config, methods.get(name).config)
        except MethodError as error:
            # The method that is used is loaded already: one that nobody asked for stops nothing.
            self._logger.warning(f"{error}; the task declares settings for it")
            return False

    def _recipe(self, prompts: Prompts[P], shots: int, config: Any) -> VectorCard:
        """Return the card of a vector before it is fitted."""
        training, fits = prompts.training, bool(self._method.settings())
        return VectorCard(
            model=self._model.name,
            revision=self._model.revision,
            dtype=self._model.dtype,
            geometry=self._sites.geometry,
            task=training.name,
            split=training.split if fits else "",
            examples=prompts.digest() if fits else "",
            prompt=self._prompt_digest(prompts) if fits else "",
            shots=shots,
            seed=self._arguments.seed,
            method=self._method.name,
            config=dataclasses.asdict(config),
            parents={self._heads.id: 1.0} if self._heads is not None else {},
        )

    def _kept(self, recipe: VectorCard) -> TaskVector | None:
        """Return the vector of this recipe in the library, if every process finds it there."""
        if not self._arguments.reuse or not self._method.settings():
            return None
        found, together = self._library.get(recipe), self._ranks()
        if together.all_reduce(torch.tensor(float(found is not None))).item() < together.count or found is None:
            return None
        if self._leads:
            self._logger.info(
                f"vector {found.id} for {found.card.task} is reused from {self._library.folder(recipe)}, "
                f"{found.described()}: pass reuse=False to fit it again"
            )
            if older := {k: v for k, v in found.card.versions.items() if record.versions().get(k) != v}:
                listed = ", ".join(f"{name} {version}" for name, version in older.items())
                self._logger.warning(f"vector {found.id} was fitted with {listed}: pass reuse=False to fit it again")
        return found

    def _fit(self, prompts: Prompts[P], config: Any, recipe: VectorCard) -> tuple[TaskVector, list[str]]:
        """Return the fitted vector, and what the session remarks of the training split."""
        began = time.perf_counter()
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
        with peak(self._model.device) as memory:
            fitted: Fitted = self._method.fit(session, config)
        card = dataclasses.replace(
            recipe,
            versions=record.versions(),
            # More digits would be noise, and most of the file.
            losses={name: [float(f"{loss:.6g}") for loss in found] for name, found in fitted.losses.items()},
            seconds=time.perf_counter() - began,
            stages={name: round(seconds, 3) for name, seconds in session.stages.items()},
            memory=memory.bytes,
            replay=session.replay,
            accuracy=self._tried(session, prompts, config, fitted.edits),
        )
        vector = TaskVector(dict(fitted.edits), card)
        for line in session.remarks if self._leads else ():
            self._logger.warning(f"{prompts.training.name}: {line}")
        if self._method.settings() and self._leads:
            self._logger.info(_summary(vector, session))
        return vector, session.remarks

    def _tried(
        self, session: FitSession[P], prompts: Prompts[P], config: Any, edits: Mapping[str, Edit]
    ) -> dict[str, float]:
        """Return how some training queries are answered without the vector and with it; see :class:`VectorCard`.

        A loss can be small where answers are wrong: on the first token of a target alone, or past its end. Nothing
        is chosen by these answers.
        """
        if not edits:
            return {}
        episodes = session.episodes(min(_TRIED, len(prompts)), session.shots, "trial")
        made = [prompts.prompt(episode) for episode in episodes]
        tokens = [self._model.target_ids(prompt) for prompt in made]
        leads = [self._model.lead_ids(prompt) for prompt in made]
        targets = [str(getattr(prompt, "target", "")).strip() for prompt in made]
        limit = max(map(len, tokens)) + max(map(len, leads)) + _MORE

        stops = prompts.training.stops

        def cut(reply: Reply) -> Reply:
            """Cut an answer where the task does."""
            ends = [place for stop in stops if (place := reply.text.find(stop)) >= 0]
            return Reply(reply.text[: min(ends)], True) if ends else reply

        def right(edited: bool) -> tuple[float, float] | None:
            """Return the share of right answers, and of those that did not end."""
            size = self._model.batch_size.copy()
            parts = size.run_batches(made, lambda batch: self._model.answered(batch, limit, edited))
            replies = [cut(reply) for _, found in parts for reply in found]
            if len(replies) < len(targets):
                return None
            count = len(replies)
            hits = sum(one.text.strip().lower() == target.lower() for one, target in zip(replies, targets, strict=True))
            return hits / count, sum(not one.ended for one in replies) / count

        plain = right(False)
        if plain is None:
            return {}
        with applied(self._sites, edits):
            edited = right(True)
        if edited is None:
            return {}
        found = {"queries": float(len(made)), "unedited": plain[0], "edited": edited[0], "endless": edited[1]}
        if self._leads:
            alike = len({ids[0] for ids in tokens}) == 1 < len(set(targets))
            for line in _doubts(found, alike and getattr(config, "loss", None) == "first"):
                self._logger.warning(f"{prompts.training.name}: {line}")
        return found

    def _prompt_digest(self, prompts: Prompts[P]) -> str:
        """Return SHA-256 of a written prompt with its target: of everything that shapes a prompt."""
        example = prompts.prompt(Episode(0, (1,) if len(prompts) > 1 else ()))
        written: list[Any] = self._model.text_parts(example)
        if recipe := dict(self._model.recipe):
            written.append(recipe)
        if lead := self._model.lead_ids(example):
            # loss=first once ended at them: vectors of that loss are others.
            written.append({"lead": lead})
        return hashlib.sha256(json.dumps(written, sort_keys=True, default=str).encode()).hexdigest()


def _doubts(accuracy: Mapping[str, float], blind: bool) -> list[str]:
    """Return what speaks against a vector, whatever its loss, a line each. ``blind``: its loss saw no answer."""
    lines = []
    if blind:
        lines.append("all targets begin with the same token, so that loss=first tells nothing of them: pass loss=all")
    if accuracy["edited"] < accuracy["unedited"]:
        lines.append(
            f"with the vector {accuracy['edited']:.0%} of {accuracy['queries']:.0f} training queries are answered "
            f"right, without it {accuracy['unedited']:.0%}: the loss it was chosen by does not tell (loss=all, more "
            "iterations=, or another method=)"
        )
    if accuracy["endless"] > 0.5:
        lines.append(
            f"{accuracy['endless']:.0%} of the answers with the vector run on past the target: pass loss=all, which "
            "learns the end of an answer too"
        )
    return lines


def _summary(vector: TaskVector, session: FitSession[Any]) -> str:
    losses: Mapping[str, Sequence[float]] = vector.card.losses
    loss = ""
    if "chosen" in losses:
        before, after = losses["unedited"][0], losses["chosen"][0]
        loss = f", loss {before:.3f} -> {after:.3f} (without edit -> with it, on training queries)"
    replay = "" if vector.card.replay is None else f" (edits: {vector.card.replay})"
    if tried := vector.card.accuracy:
        loss += f", right answers {tried['unedited']:.0%} -> {tried['edited']:.0%} of {tried['queries']:.0f}"
    return (
        f"fitted {vector.card.method} for {vector.card.task} in {vector.card.seconds:.1f} s: vector {vector.id}, "
        f"{vector.described()}{loss}, {session.forwards} forwards{replay}"
    )
