"""The output layer: left out where no one reads logits, and multiplied in blocks of the vocabulary."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from lmms_mtv import Edit, Episode, find_sites, record
from lmms_mtv.hooks import inputs_as_logits, logits_unread, output_layer
from support import zoo
from support.sessions import TokenExamples, session


@pytest.fixture
def tiny():
    return zoo.build(zoo.llama)


@torch.no_grad()
def test_all_before_the_output_layer_is_as_always(tiny):
    inputs, sites = tiny.inputs([[3, 4, 5], [6, 7, 8]]), find_sites(tiny.model)
    with record(sites) as always:
        logits = tiny.model(**inputs).logits
    with logits_unread(tiny.model), record(sites) as unread:
        zeros = tiny.model(**inputs).logits
    assert torch.equal(always.last(), unread.last())
    assert zeros.shape == logits.shape
    assert zeros.dtype == logits.dtype
    assert not zeros.any()
    assert torch.equal(tiny.model(**inputs).logits, logits)


@torch.no_grad()
def test_nothing_is_left_on_the_model_after_an_error(tiny):
    layer = tiny.model.get_output_embeddings()
    inputs = tiny.inputs([[3, 4, 5]])
    logits = tiny.model(**inputs).logits
    with pytest.raises(TypeError), logits_unread(tiny.model):
        layer(torch.zeros(1, 1, layer.in_features), "one argument too many")
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks
    assert torch.equal(tiny.model(**inputs).logits, logits)


@torch.no_grad()
def test_copies_and_other_threads_compute_their_logits(tiny):
    inputs = tiny.inputs([[3, 4, 5]])
    logits = tiny.model(**inputs).logits
    found = []

    def runs(model):
        found.append(model(**inputs).logits)

    with logits_unread(tiny.model):
        runs(copy.deepcopy(tiny.model))
        thread = threading.Thread(target=runs, args=[tiny.model])
        thread.start()
        thread.join()
    assert all(torch.equal(each, logits) for each in found)
    assert len(found) == 2


@torch.no_grad()
def test_a_model_that_names_no_output_layer_computes_its_logits(tiny):
    inputs = tiny.inputs([[3, 4, 5]])
    logits = tiny.model(**inputs).logits
    tiny.model.get_output_embeddings = lambda: None
    with logits_unread(tiny.model):
        assert torch.equal(tiny.model(**inputs).logits, logits)


def blocks_of(model, inputs, target):
    """The losses of the last tokens of ``inputs``, whose output layer is multiplied in blocks."""
    with inputs_as_logits(model) as found:
        returned = model(**inputs).logits[:, -len(target) :]
    assert found.taken
    assert found.are(returned)
    assert returned.shape[-1] == model.get_output_embeddings().in_features
    return found.cross_entropy(returned, target)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks for tiny vocabularies too, several of them and the last one not full."""
    monkeypatch.setattr(output_layer, "LARGE", 0)
    monkeypatch.setattr(output_layer, "_BLOCK", 150)


@torch.no_grad()
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("bias", [False, True])
def test_losses_in_blocks_are_those_of_logits(tiny, bias):
    layer, inputs, target = tiny.model.get_output_embeddings(), tiny.inputs([[3, 4, 5], [6, 7, 8]]), [9, 119]
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features)) if bias else None
    logits = tiny.model(**inputs).logits[:, -2:]
    tokens = [
        [-row[step].double().log_softmax(-1)[token].item() for step, token in enumerate(target)] for row in logits
    ]
    losses = blocks_of(tiny.model, inputs, target)
    assert losses.shape == (2,)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([sum(each) / 2 for each in tokens], abs=1e-5)


@torch.no_grad()
def test_small_vocabularies_have_their_logits(tiny):
    inputs = tiny.inputs([[3, 4, 5]])
    logits = tiny.model(**inputs).logits
    with inputs_as_logits(tiny.model) as found:
        assert torch.equal(tiny.model(**inputs).logits, logits)
    assert not found.taken


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_gradients_or_lower_precisions_run_logits_are_computed(tiny, dtype):
    inputs = tiny.inputs([[3, 4, 5]])
    with inputs_as_logits(tiny.model) as found:
        assert tiny.model(**inputs).logits.requires_grad
    assert not found.taken
    with torch.no_grad(), inputs_as_logits(tiny.model.to(dtype)) as found:
        assert tiny.model(**inputs).logits.shape[-1] == zoo.VOCABULARY
    assert not found.taken


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("change", [lambda logits: logits / 2, lambda logits: logits.mul_(2)])
def test_a_model_that_changes_its_logits_has_them(tiny, change):
    """Some models scale or limit their logits after the output layer: a fit sees it and computes all logits."""
    used = session(tiny, examples=TokenExamples(answer=2))
    value = torch.randn(used.shape, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(4, *used.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    handle = tiny.model.register_forward_hook(lambda model, args, output: changed(output, change))
    try:
        found = used.losses(Episode(3, ()), Edit.replace(value, masks), "all")
        assert used._replayer._runner._may_block is False
        full = session(tiny, examples=TokenExamples(answer=2), replay="full forwards")
        full._replayer._runner._may_block = False
        expected = full.losses(Episode(3, ()), Edit.replace(value, masks), "all")
    finally:
        handle.remove()
    assert (found - expected).abs().max() < 1e-5


def changed(output, change):
    output.logits = change(output.logits)
    return output


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("replay", [None, "rows", "full forwards"])
def test_a_fit_has_the_same_losses_in_blocks(tiny, replay):
    value = torch.randn(session(tiny).shape, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(5, *value.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    found = []
    for may_block in (True, False):
        used = session(tiny, examples=TokenExamples(answer=2), replay=replay)
        used._replayer._runner._may_block = may_block
        found.append(used.losses(Episode(3, (1,)), Edit.replace(value, masks), "all"))
        assert used._replayer._runner._may_block is may_block
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert used.replay == (replay or "side by side")
