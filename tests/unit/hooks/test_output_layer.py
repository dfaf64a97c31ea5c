"""Forwards whose logits no one reads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from lmms_mtv import find_sites, record
from lmms_mtv.hooks import logits_unread
from support import zoo


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
