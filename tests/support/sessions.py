"""A fit without a harness: token prompts on a tiny random model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmms_mtv import Episode, FitSession, Sites, find_sites
from support import zoo


@dataclass(frozen=True)
class TokenPrompt:
    text: tuple[int, ...]
    target: tuple[int, ...]


class TokenExamples:
    """Examples of a question token and the answer tokens that follow it."""

    def __init__(self, count: int = 30, answer: int = 2) -> None:
        self._count, self._answer = count, answer

    def __len__(self) -> int:
        return self._count

    def prompt(self, episode: Episode) -> TokenPrompt:
        answers = episode.demonstrations if episode.answers is None else episode.answers
        shown = zip(episode.demonstrations, answers, strict=True)
        text = [token for index, answer in shown for token in (self._question(index), *self._target(answer))]
        return TokenPrompt((*text, self._question(episode.query)), self._target(episode.query))

    def _question(self, index: int) -> int:
        return 3 + index

    def _target(self, index: int) -> tuple[int, ...]:
        return tuple(40 + (index * 7 + k) % 40 for k in range(self._answer))


class TokenRunner:
    """Runs token prompts on a tiny model, padded on the left, by a plain forward or as a generation begins.

    ``padding`` is how much the longest prompt has of it, ``lead`` how many tokens of a target stand before it.
    """

    def __init__(self, tiny: zoo.Tiny, generating: bool = False, padding: int = 0, lead: int = 0) -> None:
        self._tiny, self._generating, self._padding, self._lead = tiny, generating, padding, lead
        self.model: Any = tiny.model

    @torch.no_grad()
    def run(self, prompts: Sequence[TokenPrompt]) -> None:
        inputs = self._tiny.inputs([list(prompt.text) for prompt in prompts], padding=self._padding)
        if self._generating:
            self.model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
        else:
            self.model(**inputs)

    def lead_ids(self, prompt: TokenPrompt) -> list[int]:
        return list(prompt.target[: self._lead])

    def target_ids(self, prompt: TokenPrompt) -> list[int]:
        return list(prompt.target[self._lead :])


class TokenSession(FitSession[TokenPrompt]):
    """A fit that also tells what it runs: ``runner`` and ``prompts``."""

    def __init__(self, runner: TokenRunner, sites: Sites, prompts: TokenExamples, **options: Any) -> None:
        super().__init__(runner, sites, prompts, **options)
        self.runner, self.prompts = runner, prompts


def session(
    tiny: zoo.Tiny,
    *,
    examples: TokenExamples | None = None,
    generating: bool = False,
    padding: int = 0,
    lead: int = 0,
    **options: Any,
) -> TokenSession:
    runner, options = TokenRunner(tiny, generating, padding, lead), {"seed": 0, "progress": False} | options
    return TokenSession(runner, find_sites(tiny.model), examples or TokenExamples(), **options)
