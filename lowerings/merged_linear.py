"""The lowering of merged_linear: a Triton kernel on a GPU, aten elsewhere."""

from __future__ import annotations

from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import lower
from inductor_moe.ops import merged_linear as ops
from inductor_moe.ops.dispatch import PACKED_KERNEL_DTYPES, kernels_serve


def register() -> None:
    """Register the lowering."""
    lower(ops.merged_linear, merged_linear_lowering)


def merged_linear_lowering(x: Any, *args: Any) -> Any:
    """The implementation that is traced into the graph."""
    if not kernels_serve(x, dtypes=PACKED_KERNEL_DTYPES):
        return ops.merged_linear_plain(x, *args)
    from inductor_moe.ops.merged_linear_cuda import merged_linear_cuda

    return merged_linear_cuda(x, *args, wrap=compat.wrap_triton)
