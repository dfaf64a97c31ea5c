"""The end of REINFORCE before all steps: its rule, what a fit without the rule does, and its candidates."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from lmms_mtv import Edit, methods
from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.policy import WINDOW, Policy, Settling, reinforce
from lmms_mtv.vectors import HEADS
from support import zoo
from support.sessions import TokenExamples, session
from support.vectors import card

SHAPE = (3, 4)
SHORT = {"iterations": 4, "fit_shots": 2, "steps": 80, "samples": 5, "examples": 6, "candidate_examples": 3}


def noisy(scale):
    """Losses that depend on the step, the mask and a spread that ``scale`` gives for a step."""
    weights = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))

    def losses(step, masks):
        noise = torch.randn(len(masks), generator=torch.Generator().manual_seed(step))
        return 2 + scale(step) * ((masks * weights).flatten(1).sum(1) + noise)

    return losses


def learned(losses, steps, settling=None):
    return reinforce(
        losses,
        SHAPE,
        steps=range(steps),
        samples=6,
        lr=0.1,
        initial_logit=-1.0,
        generator=torch.Generator().manual_seed(0),
        settling=settling,
    )


def expected_steps(spreads, share, window):
    """The number of steps, from the definition: two windows of steps, the means of their spreads, and 1 nat."""
    for count in range(2 * window, len(spreads) + 1):
        first, last = spreads[:window], spreads[count - window : count]
        if statistics.mean(last) <= min(share * statistics.mean(first), share):
            return count
    return len(spreads)


@pytest.mark.parametrize("largest", [0.3, 3.0])
@pytest.mark.parametrize("share", [0.3, 0.4, 0.5])
def test_the_end_is_where_the_definition_says(share, largest):
    spreads = []
    losses = noisy(lambda step: largest / (1 + step / 40))

    def watched(step, masks):
        found = losses(step, masks)
        spreads.append(statistics.stdev(found.tolist()))
        return found

    learned(watched, 200)
    _, history = learned(losses, 200, Settling(share))
    assert len(history) == expected_steps(spreads, share, WINDOW)
    assert (2 * WINDOW < len(history) < 200) or largest > 1


def test_losses_that_stay_apart_take_all_steps():
    _, history = learned(noisy(lambda step: 1 + step), 3 * WINDOW, Settling(0.9))
    assert len(history) == 3 * WINDOW


def test_two_windows_run_at_least_even_if_all_masks_are_equally_good():
    _, history = learned(lambda step, masks: torch.ones(len(masks)), 4 * WINDOW, Settling(0.1))
    assert len(history) == 2 * WINDOW


def test_a_run_that_ends_early_is_the_beginning_of_the_whole_run():
    losses = noisy(lambda step: 1 / (1 + step / 40))
    early, history = learned(losses, 200, Settling(0.5))
    whole, whole_history = learned(losses, 200)
    same, same_history = learned(losses, len(history))
    assert torch.equal(early.logits, same.logits)
    assert history == same_history == whole_history[: len(history)]
    assert not torch.equal(early.logits, whole.logits)
    never, never_history = learned(losses, 200, Settling(1e-9))
    assert torch.equal(never.logits, whole.logits)
    assert never_history == whole_history


def fitted(name="mtv", **settings):
    tiny = zoo.build(zoo.llama)
    used = session(tiny, examples=TokenExamples(answer=1))
    method = methods.get(name)
    return method.fit(used, method.configure(SHORT | settings)), used


def test_a_fit_ends_early_and_runs_no_further_step():
    whole, all_steps = fitted(settle=None)
    found, fewer = fitted(settle=0.99)
    steps = len(found.losses["policy"])
    assert 2 * WINDOW <= steps < 80 == len(whole.losses["policy"])
    assert found.losses["policy"] == whole.losses["policy"][:steps]
    # Each step is one replay; the queries were prefilled when their first step came.
    assert all_steps.forwards - fewer.forwards == 80 - steps


def test_a_rule_that_never_holds_changes_nothing():
    whole, _ = fitted(settle=None)
    found, _ = fitted(settle=1e-9)
    assert found.losses == whole.losses
    assert torch.equal(found.edits[HEADS].gain, whole.edits[HEADS].gain)


def test_after_an_early_end_the_likely_heads_are_one_more_candidate():
    found, used = fitted(settle=0.99)
    drawn, likely = found.losses["candidates"][:10], found.losses["candidates"][10:]
    assert (len(drawn), len(likely)) == (10, 1)
    assert found.losses["chosen"] == [min(*drawn, *likely)]
    mask = torch.tensor(found.losses["probabilities"]).view(used.shape[:2]) >= 0.5
    judges = used.episodes(6 + 3, 0, "selection")[6:]
    expected = used.mean_losses(judges, Edit.replace(found.edits[HEADS].value, mask.unsqueeze(0)), "all")
    assert likely == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("final", [{"top_k": 3}, {"threshold": 0.2}])
def test_no_candidate_is_added_to_the_masks_that_settings_name(final):
    found, _ = fitted(settle=0.99, **final)
    assert len(found.losses["policy"]) < 80
    assert len(found.losses["candidates"]) == 1


@pytest.mark.parametrize("name", ["mtv", "random", "degraded"])
def test_without_the_rule_a_vector_has_the_id_of_earlier_versions(name):
    method = methods.get(name)
    more = {"drop": 0.5} if name == "degraded" else {}
    settings = dataclasses.asdict(method.configure({"settle": None, **more}))
    without = {key: value for key, value in settings.items() if key != "settle"}
    assert card(config=settings).id == card(config=without).id
    assert card(config=settings).id != card(config=dataclasses.asdict(method.configure(more))).id


def test_a_command_line_can_turn_the_rule_off():
    assert methods.get("mtv").configure({"settle": "None"}).settle is None
    with pytest.raises(ArgumentError, match="steps="):
        methods.get("mtv").configure({"steps": "None"})


@pytest.mark.parametrize("share", [0, 1, -0.5, 2])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ArgumentError, match=r"settle=.*None for all steps"):
        methods.get("mtv").configure({"settle": share})


def test_likely_heads_are_those_of_at_least_even_probability():
    policy = Policy(torch.tensor([[-0.1, 0.0, 0.1]]))
    assert policy.above(0.5).tolist() == [[False, True, True]]
