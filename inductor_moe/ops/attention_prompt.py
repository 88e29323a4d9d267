"""`inductor_moe::attention_prompt`: many query positions under a mask that hides much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_moe.attention_tiles import PromptTile, choose_prompt_tile
from inductor_moe.ops.attention import repeat_heads
from inductor_moe.ops.attention_checks import check_heads, check_mask_rows
from inductor_moe.ops.dispatch import kernels_serve
from inductor_moe.tiles import gpu_of

PROMPT_DTYPES = (torch.bfloat16, torch.float16)  # in fp32 the tensor cores would round


def check_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> None:
    """Raise ValueError naming the first argument of `attention_prompt` that is off."""
    op = "attention_prompt"
    check_heads(op, q, k, v, "B, Hq, T, D")
    queries, length = q.shape[2], k.shape[2]
    shapes = ((1, queries, length), (1, 1, length))
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] not in shapes:
        raise ValueError(
            f"{op}: mask has dtype {mask.dtype} and shape {list(mask.shape)}; it must be a bool "
            f"tensor [{q.shape[0]} or 1, 1, {queries} or 1, {length}]."
        )
    check_mask_rows(op, q, mask)
    if not scale > 0:
        raise ValueError(f"{op}: scale is {scale}; it must be positive.")


@torch.library.custom_op("inductor_moe::attention_prompt", mutates_args=(), device_types="cpu")
def attention_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of T query positions: blocks that the mask hides are not read or computed.

    q     [B, Hq, T, D]                bf16 or fp16 for the kernels, else any float; D at most 256
    k     [B, Hkv, L, D]               like q, any strides; head h of q reads head h // (Hq // Hkv)
    v     [B, Hkv, L, DV]              like q, any strides; DV at most 256
    mask  [B or 1, 1, T or 1, L]       bool, any strides: False hides a position
    scale                              of the scores, positive
    returns [B, Hq, T, DV] in q's dtype, a view of a contiguous [B, T, Hq, DV]; zeros for a query
    from which every position is hidden. As of PyTorch's attention, a position that some query
    does not see may not hold NaN or infinity.
    Source: Dao, FlashAttention-2, arXiv:2307.08691.
    """
    check_prompt(q, k, v, mask, scale)
    return attention_prompt_aten(q, k, v, mask, scale)


def attention_prompt_aten(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`attention_prompt` in aten alone, traceable."""
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attention_prompt.register_fake
def _attention_prompt_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    check_prompt(q, k, v, *args)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def attention_prompt_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    *,
    batch_hint: int | None = None,
    queries_hint: int | None = None,
    tile: PromptTile | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """`attention_prompt` as two Triton launches; traceable with wrap_triton.

    The hints stand for a symbolic B and T in the choice of the tile; any tile is right for any.
    """
    import triton

    from inductor_moe.kernels.attention_prompt import (
        WORD,
        attention_mask_kernel,
        attention_prompt_kernel,
    )

    batch, heads, queries, dim = q.shape
    _, kv_heads, length, value_dim = v.shape
    tile = tile or choose_prompt_tile(
        programs=heads * (batch if batch_hint is None else batch_hint),
        queries=queries if queries_hint is None else queries_hint,
        dim=max(dim, value_dim),
        gpu=gpu_of(q.device.index) if q.device.type == "cuda" else None,
    )
    out = torch.empty((batch, queries, heads, value_dim), dtype=q.dtype, device=q.device)
    if any(isinstance(size, int) and size == 0 for size in (batch, queries, length)):
        return out.zero_().transpose(1, 2)
    rows, width = -(-queries // tile.block_m), -(-length // WORD.value)
    words = torch.empty((mask.shape[0], queries, width), dtype=torch.int64, device=q.device)
    blocks = torch.empty((mask.shape[0], rows, width), dtype=torch.int8, device=q.device)
    wrap(attention_mask_kernel)[(-(-width // 8), rows, mask.shape[0])](
        mask, words, blocks, queries, length,
        mask.stride(0), 0 if mask.shape[2] == 1 else mask.stride(2), mask.stride(3),
        BLOCK_M=tile.block_m, ROWS=16, COUNT=8, num_warps=8,
    )  # fmt: skip
    wrap(attention_prompt_kernel)[(heads, rows, batch)](
        q, k, v, words, blocks, out, queries, length,
        *q.stride(), *k.stride(), *v.stride(),
        G=heads // kv_heads, D=dim, DV=value_dim, SCALE=scale, SHARED=mask.shape[0] == 1,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out.transpose(1, 2)


@attention_prompt.register_kernel("cuda")
def _attention_prompt_on_cuda(q: Tensor, *args: Any) -> Tensor:
    check_prompt(q, *args)
    kernels = kernels_serve(q, dtypes=PROMPT_DTYPES)
    return (attention_prompt_cuda if kernels else attention_prompt_aten)(q, *args)
