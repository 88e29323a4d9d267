"""Lowerings of decode attention and its rotary embedding: Triton on a GPU, aten elsewhere."""

from __future__ import annotations

import functools
from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import lower
from inductor_moe.ops import attention, norm_rope
from inductor_moe.ops.dispatch import kernels_serve


def register() -> None:
    """Register the lowerings of attention_decode, norm_rope and norm_rope_cache."""
    lower(attention.attention_decode, attention_decode_lowering)
    for op in (norm_rope.norm_rope, norm_rope.norm_rope_cache):
        lower(op, functools.partial(norm_rope_lowering, op))


def norm_rope_lowering(op: Any, q: Any, *args: Any) -> Any:
    """One launch where the device runs our kernels, else aten."""
    if not kernels_serve(q):
        return getattr(norm_rope, f"{op._name}_plain")(q, *args)
    return getattr(norm_rope, f"{op._name}_cuda")(q, *args, wrap=compat.wrap_triton)


def attention_decode_lowering(q: Any, k: Any, *args: Any) -> Any:
    """One or two launches where the device runs our kernels, else aten's attention."""
    if not kernels_serve(q):
        return attention.attention_decode_aten(q, k, *args)
    return attention.attention_decode_cuda(
        q, k, *args,
        batch_hint=compat.size_hint(q.shape[0]), length_hint=compat.size_hint(k.shape[2]),
        wrap=compat.wrap_triton,
    )  # fmt: skip
