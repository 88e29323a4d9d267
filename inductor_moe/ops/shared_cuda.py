"""`moe_experts_shared` as Triton launches; see `inductor_moe.ops.moe_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops import moe_cuda, quant_cuda
from inductor_moe.ops.moe_cuda import (
    Activation,
    SharedExpert,
    Wrap,
    _as_is,
    _cdiv,
    _inner_contiguous,
)
from inductor_moe.ops.shared import read_projections
from inductor_moe.quant_tiles import QuantizedPlan
from inductor_moe.reference.moe import shared_expert_reference
from inductor_moe.tiles import Plan


def moe_experts_shared_cuda(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    routed: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    group_size: int,
    activation: str = "silu",
    gate: str = "chunked",
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    tokens_hint: int | None = None,
    plan: Plan | QuantizedPlan | None = None,
    settled: bool = False,
    wrap: Wrap = _as_is,
) -> Tensor:
    """Two launches where the routed experts' plan has the decode kernels, else GEMMs apart.

    settled: of packed weights, see `quant_cuda._Weight`.
    """
    tokens, top_k = ids.shape
    out_dtype = out_dtype or x.dtype
    if isinstance(tokens, int) and tokens == 0:
        return x.new_zeros(x.shape, dtype=out_dtype)
    up, down, own_gate, own_up, own_down = read_projections(routed, shared, gate)
    packed, hidden = up.scales is not None, x.shape[1]
    inner = up.values.shape[1] // (1 if gate == "none" else 2)
    epilogue = (activation, gate, alpha, up_offset, limit)
    launch: Any = quant_cuda if packed else moe_cuda
    options: Any = {"tokens_hint": tokens_hint, "wrap": wrap}

    def weight(projection: Any, inputs: int) -> Any:
        if not packed:
            return projection.values
        return launch._Weight.of(*projection, group_size, inputs, settled)

    w_up, w_down = weight(up, hidden), weight(down, inner)
    if plan is None:
        if packed:
            plan = quant_cuda._plan(ids, tokens_hint, w_up, inner, gate != "none", False)
        else:
            plan = moe_cuda._plan(ids, tokens_hint, w_up, w_down, gate != "none")
    own = (own_gate or own_up, own_up, own_down)
    if not plan.block_m and (packed or all(p.values.stride(-1) == 1 for p in (up, down, *own))):
        own_inner = int(own_up.values.shape[0])
        v_gate, v_up, v_down = map(weight, own, (hidden, hidden, own_inner))
        expert = SharedExpert(v_gate, v_up, v_down, logits, own_inner)
        h = torch.empty((tokens, top_k * inner + own_inner), dtype=x.dtype, device=x.device)
        repeat = top_k + _cdiv(own_inner, inner)
        launch._up_decode(
            _inner_contiguous(x), repeat, w_up, None, ids, h, Activation(*epilogue), plan.up,
            wrap, expert,
        )  # fmt: skip
        out: Tensor = launch._down_decode(
            h, w_down, None, ids, weights, out_dtype, plan.down, wrap, expert
        )
        return out

    def linear(rows: Tensor, projection: Any) -> Tensor:
        if not packed:
            return F.linear(rows, projection.values)
        out: Tensor = launch.quantized_linear_cuda(rows, *projection, None, group_size, **options)
        return out

    rest: Any = (ids, weights, None, None, *epilogue, False, torch.float32)
    if packed:
        buffers: Any = (*up, group_size, *down, group_size, inner)
        y = quant_cuda.moe_experts_quantized_cuda(x, *buffers, *rest, **options)
    else:
        y = moe_cuda.moe_experts_cuda(x, up.values, down.values, *rest, **options)
    other = shared_expert_reference(
        x, own_gate, own_up, own_down, logits, activation, alpha, up_offset, limit, linear
    )
    return (y + other).to(out_dtype)
