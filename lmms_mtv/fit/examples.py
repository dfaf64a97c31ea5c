"""What a fit is given: the training examples of a task, and a model that runs prompts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from torch import nn

P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)

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
        """Return the tokens that count in a loss."""
        return self.ids[: self.lead + 1] if tokens == "first" else self.ids


class Examples(Protocol[P_co]):
    """The training examples of a task, and how they become prompts."""

    def __len__(self) -> int: ...

    def prompt(self, episode: Episode) -> P_co:
        """Return the prompt of an episode, with the query's target known to the runner.

        Raises :class:`DataError` for an episode with ``answers`` where targets cannot be exchanged.
        """
        ...


class Runner(Protocol[P_contra]):
    """A model that runs prompts with its own preprocessing."""

    @property
    def model(self) -> nn.Module: ...

    def run(self, prompts: Sequence[P_contra]) -> None:
        """Run the prompts' forwards, with one row for each; the first tokens of answers may follow."""
        ...

    def lead_ids(self, prompt: P_contra) -> list[int]:
        """Return the token ids of the blanks between the prompt and the query's target, which tell nothing of it."""
        ...

    def target_ids(self, prompt: P_contra) -> list[int]:
        """Return the token ids of the query's target, as they follow the prompt and :meth:`lead_ids`."""
        ...
