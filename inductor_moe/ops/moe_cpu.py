"""The expert ops in aten alone, for Inductor's C++ backend: no data-dependent Python.

Two forms. With few pairs (a static count), for dtypes `_grouped_mm` does not trace with, and where
generated code cannot call it, each pair multiplies its gathered expert; Inductor fuses the gather
into the reduction and copies no weight. Otherwise pairs are sorted by expert and two grouped GEMMs
run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from inductor_moe import compat
from inductor_moe.reference.moe import gated_activation

FEW_PAIRS = 16


def moe_experts_cpu(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    activation: str = "silu",
    gate: str = "chunked",
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    weights_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`moe_experts`, traceable by make_fx under fake tensors and by Dynamo; T may be symbolic."""
    on_input, on_output = (weights, None) if weights_on_input else (None, weights)
    by_sorting = _by_sorting(x, ids, w_up, w_down)
    routing = _route(ids, w_up.shape[0], by_sorting)
    rows = _input_rows(x, ids, on_input)
    up = _project(rows, w_up, bias_up, routing)
    h = gated_activation(up, activation, gate, alpha, up_offset, limit)
    return _combine(_project(h, w_down, bias_down, routing), on_output, ids, routing).to(
        out_dtype or x.dtype
    )


def moe_up_cpu(
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None = None,
    input_weights: Tensor | None = None,
) -> Tensor:
    """`moe_up`, traceable like `moe_experts_cpu`."""
    routing = _route(ids, w_up.shape[0], _by_sorting(x, ids, w_up))
    up = _project(_input_rows(x, ids, input_weights), w_up, bias_up, routing)
    return torch.where(routing.valid[:, None], up, 0.0)


def moe_down_combine_cpu(
    h: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor | None = None,
    bias_down: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`moe_down_combine`, traceable like `moe_experts_cpu`."""
    routing = _route(ids, w_down.shape[0], _by_sorting(h, ids, w_down))
    y = _project(h, w_down, bias_down, routing)
    return _combine(y, weights, ids, routing).to(out_dtype or h.dtype)


class _Routing:
    """Pairs in pair order and, when sorted, the permutation and where each expert's rows end."""

    def __init__(self, expert: Tensor, valid: Tensor) -> None:
        self.expert = expert  # [S] int64, clamped into [0, E)
        self.valid = valid  # [S] bool
        self.order: Tensor | None = None  # [S] pair at each sorted position
        self.place: Tensor | None = None  # [S] sorted position of each pair
        self.ends: Tensor | None = None  # [E] int32


def _route(ids: Tensor, experts: int, by_sorting: bool) -> _Routing:
    flat = ids.reshape(-1).to(torch.int64)
    valid = (flat >= 0) & (flat < experts)
    routing = _Routing(flat.clamp(0, experts - 1), valid)
    if by_sorting:
        keys = torch.where(valid, flat, experts)
        routing.order = torch.argsort(keys, stable=True)
        iota = torch.arange(keys.shape[0], device=keys.device)
        routing.place = torch.empty_like(iota).index_put((routing.order,), iota)
        ones = torch.ones_like(keys, dtype=torch.int32)
        zeros = torch.zeros(experts + 1, dtype=torch.int32, device=keys.device)
        counts = zeros.scatter_add(0, keys, ones)
        routing.ends = counts[:experts].cumsum(0, dtype=torch.int32)
    return routing


def _by_sorting(rows: Tensor, ids: Tensor, *projections: Tensor) -> bool:
    pairs = ids.shape[0] * ids.shape[1]
    if isinstance(pairs, int) and pairs <= FEW_PAIRS:
        return False
    if rows.device.type != "cpu":
        return False
    if rows.dtype != torch.bfloat16 or not all(_grouped_mm_takes(w) for w in projections):
        return False
    return compat.calls_grouped_mm()


def _grouped_mm_takes(weight: Tensor) -> bool:
    """Whether both operands of `_grouped_mm` for this weight have 16-byte aligned rows."""
    _, rows, cols = weight.shape
    _, row_stride, col_stride = weight.stride()
    if not all(isinstance(n, int) for n in (rows, cols, row_stride, col_stride)):
        return False
    if col_stride == 1 and row_stride >= cols:
        aligned = row_stride % 8 == 0
    else:
        aligned = row_stride == 1 and col_stride >= rows and col_stride % 8 == 0
    return aligned and rows % 8 == 0 and cols % 8 == 0


def _input_rows(x: Tensor, ids: Tensor, input_weights: Tensor | None) -> Tensor:
    tokens, top_k = ids.shape
    rows = x[:, None, :].expand(tokens, top_k, x.shape[1])
    if input_weights is not None:
        rows = (rows * input_weights[:, :, None]).to(x.dtype)
    return rows.reshape(tokens * top_k, x.shape[1])


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, routing: _Routing) -> Tensor:
    """[S, in] -> [S, out], each pair by its own expert; rows of skipped pairs are arbitrary."""
    if routing.order is None:
        wide = torch.promote_types(rows.dtype, torch.float32)
        product = weight[routing.expert].to(wide) * rows[:, None, :].to(wide)
        out = product.sum(-1)
        if bias is not None:
            out = out + bias[routing.expert]
        return out.to(rows.dtype)
    grouped = F.grouped_mm(rows[routing.order], weight.transpose(1, 2), offs=routing.ends)
    out = grouped[routing.place]
    if bias is not None:
        out = (out.float() + bias[routing.expert]).to(rows.dtype)
    return out


def _combine(y: Tensor, weights: Tensor | None, ids: Tensor, routing: _Routing) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    value = y.to(wide)
    if weights is not None:
        value = value * weights.reshape(-1, 1)
    value = torch.where(routing.valid[:, None], value, 0.0)
    return value.view(ids.shape[0], ids.shape[1], y.shape[1]).sum(1)
