"""The expert ops as Triton launches.

Each function runs eagerly and traces: `wrap` receives every kernel before its launch
(`torch.library.wrap_triton` under make_fx), and T may be a SymInt as long as `tokens_hint` names
the number of tokens to choose kernels and tiles for. Any choice is right for any T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from inductor_moe.kernels.moe_decode import moe_down_decode_kernel, moe_up_decode_kernel
from inductor_moe.kernels.moe_grouped import moe_combine_kernel, moe_grouped_gemm_kernel
from inductor_moe.kernels.moe_sort import (
    moe_sort_blocks_kernel,
    moe_sort_by_rank_kernel,
    moe_sort_count_kernel,
    moe_sort_place_kernel,
    moe_sort_scan_kernel,
)
from inductor_moe.tiles import DecodeTile, Experts, GemmTile, Plan, choose_plan, gpu_of

Wrap = Callable[[Any], Any]
Weight = TypeVar("Weight")
# Ranking compares every pair with every other: fastest while that is one short launch.
RANKED_PAIRS = 4096


def _as_is(kernel: Any) -> Any:
    return kernel


@dataclass(frozen=True)
class Activation:
    """The epilogue of an up projection, as the kernels take it."""

    name: str = "identity"
    gate: str = "none"
    alpha: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None

    def constants(self) -> dict[str, Any]:
        return {
            "GATE": self.gate,
            "ACTIVATION": self.name,
            "ALPHA": float(self.alpha),
            "UP_OFFSET": float(self.up_offset),
            "LIMIT": float(self.limit or 0.0),
        }


IDENTITY = Activation()


@dataclass(frozen=True)
class SharedExpert(Generic[Weight]):
    """An expert for every token; inner 0 stands for none.

    gate    [inner, H], contiguous in H; `up` again if not gated
    up      [inner, H]
    down    [H, inner], contiguous in inner
    logits  [T, 1], whose sigmoid scales the output, or None
    """

    gate: Weight
    up: Weight
    down: Weight
    logits: Tensor | None
    inner: int


def moe_experts_cuda(
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
    *,
    tokens_hint: int | None = None,
    plan: Plan | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`moe_experts` on Triton kernels."""
    tokens, top_k = ids.shape
    out_dtype = out_dtype or x.dtype
    if isinstance(tokens, int) and tokens == 0:
        return x.new_zeros(x.shape, dtype=out_dtype)
    plan = plan or _plan(ids, tokens_hint, w_up, w_down, gate != "none")
    epilogue = Activation(activation, gate, alpha, up_offset, limit)
    rows, repeat = _input_rows(x, weights if weights_on_input else None, top_k)
    on_output = None if weights_on_input else weights
    h = torch.empty((tokens * top_k, w_down.shape[2]), dtype=x.dtype, device=x.device)
    if not plan.block_m:
        _up_decode(rows, repeat, w_up, bias_up, ids, h, epilogue, plan.up, wrap)
        return _down_decode(h, w_down, bias_down, ids, on_output, out_dtype, plan.down, wrap)
    routed = _sort(ids, w_up.shape[0], plan.block_m, tokens_hint, wrap)
    routed.gemm(rows, repeat, w_up, bias_up, None, h, epilogue, plan.up, out_sorted=True)
    return routed.down_combine(
        h, w_down, bias_down, on_output, out_dtype, plan.down, sorted_h=True
    )


def moe_up_cuda(
    x: Tensor,
    w_up: Tensor,
    ids: Tensor,
    bias_up: Tensor | None = None,
    input_weights: Tensor | None = None,
    *,
    tokens_hint: int | None = None,
    plan: Plan | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`moe_up` on Triton kernels."""
    tokens, top_k = ids.shape
    size = (tokens * top_k, w_up.shape[1])
    if isinstance(tokens, int) and tokens == 0:
        return x.new_zeros(size)
    plan = plan or _plan(ids, tokens_hint, w_up, w_up.transpose(1, 2), False)
    rows, repeat = _input_rows(x, input_weights, top_k)
    if not plan.block_m:
        out = torch.empty(size, dtype=x.dtype, device=x.device)
        _up_decode(rows, repeat, w_up, bias_up, ids, out, IDENTITY, plan.up, wrap)
        return out
    # No block covers the rows of skipped pairs.
    out = torch.zeros(size, dtype=x.dtype, device=x.device)
    routed = _sort(ids, w_up.shape[0], plan.block_m, tokens_hint, wrap)
    routed.gemm(rows, repeat, w_up, bias_up, None, out, IDENTITY, plan.up, out_sorted=False)
    return out


def moe_down_combine_cuda(
    h: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor | None = None,
    bias_down: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    tokens_hint: int | None = None,
    plan: Plan | None = None,
    wrap: Wrap = _as_is,
) -> Tensor:
    """`moe_down_combine` on Triton kernels."""
    tokens = ids.shape[0]
    out_dtype = out_dtype or h.dtype
    if isinstance(tokens, int) and tokens == 0:
        return h.new_zeros((tokens, w_down.shape[1]), dtype=out_dtype)
    plan = plan or _plan(ids, tokens_hint, w_down.transpose(1, 2), w_down, False)
    h = _inner_contiguous(h)
    if not plan.block_m:
        return _down_decode(h, w_down, bias_down, ids, weights, out_dtype, plan.down, wrap)
    routed = _sort(ids, w_down.shape[0], plan.block_m, tokens_hint, wrap)
    return routed.down_combine(h, w_down, bias_down, weights, out_dtype, plan.down, sorted_h=False)


def _plan(ids: Tensor, tokens_hint: int | None, w_up: Tensor, w_down: Tensor, gated: bool) -> Plan:
    layer = Experts(
        top_k=int(ids.shape[1]),
        experts=int(w_up.shape[0]),
        hidden=int(w_up.shape[2]),
        inner=int(w_down.shape[2]),
        gated=gated,
        itemsize=w_up.element_size(),
        up_inner=_inner_dim(w_up),
        down_inner=_inner_dim(w_down),
    )
    return choose_plan(layer, _tokens(ids, tokens_hint), gpu_of(ids.device.index))


def _tokens(ids: Tensor, tokens_hint: int | None) -> int:
    if tokens_hint is not None:
        return tokens_hint
    tokens = ids.shape[0]
    if not isinstance(tokens, int):
        raise ValueError("a symbolic number of tokens needs tokens_hint, a Python int")
    return tokens


def _inner_dim(weight: Tensor) -> str:
    """Which of a weight's dims [E, n, k] is contiguous; any other layout is correct but slow."""
    if weight.stride(2) == 1:
        return "k"
    return "n" if weight.stride(1) == 1 else "strided"


def _rows_aligned(*tensors: Tensor) -> bool:
    """Whether every row starts where a load of 16 bytes may; those that allocate start there."""
    return all(
        isinstance(elements, int) and elements * tensor.itemsize % 16 == 0
        for tensor in tensors
        for elements in (tensor.storage_offset(), *tensor.stride()[:-1])
    )


def _inner_contiguous(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _input_rows(x: Tensor, weights: Tensor | None, top_k: int) -> tuple[Tensor, int]:
    """Rows of the up GEMM, and how many pairs share one."""
    if weights is None:
        return _inner_contiguous(x), top_k
    scaled = (x[:, None, :] * weights[:, :, None]).to(x.dtype)
    return scaled.reshape(x.shape[0] * top_k, x.shape[1]), 1


def _cdiv(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _bias_args(bias: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int, int]:
    return (stand_in, 0, 0) if bias is None else (bias, bias.stride(0), bias.stride(1))


def _up_decode(
    rows: Tensor,
    repeat: int,
    w_up: Tensor,
    bias_up: Tensor | None,
    ids: Tensor,
    h: Tensor,
    epilogue: Activation,
    tile: DecodeTile | GemmTile,
    wrap: Wrap,
    shared: SharedExpert[Tensor] | None = None,
) -> None:
    assert isinstance(tile, DecodeTile)
    tokens, top_k = ids.shape
    gated = epilogue.gate != "none"
    inner = w_up.shape[1] // (2 if gated else 1)
    columns = tile.block_n // 2 if gated else tile.block_n
    bias, stride_be, stride_bn = _bias_args(bias_up, w_up)
    own = shared or SharedExpert(w_up, w_up, w_up, None, 0)
    slots = _cdiv(own.inner, inner)
    wrap(moe_up_decode_kernel)[(tokens * (top_k + slots), _cdiv(inner, columns))](
        rows, w_up, bias, ids, own.gate, own.up, h,
        repeat, w_up.shape[0], w_up.shape[2], inner, own.inner,
        rows.stride(0), *w_up.stride(), stride_be, stride_bn, *ids.stride(),
        own.gate.stride(0), own.up.stride(0),
        TOP_K=top_k, SHARED=slots, **epilogue.constants(),
        HAS_BIAS=bias_up is not None, W_INNER=_inner_dim(w_up),
        ALIGNED=_rows_aligned(w_up, own.gate, own.up),
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, UNROLL=tile.unroll,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def _down_decode(
    h: Tensor,
    w_down: Tensor,
    bias_down: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    out_dtype: torch.dtype,
    tile: DecodeTile | GemmTile,
    wrap: Wrap,
    shared: SharedExpert[Tensor] | None = None,
) -> Tensor:
    assert isinstance(tile, DecodeTile)
    tokens, top_k = ids.shape
    split = min(tile.split, top_k)
    hidden = w_down.shape[1]
    dtype = out_dtype if split == 1 else torch.float32
    y = torch.empty((tokens * split, hidden), dtype=dtype, device=h.device)
    bias, stride_be, stride_bh = _bias_args(bias_down, w_down)
    scale, stride_st, stride_sk = _bias_args(weights, w_down)
    own = shared or SharedExpert(w_down, w_down, w_down, None, 0)
    logits, stride_lt, _ = _bias_args(own.logits, w_down)
    # h is [T * K, I], or [T, K * I + the shared inner].
    pair = (top_k * h.stride(0), h.stride(0)) if shared is None else (h.stride(0), w_down.shape[2])
    wrap(moe_down_decode_kernel)[(tokens * split, _cdiv(hidden, tile.block_n))](
        h, w_down, bias, ids, scale, own.down, logits, y,
        w_down.shape[0], hidden, w_down.shape[2], own.inner,
        *pair, *w_down.stride(), stride_be, stride_bh, *ids.stride(), stride_st, stride_sk,
        own.down.stride(0), stride_lt,
        TOP_K=top_k, SHARED=own.inner > 0, HAS_LOGITS=own.logits is not None, SPLIT=split,
        HAS_WEIGHTS=weights is not None, HAS_BIAS=bias_down is not None,
        W_INNER=_inner_dim(w_down), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, UNROLL=tile.unroll,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return y if split == 1 else _combine(y, ids, split, False, w_down.shape[0], out_dtype, wrap)


def _combine(
    rows: Tensor,
    ids: Tensor,
    slots: int,
    by_ids: bool,
    experts: int,
    out_dtype: torch.dtype,
    wrap: Wrap,
) -> Tensor:
    tokens, hidden = ids.shape[0], rows.shape[1]
    y = torch.empty((tokens, hidden), dtype=out_dtype, device=rows.device)
    block = min(1024, _power_of_two(hidden))
    wrap(moe_combine_kernel)[(tokens, _cdiv(hidden, block))](
        rows, ids, y, experts, hidden, *ids.stride(),
        SLOTS=slots, HAS_IDS=by_ids, BLOCK=block, UNROLL=min(slots, 8),
        num_warps=4 if block >= 512 else 1, num_stages=1,
    )  # fmt: skip
    return y


def _sort(ids: Tensor, experts: int, block_m: int, tokens_hint: int | None, wrap: Wrap) -> _Routed:
    """Order pairs by expert and cut the order into blocks; see `kernels.moe_sort`."""
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    hint = _tokens(ids, tokens_hint) * top_k
    capacity = _cdiv(pairs, block_m) + torch.sym_min(experts, pairs)
    order = torch.empty((pairs,), dtype=torch.int32, device=ids.device)
    blocks = torch.empty((3 * capacity,), dtype=torch.int32, device=ids.device)
    bins = max(32, _power_of_two(experts))
    sizes = {"TOP_K": top_k, "BINS": bins}
    routed = _Routed(ids, order, blocks, capacity, block_m, wrap)
    if hint <= RANKED_PAIRS:
        wrap(moe_sort_by_rank_kernel)[(_cdiv(pairs, 16) + 1,)](
            ids, order, blocks, pairs, experts, capacity, *ids.stride(),
            **sizes, BLOCK_M=block_m, BLOCK=16, CHUNK=256, num_warps=4, num_stages=1,
        )  # fmt: skip
        return routed
    chunk = 128
    chunks = _cdiv(pairs, chunk)
    counts = torch.empty((chunks * bins,), dtype=torch.int32, device=ids.device)
    base = torch.empty((chunks * bins,), dtype=torch.int32, device=ids.device)
    totals = torch.empty((2 * bins,), dtype=torch.int32, device=ids.device)
    wrap(moe_sort_count_kernel)[(chunks,)](
        ids, counts, pairs, experts, *ids.stride(), **sizes, CHUNK=chunk, num_warps=4, num_stages=1
    )
    wrap(moe_sort_scan_kernel)[(bins // 8,)](
        counts, base, totals, chunks, BINS=bins, COLUMNS=8, ROWS=256, num_warps=4, num_stages=1
    )
    wrap(moe_sort_blocks_kernel)[(1,)](
        totals, blocks, capacity, BINS=bins, BLOCK_M=block_m, num_warps=4, num_stages=1
    )
    wrap(moe_sort_place_kernel)[(chunks,)](
        ids, base, totals, order, pairs, experts, *ids.stride(),
        **sizes, CHUNK=chunk, num_warps=4, num_stages=1,
    )  # fmt: skip
    return routed


@dataclass(frozen=True)
class _Routed:
    """Pairs sorted by expert, and the grouped GEMMs over them."""

    ids: Tensor
    order: Tensor
    blocks: Tensor
    capacity: int
    block_m: int
    wrap: Wrap

    def gemm(
        self,
        a: Tensor,
        repeat: int,
        w: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        out: Tensor,
        epilogue: Activation,
        tile: DecodeTile | GemmTile,
        *,
        out_sorted: bool,
        a_sorted: bool = False,
    ) -> None:
        assert isinstance(tile, GemmTile)
        bias_arg, stride_be, stride_bn = _bias_args(bias, w)
        scale, stride_st, stride_sk = _bias_args(weights, w)
        columns = tile.block_n if epilogue.gate == "none" else tile.block_n // 2
        capacity = self.capacity
        k_dim = w.shape[2]
        self.wrap(moe_grouped_gemm_kernel)[(capacity * _cdiv(out.shape[1], columns),)](
            a, w, bias_arg, scale, self.order, self.blocks, out,
            repeat, capacity, tile.group_m, k_dim, out.shape[1],
            a.stride(0), *w.stride(), stride_be, stride_bn, stride_st, stride_sk,
            TOP_K=self.ids.shape[1], A_SORTED=a_sorted, OUT_SORTED=out_sorted,
            **epilogue.constants(), HAS_BIAS=bias is not None, HAS_WEIGHTS=weights is not None,
            W_INNER=_inner_dim(w),
            EVEN_N=out.shape[1] % columns == 0, EVEN_K=k_dim % tile.block_k == 0,
            BLOCK_M=self.block_m, TAIL_M=self.block_m // 2 if tile.tail else self.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def down_combine(
        self,
        h: Tensor,
        w_down: Tensor,
        bias_down: Tensor | None,
        weights: Tensor | None,
        out_dtype: torch.dtype,
        tile: DecodeTile | GemmTile,
        *,
        sorted_h: bool,
    ) -> Tensor:
        experts, hidden, _ = w_down.shape
        rows = torch.empty((self.order.shape[0], hidden), dtype=h.dtype, device=h.device)
        self.gemm(
            h, 1, w_down, bias_down, weights, rows, IDENTITY, tile,
            out_sorted=False, a_sorted=sorted_h,
        )  # fmt: skip
        return _combine(rows, self.ids, self.ids.shape[1], True, experts, out_dtype, self.wrap)
