"""The check of torch's attention finds kernels that compute wrong numbers, and leaves the others alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lmms_mtv.runtime.attention import LENGTHS, check_attention, wrong_lengths
from support import zoo

CPU = torch.device("cpu")


def wrong_at(remainder: int, change: float):
    """Attention that is wrong where the number of keys leaves ``remainder`` when it is divided by 32."""

    def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        output = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return output + change if keys.shape[2] % 32 == remainder else output

    return attention


@pytest.mark.parametrize(("heads", "own", "size"), [(4, 1, 256), (8, 2, 16), (3, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_on_a_cpu_is_right(heads, own, size, dtype):
    assert wrong_lengths(heads, own, size, dtype, CPU) == []


@pytest.mark.parametrize("change", [0.1, float("nan")])
def test_the_lengths_at_which_a_kernel_is_wrong_are_found(change):
    assert wrong_lengths(4, 1, 64, torch.float32, CPU, attention=wrong_at(1, change)) == [33, 65, 97]
    assert wrong_lengths(4, 1, 64, torch.float32, CPU, range(1, 40), wrong_at(5, change)) == [5, 37]


def test_a_rounding_error_is_not_wrong():
    assert wrong_lengths(4, 1, 64, torch.float32, CPU, attention=wrong_at(1, 1e-5)) == []


def test_padding_is_part_of_the_check():
    """A kernel that forgets the mask of padded rows is found at all lengths."""

    def unpadded(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:1])

    assert wrong_lengths(4, 1, 64, torch.float32, CPU, attention=unpadded) == list(LENGTHS)


def test_a_model_on_a_cpu_changes_nothing(caplog):
    check_attention(zoo.build(zoo.llama).model)
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not caplog.records
