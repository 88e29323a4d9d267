"""Routed and shared experts in the decode kernels, interpreted, buffers of NaN, against fp64."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from kernels.interpreted import Interpreted
from torch import Tensor

from inductor_moe.ops import moe_cuda
from inductor_moe.ops.shared import moe_experts_shared_plain
from inductor_moe.ops.shared_cuda import moe_experts_shared_cuda
from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.quant_tiles import PartsTile, QuantizedPlan
from inductor_moe.testing import relative_error
from inductor_moe.tiles import DecodeTile, GemmTile, Plan

EXPERTS, TOP_K = 5, 3
DENSE = {
    "whole": Plan(0, DecodeTile(16, 32, 4), DecodeTile(16, 16, 4, unroll=2)),
    "split": Plan(0, DecodeTile(32, 64, 4, 2), DecodeTile(32, 32, 4, split=2)),
    "apart": Plan(16, GemmTile(32, 32, 2, 4, 2), GemmTile(16, 16, 2, 4, 2)),
}
PACKED = {
    "parts-8": QuantizedPlan(0, PartsTile(16, 64, 8, 4, 2), PartsTile(16, 64, 8, 4, 2)),
    "parts-2": QuantizedPlan(0, PartsTile(32, 128, 2, 4, 2), PartsTile(8, 64, 2, 4, 2)),
    "apart": QuantizedPlan(16, GemmTile(32, 64, 2, 4, 2), GemmTile(16, 128, 2, 4, 2)),
}
SCHEMES = {
    "int4 g128": Scheme(4, 128, True, "rtn"),
    "int4 g32": Scheme(4, 32, True, "rtn"),
    "int4 g64 zeros": Scheme(4, 64, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        floats = tensor.is_floating_point()
        return tensor.fill_(math.nan if floats else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(moe_cuda.torch, "empty", poisoned)


def draw(
    sizes: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    gate: str = "chunked",
    scheme: Scheme | None = None,
    logits: bool = True,
) -> tuple[Any, ...]:
    """Arguments of the op: sizes are (H, I, S); ids are -1 and beyond E, too."""
    hidden, inner, own = sizes
    halves = 1 if gate == "none" else 2

    def weight(*shape: int) -> list[Tensor | None]:
        value = (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)
        if scheme is None:
            return [value, None, None]
        packed = quantize_weight(value, scheme)
        return [packed.packed, packed.scales, packed.zeros]

    ids = torch.randint(-1, EXPERTS + 2, (tokens, TOP_K))
    ids[0, 0] = EXPERTS - 1
    own_gate = [None] * 3 if gate == "none" else weight(own, hidden)
    return (
        torch.randn(tokens, hidden).to(dtype),
        ids,
        torch.rand(tokens, TOP_K).to(dtype),
        2 * torch.randn(tokens, 2).to(dtype)[:, 1:] if logits else None,
        [*weight(EXPERTS, halves * inner, hidden), *weight(EXPERTS, hidden, inner)],
        [*own_gate, *weight(own, hidden), *weight(hidden, own)],
        0 if scheme is None else scheme.group_size,
        "silu",
        gate,
    )


def exact(arguments: tuple[Any, ...], **options: Any) -> Tensor:
    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(each) for each in value]
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floats else value

    return moe_experts_shared_plain(*map(wide, arguments), **options)


def run(arguments: tuple[Any, ...], plan: Any, **options: Any) -> Tensor:
    return moe_experts_shared_cuda(*arguments, **options, plan=plan, wrap=Interpreted)


@pytest.mark.parametrize("plan", DENSE)
@pytest.mark.parametrize("gate", ["chunked", "interleaved", "none"])
@pytest.mark.parametrize("sizes", [(40, 24, 24), (40, 24, 67), (37, 33, 8)], ids=str)
def test_dense(plan, gate, sizes):
    arguments = draw(sizes, 2, torch.float32, gate, logits=gate != "none")
    found = run(arguments, DENSE[plan])
    assert found.dtype == torch.float32
    assert relative_error(found, exact(arguments)) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("plan", ["whole", "split"])
def test_dense_in_low_precision_with_every_option(plan):
    options = {"alpha": 1.702, "up_offset": 1.0, "limit": 0.7, "out_dtype": torch.float32}
    arguments = draw((40, 24, 48), 3, torch.bfloat16)
    found = run(arguments, DENSE[plan], **options)
    assert found.dtype == torch.float32
    assert relative_error(found, exact(arguments, **options)) <= 2**-8


def test_transposed_weights():
    arguments = draw((40, 24, 24), 2, torch.float32)
    for weights in (arguments[4], arguments[5]):
        for place, weight in enumerate(weights):
            if weight is not None:
                weights[place] = weight.mT.contiguous().mT
    found = run(arguments, DENSE["whole"])
    assert relative_error(found, exact(arguments)) <= 4 * torch.finfo(torch.float32).eps


QUICK = {
    ("parts-8", "int4 g128", (128, 64, 320)),
    ("parts-8", "int4 g64 zeros", (72, 40, 100)),
    ("parts-2", "int4 g32", (72, 40, 200)),
    ("parts-2", "int8", (72, 40, 24)),
    ("apart", "int4 g128", (72, 40, 100)),
}


@pytest.mark.parametrize(
    ("plan", "scheme", "sizes"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id=str(case))
        for case in ((p, s, z) for p in PACKED for s in SCHEMES
                     for z in ((128, 64, 320), (128, 128, 1024), (72, 40, 100), (72, 40, 24),
                               (72, 40, 200)))
    ],
)  # fmt: skip
def test_packed(plan, scheme, sizes):
    gate = "interleaved" if sizes[1] == 40 else "chunked"
    # Eight tokens, so that chance moves the ratio of two errors little.
    arguments = draw(sizes, 8, torch.bfloat16, gate, SCHEMES[scheme], logits=sizes[2] != 100)
    found, expected = run(arguments, PACKED[plan]), exact(arguments)
    assert found.dtype == torch.bfloat16
    eager = relative_error(moe_experts_shared_plain(*arguments), expected)
    assert relative_error(found, expected) <= 1.2 * eager


def test_packed_without_a_gate():
    arguments = draw((72, 40, 56), 2, torch.float16, "none", SCHEMES["int4 g32"])
    arguments = (*arguments[:7], "relu2", "none")
    found = run(arguments, PACKED["parts-8"])
    assert relative_error(found, exact(arguments)) <= 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_shared_expert_where_nothing_is_routed(packed):
    scheme = SCHEMES["int4 g32"] if packed else None
    plan = PACKED["parts-8"] if packed else DENSE["split"]
    arguments = draw((64, 32, 32), 2, torch.bfloat16, scheme=scheme)
    arguments[1].fill_(EXPERTS)
    arguments[2].fill_(math.nan)
    found = run(arguments, plan)
    assert found.abs().sum() > 0
    assert relative_error(found, exact(arguments)) <= 5e-3
    arguments[3].fill_(-math.inf)  # a gate that is shut
    assert not run(arguments, plan).any()


def test_no_tokens():
    arguments = [v[:0] if isinstance(v, Tensor) else v for v in draw((40, 24, 24), 2, torch.half)]
    assert moe_experts_shared_cuda(*arguments, plan=DENSE["whole"]).shape == (0, 40)
