"""Packed experts multiplied without tensor cores, interpreted, buffers of NaN, against fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernels.interpreted import Interpreted
from kernels.test_shared_kernels import (
    EXPERTS,
    SCHEMES,
    TOP_K,
    _poisoned_buffers,  # noqa: F401
    _seed,  # noqa: F401
    draw,
    exact,
)

from inductor_moe.ops.quant_cuda import moe_experts_quantized_cuda
from inductor_moe.ops.shared_cuda import moe_experts_shared_cuda
from inductor_moe.quant.fit import Scheme
from inductor_moe.quant_tiles import (
    PartsTile,
    QuantizedExperts,
    QuantizedPlan,
    VectorTile,
    experts_by_rule,
)
from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import relative_error
from inductor_moe.tiles import generic_gpu

# Of roundings to bf16: inputs of the down projection, weights of experts, outputs.
LIMIT = 5e-3
UP, DOWN = "quantized_up_vector_kernel", "quantized_down_vector_kernel"
PARTS_UP, PARTS_DOWN = "quantized_up_decode_kernel", "quantized_down_decode_kernel"


class Named:
    """Interprets kernels and notes their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, kernel: Any) -> Any:
        self.names.append(kernel.fn.__name__)
        return Interpreted(kernel)


def plan(up: tuple[int, int, int], down: tuple[int, int, int]) -> QuantizedPlan:
    return QuantizedPlan(0, VectorTile(*up), VectorTile(*down))


@pytest.mark.parametrize(
    ("scheme", "gate", "sizes", "tokens", "tiles"),
    [
        # (H, I, S): rows of two, one and half a warp; tails of outputs; two and more shared slots
        ("int4 g128", "chunked", (2048, 256, 256), 1, ((3, 3, 4), (32, 4, 8))),
        ("int4 g64 zeros", "interleaved", (1024, 256, 512), 2, ((5, 2, 2), (16, 2, 2))),
        ("int4 g128", "none", (4096, 512, 512), 1, ((7, 3, 8), (32, 8, 4))),
        ("int4 g128", "chunked", (512, 1024, 1024), 1, ((9, 2, 4), (16, 1, 4))),
    ],
)
def test_with_a_shared_expert(scheme, gate, sizes, tokens, tiles):
    arguments = draw(sizes, tokens, torch.bfloat16, gate, SCHEMES[scheme])
    options = {"alpha": 1.5, "limit": 0.7, "up_offset": 1.0} if gate == "interleaved" else {}
    named = Named()
    found = moe_experts_shared_cuda(*arguments, **options, plan=plan(*tiles), wrap=named)
    assert named.names == [UP, DOWN]
    assert relative_error(found, exact(arguments, **options)) <= LIMIT


@pytest.mark.parametrize("logits", [True, False])
def test_shared_alone_where_every_pair_is_skipped(logits):
    arguments = draw((512, 256, 256), 2, torch.bfloat16, "chunked", SCHEMES["int4 g128"], logits)
    arguments[1][:] = torch.tensor([-1, EXPERTS, EXPERTS + 1])
    arguments[2][:] = torch.nan
    named = Named()
    found = moe_experts_shared_cuda(*arguments, plan=plan((8, 2, 2), (32, 4, 2)), wrap=named)
    reference = exact((*arguments[:2], torch.ones(2, TOP_K), *arguments[3:]))
    assert named.names == [UP, DOWN] and reference.abs().max() > 0
    assert relative_error(found, reference) <= LIMIT


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, [UP, DOWN]),
        ({"bias": True}, [PARTS_UP, PARTS_DOWN]),
        ({"inner": 192}, [UP, PARTS_DOWN]),
        ({"hidden": 192}, [PARTS_UP, DOWN]),
        ({"scheme": SCHEMES["int4 g32"]}, [PARTS_UP, PARTS_DOWN]),
        ({"scheme": SCHEMES["int8"]}, [PARTS_UP, PARTS_DOWN]),
        ({"scheme": Scheme(4, 512, True, "rtn")}, [UP, PARTS_DOWN]),
        ({"weights": "on the input"}, [UP, DOWN]),
    ],
    ids=str,
)
def test_routed_experts_and_what_other_kernels_take(change, names):
    hidden, inner = change.get("hidden", 512), change.get("inner", 256)
    scheme = change.get("scheme", SCHEMES["int4 g128"])
    x, ids, weights, _, routed, _, group, *_ = draw(
        (hidden, inner, 16), 2, torch.bfloat16, "chunked", scheme
    )
    rows = (2 * inner, hidden)
    biases = [torch.randn(EXPERTS, n).bfloat16() if "bias" in change else None for n in rows]
    on_input = "weights" in change
    named = Named()
    found = moe_experts_quantized_cuda(
        x, *routed[:3], group, *routed[3:], group, inner, ids, weights, *biases,
        "silu", "chunked", weights_on_input=on_input, plan=plan((8, 2, 2), (32, 2, 4)), wrap=named,
    )  # fmt: skip
    assert named.names == names
    up, down = (
        dequantize_reference(
            packed, scales.double(), None if zeros is None else zeros.double(), group, width
        )
        for (packed, scales, zeros), width in ((routed[:3], hidden), (routed[3:], inner))
    )
    reference = moe_experts_reference(
        x.double(), up, down, ids, weights.double(),
        *(None if b is None else b.double() for b in biases), "silu", "chunked",
        weights_on_input=on_input,
    )  # fmt: skip
    assert relative_error(found, reference) <= LIMIT


def test_a_shared_expert_of_another_width_goes_to_other_kernels():
    arguments = draw((512, 256, 128), 1, torch.bfloat16, "chunked", SCHEMES["int4 g128"])
    named = Named()
    found = moe_experts_shared_cuda(*arguments, plan=plan((8, 2, 2), (32, 2, 4)), wrap=named)
    assert named.names == [PARTS_UP, PARTS_DOWN]
    assert relative_error(found, exact(arguments)) <= LIMIT


@pytest.mark.parametrize(
    ("hidden", "gated", "group", "tile"),
    [
        (2048, True, 128, (3, 3, 1)),
        (4096, True, 64, (3, 3, 2)),
        (2048, False, 128, (6, 6, 1)),
        (2880, True, 64, None),
        (2048, True, 32, None),
    ],
)
def test_up_tiles_by_rule(hidden, gated, group, tile):
    layer = QuantizedExperts(8, 128, hidden, 768, gated, 4, group)
    found = experts_by_rule(layer, 4, generic_gpu((9, 0)))
    assert found.up == (found.down if tile is None else VectorTile(*tile))
    assert isinstance(experts_by_rule(layer, 1, generic_gpu((8, 0))).up, PartsTile)
    assert experts_by_rule(layer, 32, generic_gpu((9, 0))).block_m


@pytest.mark.parametrize(
    ("hidden", "inner", "tokens", "group", "tile"),
    [
        (2048, 512, 1, 128, (4, 4, 4)),
        (2048, 1024, 1, 64, (4, 4, 8)),
        (1024, 256, 1, 128, (2, 2, 8)),
        (2048, 512, 2, 128, None),
        (2048, 768, 1, 128, None),
        (2048, 512, 1, 32, None),
    ],
)
def test_down_tiles_by_rule(hidden, inner, tokens, group, tile):
    layer = QuantizedExperts(8, 128, hidden, inner, True, 4, group)
    hopper = dataclasses.replace(generic_gpu((9, 0)), multiprocessors=132)
    found = experts_by_rule(layer, tokens, hopper).down
    assert found == VectorTile(*tile) if tile is not None else isinstance(found, PartsTile)
    assert isinstance(experts_by_rule(layer, tokens, generic_gpu((8, 0))).down, PartsTile)
