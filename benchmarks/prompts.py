"""Prompts of random tokens, with images if asked for, and what a fit needs to run them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import images, models
from lmms_mtv import Episode, FitSession, find_sites
from lmms_mtv.runtime.distributed import Ranks

_FIRST = 3
"""Tokens below stand for padding, beginning and end in most models."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of its answer; those of ``images`` images are among the prompt's."""

    text: tuple[int, ...]
    target: tuple[int, ...]
    images: int = 0


class Examples:
    """``count`` training examples; a prompt of k demonstrations has k + 1 times ``tokens`` tokens.

    Before those of each example there are the tokens ``image``, if it has one.
    """

    def __init__(self, count: int, tokens: int, vocabulary: int, seed: int = 0, image: tuple[int, ...] = ()) -> None:
        # Half of the vocabulary: what stands for images is at its end.
        self._count, self._tokens, self._vocabulary, self._seed = count, tokens, vocabulary // 2, seed
        self._image = image

    def __len__(self) -> int:
        return self._count

    def prompt(self, episode: Episode) -> Prompt:
        order = (*episode.demonstrations, episode.query)
        text = tuple(token for index in order for token in self._text(index))
        return Prompt(text, self._drawn(f"answer {episode.query}", 1), len(order) if self._image else 0)

    def _text(self, index: int) -> tuple[int, ...]:
        return self._image + self._drawn(f"text {index}", self._tokens)

    def _drawn(self, purpose: str, count: int) -> tuple[int, ...]:
        rng = random.Random(f"{self._seed}/{purpose}")
        return tuple(rng.choices(range(_FIRST, self._vocabulary), k=count))


class Runner:
    """Runs prompts of one length as one batch, with the logits of the last token alone, as a generation begins."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._images = images.of(model)

    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt]) -> None:
        self.model(**batch(self.model, prompts, self._images), use_cache=False, logits_to_keep=1)

    def lead_ids(self, prompt: Prompt) -> list[int]:
        return []

    def target_ids(self, prompt: Prompt) -> list[int]:
        return list(prompt.target)


def batch(model: nn.Module, prompts: Sequence[Prompt], seen: images.Images | None = None) -> dict[str, Tensor]:
    """The inputs of ``model`` for prompts of one length, with as many images each, of what ``seen`` has them look."""
    device, count = next(model.parameters()).device, prompts[0].images
    ids = torch.tensor([prompt.text for prompt in prompts], device=device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not count:
        return given
    if seen is None:
        raise ValueError(f"prompts of {count} images: pass those that the model sees")
    return given | seen.inputs(ids, count)


def session(
    model: nn.Module, examples: Examples, *, seed: int = 0, ranks: Ranks | None = None, **options: Any
) -> FitSession[Prompt]:
    """A fit of ``examples`` on ``model``, without progress bars."""
    return FitSession(
        Runner(model), find_sites(model), examples, seed=seed, progress=False, ranks=ranks or Ranks(), **options
    )


def examples(model: nn.Module, count: int, tokens: int, seed: int = 0, with_images: bool = False) -> Examples:
    """``count`` examples of ``tokens`` tokens that ``model`` knows, each ``with_images`` if it sees any."""
    seen = images.of(model) if with_images else None
    return Examples(count, tokens, models.vocabulary(model), seed, seen.ids if seen else ())


def values(model: nn.Module, seed: int = 0) -> Tensor:
    """Something to put at heads, float32 [L, H, D]: small random numbers."""
    shape = find_sites(model).shape
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
