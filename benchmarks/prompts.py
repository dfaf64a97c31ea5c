"""Synthetic prompts of random tokens, with or without images, and the fit session that runs the prompts."""

from __future__ import annotations

import argparse
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
"""Lowest token id of a prompt: most models use the ids below for padding, start and end."""


@dataclass(frozen=True)
class SyntheticPrompt:
    """Token ids of a prompt and of its target; the prompt has the token ids of ``images`` images."""

    text: tuple[int, ...]
    target: tuple[int, ...]
    images: int = 0


class SyntheticExamples:
    """Training examples of random tokens: a prompt of k demonstrations has k + 1 times ``tokens`` tokens.

    The tokens ``image`` stand before the tokens of each example.
    """

    def __init__(self, count: int, tokens: int, vocabulary: int, seed: int = 0, image: tuple[int, ...] = ()) -> None:
        # Only the first half of the vocabulary: the token ids of images are in the second half.
        self._count, self._tokens, self._vocabulary, self._seed = count, tokens, vocabulary // 2, seed
        self._image = image

    def __len__(self) -> int:
        return self._count

    def prompt(self, episode: Episode) -> SyntheticPrompt:
        """Return the prompt of an episode: its demonstrations, then its query."""
        order = (*episode.demonstrations, episode.query)
        text = tuple(token for index in order for token in self._text(index))
        return SyntheticPrompt(text, self._drawn(f"answer {episode.query}", 1), len(order) if self._image else 0)

    def _text(self, index: int) -> tuple[int, ...]:
        return self._image + self._drawn(f"text {index}", self._tokens)

    def _drawn(self, purpose: str, count: int) -> tuple[int, ...]:
        rng = random.Random(f"{self._seed}/{purpose}")
        return tuple(rng.choices(range(_FIRST, self._vocabulary), k=count))


class SyntheticRunner:
    """A runner of prompts of equal length as one batch, with the logits of the last token only."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._images = images.of(model)

    @torch.no_grad()
    def run(self, prompts: Sequence[SyntheticPrompt]) -> None:
        """Run one forward of the model on ``prompts``."""
        self.model(**batch(self.model, prompts, self._images), use_cache=False, logits_to_keep=1)

    def lead_ids(self, prompt: SyntheticPrompt) -> list[int]:
        """Return the token ids between the prompt and its target: none."""
        return []

    def target_ids(self, prompt: SyntheticPrompt) -> list[int]:
        """Return the token ids of the target."""
        return list(prompt.target)


def batch(
    model: nn.Module, prompts: Sequence[SyntheticPrompt], model_images: images.Images | None = None
) -> dict[str, Tensor]:
    """Return the inputs of ``model`` for prompts of equal length with equal numbers of images.

    Args:
        model: the model that the inputs are for.
        prompts: the prompts of the batch.
        model_images: the images of the model (:func:`benchmarks.images.of`), needed for prompts with images.

    Raises:
        ValueError: the prompts have images and ``model_images`` is None.
    """
    device, count = next(model.parameters()).device, prompts[0].images
    ids = torch.tensor([prompt.text for prompt in prompts], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not count:
        return inputs
    if model_images is None:
        raise ValueError(f"the prompts have {count} images and model_images is None: pass benchmarks.images.of(model)")
    return inputs | model_images.inputs(ids, count)


def session(
    model: nn.Module, examples: SyntheticExamples, *, seed: int = 0, ranks: Ranks | None = None, **options: Any
) -> FitSession[SyntheticPrompt]:
    """Return a fit session of ``examples`` on ``model``, without progress bars."""
    return FitSession(
        SyntheticRunner(model),
        find_sites(model),
        examples,
        seed=seed,
        progress=False,
        ranks=ranks or Ranks(),
        **options,
    )


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of benchmarks that run a fit, or parts of a fit; see :func:`session_of`."""
    parser.add_argument("--tokens", type=int, default=30, help="tokens of text in an example (default: 30)")
    parser.add_argument("--text", action="store_true", help="leave images out")
    parser.add_argument("--batch", type=int, default=4, help="batch size of the extraction (default: 4)")
    parser.add_argument("--no-graphs", action="store_true", help="replay without CUDA graphs")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB for the prefill cache (default: 16)")


def session_of(
    arguments: argparse.Namespace, model: nn.Module, examples: SyntheticExamples
) -> FitSession[SyntheticPrompt]:
    """Return a session over ``examples`` as the arguments of :func:`add_fit_arguments` say."""
    return session(
        model,
        examples,
        seed=arguments.seed,
        batch_size=arguments.batch,
        memory=int(arguments.memory * 2**30),
        graphs=False if arguments.no_graphs else None,
    )


def examples(model: nn.Module, count: int, tokens: int, seed: int = 0, with_images: bool = False) -> SyntheticExamples:
    """Return ``count`` examples of ``tokens`` tokens for ``model``, with images if wanted and possible."""
    model_images = images.of(model) if with_images else None
    return SyntheticExamples(count, tokens, models.vocabulary(model), seed, model_images.ids if model_images else ())


def values(model: nn.Module, seed: int = 0) -> Tensor:
    """Return small random values for all heads, float32 [layers, heads, size]."""
    shape = find_sites(model).shape
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
