"""One package of a dynamic length on a GPU: its kernels for few tokens and for many."""

from __future__ import annotations

import pytest
import torch

import inductor_moe
from inductor_moe.ops import moe, quant
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.reference.delta_rule import delta_rule_recurrent
from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import relative_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.xdist_group("dispatch"),  # one worker builds the package
]

LENGTHS = (1, 2, 8, 9, 64, 65, 200)
HIDDEN, INNER, EXPERTS, TOP_K, GROUP = 256, 128, 64, 2, 128
FEW = {"delta_recurrent_kernel", "moe_up_decode_kernel", "quantized_up_decode_kernel"}
MANY = {"delta_chunk_intra_kernel", "moe_grouped_gemm_kernel", "moe_quantized_gemm_kernel"}


def normal(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


class Layers(torch.nn.Module):
    """The delta rule, then experts in bf16 and others in int4, each over the same tokens."""

    def __init__(self):
        super().__init__()
        up = normal(EXPERTS, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
        down = normal(EXPERTS, HIDDEN, INNER, scale=INNER**-0.5)
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        for name, weight in (("up", up), ("down", down)):
            packed = quantize_weight(weight, Scheme(4, GROUP, True, "rtn"))
            self.register_buffer(f"{name}_codes", packed.packed)
            self.register_buffer(f"{name}_scales", packed.scales)

    def forward(self, q, k, v, g, beta, state, x, ids, weights):
        out, final = delta_rule(q, k, v, g, beta, state, q.shape[-1] ** -0.5, 1e-6)
        dense = moe.moe_experts(x, self.up, self.down, ids, weights, None, None, "silu", "chunked")
        packed = quant.moe_experts_quantized(
            x, self.up_codes, self.up_scales, None, GROUP, self.down_codes, self.down_scales,
            None, GROUP, INNER, ids, weights, None, None, "silu", "chunked",
        )  # fmt: skip
        return out, final, dense, packed

    def exact(self, q, k, v, g, beta, state, x, ids, weights):
        """The same in fp64."""
        wide = (t.double() for t in (q, k, v, g, beta, state))
        out, final = delta_rule_recurrent(*wide, q.shape[-1] ** -0.5, 1e-6)
        up = dequantize_reference(self.up_codes, self.up_scales, None, GROUP, HIDDEN)
        down = dequantize_reference(self.down_codes, self.down_scales, None, GROUP, INNER)
        routed = [
            moe_experts_reference(
                x.double(), w_up.double(), w_down.double(), ids, weights.double(), None, None,
                "silu", "chunked",
            )
            for w_up, w_down in ((self.up, self.down), (up, down))
        ]  # fmt: skip
        return out, final, *routed


def inputs(tokens):
    scores = torch.rand(tokens, EXPERTS, device="cuda")
    weights, ids = scores.topk(TOP_K)
    return (
        *(normal(1, tokens, heads, 128) for heads in (2, 2, 4)),
        -normal(1, tokens, 4, dtype=torch.float32).abs(),
        normal(1, tokens, 4, dtype=torch.float32).sigmoid(),
        normal(1, 4, 128, 128, dtype=torch.float32),
        normal(tokens, HIDDEN), ids, weights,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The layers and their package, which takes 1 to 256 tokens."""
    torch.manual_seed(0)
    model = Layers()
    dim = torch.export.Dim("tokens", min=1, max=256)
    shapes = (*({1: dim},) * 5, None, *({0: dim},) * 3)
    with torch.no_grad():
        exported = torch.export.export(model, inputs(100), dynamic_shapes=shapes)
        folder = tmp_path_factory.mktemp("dispatch")
        path = inductor_moe.aoti_compile_and_package(exported, package_path=folder / "m.pt2")
    return model, torch._inductor.aoti_load_package(path)


def launched(run, *arguments):
    """(the outputs, the kernels of one call that are FEW's or MANY's)"""
    run(*arguments)  # loading the kernels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = run(*arguments)
        torch.cuda.synchronize()
    events = [event.key for event in profile.key_averages()]
    return found, {name for name in FEW | MANY if any(name in event for event in events)}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_each_length_runs_the_kernels_made_for_it(made, tokens):
    model, run = made
    arguments = inputs(tokens)
    with torch.no_grad():
        found, kernels = launched(run, *arguments)
        eager = model(*arguments)
        exact = model.exact(*arguments)
    assert kernels == (FEW if tokens <= 8 else MANY)
    for ours, own, expected in zip(found, eager, exact, strict=True):
        assert ours.shape == expected.shape and ours.isfinite().all()
        assert relative_error(ours, expected) <= 2 * relative_error(own, expected)


def test_calls_of_alternating_lengths_do_not_meet(made):
    _, run = made
    given = [inputs(tokens) for tokens in (9, 8, 200, 1)]
    with torch.no_grad():
        alone = [[output.clone() for output in run(*arguments)] for arguments in given]
        held = [run(*arguments) for arguments in given]
    torch.cuda.synchronize()
    for first, second in zip(alone, held, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
