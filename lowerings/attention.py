"""Lowerings of attention and its rotary embedding: Triton on a GPU, aten elsewhere."""

from __future__ import annotations

import functools
from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import lower
from inductor_moe.ops import attention, attention_prompt, norm_rope
from inductor_moe.ops.dispatch import kernels_serve


def register() -> None:
    """Register the lowerings of both attentions, norm_rope and norm_rope_cache."""
    lower(attention.attention_decode, attention_decode_lowering)
    lower(attention_prompt.attention_prompt, attention_prompt_lowering)
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


def attention_prompt_lowering(q: Any, *args: Any) -> Any:
    """Two launches where the device runs our kernels, else aten's attention."""
    if not kernels_serve(q, dtypes=attention_prompt.PROMPT_DTYPES):
        return attention_prompt.attention_prompt_aten(q, *args)
    return attention_prompt.attention_prompt_cuda(
        q, *args,
        batch_hint=compat.size_hint(q.shape[0]), queries_hint=compat.size_hint(q.shape[2]),
        wrap=compat.wrap_triton,
    )  # fmt: skip
