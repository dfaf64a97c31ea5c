"""Inputs of a fit: the training examples of a task, and a model that runs prompts made of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from torch import nn

P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)

Tokens = Literal["first", "all"]
"""Tokens of the target that count in a loss: all tokens, or the tokens up to the first token that is not blank."""


class Episode(NamedTuple):
    """A training query and the demonstrations before it, as indices of training examples.

    Attributes:
        query: the index of the query.
        demonstrations: the indices of the demonstrations, in the order of the prompt.
        answers: the indices of the examples whose targets the demonstrations show; None shows their own targets.
    """

    query: int
    demonstrations: tuple[int, ...]
    answers: tuple[int, ...] | None = None


class Target(NamedTuple):
    """The token ids that follow a prompt when its query is answered.

    Attributes:
        ids: the token ids.
        lead: the number of blank tokens at the beginning of ``ids``.
    """

    ids: list[int]
    lead: int = 0

    def counting(self, tokens: Tokens) -> list[int]:
        """Return the tokens that count in a loss."""
        return self.ids[: self.lead + 1] if tokens == "first" else self.ids


class Examples(Protocol[P_co]):
    """The training examples of a task, and their conversion to prompts."""

    def __len__(self) -> int: ...

    def prompt(self, episode: Episode) -> P_co:
        """Return the prompt of an episode, with the query's target known to the runner.

        Raises:
            DataError: the episode has ``answers``, and the targets of this task cannot be exchanged.
        """
        ...


class Runner(Protocol[P_contra]):
    """A model that runs prompts with its own preprocessing.

    A runner may also have a method ``prepared``. It takes the prompts of :meth:`run`, preprocesses them without the
    model, and returns the function without arguments that runs them. Another thread may call it while the model runs,
    but no two threads call it at once.
    """

    @property
    def model(self) -> nn.Module: ...

    def run(self, prompts: Sequence[P_contra]) -> None:
        """Run the forwards of the prompts, with one row for each prompt; the first tokens of answers may follow."""
        ...

    def lead_ids(self, prompt: P_contra) -> list[int]:
        """Return the token ids of the blanks between prompt and target, which say nothing about the target."""
        ...

    def target_ids(self, prompt: P_contra) -> list[int]:
        """Return the token ids of the query's target, as the ids follow the prompt and :meth:`lead_ids`."""
        ...
