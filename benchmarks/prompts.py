"""Prompts of random tokens, and what a fit needs to run them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from lmms_mtv import Episode, FitSession, find_sites
from lmms_mtv.ranks import Ranks

_FIRST = 3
"""Tokens below stand for padding, beginning and end in most models."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of its answer."""

    text: tuple[int, ...]
    target: tuple[int, ...]


class Examples:
    """``count`` training examples; a prompt of k demonstrations has k + 1 times ``tokens`` tokens."""

    def __init__(self, count: int, tokens: int, vocabulary: int, seed: int = 0) -> None:
        # Half of the vocabulary: what stands for images is at its end.
        self._count, self._tokens, self._vocabulary, self._seed = count, tokens, vocabulary // 2, seed

    def __len__(self) -> int:
        return self._count

    def prompt(self, episode: Episode) -> Prompt:
        shown = [token for index in episode.demonstrations for token in self._text(index)]
        return Prompt((*shown, *self._text(episode.query)), self._drawn(f"answer {episode.query}", 1))

    def _text(self, index: int) -> tuple[int, ...]:
        return self._drawn(f"text {index}", self._tokens)

    def _drawn(self, purpose: str, count: int) -> tuple[int, ...]:
        rng = random.Random(f"{self._seed}/{purpose}")
        return tuple(rng.choices(range(_FIRST, self._vocabulary), k=count))


class Runner:
    """Runs prompts of one length as one batch, with the logits of the last token alone, as a generation begins."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt]) -> None:
        self.model(**batch(self.model, prompts), use_cache=False, logits_to_keep=1)

    def target_ids(self, prompt: Prompt) -> list[int]:
        return list(prompt.target)


def batch(model: nn.Module, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The inputs of ``model`` for prompts of one length."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.text for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def session(
    model: nn.Module, examples: Examples, *, seed: int = 0, ranks: Ranks | None = None, **options: Any
) -> FitSession[Prompt]:
    """A fit of ``examples`` on ``model``, without progress bars."""
    return FitSession(
        Runner(model), find_sites(model), examples, seed=seed, progress=False, ranks=ranks or Ranks(), **options
    )


def examples(model: nn.Module, count: int, tokens: int, seed: int = 0) -> Examples:
    """``count`` examples of ``tokens`` tokens that ``model`` knows."""
    return Examples(count, tokens, models.vocabulary(model), seed)


def values(model: nn.Module, seed: int = 0) -> Tensor:
    """Something to put at heads, float32 [L, H, D]: small random numbers."""
    shape = find_sites(model).shape
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
