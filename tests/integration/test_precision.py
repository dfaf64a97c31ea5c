"""Half precision, and projections whose weight is no plain matrix: the hook never touches a weight."""

from __future__ import annotations

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from torch import Tensor, nn
from torch.nn import functional

from lmms_mtv import Edit, applied, find_sites, methods, verify
from lmms_mtv.vectors import HEADS
from support import sessions, zoo
from support.evaluations import task_manager


class Packed(nn.Module):
    """A projection as 4- and 8-bit libraries keep one: a row of bytes and a scale, unpacked in the forward."""

    def __init__(self, plain: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = plain.in_features, plain.out_features, bits
        most = 2 ** (bits - 1) - 1
        self.scale = plain.weight.abs().max().item() / most
        whole = (plain.weight / self.scale).round().clamp(-most, most).to(torch.int8).flatten() + most
        stored = whole.to(torch.uint8)
        if bits == 4:
            stored = stored[0::2] * 16 + stored[1::2]
        self.weight = nn.Parameter(stored.unsqueeze(1), requires_grad=False)

    def unpacked(self) -> Tensor:
        stored, most = self.weight.flatten(), 2 ** (self.bits - 1) - 1
        if self.bits == 4:
            stored = torch.stack([stored // 16, stored % 16], 1).flatten()
        return (stored.float() - most).view(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.unpacked().to(x.dtype))


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_packed_projections_are_edited_like_the_matrices_they_stand_for(bits):
    packed, plain = zoo.build(zoo.qwen3), zoo.build(zoo.qwen3)
    for block, twin in zip(packed.model.model.layers, plain.model.model.layers, strict=True):
        block.self_attn.o_proj = Packed(block.self_attn.o_proj, bits)
        twin.self_attn.o_proj.weight.copy_(block.self_attn.o_proj.unpacked())
    before = [block.self_attn.o_proj.weight.clone() for block in packed.model.model.layers]
    sites, inputs = find_sites(packed.model), packed.inputs([[5, 6, 7], [8, 9]])
    assert sites.shape == find_sites(plain.model).shape
    verify(packed.model, sites, inputs)
    rng = torch.Generator().manual_seed(0)
    edit = Edit.replace(torch.randn(sites.shape, generator=rng), torch.rand(sites.shape[:2], generator=rng) < 0.5)
    with applied(packed.model, edit), applied(plain.model, edit):
        torch.testing.assert_close(packed.model(**inputs).logits, plain.model(**inputs).logits, rtol=1e-4, atol=1e-4)
    method = methods.get("mtv")
    config = method.configure(
        {"iterations": 4, "fit_shots": 1, "steps": 5, "samples": 8, "examples": 3, "candidate_examples": 2}
    )
    fitted = [method.fit(sessions.session(tiny), config).edits[HEADS] for tiny in (packed, plain)]
    torch.testing.assert_close(fitted[0].value, fitted[1].value, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(a, b.self_attn.o_proj.weight) for a, b in zip(before, packed.model.model.layers, strict=True)
    )


@pytest.mark.slow
def test_bfloat16_is_as_good_as_float32():
    """Two tasks fitted and evaluated in both, on half of their scenes."""
    scores = {}
    for dtype in ("float32", "bfloat16"):
        manager = task_manager()
        tasks = ["shapes_color_es", "shapes_phrase_en"]
        arguments = f"pretrained=tiny,dtype={dtype},steps=150,batch_size=16"
        results = simple_evaluate("mtv", arguments, tasks=tasks, task_manager=manager, limit=100)["results"]
        scores[dtype] = sum(results[task]["exact_match,none"] for task in tasks) / len(tasks)
    assert scores["float32"] > 0.9
    assert abs(scores["bfloat16"] - scores["float32"]) <= 0.02
