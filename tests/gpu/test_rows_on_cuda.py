"""Packed layers of many rows on a GPU: full and partly filled blocks, and weights of 16 bits."""

from __future__ import annotations

import pytest
import torch

from inductor_moe.ops.quant import moe_experts_quantized, quantized_linear
from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SCHEMES = {
    "int4 g128": Scheme(4, 128, True, "rtn"),
    "int4 g32 zeros": Scheme(4, 32, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}


def packed(shape, scheme, dtype):
    """(packed, scales, zeros) on the GPU, and the weight that they are in fp64."""
    weight = quantize_weight((torch.randn(shape) / shape[-1] ** 0.5).to(dtype), scheme)
    zeros = None if weight.zeros is None else weight.zeros.double()
    exact = dequantize_reference(
        weight.packed, weight.scales.double(), zeros, scheme.group_size, shape[-1]
    )
    tensors = (weight.packed, weight.scales, weight.zeros)
    return [None if t is None else t.cuda() for t in tensors], exact.cuda()


def poison_free_memory():
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs, inputs", [(1100, 2048), (2200, 1000)])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_linear_layers(scheme, outputs, inputs, dtype):
    torch.manual_seed(outputs)
    weights, exact = packed((outputs, inputs), scheme, dtype)
    x = torch.randn(1025, inputs, device="cuda").to(dtype)
    wide = torch.randn(outputs, device="cuda")
    for bias in (None, wide.to(dtype), wide):
        expected = x.double() @ exact.T + (0 if bias is None else bias.double())
        for tokens in (17, 33, 65, 100, 300, 511, 512, 513, 1025):
            poison_free_memory()
            found = quantized_linear(x[:tokens], *weights, bias, scheme.group_size)
            assert found.shape == (tokens, outputs) and found.dtype == dtype
            limit = 3e-3 if dtype == torch.bfloat16 else 4e-4
            assert relative_error(found, expected[:tokens]) <= limit, tokens


@pytest.mark.parametrize("int8_activations", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("tokens", [40, 150, 700, 2100])
def test_experts(tokens, int8_activations):
    """Of some experts a block of one row is left over, of others none."""
    torch.manual_seed(tokens)
    experts, hidden, inner, scheme = 12, 512, 384, SCHEMES["int4 g128"]
    up, exact_up = packed((experts, 2 * inner, hidden), scheme, torch.bfloat16)
    down, exact_down = packed((experts, hidden, inner), scheme, torch.bfloat16)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    weights, ids = torch.rand(tokens, experts, device="cuda").topk(4)
    ids[0] = torch.arange(4)
    ids[1:][ids[1:] == 3] = 11
    poison_free_memory()
    found = moe_experts_quantized(
        x, *up, 128, *down, 128, inner, ids, weights.bfloat16(), None, None, "silu", "chunked",
        int8_activations=int8_activations,
    )  # fmt: skip
    expected = moe_experts_reference(
        x.double(), exact_up, exact_down, ids, weights.bfloat16().double(), None, None,
        "silu", "chunked",
    )  # fmt: skip
    assert relative_error(found, expected) <= (2e-2 if int8_activations else 5e-3)
