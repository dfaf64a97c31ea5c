"""Sensitivity-aware Task Vectors (STV, arXiv 2511.08246), after descriptions of it by others: the paper's own text and
code were not at hand.

Stored: one centroid at each of the heads whose activation demonstrations change most. K-means finds the centroids among
the activations of the head over many few-shot prompts. Injected: as ``mtv``, the stored value replaces the activation,
at the last prompt token and at every generated token. Trained: for each head a categorical choice among its centroids,
by REINFORCE; all weights are frozen. Cost: ``iterations`` few-shot prefills and as many without the demonstrations; a
replay of the last token with a row for each number of heads tried (at most 64) on each of ``candidate_examples``
queries; then ``steps`` replays of ``samples`` combinations each.

These choices are ours. The prompt that a context is compared with has the demonstrations of the prompts that the vector
is used with, and so none if these prompts are zero-shot. The number of heads, which the paper tunes (64 to 300 are
told), has the lowest loss among numbers up to half of all heads, evenly spaced on a logarithmic scale. This loss is
measured with means for values, on training queries that neither the values nor the policy come from, where enough
queries are left. The optimiser, its 600 steps of 32 samples and its learning rate 0.1 are MTV's. The policy begins
uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.policy import Categorical, improved
from lmms_mtv.fit.session import FitSession
from lmms_mtv.methods import Fitted
from lmms_mtv.runtime.settings import setting
from lmms_mtv.vectors import HEADS, Edit


@dataclass(frozen=True)
class Config:
    """Settings of STV.

    Sensitivities and centroids come from ``iterations`` prompts of ``fit_shots`` demonstrations. The ``top`` most
    sensitive heads are edited; None chooses their number. Each head has ``clusters`` centroids, or as many as there are
    prompts. ``steps`` steps of REINFORCE with the learning rate ``lr`` each sample ``samples`` combinations of
    centroids, on one of ``examples`` training queries. ``candidate_examples`` other queries choose the number of heads.
    ``loss`` says which answer tokens count: the ``first`` token, or the mean over ``all``.
    """

    iterations: int = setting(100, "prompts that sensitivities and centroids come from")
    fit_shots: int = setting(4, "demonstrations in each of these prompts")
    top: int | None = setting(
        None, "heads that are edited, the most sensitive ones; None chooses the number by its loss"
    )
    clusters: int = setting(32, "centroids of each head")
    steps: int = setting(600, "steps of REINFORCE")
    samples: int = setting(32, "combinations of centroids that are sampled in a step")
    lr: float = setting(0.1, "learning rate of Adam on the logits of the policy")
    examples: int = setting(100, "training queries that the steps use")
    candidate_examples: int = setting(50, "further training queries that choose the number of heads")
    loss: Tokens = setting("all", "tokens of the answer that count: `first`, or the mean over `all`")

    def __post_init__(self) -> None:
        for name in ("iterations", "fit_shots", "top", "clusters", "steps", "examples", "candidate_examples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ArgumentError(f"{name}={value}, expected at least 1")
        if self.samples < 2:
            raise ArgumentError(f"samples={self.samples}, expected at least 2: combinations are compared")
        if self.lr <= 0:
            raise ArgumentError(f"lr={self.lr}, expected above 0")


def fit(session: FitSession[Any], config: Config) -> Fitted:
    """Return the most sensitive heads, and the centroid that replaces each activation.

    Args:
        session: the fit.
        config: the settings.

    Raises:
        ArgumentError: ``top`` is more than the number of heads, or ``fit_shots`` is not more than the number of
            demonstrations in the prompts that the vector is used with.
    """
    layers, heads, _ = session.shape
    if config.top is not None and config.top > layers * heads:
        raise ArgumentError(f"top={config.top}, but the model has {layers * heads} heads")
    if config.fit_shots <= session.shots:
        raise ArgumentError(
            f"fit_shots={config.fit_shots} and shots={session.shots}: heads are compared with more demonstrations and "
            f"with fewer; pass fit_shots= of at least {session.shots + 1}"
        )
    prompts = session.episodes(config.iterations, config.fit_shots, "values")
    judges = session.episodes(config.candidate_examples, session.shots, "judges", unlike=prompts)
    queries = session.episodes(config.examples, session.shots, "selection", unlike=judges)
    with session.stage("locations"):
        contexts = session.activations(prompts)
        sensitivity = _sensitivity(session, prompts, contexts)
        means = contexts.mean(0)
        mask, tried = _located(session, config, judges, sensitivity, means)
    with session.stage("bank"):
        bank = _bank(session, config, contexts[:, mask])
    with session.stage("search"):
        policy, history = _searched(session, config, queries, bank, mask)
        value = _inserted(bank, policy.best.unsqueeze(0), mask)[0]
        judged = Edit.replace(torch.stack([value, means, means]), torch.stack([mask, mask, torch.zeros_like(mask)]))
        chosen, of_means, unedited = session.mean_losses(judges, judged, config.loss, "Judging the vector").tolist()
    return Fitted(
        {HEADS: Edit.replace(value, mask)},
        tried
        | {
            "policy": history,
            "unedited": [unedited],
            "means": [of_means],
            "chosen": [chosen],
            "sensitivity": sensitivity.flatten().tolist(),
        },
    )


def _sensitivity(session: FitSession[Any], prompts: Sequence[Episode], contexts: Tensor) -> Tensor:
    """Return the mean Euclidean distance by which demonstrations move each head at the last token, float32 [L, H].

    ``contexts`` are the activations of ``prompts``, [T, L, H, D].
    """
    shown = session.shots
    bare = [episode._replace(demonstrations=episode.demonstrations[:shown]) for episode in prompts]
    moved: Tensor = (contexts - session.activations(bare)).norm(dim=-1)
    return moved.mean(0)


def _located(
    session: FitSession[Any], config: Config, judges: Sequence[Episode], sensitivity: Tensor, means: Tensor
) -> tuple[Tensor, dict[str, list[float]]]:
    """Return the heads to edit, bool [L, H], and by name their number and the loss with ``means`` of each number."""
    rank = sensitivity.flatten().argsort(descending=True, stable=True).argsort().view(sensitivity.shape)
    if config.top is not None:
        return rank < config.top, {"top": [float(config.top)]}
    numbers = _numbers(rank.numel())
    masks = torch.stack([rank < number for number in numbers])
    losses = session.mean_losses(judges, Edit.replace(means, masks), config.loss, "Choosing the number of heads")
    best = int(losses.argmin())
    return masks[best], {"top": [float(numbers[best])], "numbers": losses.tolist()}


def _numbers(heads: int) -> list[int]:
    """Return the numbers of heads to try, up to half of ``heads``: all small numbers, ever fewer larger numbers."""
    return sorted({round(max(heads // 2, 1) ** (power / 63)) for power in range(64)})


def _bank(session: FitSession[Any], config: Config, contexts: Tensor) -> Tensor:
    """Return the M centroids of the activations ``contexts``, [T, N, D], of each of N heads, float32 [N, M, D]."""
    # The import is here since every run imports every method, and scikit-learn takes seconds.
    from sklearn.cluster import KMeans

    rng, clusters = session.random("bank"), min(config.clusters, len(contexts))
    centroids = []
    for head in contexts.double().unbind(1):
        # Without a tolerance k-means ends when no activation changes cluster: a centroid is the mean of its cluster.
        means = KMeans(clusters, n_init=1, tol=0, random_state=rng.getrandbits(32)).fit(head.numpy())
        centroids.append(torch.from_numpy(means.cluster_centers_).float())
    return torch.stack(centroids)


def _searched(
    session: FitSession[Any], config: Config, queries: Sequence[Episode], bank: Tensor, mask: Tensor
) -> tuple[Categorical, list[float]]:
    """Return the choice among the centroids of each head, and the mean loss of each step."""
    chosen = session.random_queries(queries, config.steps)

    def losses(step: int, options: Tensor) -> Tensor:
        return session.losses(chosen[step], Edit.replace(_inserted(bank, options, mask), mask), config.loss)

    return improved(
        Categorical(torch.zeros(bank.shape[:2])),
        losses,
        steps=session.bar(range(config.steps), "Selecting centroids"),
        samples=config.samples,
        lr=config.lr,
        generator=session.generator("centroids"),
    )


def _inserted(bank: Tensor, options: Tensor, mask: Tensor) -> Tensor:
    """Return the chosen rows of ``bank`` at the N heads of ``mask``, and 0 at other heads, float32 [count, L, H, D].

    ``bank`` is [N, M, D], and ``options``, [count, N], are the indices of the chosen rows.
    """
    value = torch.zeros(len(options), *mask.shape, bank.shape[-1])
    value[:, mask] = bank[torch.arange(len(bank)), options]
    return value
