"""The context that the parts of a fit share: model, examples, processes, and a count of forwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from lmms_mtv.fit.examples import Episode, Examples, Runner
from lmms_mtv.hooks import ForwardCounter, Prefill, Sites, verify
from lmms_mtv.runtime.ahead import computed_ahead
from lmms_mtv.runtime.devices import only_device
from lmms_mtv.runtime.distributed import Ranks

P = TypeVar("P")
T = TypeVar("T")
R = TypeVar("R")
Arguments = ParamSpec("Arguments")


@dataclass
class Context(Generic[P]):
    """The model, the examples and the processes of one fit.

    Attributes:
        runner: the model with its preprocessing.
        sites: the hook points of the model.
        examples: the training examples.
        ranks: the processes that fit together.
        progress: True shows progress bars.
        ahead: True preprocesses prompts while the model runs the prompts before them; None does so on a GPU. On a CPU
            the model needs all cores.
        verified: the streams whose hook points are verified.
        counter: the counter of the model's forwards.
    """

    runner: Runner[P]
    sites: Sites
    examples: Examples[P]
    ranks: Ranks
    progress: bool
    ahead: bool | None = None
    verified: set[str] = field(default_factory=set)
    counter: ForwardCounter = field(init=False)

    def __post_init__(self) -> None:
        self.counter = ForwardCounter(self.sites)

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    @property
    def device(self) -> torch.device:
        """Device of the choices of a method: the GPU of the model, if a single process uses a single GPU; or the CPU.

        A step whose choices and losses stay on the GPU does not wait for the GPU.
        """
        device = only_device(self.model) if self.ranks.count == 1 else None
        return device if device is not None and device.type == "cuda" else torch.device("cpu")

    def prompts(self, episodes: Sequence[Episode]) -> list[P]:
        """Return the prompts of ``episodes``."""
        return [self.examples.prompt(episode) for episode in episodes]

    def prepared(self, episodes: Sequence[Episode]) -> Callable[[], None]:
        """Return the function that runs the prompts of ``episodes``, preprocessed now if the runner can do so."""
        prompts = self.prompts(episodes)
        prepared: Callable[[Sequence[P]], Callable[[], None]] | None = getattr(self.runner, "prepared", None)
        return functools.partial(self.runner.run, prompts) if prepared is None else prepared(prompts)

    @contextmanager
    def prepared_ahead(self, episodes: Sequence[Episode]) -> Iterator[Callable[[Sequence[int]], Callable[[], None]]]:
        """Yield :meth:`prepared` for positions of ``episodes``; see ``ahead``. Nothing else may preprocess inside."""

        def prepared(batch: Sequence[int]) -> Callable[[], None]:
            return self.prepared([episodes[position] for position in batch])

        on_gpu = next(self.model.parameters()).device.type == "cuda"
        if not (on_gpu if self.ahead is None else self.ahead) or not hasattr(self.runner, "prepared"):
            yield prepared
            return
        with computed_ahead(prepared, len(episodes)) as ahead:
            yield ahead

    def bar(self, items: Iterable[T], description: str) -> Iterable[T]:
        """Return ``items`` with a progress bar."""
        return tqdm(items, **self.bar_options(description))

    def bar_options(self, description: str) -> dict[str, Any]:
        """Return the arguments of tqdm for a progress bar."""
        return {"desc": description, "disable": not self.progress, "dynamic_ncols": True, "leave": False}

    def verify(self, prefill: Prefill, streams: Iterable[str]) -> None:
        """Verify the hook points of ``streams``, each stream once in a fit."""
        for stream in sorted(set(streams) - self.verified):
            verify(self.model, self.sites, prefill.inputs, stream)
            self.verified.add(stream)

    def on_all_ranks(self, holds: bool) -> bool:
        """Return whether a condition ``holds`` on every rank, so that all ranks do the same."""
        return self.ranks.all_reduce(torch.tensor(float(holds))).item() == self.ranks.count


class _Part(Protocol):
    """A part of a fit."""

    _context: Context[Any]


S = TypeVar("S", bound=_Part)


def counted(method: Callable[Concatenate[S, Arguments], R]) -> Callable[Concatenate[S, Arguments], R]:
    """Count the forwards that a method of a part of a fit runs. The counting hook is removed when the method ends."""

    @functools.wraps(method)
    def counting(self: S, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> R:
        with self._context.counter.counting():
            return method(self, *args, **kwargs)

    return counting


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn ``requires_grad`` of all weights off inside the block."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
