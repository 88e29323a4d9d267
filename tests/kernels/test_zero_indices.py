"""Kernels run on zeros where their indices should be, as PyTorch runs them to make a package."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import Interpreted
from kernels.test_moe_kernels import PLANS
from kernels.test_quant_kernels import PLANS as QUANTIZED_PLANS

from inductor_moe.ops import moe_cuda, quant_cuda
from inductor_moe.quant.fit import Scheme, quantize_weight

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 9, 64, 32, 5, 3
FAR = 1 << 30  # what lies before an index tensor: rows so far off that to read one is a crash


class OnZeros(Interpreted):
    """A launch whose integers are zeros; what a GEMM then stores is an error."""

    def __getitem__(self, grid):
        launch = super().__getitem__(grid)

        def on_zeros(*args, **kwargs):
            names = self.kernel.arg_names
            given = {
                name: zeros_behind(value) if is_index(value) else value
                for name, value in (dict(zip(names, args, strict=False)) | kwargs).items()
            }
            blocks = "blocks" in given and "out" in given
            if blocks:
                given["out"].fill_(float("nan"))
            launch(**given)
            if blocks:
                assert given["out"].isnan().all(), "a block without rows was stored"
            LAUNCHED.append(self.kernel.fn.__name__)

        return on_zeros


LAUNCHED: list[str] = []


def is_index(value):
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


def zeros_behind(value):
    buffer = torch.zeros(value.numel() + 1, dtype=value.dtype)
    buffer[0] = FAR
    return buffer[1:].view(value.shape)


@pytest.fixture(autouse=True)
def _fresh_list():
    LAUNCHED.clear()


def routing():
    ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    return ids, torch.rand(TOKENS, TOP_K)


def weights():
    return torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)


@pytest.mark.parametrize("plan", PLANS)
def test_experts(plan):
    moe_cuda.moe_experts_cuda(
        torch.randn(TOKENS, HIDDEN), *weights(), *routing(), None, None, "silu", "chunked",
        plan=PLANS[plan], wrap=OnZeros,
    )  # fmt: skip
    expected = "moe_up_decode_kernel" if "decode" in plan else "moe_grouped_gemm_kernel"
    assert expected in LAUNCHED


@pytest.mark.parametrize("int8, kernel", [
    (False, "moe_quantized_gemm_kernel"), (True, "moe_int8_gemm_kernel"),
])  # fmt: skip
def test_packed_experts(int8, kernel):
    up, down = (quantize_weight(w.bfloat16(), Scheme(4, 32, True, "rtn")) for w in weights())
    quant_cuda.moe_experts_quantized_cuda(
        torch.randn(TOKENS, HIDDEN).bfloat16(), up.packed, up.scales, None, 32,
        down.packed, down.scales, None, 32, INNER, *routing(),
        activation="silu", gate="chunked", plan=QUANTIZED_PLANS["gemm"],
        int8_activations=int8, wrap=OnZeros,
    )  # fmt: skip
    assert kernel in LAUNCHED
