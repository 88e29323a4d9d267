"""The delta rule on a GPU: which kernels a call takes."""

from __future__ import annotations

import torch.nn.functional as F
import triton
from torch import Tensor

from inductor_moe.kernels.delta_chunk import delta_rule_chunk
from inductor_moe.kernels.delta_chunk_channel import delta_rule_chunk_channel
from inductor_moe.kernels.delta_recurrent import delta_rule_recurrent

RECURRENT_TOKENS = 8
# Head dims at which the chunked kernels have been right on a GPU. Other rows, which keep the
# serial kernel's loads from being vectors, were wrong on an H100 under Triton 3.6.
CHUNK_WIDTHS = (64, 128, 256)
CHANNEL_CHUNK_WIDTHS = (128,)
# Triton's alignment hint: a stride it cannot assume a multiple of this ends vector loads
ALIGNED = 16


def has_chunks(q: Tensor, v: Tensor, g: Tensor | None) -> bool:
    """Whether the chunked kernels serve these head dims."""
    widths = CHANNEL_CHUNK_WIDTHS if g is not None and g.dim() == 4 else CHUNK_WIDTHS
    return q.shape[3] in widths and v.shape[3] in widths


def chunk_width(width: int) -> int:
    return max(CHUNK_WIDTHS[0], triton.next_power_of_2(width))


def vector_loadable(x: Tensor) -> Tensor:
    """x, or a copy whose rows start at vector boundaries."""
    offset = x.storage_offset()
    steps = [step for step in x.stride()[:-1] if isinstance(step, int)]
    unaligned = isinstance(offset, int) and offset % ALIGNED
    if x.stride(-1) == 1 and not unaligned and all(step % ALIGNED == 0 for step in steps):
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def delta_rule_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """By chunks, head dims filled with zeros up to a power of two from 64 on.

    The serial kernel gave wrong results on an H100 (Triton 3.6) where a row's width or alignment
    kept its loads from being vectors, so neither ever reaches it.
    """
    key_width, value_width = q.shape[3], v.shape[3]
    more_k = chunk_width(key_width) - key_width
    more_v = chunk_width(value_width) - value_width
    per_channel = g is not None and g.dim() == 4
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
    if more_k and g is not None and per_channel:
        g = F.pad(g, (0, more_k))
    if more_v:
        v = F.pad(v, (0, more_v))
    if state is not None and (more_k or more_v):
        state = F.pad(state, (0, more_v, 0, more_k))
    q, k, v = vector_loadable(q), vector_loadable(k), vector_loadable(v)
    rest = (beta, state, scale, l2norm_eps, cu_seqlens)
    if g is not None and per_channel:
        out, final = delta_rule_chunk_channel(q, k, v, vector_loadable(g), *rest)
    else:
        out, final = delta_rule_chunk(q, k, v, g, *rest)
    if more_v:
        out = out[..., :value_width].contiguous()
    if more_k or more_v:
        final = final[:, :, :key_width, :value_width].contiguous()
    return out, final


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: Tensor | None = None,
    tokens_hint: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`inductor_moe::delta_rule` by launches make_fx can trace.

    Every branch serves every length; tokens_hint, a typical length of one sequence, chooses the
    one to trace where T is symbolic. Without it a symbolic T takes the chunked kernels. Head dims
    other than CHUNK_WIDTHS (CHANNEL_CHUNK_WIDTHS for a decay per channel) go token by token.
    """
    tokens = q.shape[1]
    if tokens_hint is None and isinstance(tokens, int):
        sequences = 1 if cu_seqlens is None else max(1, cu_seqlens.shape[0] - 1)
        tokens_hint = (tokens + sequences - 1) // sequences
    arguments = (q, k, v, g, beta, state, scale, l2norm_eps, cu_seqlens)
    few = tokens_hint is not None and tokens_hint <= RECURRENT_TOKENS
    if few or not has_chunks(q, v, g):
        return delta_rule_recurrent(*arguments)
    return delta_rule_padded(*arguments)
