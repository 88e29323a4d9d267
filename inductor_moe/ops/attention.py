"""`inductor_moe::attention_decode`: one query position against a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_moe.attention_tiles import AttentionTile, choose_attention_tile
from inductor_moe.ops.attention_checks import check_heads, check_mask_rows
from inductor_moe.ops.dispatch import kernels_serve
from inductor_moe.tiles import gpu_of


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument of `attention_decode` that is off."""
    del scale
    check_heads("attention_decode", q, k, v, "B, Hq, D")
    batch, heads, _ = q.shape
    shape = (batch, heads, v.shape[3])
    if gate is not None and (
        gate.shape != shape or gate.dtype != q.dtype or gate.device != q.device
    ):
        raise ValueError(
            f"attention_decode: gate is {gate.dtype} {list(gate.shape)} on {gate.device}; it must "
            f"be {q.dtype} {list(shape)} on {q.device}."
        )
    if mask is None:
        return
    known = mask.dtype == torch.bool or mask.dtype.is_floating_point
    if not known or mask.dim() != 4 or mask.shape[1:] != (1, 1, k.shape[2]):
        raise ValueError(
            f"attention_decode: mask has dtype {mask.dtype} and shape {list(mask.shape)}; it must "
            f"be a bool or float tensor [{batch} or 1, 1, 1, {k.shape[2]}]."
        )
    check_mask_rows("attention_decode", q, mask)


@torch.library.custom_op("inductor_moe::attention_decode", mutates_args=(), device_types="cpu")
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention of one query position, the cache read where it lies: no head is repeated.

    q     [B, Hq, D]         bf16, fp16 or fp32; D at most 256
    k     [B, Hkv, L, D]     like q, any strides; head h of q reads head h // (Hq // Hkv)
    v     [B, Hkv, L, DV]    like q, any strides; DV at most 256
    mask  [B or 1, 1, 1, L]  bool, False hides a position; or float, added to the scaled scores,
                             where -inf hides one
    scale                    of the scores
    gate  [B, Hq, DV]        like q, any strides: the output is multiplied by its sigmoid
    returns [B, Hq, DV] in q's dtype, contiguous; zeros for a row with every position hidden, as
    torch.nn.functional.scaled_dot_product_attention on a CPU. On a GPU hidden positions are not
    read: they may hold NaN
    Source: Dao et al., Flash-Decoding, 2023; Milakov and Gimelshein, arXiv:1805.02867.
    """
    check_attention(q, k, v, mask, scale, gate)
    return attention_decode_aten(q, k, v, mask, scale, gate)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, L, D] -> [B, heads, L, D], each head for its neighbours; x itself if it has all."""
    group = heads // x.shape[1]
    if group == 1:
        return x
    repeated = x[:, :, None].expand(-1, -1, group, -1, -1)
    return repeated.reshape(x.shape[0], heads, x.shape[2], x.shape[3])


def attention_decode_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """`attention_decode` in aten alone, traceable. A hidden position must not hold NaN."""
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    if mask is not None:
        mask = mask if mask.dtype in (torch.bool, q.dtype) else mask.float()
    out = torch.nn.functional.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=mask, scale=scale
    )
    out = out.reshape(q.shape[0], q.shape[1], v.shape[3])
    return out if gate is None else out * gate.sigmoid()


@attention_decode.register_fake
def _attention_decode_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    check_attention(q, k, v, *args)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[3]))


def attention_decode_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
    *,
    batch_hint: int | None = None,
    length_hint: int | None = None,
    tile: AttentionTile | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """`attention_decode` as one or two Triton launches; traceable with wrap_triton.

    The hints stand for a symbolic B and L in the choice of the tile; any tile is right for any.
    """
    import triton

    from inductor_moe.kernels.attention import attention_combine_kernel, attention_decode_kernel

    batch, heads, dim = q.shape
    _, kv_heads, length, value_dim = v.shape
    group = heads // kv_heads
    tile = tile or choose_attention_tile(
        batch=batch if batch_hint is None else batch_hint,
        kv_heads=kv_heads,
        group=group,
        length=length if length_hint is None else length_hint,
        dim=max(dim, value_dim),
        itemsize=q.element_size(),
        gpu=gpu_of(q.device.index) if q.device.type == "cuda" else None,
    )
    out = torch.empty((batch, heads, value_dim), dtype=q.dtype, device=q.device)
    if isinstance(batch, int) and batch == 0:
        return out
    splits, partial, maxima, sums = tile.splits, out, q, q
    if splits > 1:
        shape = (batch, heads, splits)
        partial = torch.empty((*shape, value_dim), dtype=torch.float32, device=q.device)
        maxima = torch.empty(shape, dtype=torch.float32, device=q.device)
        sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    gate_strides = (0, 0, 0) if gate is None else gate.stride()
    row_stride = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    wrap(attention_decode_kernel)[(splits, kv_heads * -(-group // tile.block_g), batch)](
        q, k, v, q if mask is None else mask, q if gate is None else gate, partial, maxima, sums,
        length, *q.stride(), *k.stride(), *v.stride(),
        row_stride, 0 if mask is None else mask.stride(3), *gate_strides,
        G=group, D=dim, DV=value_dim, SCALE=scale,
        MASK="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        GATED=gate is not None, SPLITS=splits, BLOCK_G=tile.block_g, BLOCK_L=tile.block_l,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        wrap(attention_combine_kernel)[(batch * heads, -(-value_dim // 64))](
            partial, maxima, sums, q if gate is None else gate, out, heads, *gate_strides,
            DV=value_dim, GATED=gate is not None, SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_DV=64, num_warps=4,
        )  # fmt: skip
    return out


@attention_decode.register_kernel("cuda")
def _attention_decode_on_cuda(q: Tensor, *args: Any) -> Tensor:
    check_attention(q, *args)
    run = attention_decode_cuda if kernels_serve(q) else attention_decode_aten
    return run(q, *args)
