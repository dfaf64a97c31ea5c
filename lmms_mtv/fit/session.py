"""What every method needs of a model and a training split: activations of few-shot prompts, and losses of edits."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any, Final, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lmms_mtv.errors import DataError, HookError, NumericsError
from lmms_mtv.hooks import Prefill, Sites, applied, capture, checkpointed, receivers, record, shape, verify, written
from lmms_mtv.runtime.batches import BatchSize, alone
from lmms_mtv.runtime.distributed import Ranks
from lmms_mtv.runtime.lru_cache import Kept
from lmms_mtv.vectors import HEADS, Edit, Edits, by_stream, distinct, rows_of, taken

logger = logging.getLogger(__name__)

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)
T = TypeVar("T")

_COMPARED: Final = 4
"""Edits whose replays are compared with full forwards, once in a session."""

_SIDE_BY_SIDE: Final = 32
"""How many edits, those over and over, are compared side by side."""

_PACKED: Final = 1024
"""Positions side by side at most: the attention mask grows with the square."""

_APART: Final = 1e-4
"""How much a loss may change with the edits beside it, which count for exactly nothing where they are not seen."""

_UNSUPPORTED: Final = (
    *(RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError),
    *(HookError, NumericsError),
)
"""What models raise of an attention mask that they do not take."""

Run = Callable[[nn.Module, Sites, Edits, Sequence[int]], Tensor]
"""How a prompt is run with edits: from its cache or whole."""

Tokens = Literal["first", "all"]
"""Which tokens of the target count in a loss: up to the first that is not blank, or all."""


class Episode(NamedTuple):
    """A training query and the demonstrations before it, as indices of training examples.

    ``answers`` are the examples whose targets the demonstrations show, if not their own.
    """

    query: int
    demonstrations: tuple[int, ...]
    answers: tuple[int, ...] | None = None


class Target(NamedTuple):
    """What follows a prompt when its query is answered: token ids, of which the first ``lead`` are blank."""

    ids: list[int]
    lead: int = 0

    def counting(self, tokens: Tokens) -> list[int]:
        """The tokens that count in a loss."""
        return self.ids[: self.lead + 1] if tokens == "first" else self.ids


class Answer(NamedTuple):
    """What a model makes of a query's target, T tokens of it.

    ``logits`` is float32 [T, vocabulary], and predicts ``target``, int64 [T]. ``states`` are float32 [T, L, H, D], of a
    stream at the positions that predict them, or None if no stream was asked for.
    """

    logits: Tensor
    target: Tensor
    states: Tensor | None = None


class Examples(Protocol[P_co]):
    """The training examples of a task, and how they become prompts."""

    def __len__(self) -> int: ...

    def prompt(self, episode: Episode) -> P_co:
        """The prompt of an episode, with the query's target known to the runner.

        Raises :class:`DataError` for an episode with ``answers`` where targets cannot be exchanged.
        """
        ...


class Runner(Protocol[P_contra]):
    """A model that runs prompts with its own preprocessing."""

    @property
    def model(self) -> nn.Module: ...

    def run(self, prompts: Sequence[P_contra]) -> None:
        """The prompts' forwards, with one row for each; the first tokens of answers may follow."""
        ...

    def lead_ids(self, prompt: P_contra) -> list[int]:
        """Token ids of the blanks between the prompt and the query's target, which tell nothing of it."""
        ...

    def target_ids(self, prompt: P_contra) -> list[int]:
        """Token ids of the query's target, as they follow the prompt and :meth:`lead_ids`."""
        ...


class FitSession(Generic[P]):
    """One fit: a model, the training examples of one task, a seed.

    ``shots`` is the number of demonstrations in the prompts that the vector will be used with: losses are of such
    prompts. ``batch_size`` is the rows of an extracting forward. ``memory`` is how many bytes of prefilled prompts
    are kept (of prompts and answers that are learned from, half of it each), and how many the copies of one may take in
    a replay. ``ranks`` are the processes that fit together, each with a session of its own: prompts and edits are
    shared out among them, and all get the same results. All randomness comes from ``seed`` and the purpose it is drawn
    for, so that nothing depends on the order of calls, on ``batch_size`` or on ``ranks``. ``stages`` has the seconds
    that each :meth:`stage` of the fit took so far, ``remarks`` a line for each use of a training example that a larger
    training split would have spared.
    """

    def __init__(
        self,
        runner: Runner[P],
        sites: Sites,
        examples: Examples[P],
        *,
        seed: int,
        shots: int = 0,
        batch_size: int | BatchSize = 1,
        memory: int = 4 << 30,
        progress: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.sites = sites
        self.seed = seed
        self.shots = shots
        self.forwards = 0
        self.stages: dict[str, float] = {}
        self.remarks: list[str] = []
        self._runner = runner
        self._examples = examples
        self._batch_size = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size.copy()
        # Fewer rows in a replay change nothing but the time it takes.
        self._replay_rows = BatchSize(sys.maxsize, automatic=True)
        self._memory = memory
        self._progress = progress
        self._ranks = ranks or Ranks()
        self._prefills: Kept[Episode, tuple[Prefill, Target]] = Kept(memory)
        self._learners: Kept[Episode, tuple[Prefill, Target]] = Kept(memory // 2)
        self._answers: Kept[tuple[Episode, Tokens, str | None], Answer] = Kept(memory // 2)
        self._replays: bool | None = None
        self._packs: bool | None = None
        self._packed_to = 0
        self._verified: set[str] = set()
        self._is_edited = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, size of a head."""
        return self.sites.shape

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self._examples)

    @property
    def replays(self) -> bool | None:
        """Whether losses come from replays; None before the first loss."""
        return self._replays

    @property
    def replay(self) -> str | None:
        """How the losses of several edits are computed: side by side, in rows, or by full forwards.

        The first is the fastest, the last the slowest. None before the first loss.
        """
        if self._replays is None:
            return None
        if not self._replays:
            return "full forwards"
        return "side by side" if self._packs else "rows"

    def random(self, purpose: str) -> Random:
        """A generator for ``purpose``, independent of all others."""
        return Random(f"{self.seed}/{purpose}")

    def generator(self, purpose: str) -> torch.Generator:
        """The same for torch, on the CPU."""
        return torch.Generator().manual_seed(self.random(purpose).getrandbits(63))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the fit: the wall-clock seconds of the block are added to ``stages[name]``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - began

    def bar(self, items: Iterable[T], description: str) -> Iterable[T]:
        """A progress bar over ``items``."""
        return tqdm(items, **self._bar_options(description))

    def _bar_options(self, description: str) -> dict[str, Any]:
        return {"desc": description, "disable": not self._progress, "dynamic_ncols": True, "leave": False}

    def episodes(
        self,
        count: int,
        shots: int,
        purpose: str,
        pool: Sequence[int] | None = None,
        unlike: Iterable[Episode] = (),
    ) -> list[Episode]:
        """``count`` random queries, each with ``shots`` random demonstrations, the query never among them.

        A query returns only after all others had their turn. Demonstrations come from the training examples in
        ``pool``, or from all of them. Examples that are in ``unlike`` are no queries, if ``count`` others are left.
        Raises :class:`DataError` when the training split has fewer than ``shots`` + 1 examples, or ``pool`` has fewer
        than ``shots`` beside the query.
        """
        total, rng = len(self._examples), self.random(purpose)
        self._check_enough(shots)
        used = {index for episode in unlike for index in (episode.query, *episode.demonstrations)}
        fresh = [index for index in range(total) if index not in used]
        asked = fresh if len(fresh) >= count else range(total)
        if len(asked) < count:
            self._remark(f"the {count} prompts for {purpose} ask {len(asked)} different queries")
        if used and len(fresh) < count:
            self._remark(f"the {count} queries for {purpose} are not kept apart from the examples of earlier stages")
        queries: list[int] = []
        while len(queries) < count:
            queries += rng.sample(asked, min(len(asked), count - len(queries)))
        made = []
        for query in queries:
            if pool is None:
                made.append(self._drawn(query, shots, rng))
                continue
            others = [index for index in pool if index != query]
            if len(others) < shots:
                raise DataError(
                    f"{len(others)} training examples to draw {shots} demonstrations from: pass diverse= of at least "
                    f"{shots + 1}, or a smaller fit_shots="
                )
            made.append(Episode(query, tuple(rng.sample(others, shots))))
        return made

    def _remark(self, reused: str) -> None:
        line = f"the training split has {len(self._examples)} examples: {reused}"
        if line not in self.remarks:
            self.remarks.append(line)

    def redrawn(self, episodes: Iterable[Episode], shots: int, purpose: str) -> list[Episode]:
        """The queries of ``episodes``, each with ``shots`` random demonstrations instead of its own.

        Raises :class:`DataError` when the training split has fewer than ``shots`` + 1 examples.
        """
        rng = self.random(purpose)
        self._check_enough(shots)
        return [self._drawn(episode.query, shots, rng) for episode in episodes]

    def asked(self, queries: Sequence[Episode], steps: int) -> list[Episode]:
        """One of ``queries`` at random for each step of a selection, prefilled as far as :meth:`prefetch` does."""
        order = self.random("order")
        chosen = [queries[order.randrange(len(queries))] for _ in range(steps)]
        self.prefetch(chosen)
        return chosen

    def _drawn(self, query: int, shots: int, rng: Random) -> Episode:
        """An episode whose demonstrations may be any example but the query."""
        drawn = rng.sample(range(len(self._examples) - 1), shots)
        return Episode(query, tuple(index + (index >= query) for index in drawn))

    def _check_enough(self, shots: int) -> None:
        if (total := len(self._examples)) < shots + 1:
            raise DataError(
                f"the training split has {total} examples, but prompts of {shots} demonstrations and a query need at "
                f"least {shots + 1}: pass fit_shots= (and shots=) of at most {max(total - 1, 0)}, or a larger split "
                "with demonstrations="
            )

    @torch.no_grad()
    def mean_activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Mean over ``episodes`` of each head's activation at the last token, float32 [L, H, D] on the CPU.

        MTV, arXiv 2406.15334, section 3.1: ``mu_l = (1/T) sum_t z_l``. Another ``stream`` gives [L, 1, width].
        """
        total = torch.zeros(shape(self.sites, stream), dtype=torch.float64)
        own = self._ranks.share(episodes)

        def extracted(batch: Sequence[Episode]) -> Tensor:
            return self._activations(batch, stream).to("cpu", torch.float64).sum(0)

        with self._ranks.together(), tqdm(total=len(own), **self._bar_options("Extracting activations")) as bar:
            for batch, rows in self._batch_size.over(own, extracted):
                total += rows
                self.forwards += 1
                bar.update(len(batch))
        return (self._ranks.total(total) / len(episodes)).float()

    def activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Each head's activation at the last token of each of N ``episodes``, float32 [N, L, H, D] on the CPU.

        Another ``stream`` gives [N, L, 1, width].
        """
        return self._each(episodes, stream, range(len(self.sites)), "Extracting activations")

    def embeddings(self) -> Tensor:
        """What the model makes of each training query without demonstrations, float32 [examples, H * D] on the CPU.

        The activations of the heads of the middle layer at the last token of the zero-shot prompt: late enough to
        have seen question and image, early enough to tell more than the first token of the answer. One prompt is run
        for each training example.
        """
        queries = [Episode(query, ()) for query in range(len(self._examples))]
        middle = len(self.sites) // 2
        return self._each(queries, HEADS, range(middle, middle + 1), "Embedding queries").flatten(1)

    @torch.no_grad()
    def _each(self, episodes: Sequence[Episode], stream: str, layers: range, description: str) -> Tensor:
        """Activations of each of N prompts in those ``layers``, float32 [N, layers, H, D] on the CPU."""
        _, heads, size = shape(self.sites, stream)
        found = torch.zeros(len(episodes), len(layers), heads, size)
        own = self._ranks.share(range(len(episodes)))

        def extracted(batch: Sequence[int]) -> Tensor:
            rows = self._activations([episodes[index] for index in batch], stream)
            return rows[:, layers.start : layers.stop].cpu()

        with self._ranks.together(), tqdm(total=len(own), **self._bar_options(description)) as bar:
            for batch, rows in self._batch_size.over(own, extracted):
                found[list(batch)] = rows
                self.forwards += 1
                bar.update(len(batch))
        return self._ranks.total(found)

    def _activations(self, batch: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Of each head at the last token of each prompt, float32 [prompts, L, H, D], or of a stream."""
        with record(self.sites, stream, prompts_only=True) as recording:
            self._runner.run([self._examples.prompt(episode) for episode in batch])
        rows = recording.last()
        if rows.shape[0] != len(batch):
            raise HookError(f"{len(batch)} prompts gave activations of {rows.shape[0]} rows, expected one each")
        return rows

    def written(self, means: Tensor, chosen: Tensor) -> Tensor:
        """Return what the ``chosen`` heads add to the hidden state of each layer where all heads have their ``means``.

        Args:
            means: the values of all heads, float32 [L, H, D].
            chosen: 1 for the heads that count, else 0, float32 [L, H].

        Returns:
            float32 [L, 1, width], on the CPU.
        """
        with receivers(self.sites) as norms:
            # One prompt, to see where the output of attention goes.
            self._activations([Episode(0, ())])
        self.forwards += 1
        return written(self.sites, means * chosen.unsqueeze(-1), means, norms)

    @torch.no_grad()
    def answered_activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> tuple[Tensor, Tensor]:
        """Activations at the last token of each prompt, and at that of its query's target after it.

        Both are float32 [N, L, H, D] for N ``episodes``, on the CPU; (H, D) is (1, width) in a ``stream`` other than
        the heads. The target ends with what ends an answer in the prompt.
        """
        found = torch.zeros(2, len(episodes), *shape(self.sites, stream))
        with self._ranks.together(), alone():
            for index in self.bar(self._ranks.share(range(len(episodes))), "Extracting activations"):
                prefill, target = self._prefill(episodes[index], whole=True)
                self._verify(prefill, [stream])
                # A forward runs the target without its last token, so the whole of it needs one more.
                for which, following in enumerate((target.ids[:1], [*target.ids, target.ids[-1]])):
                    with record(self.sites, stream) as recording:
                        prefill.forward(self._runner.model, self.sites, {}, following)
                    found[which, index] = recording.last()[0].cpu()
                    self.forwards += 1
        before, after = self._ranks.total(found)
        return before, after

    @torch.no_grad()
    def losses(self, episode: Episode, edit: Edit | Edits, tokens: Tokens = "first") -> Tensor:
        """Cross-entropy of the query's target under each of the K edits, float32 [K], on the CPU.

        ``edit`` is of the heads, or edits by stream. ``tokens`` is ``first`` for the first target token (with the
        blanks before it, if the model writes any), or ``all`` for the mean over all of them. The first call compares
        replays of a few of the edits with full forwards; if they differ, this session uses full forwards and says so.
        In the same way it finds out whether all edits can be replayed in one row. Edits of all positions always take
        full forwards, one for each of them. Equal edits run once.
        """
        edits, alike = by_stream(edit), None
        if rows_of(edits) is not None:
            edits, alike = distinct(edits)
        whole = any(each.everywhere for each in edits.values())
        prefill, target = self._ready(episode, edits, tokens, whole)
        # Of all edits, so that how they run does not depend on how many ranks there are.
        way, rows = self._way(prefill, edits, target, whole), rows_of(edits)
        if rows is None:
            return self._losses(prefill, edits, target, *way).cpu()
        found = torch.zeros(rows)
        with self._ranks.together():
            if rows > self._ranks.rank:
                own = taken(edits, self._ranks.mine)
                found[self._ranks.mine] = self._losses(prefill, own, target, *way).cpu()
        return self._ranks.total(found)[alike]

    def loss_gradient(
        self, episode: Episode, value: Tensor, mask: Tensor, tokens: Tokens = "first"
    ) -> tuple[Tensor, Tensor]:
        """The losses of :meth:`losses` where ``mask`` replaces heads by ``value`` [L, H, D], and their gradient.

        ``mask`` is float32 [K, L, H]; an entry m makes ``x' = (1 - m) * x + m * value`` of its head, so entries between
        0 and 1 mix. Returns the losses, float32 [K], and the derivative of each with respect to its own mask, float32
        [K, L, H], both on the CPU. It reaches the mask alone: no weight takes part, whatever its ``requires_grad``.

        Raises :class:`HookError` if the model's own code turns gradients off.
        """
        mask = mask.detach()
        edits = by_stream(Edit.replace(value, mask))
        with torch.no_grad():
            prefill, target = self._ready(episode, edits, tokens)
        way = self._way(prefill, edits, target, learning=True)
        losses, gradient = torch.zeros(len(mask)), torch.zeros(mask.shape)
        with self._ranks.together():
            if own := range(len(mask))[self._ranks.mine]:
                losses[own], gradient[own] = self._loss_gradient(value, mask[own], target, *way)
        return self._ranks.total(losses), self._ranks.total(gradient)

    @torch.no_grad()
    def answer(self, episode: Episode, tokens: Tokens = "all", stream: str | None = None) -> Answer:
        """What the model, unedited, makes of the query's target, with the activations of ``stream`` if one is given.

        It is worked out once, and kept as long as there is room. Replays are used once :meth:`losses` has found that
        they are exact. Raises :class:`HookError` where the model is edited: in what the ``loss`` of :meth:`gradients`
        gives.
        """
        if self._is_edited:
            raise HookError("the model is edited now: ask for its own answers in loss, before it gives its function")
        kept = self._answers.get((episode, tokens, stream))
        if kept is not None:
            return kept
        with alone():
            prefill, whole = self._prompted(episode)
            target = whole.counting(tokens)
            run = prefill.replay if self._replayed(prefill) else prefill.forward
            with ExitStack() as stack:
                tail = len(target)
                recording = stack.enter_context(record(self.sites, stream, tail=tail)) if stream else None
                logits = run(self._runner.model, self.sites, {}, target)[0]
            self.forwards += 1
        states = recording.last() if recording else None
        found = Answer(logits, torch.tensor(target, device=logits.device), states)
        self._answers.put((episode, tokens, stream), found, sum(t.nbytes for t in found if t is not None))
        return found

    def gradients(
        self,
        episodes: Sequence[Episode],
        parameters: Sequence[Tensor],
        edits: Callable[[int], Edits],
        loss: Callable[[int], Callable[[Answer], Tensor]],
        *,
        tokens: Tokens = "all",
        stream: str | None = None,
        autocast: bool = False,
        checkpointing: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The ``loss`` of what the edited model makes of each query's target, and the gradient of their sum.

        For the i-th of N episodes ``edits(i)`` makes edits of ``parameters``, and ``loss(i)`` a function that gives a
        number of the :class:`Answer` under them, with the activations of ``stream`` if one is given; what it needs of
        the unedited model, ``loss`` asks for before. Returns the losses, float32 [N], and the derivative of their sum
        with respect to each of the parameters, float32, all on the CPU. Weights take no gradient. Each prompt runs
        whole and alone; with ``autocast`` in bfloat16, with ``checkpointing`` keeping what goes into a block only.

        Raises :class:`NumericsError` on NaN or infinity, :class:`HookError` if the model's own code turns gradients off
        or cannot be checkpointed.
        """
        found = torch.zeros(len(episodes), 1 + sum(parameter.numel() for parameter in parameters))
        with self._ranks.together(), alone():
            for index in self._ranks.share(range(len(episodes))):
                prefill, whole = self._learner(episodes[index])
                target = whole.counting(tokens)
                compared = loss(index)
                with ExitStack() as stack:
                    stack.enter_context(_frozen(self._runner.model))
                    if checkpointing:
                        stack.enter_context(checkpointed(self.sites))
                    stack.enter_context(torch.enable_grad())
                    made = edits(index)
                    with torch.no_grad():
                        self._verify(prefill, made)
                    # Open to the end: what is checkpointed runs again, edited, when gradients are computed.
                    stack.enter_context(self._edited(made, len(target)))
                    value = compared(self._answered(prefill, target, stream, autocast))
                    if not value.requires_grad:
                        raise HookError("the code of this model turns gradients off: nothing can be learned from it")
                    if not value.isfinite():
                        raise NumericsError("a loss is NaN or infinite: use dtype=float32 or bfloat16")
                    slopes = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
                self.forwards += 1
                found[index] = torch.cat([part.detach().float().flatten().cpu() for part in (value, *slopes)])
        # Added up in the order of the episodes, whichever process each of them was on.
        found = self._ranks.total(found)
        if not found.isfinite().all():
            raise NumericsError("a gradient is NaN or infinite: use dtype=float32 or bfloat16, or a smaller lr")
        parts = torch.split(found[:, 1:].sum(0), [parameter.numel() for parameter in parameters])
        return found[:, 0], [part.view(like.shape) for part, like in zip(parts, parameters, strict=True)]

    @contextmanager
    def _edited(self, edits: Edits, tail: int) -> Iterator[None]:
        with applied(self.sites, edits, tail=tail):
            self._is_edited = True
            try:
                yield
            finally:
                self._is_edited = False

    def _answered(self, prefill: Prefill, target: list[int], stream: str | None, autocast: bool) -> Answer:
        """What the model makes of ``target``, with gradients, under the edits that are applied around the call."""
        model = self._runner.model
        given = prefill.whole(model, target)
        device = given["input_ids"].device
        with ExitStack() as stack:
            recording = None
            if stream is not None:
                recording = stack.enter_context(record(self.sites, stream, tail=len(target), attached=True))
            if autocast:
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            logits = model(**given).logits[0, -len(target) :].float()
        return Answer(logits, torch.tensor(target, device=logits.device), recording.last() if recording else None)

    def _learner(self, episode: Episode) -> tuple[Prefill, Target]:
        """The prompt of an episode to run whole, and its target."""
        kept = self._learners.get(episode)
        if kept is None:
            prefill, target = self._prompted(episode)
            kept = prefill.without_cache(), target
            self._learners.put(episode, kept, kept[0].held)
        return kept

    def _ready(self, episode: Episode, edits: Edits, tokens: Tokens, whole: bool = False) -> tuple[Prefill, list[int]]:
        """The prefill of ``episode`` and the tokens that count, when it is settled whether there are replays."""
        with self._ranks.together(), alone():
            prefill, answered = self._prefill(episode, whole or not self._verified.issuperset(edits))
            target = answered.counting(tokens)
            self._verify(prefill, edits)
            compares = self._replays is None and not whole
            replays = self._compared(prefill, edits, target) if compares else bool(self._replays)
        if compares:
            self._replays = self._all(replays)
        if self._packs is not False and not whole and self._replayed(prefill) and prefill.length > self._packed_to:
            self._settle_packing(prefill, edits, target)
        return prefill, target

    def _all(self, mine: bool) -> bool:
        """Whether it is so on every rank: all of them have to do the same."""
        return self._ranks.total(torch.tensor(float(mine))).item() == self._ranks.count

    def _loss_gradient(
        self, value: Tensor, mask: Tensor, target: list[int], run: Run, limit: int
    ) -> tuple[Tensor, Tensor]:
        def of_rows(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            part = mask[rows[0] : rows[-1] + 1].clone().requires_grad_()
            with torch.enable_grad(), _frozen(self._runner.model):
                logits = run(self._runner.model, self.sites, by_stream(Edit.replace(value, part)), target)
                losses = _cross_entropy(logits, target)
                if not losses.requires_grad:
                    raise HookError("the code of this model turns gradients off: leave out optimizer=gradient")
                (gradient,) = torch.autograd.grad(losses.sum(), part)
            return losses.detach().cpu(), gradient

        found = [part for _, part in self._replay_rows.over(range(len(mask)), of_rows, limit)]
        self.forwards += len(found)
        losses, gradients = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        """Have the prompts of ``episodes`` prefilled by several processes, each a share, for all of them.

        As many as there is room for; not for a model that is spread over several devices. One process alone prefills a
        prompt when its losses are asked for.
        """
        devices = {parameter.device for parameter in self._runner.model.parameters()}
        count, rank = self._ranks.count, self._ranks.rank
        if count == 1 or len(devices) > 1:
            return
        (device,) = devices
        ahead = [episode for episode in dict.fromkeys(episodes) if self._prefills.get(episode) is None]
        for begin in range(0, len(ahead), count):
            asked = ahead[begin : begin + count]
            own: tuple[Prefill, Target] | None = None
            with self._ranks.together(), alone():
                if rank < len(asked):
                    prefill, target = self._prompted(asked[rank])
                    own = self._lean(prefill).to(torch.device("cpu")), target
            for source, episode in enumerate(asked):
                prefill, target = self._ranks.passed(own, source)
                if not self._prefills.room(prefill.bytes):
                    return
                self._prefills.put(episode, (prefill.to(device), target), prefill.bytes)

    def mean_losses(
        self, episodes: Sequence[Episode], edit: Edit | Edits, tokens: Tokens = "first", description: str = "Choosing"
    ) -> Tensor:
        """Mean over ``episodes`` of the losses of each edit, float32 [K] on the CPU."""
        self.prefetch(episodes)
        bar = self.bar(episodes, description)
        return torch.stack([self.losses(episode, edit, tokens) for episode in bar]).mean(0)

    def _losses(self, prefill: Prefill, edits: Edits, target: list[int], run: Run, limit: int) -> Tensor:
        try:
            parts = self._in_batches(run, edits, target, limit)
            self.forwards += len(parts)
            return torch.cat(parts)
        except NumericsError:
            # Once more, one by one, to name the layer if it is one.
            again = prefill.forward if run == prefill.forward else prefill.replay
            with record(self.sites) as recording:
                for row in range(rows_of(edits) or 1):
                    again(self._runner.model, self.sites, taken(edits, row), target)
            recording.last()
            raise

    def _way(
        self, prefill: Prefill, edits: Edits, target: list[int], whole: bool = False, learning: bool = False
    ) -> tuple[Run, int]:
        """How a prompt is run with edits, and with how many of them at most; ``learning`` if gradients are kept."""
        if whole or not self._replayed(prefill):
            # With gradients, whole prompts keep all that they computed.
            return prefill.forward, 1 if learning else sys.maxsize
        rows = rows_of(edits) or 1
        settled = self._packs and prefill.length <= self._packed_to
        # With gradients, keys are kept for each query head, which are eight for a key in many models.
        fits = rows * len(target) <= _PACKED and (not learning or 8 * prefill.bytes <= self._memory)
        if settled and fits and rows > 1 and prefill.packs(self._runner.model, edits, target):
            return prefill.packed, sys.maxsize
        # A replay copies the cache for each of its rows; with gradients, at the worst, these are as large.
        return prefill.replay, self._memory // max(prefill.bytes * (2 if learning else 1), 1)

    def _in_batches(self, run: Run, edits: Edits, target: list[int], limit: int = sys.maxsize) -> list[Tensor]:
        """The losses of ``edits``, as many rows at a time as the memory takes."""

        def of_rows(rows: Sequence[int]) -> Tensor:
            part = taken(edits, slice(rows[0], rows[-1] + 1))
            return _cross_entropy(run(self._runner.model, self.sites, part, target), target)

        return [found for _, found in self._replay_rows.over(range(rows_of(edits) or 1), of_rows, limit)]

    def _prefill(self, episode: Episode, whole: bool) -> tuple[Prefill, Target]:
        """The prefilled prompt of an episode and its target; ``whole`` if more than its last token is to run again."""
        kept = self._prefills.get(episode)
        if kept is not None and not (whole and kept[0].tokens_only):
            return kept
        prefill, target = self._prompted(episode)
        prefill = prefill if whole else self._lean(prefill)
        self._prefills.put(episode, (prefill, target), prefill.bytes)
        return prefill, target

    def _lean(self, prefill: Prefill) -> Prefill:
        """A prefilled prompt with no more than its replays need, if there are any."""
        return prefill.without_media() if self._replayed(prefill) else prefill

    def _replayed(self, prefill: Prefill) -> bool:
        """Whether a prompt is replayed where edits allow it."""
        return bool(self._replays) and prefill.cache is not None

    def _prompted(self, episode: Episode) -> tuple[Prefill, Target]:
        """The prompt of an episode, as the model runs it now, and its target."""
        prompt = self._examples.prompt(episode)
        lead, ids = self._runner.lead_ids(prompt), self._runner.target_ids(prompt)
        if not ids:
            raise DataError(f"the target of training example {episode.query} has no tokens: it cannot be learned from")
        with torch.no_grad(), capture(self._runner.model, self.sites) as captured:
            self._runner.run([prompt])
        self.forwards += 1
        return captured.prefill(), Target([*lead, *ids], len(lead))

    def _verify(self, prefill: Prefill, streams: Iterable[str]) -> None:
        """Make sure, once in this session, of the places where ``streams`` run."""
        for stream in sorted(set(streams) - self._verified):
            verify(self._runner.model, self.sites, prefill.inputs, stream)
            self._verified.add(stream)

    def _compared(self, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Whether replays equal full forwards on this model."""
        if prefill.cache is None:
            logger.warning("the cache of this model cannot be replayed: losses come from full forwards, more slowly")
            return False
        some = taken(edits, slice(_COMPARED))
        full = torch.cat(self._in_batches(prefill.forward, some, target))
        replayed = torch.cat(self._in_batches(prefill.replay, some, target))
        gap = (full - replayed).abs().max().item()
        if not self._near(full, gap):
            logger.warning(
                "replays differ from full forwards by %.3g on this model: losses come from full forwards, more slowly",
                gap,
            )
            return False
        return True

    def _settle_packing(self, prefill: Prefill, edits: Edits, target: list[int]) -> None:
        """Find out whether edits side by side in one row give the losses of rows of their own on this model.

        It holds for prompts of up to twice this length. Nothing is settled where edits do not differ, or a window is
        too short for many of them: another call may tell.
        """
        some, model = taken(edits, slice(_COMPARED)), self._runner.model
        count = rows_of(some) or 1
        order = [index % count for index in range(min(_SIDE_BY_SIDE, max(_PACKED // len(target), count)))]
        if count == 1 or not prefill.packs(model, some, target, len(order)):
            return

        def side_by_side(of: Sequence[int], prompt: Prefill = prefill) -> Tensor:
            return _cross_entropy(prompt.packed(model, self.sites, taken(some, of), target), target)

        found, reason = False, ""
        with self._ranks.together(), alone():
            own = torch.cat(self._in_batches(prefill.replay, some, target))
            differ = (own - own[0]).abs().max().item() > 10 * _APART
            try:
                packed = side_by_side(order)
                # Every other one with the same neighbours on both sides, and with others.
                moved = side_by_side([index if place % 2 == 0 else 0 for place, index in enumerate(order)])
                halfway = side_by_side(order, prefill.halfway())
            except _UNSUPPORTED as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                gap = (packed - own[order]).abs().max().item()
                seen = (packed - moved)[::2].abs().max().item()
                placed = not prefill.last_position.any() or not torch.equal(packed, halfway)
                found = self._near(own, gap) and seen <= _APART and placed
                reason = (
                    f"losses differ by {gap:.3g} from rows of their own, by {seen:.3g} with other edits beside"
                    if placed
                    else "it does not go by the positions that it is given"
                )
        if self._all(found):
            # What does not differ cannot be told apart.
            self._packs, self._packed_to = (True, 2 * prefill.length) if differ else (self._packs, self._packed_to)
            return
        self._packs = False
        logger.info("edits are replayed in rows of their own on this model, not side by side (%s)", reason)

    def _near(self, losses: Tensor, gap: float) -> bool:
        """Whether losses that differ from ``losses`` by ``gap`` are the same but for the model's precision."""
        parameter = next(self._runner.model.parameters())
        tolerance = 1e-3 if parameter.dtype == torch.float32 else 5e-2
        return gap <= tolerance * (1 + losses.abs().max().item())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights that take no gradient inside the block."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _cross_entropy(logits: Tensor, target: Sequence[int]) -> Tensor:
    """float32 [K], the mean over the tokens of ``target`` of their cross-entropy under ``logits`` [K, T, V]."""
    expected = torch.tensor(target, device=logits.device).repeat(logits.shape[0])
    # Over the last dimension, which lies together: on a CPU ten times as fast as over another.
    losses = functional.cross_entropy(logits.flatten(0, 1), expected, reduction="none").view(logits.shape[:2]).mean(1)
    if not losses.isfinite().all():
        raise NumericsError("NaN or infinity in the logits of an edited forward: use dtype=float32 or bfloat16")
    return losses
