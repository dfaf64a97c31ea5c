"""What the parts of a fit share: the model, the examples, the processes, and a count of the work done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from lmms_mtv.fit.examples import Episode, Examples, Runner
from lmms_mtv.hooks import Prefill, Sites, verify
from lmms_mtv.runtime.distributed import Ranks

P = TypeVar("P")
T = TypeVar("T")


@dataclass
class Context(Generic[P]):
    """The model, the examples and the processes of one fit.

    ``forwards`` counts the model's forwards so far. ``verified`` are the streams whose places were made sure of.
    """

    runner: Runner[P]
    sites: Sites
    examples: Examples[P]
    ranks: Ranks
    progress: bool
    forwards: int = 0
    verified: set[str] = field(default_factory=set)

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    def prompts(self, episodes: Sequence[Episode]) -> list[P]:
        """Return the prompts of ``episodes``."""
        return [self.examples.prompt(episode) for episode in episodes]

    def bar(self, items: Iterable[T], description: str) -> Iterable[T]:
        """Return ``items`` with a progress bar."""
        return tqdm(items, **self.bar_options(description))

    def bar_options(self, description: str) -> dict[str, Any]:
        """Return the arguments of a progress bar."""
        return {"desc": description, "disable": not self.progress, "dynamic_ncols": True, "leave": False}

    def verify(self, prefill: Prefill, streams: Iterable[str]) -> None:
        """Make sure, once in a fit, of the places where ``streams`` run."""
        for stream in sorted(set(streams) - self.verified):
            verify(self.model, self.sites, prefill.inputs, stream)
            self.verified.add(stream)

    def on_all_ranks(self, holds: bool) -> bool:
        """Return whether it holds on every rank: all of them have to do the same."""
        return self.ranks.all_reduce(torch.tensor(float(holds))).item() == self.ranks.count


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Weights that take no gradient inside the block."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
