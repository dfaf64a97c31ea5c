"""Combined vectors: what the combined edit gives is the weighted sum of what the edits give."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lmms_mtv import Edit, TaskVector, VectorCard, applied, combined, find_sites
from lmms_mtv.errors import ArgumentError, GeometryError
from support import zoo
from support.vectors import card, vector

WEIGHTS = [0.7, 0.5, -0.2]


def drawn(model: torch.nn.Module, seed: int) -> TaskVector:
    """A vector with every kind of edit: replaced, scaled, shifted and untouched heads."""
    geometry = find_sites(model).geometry
    rng = torch.Generator().manual_seed(seed)
    layers, heads, size = len(geometry), geometry[0][2], geometry[0][3]
    mask = torch.rand(layers, heads, generator=rng) < 0.5
    keep = torch.where(mask, torch.randn(layers, heads, generator=rng), 1.0)
    gain = torch.where(mask, torch.randn(layers, heads, generator=rng), 0.0)
    edit = Edit(torch.randn(layers, heads, size, generator=rng), keep, gain)
    return TaskVector({"heads": edit}, card(model="tiny", geometry=geometry, seed=seed))


def test_the_combined_edit_is_a_hand_made_hook_at_one_site():
    """At one site, where the sum of what three edits make of the same input can be written down."""
    tiny = zoo.build(zoo.llama)
    inputs = tiny.inputs([[5, 6, 7, 8]])
    sites = find_sites(tiny.model)
    only = torch.zeros(len(sites), dtype=torch.bool)
    only[1] = True

    def at_one_site(made: TaskVector) -> TaskVector:
        edit = made.edits["heads"]
        keep = torch.where(only[:, None], edit.keep, 1.0)
        gain = torch.where(only[:, None], edit.gain, 0.0)
        return dataclasses.replace(made, edits={"heads": Edit(edit.value, keep, gain)})

    made = [at_one_site(drawn(tiny.model, seed)) for seed in range(3)]

    def by_hand(_, args):
        (states,) = args
        last = states[:, -1].unflatten(-1, (tiny.heads, tiny.head_dim))
        total = torch.zeros_like(last)
        for weight, one in zip(WEIGHTS, made, strict=True):
            edit = one.edits["heads"]
            total += weight * (edit.keep[1][:, None] * last + (edit.gain[1][:, None] * edit.value[1]))
        return (torch.cat([states[:, :-1], total.flatten(-2)[:, None]], 1),)

    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        hook = sites[1].module.register_forward_pre_hook(by_hand)
        expected = tiny.model(**inputs).logits
        hook.remove()
        with applied(tiny.model, combined(made, WEIGHTS, task="mixed")):
            found = tiny.model(**inputs).logits
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_combination_of_one_vector_is_that_vector():
    made = vector()
    found = combined([made], task="task").edits["heads"]
    edit = made.edits["heads"]
    for part in ("keep", "gain"):
        assert torch.equal(getattr(found, part), getattr(edit, part))
    assert torch.equal(found.gain[..., None] * found.value, edit.gain[..., None] * edit.value)


def test_heads_that_no_vector_edits_stay_as_they_are():
    made = [vector(values=seed, seed=seed) for seed in range(3)]
    assert combined(made, task="mean").heads == made[0].heads
    assert combined(made, [0.3333333, 0.3333333, 0.3333333], task="mean").heads == made[0].heads


def test_values_count_where_gains_cancel():
    made = [vector(values=seed, seed=seed) for seed in range(2)]
    found = combined(made, [1, -1], task="difference", any_sum=True).edits["heads"]
    first, second = (one.edits["heads"].value for one in made)
    assert torch.allclose(found.value[0, 0], first[0, 0] - second[0, 0])
    assert found.gain.tolist() == [[1, 0], [0, 1]]


def test_the_card_names_the_parents():
    made = [vector(values=1, seed=1), vector(values=2, seed=2, task="other", split="dev")]
    found = combined(made, [0.25, 0.75], task="mixed").card
    assert found.parents == {made[0].id: 0.25, made[1].id: 0.75}
    assert (found.method, found.task, found.model, found.split, found.seed) == (
        "combination",
        "mixed",
        "some/model",
        "",
        0,
    )
    assert found.prompt == made[0].card.prompt
    assert found.versions == {"torch": "2"}
    assert found.id != combined(made, [0.75, 0.25], task="mixed").id
    assert VectorCard.from_json(found.to_json(), "here") == found


def test_a_card_without_parents_has_the_id_it_always_had():
    """The id of a recipe is part of what is published."""
    assert card().id == "5f0d6fc8e5f45a01"
    assert card(parents={"a": 1.0}).id != card().id


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"revision": None}, GeometryError, "differ in revision .'abc', None"),
        ({"dtype": "float16"}, GeometryError, "differ in dtype"),
        ({"geometry": ((0, "x", 2, 4), (1, "y", 2, 4))}, GeometryError, "differ in geometry"),
        ({"shots": 1}, ArgumentError, r"for prompts of \[0, 1\] shots"),
        ({"seed": 0}, ArgumentError, "given twice"),
    ],
    ids=str,
)
def test_vectors_that_do_not_belong_together_are_refused(changes, kind, said):
    with pytest.raises(kind, match=said):
        combined([vector(), vector(**{"seed": 1} | changes)], task="mixed")


def test_the_same_weights_under_another_name_are_the_same_model():
    made = [vector(), vector(seed=1, model="local/elsewhere")]
    assert combined(made, task="mixed").card.model == "some/model"
    unknown = [vector(revision=None), vector(seed=1, revision=None, model="local/elsewhere")]
    with pytest.raises(GeometryError, match=r"differ in model .'local/elsewhere', 'some/model'"):
        combined(unknown, task="mixed")


def test_other_streams_and_no_edits_are_refused():
    empty = TaskVector({}, card(method="none"))
    with pytest.raises(GeometryError, match="edits of"):
        combined([vector(), empty], task="mixed")
    with pytest.raises(GeometryError, match="edits of"):
        combined([empty], task="mixed")


@pytest.mark.parametrize(
    ("weights", "said"),
    [([0.5, 0.6], "sum to 1.1, not to 1"), ([1], "one number for each"), ([float("nan"), 1], "one number for each")],
)
def test_weights_that_are_none_are_refused(weights, said):
    with pytest.raises(ArgumentError, match=said):
        combined([vector(), vector(seed=1)], weights, task="mixed")
    with pytest.raises(ArgumentError, match="no vectors"):
        combined([], task="mixed")
