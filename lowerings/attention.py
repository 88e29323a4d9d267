"""Lowering of decode attention: our Triton kernels on a GPU, aten's attention elsewhere."""

from __future__ import annotations

from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import lower
from inductor_moe.ops import attention


def register() -> None:
    """Register the lowering of attention_decode."""
    lower(attention.attention_decode, attention_decode_lowering)


def attention_decode_lowering(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """One or two launches where the device runs our kernels, else aten's attention."""
    if q.dtype not in attention.KERNEL_DTYPES or not compat.runs_triton_kernels(q.device):
        return attention.attention_decode_aten(q, k, v, mask, scale)
    return attention.attention_decode_cuda(
        q, k, v, mask, scale,
        batch_hint=compat.size_hint(q.shape[0]), length_hint=compat.size_hint(k.shape[2]),
        wrap=compat.wrap_triton,
    )  # fmt: skip
