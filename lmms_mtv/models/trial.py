"""The trial of a fitted vector: training queries that are answered without the vector and with the vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from lmms_mtv.fit.examples import Examples, Runner
from lmms_mtv.fit.session import FitSession
from lmms_mtv.hooks import Sites, applied
from lmms_mtv.models.prompts import Reply
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.vectors import Edit, VectorCard

_END: Final = (
    "that the text that ends an answer is the same in the fit and in use (fewshot_delimiter, and until of a task)"
)
"""The cause of wrong answers that no loss tells."""

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)

_QUERIES: Final = 16
"""Number of training queries that are answered after a fit."""

_SPARE_TOKENS: Final = 8
"""Tokens that an answer may have beyond the longest target, so that an endless answer is noticed."""


class AnsweringRunner(Runner[P_contra], Protocol[P_contra]):
    """A runner that answers. ``batch_size`` is the number of rows of one forward."""

    @property
    def batch_size(self) -> BatchSize: ...

    def greedy_replies(self, prompts: Sequence[P_contra], new_tokens: int, edited: bool) -> list[Reply]:
        """Return greedy answers, or an empty list if the model scores the targets of these prompts.

        Args:
            prompts: a batch of prompts.
            new_tokens: the largest number of tokens of an answer.
            edited: True if an edit is applied.
        """
        ...


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Attributes:
        accuracy: see :class:`~lmms_mtv.vectors.VectorCard`; empty if nothing was tried.
        same_first_token: True if all targets begin with the same token, although the targets differ.
    """

    accuracy: Mapping[str, float] = field(default_factory=dict)
    same_first_token: bool = False


@dataclass(frozen=True)
class _Score:
    """The share of answers that are right, and the share of answers that did not end."""

    right: float
    endless: float


def run_trial(
    session: FitSession[P],
    model: AnsweringRunner[P],
    sites: Sites,
    examples: Examples[P],
    edits: Mapping[str, Edit],
    stops: Sequence[str] = (),
) -> Trial:
    """Return the result of answering some training queries without edits and with edits.

    A loss can be small although answers are wrong: the loss of the first token of a target ignores the other tokens,
    and a loss ignores the text past the end of the target. No fit chooses anything by these answers. Nothing is tried
    without edits, or if the model scores targets instead of generating answers.

    Args:
        session: the session of the fit, which draws the queries.
        model: the model that answers.
        sites: the sites of the model.
        examples: the training examples.
        edits: the fitted edits by stream.
        stops: texts that end an answer.
    """
    if not edits:
        return Trial()
    episodes = session.episodes(min(_QUERIES, len(examples)), session.shots, "trial")
    queries = [examples.prompt(episode) for episode in episodes]
    target_ids = [model.target_ids(query) for query in queries]
    lead_ids = [model.lead_ids(query) for query in queries]
    targets = [str(getattr(query, "target", "")).strip() for query in queries]
    limit = max(map(len, target_ids)) + max(map(len, lead_ids)) + _SPARE_TOKENS

    def score(edited: bool) -> _Score | None:
        batches = model.batch_size.copy().run_batches(queries, lambda batch: model.greedy_replies(batch, limit, edited))
        replies = [_cut(reply, stops) for _, batch in batches for reply in batch]
        if len(replies) < len(targets):
            return None
        hits = sum(reply.text.strip().lower() == target.lower() for reply, target in zip(replies, targets, strict=True))
        return _Score(hits / len(replies), sum(not reply.ended for reply in replies) / len(replies))

    unedited = score(edited=False)
    if unedited is None:
        return Trial()
    with applied(sites, edits):
        edited = score(edited=True)
    if edited is None:
        return Trial()
    accuracy = {
        "queries": float(len(queries)),
        "unedited": unedited.right,
        "edited": edited.right,
        "endless": edited.endless,
    }
    return Trial(accuracy, len({ids[0] for ids in target_ids}) == 1 < len(set(targets)))


def _cut(reply: Reply, stops: Sequence[str]) -> Reply:
    """Return an answer that ends where the task ends an answer."""
    ends = [position for stop in stops if (position := reply.text.find(stop)) >= 0]
    return Reply(reply.text[: min(ends)], True) if ends else reply


def doubts(trial: Trial, card: VectorCard, control: bool = False) -> list[str]:
    """Return the reasons to doubt a vector whose loss may be small, a line for each reason.

    Args:
        trial: the trial of the vector.
        card: the card of the vector, with its method, seed and settings.
        control: True if the vector is a control, which may be worse than no vector.
    """
    accuracy, loss = trial.accuracy, card.config.get("loss")
    if not accuracy:
        return []
    lines = []
    if trial.same_first_token and loss == "first":
        lines.append("all targets begin with the same token, so that loss=first tells nothing of them: pass loss=all")
    if accuracy["edited"] < accuracy["unedited"] and not control:
        ways = ["loss=all"] if loss == "first" else []
        ways += [f"more {name}=" for name in ("steps", "epochs", "iterations") if name in card.config]
        lines.append(
            f"method={card.method}, seed={card.seed}: with the vector {accuracy['edited']:.0%} of "
            f"{accuracy['queries']:.0f} training queries are answered right, without it {accuracy['unedited']:.0%}: "
            f"{'' if loss == 'first' else f'check {_END}; '}pass {', '.join([*ways, 'or another method='])}"
        )
    if accuracy["endless"] > 0.5:
        lines.append(
            f"{accuracy['endless']:.0%} of the answers with the vector run on past the target: {mend_endless(card)}"
        )
    return lines


def mend_endless(card: VectorCard) -> str:
    """Return advice for a vector whose answers do not end.

    Args:
        card: the card of the vector, with the settings that it was fitted with.
    """
    if card.config.get("loss") == "first":
        return "fit it with loss=all, which learns the end of an answer too"
    longer = next((f", fit it with more {name}=" for name in ("steps", "epochs") if name in card.config), "")
    return f"check {_END}{longer}, or take another method="
