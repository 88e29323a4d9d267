"""A CUDA package of a dynamic length holds the kernels for few tokens and for many."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch
from kernels.generated import Drawn, source
from kernels.test_moe_offline_compile import H100
from torch._inductor.ir import FixedLayout
from torch._inductor.virtualized import V

from inductor_moe import compat
from inductor_moe.compat import lowering
from inductor_moe.lowerings import moe as moe_lowerings
from inductor_moe.ops import moe, quant, quant_cuda
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.ops.moe_checks import check_up

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"
)
FLOAT, CODES = torch.float32, torch.int16  # four codes of 4 bits


def delta(drawn, width=128, dtype=torch.bfloat16):
    tokens = drawn.tokens
    tensors = [
        *(drawn.tensor(1, tokens, heads, width, dtype=dtype) for heads in (2, 2, 4)),
        *(drawn.tensor(1, tokens, 4, dtype=FLOAT) for _ in range(2)),
        drawn.tensor(1, 4, width, width, dtype=FLOAT),
    ]
    return tensors, lambda *given: delta_rule(*given, 0.1, 1e-6)


def routed(drawn):
    return [
        drawn.tensor(drawn.tokens, 8, dtype=torch.int64),
        drawn.tensor(drawn.tokens, 8, dtype=FLOAT),
    ]


def experts(drawn):
    weights = [drawn.tensor(64, 256, 128), drawn.tensor(64, 128, 128)]
    tensors = [drawn.tensor(drawn.tokens, 128), *weights, *routed(drawn)]
    return tensors, lambda *given: moe.moe_experts(*given, None, None, "silu", "chunked")


def packed_experts(drawn):
    up = [drawn.tensor(64, 256, 32, dtype=CODES), drawn.tensor(64, 256, 1)]
    down = [drawn.tensor(64, 128, 32, dtype=CODES), drawn.tensor(64, 128, 1)]

    def run(x, up, up_scales, down, down_scales, ids, weights):
        return quant.moe_experts_quantized(
            x, up, up_scales, None, 128, down, down_scales, None, 128, 128, ids, weights,
            None, None, "silu", "chunked",
        )  # fmt: skip

    return [drawn.tensor(drawn.tokens, 128), *up, *down, *routed(drawn)], run


CASES = {
    "delta": (delta, "delta_recurrent_kernel", "delta_chunk_scan_kernel"),
    "experts": (experts, "moe_up_decode_kernel", "moe_grouped_gemm_kernel"),
    "packed experts": (
        packed_experts, "quantized_up_decode_kernel", "moe_quantized_gemm_kernel",
    ),
}  # fmt: skip


def launched(code):
    return set(re.findall(r"\bcall_(\w+_kernel)_\d+\(", code))


@pytest.mark.parametrize("hint", [5, 100])
@pytest.mark.parametrize("case", CASES)
def test_a_package_of_any_length_chooses_when_it_runs(case, hint):
    make, small, large = CASES[case]
    drawn = Drawn(1, 288, hint)
    tensors, run = make(drawn)
    code = source(drawn, run, tensors)
    before, *branches = re.split(r"// subgraph: (true|false)_graph\w*\n", code)
    forms = dict(zip(branches[::2], branches[1::2], strict=True))
    assert f"{drawn.tokens.node.expr} <= 8L" in before.rstrip().splitlines()[-1]
    assert not launched(before)
    assert small in launched(forms["true"]) and large not in launched(forms["true"])
    assert large in launched(forms["false"]) and small not in launched(forms["false"])


@pytest.mark.parametrize("least, most, expected", [(2, 8, "small"), (9, 288, "large")])
@pytest.mark.parametrize("case", ["delta", "experts", "packed experts"])
def test_lengths_of_one_kind_take_one_form(case, least, most, expected):
    make, small, large = CASES[case]
    drawn = Drawn(least, most, most - 1)
    tensors, run = make(drawn)
    code = source(drawn, run, tensors)
    assert ({small, large} & launched(code)) == {{"small": small, "large": large}[expected]}


def test_head_dims_without_chunks_take_one_form():
    drawn = Drawn(1, 288, 100)
    tensors, run = delta(drawn, width=32)
    assert launched(source(drawn, run, tensors)) == {"delta_recurrent_kernel"}


@pytest.mark.parametrize("tokens", [None, 70])
@pytest.mark.parametrize("width", [32, 128])
def test_a_rule_in_fp64_takes_no_kernel(width, tokens):
    """A model in fp64, as one runs to compare with, keeps its precision on a GPU, too."""
    drawn = Drawn(2, 288, 100)
    drawn.tokens = tokens or drawn.tokens
    tensors, run = delta(drawn, width, torch.float64)
    code = source(drawn, run, tensors, package=False)
    assert "inductor_moe.delta_rule" in code and not re.search(r"delta_\w+_kernel", code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_in_fp64_take_no_kernel(dtype, monkeypatch):
    monkeypatch.setattr(compat, "runs_triton_kernels", lambda device: True)
    monkeypatch.setattr(moe_lowerings, "by_tokens", lambda *_: "kernels")
    drawn = Drawn(2, 288, 100)
    x, ids = drawn.tensor(4, 128, dtype=dtype), drawn.tensor(4, 8, dtype=torch.int64)
    assert check_up(x, drawn.tensor(8, 256, 128, dtype=dtype), ids, None, None) is None
    lowering = moe_lowerings._lowering("moe_up_cuda", lambda *_: "aten", 2)
    assert lowering(x, None, ids) == ("kernels" if dtype == torch.float32 else "aten")


def test_torch_compile_does_not_choose_when_it_runs():
    drawn = Drawn(2, 288, 100)
    tensors, run = delta(drawn)
    code = source(drawn, run, tensors, package=False)
    assert "delta_chunk_scan_kernel" in code and "delta_recurrent_kernel" not in code


@pytest.mark.parametrize("tokens, package", [(1600, False), (None, False), (None, True)])
def test_what_several_launches_read_is_computed_once(tokens, package):
    drawn = Drawn(9, 4096, 1600)
    tokens = tokens or drawn.tokens
    wide = drawn.tensor(1, tokens, 1024)
    g = drawn.tensor(1, tokens, 4, 128, dtype=FLOAT)
    beta = drawn.tensor(1, tokens, 4, dtype=FLOAT)

    def run(wide, g, beta):
        q, k, v = (wide * 2).split((256, 256, 512), 2)
        heads = [x.view(1, tokens, -1, 128) for x in (q, k, v)]
        return delta_rule(*heads, -torch.exp(g), beta + 1, None, 0.1, 1e-6)

    code = source(drawn, run, [wide, g, beta], package)
    calls = re.findall(r"\b(?:call_)?(delta_\w+_kernel)_\d+(?:\.run)?\((.*, -1, .*)\)", code)
    first = "delta_channel_intra_kernel"
    assert [name for name, _ in calls][:2] == [first, first]
    buffers = [text.split(", -1, ")[0] for name, text in calls if name == first]
    assert set(buffers) == {buffers[0]}
    assert "clone" not in code


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize(
    "most, bias, wide",
    [(512, None, False), (4096, None, True), (4096, torch.bfloat16, True), (4096, FLOAT, False)],
)
def test_a_linear_layer_of_many_rows_is_a_library_product(monkeypatch, package, most, bias, wide):
    """But not with a bias in fp32, which a library would round before it adds it."""
    monkeypatch.setattr(quant_cuda, "gpu_of", lambda *_: H100)
    drawn = Drawn(2, most, most // 2)
    packed, scales = drawn.tensor(4096, 512, dtype=CODES), drawn.tensor(4096, 16)
    tensors = [drawn.tensor(drawn.tokens, 2048), packed, scales]
    if bias is not None:
        tensors.append(drawn.tensor(4096, dtype=bias))

    def run(x, packed, scales, *bias):
        return quant.quantized_linear(x, packed, scales, None, *(bias or (None,)), 128)

    code = source(drawn, run, tensors, package)
    assert ("widen_kernel" in code) == wide
    assert bool(re.search(r"extern_kernels\.(add)?mm|mm_out\(", code)) == wide
    assert ("quantized_linear_kernel" in code) != wide


def test_fakes_lie_where_their_buffers_do():
    """What a branch takes for a vector's boundary is one."""
    drawn = Drawn(1, 288, 100)
    size, stride = (drawn.tokens, 4, 8), (40, 10, 1)
    symbols = (drawn.tokens.node.expr, 4, 8)
    layout = FixedLayout(torch.device("cuda"), torch.bfloat16, symbols, stride, offset=3)
    with drawn.mode, V.set_graph_handler(mock.MagicMock()):
        fake = lowering._as_laid_out(drawn.tensor(*size), layout)
    assert fake.stride() == stride and fake.storage_offset() == 3
    assert fake.shape == size
