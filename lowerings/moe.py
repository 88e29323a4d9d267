"""Lowerings of the expert ops: our Triton kernels on a GPU, Inductor's own code elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import DECODE_TOKENS, by_tokens, lower
from inductor_moe.ops import moe, moe_cpu, moe_route, moe_router, shared
from inductor_moe.ops.dispatch import KERNEL_DTYPES, PACKED_KERNEL_DTYPES, kernels_serve


def register() -> None:
    """Register the lowerings of the expert ops on unpacked weights and of moe_route."""
    lower(moe.moe_experts, _lowering("moe_experts_cuda", moe_cpu.moe_experts_cpu, 3))
    lower(moe.moe_up, _lowering("moe_up_cuda", moe_cpu.moe_up_cpu, 2))
    lower(
        moe.moe_down_combine, _lowering("moe_down_combine_cuda", moe_cpu.moe_down_combine_cpu, 2)
    )
    lower(moe_route.moe_route, moe_route_lowering)
    lower(moe_router.moe_router, moe_router_lowering)
    lower(shared.moe_experts_shared, moe_experts_shared_lowering)


def moe_route_lowering(logits: Any, *args: Any, **weights: Any) -> Any:
    """One launch where the device runs our kernels, else softmax and top-k in aten."""
    if not kernels_serve(logits):
        return moe_route.moe_route_cpu(logits, *args, **weights)
    return moe_route.moe_route_cuda(logits, *args, **weights, wrap=compat.wrap_triton)


def moe_router_lowering(x: Any, *args: Any, **own: Any) -> Any:
    """One launch where the device runs our kernels, else the norm, matmuls and top-k in aten."""
    if not kernels_serve(x):
        return moe_router.moe_router_plain(x, *args, **own)
    settled = compat.settled(0, 5, 6)
    return moe_router.moe_router_cuda(x, *args, **own, settled=settled, wrap=compat.wrap_triton)


def moe_experts_shared_lowering(x: Any, ids: Any, *args: Any) -> Any:
    """The Triton implementation where the device and dtype run our kernels, else the aten one."""
    packed = args[2][1] is not None
    if not kernels_serve(x, dtypes=PACKED_KERNEL_DTYPES if packed else KERNEL_DTYPES):
        return shared.moe_experts_shared_plain(x, ids, *args)
    from inductor_moe.ops import shared_cuda

    launch = functools.partial(
        shared_cuda.moe_experts_shared_cuda, settled=packed and compat.settled(0, 4, 5),
        wrap=compat.wrap_triton,
    )  # fmt: skip
    return by_tokens(launch, (x, ids, *args), ids.shape[0], DECODE_TOKENS)


def _lowering(launcher: str, aten: Callable[..., Any], ids: int) -> Callable[..., Any]:
    """The Triton implementation where the device runs our kernels, else the aten one.

    launcher  its name in ops.moe_cuda, which cannot be imported without Triton
    ids       the position of the expert numbers [T, K] among the op's arguments
    """

    def implementation(*args: Any) -> Any:
        if not kernels_serve(args[0]):
            return aten(*args)
        from inductor_moe.ops import moe_cuda

        launch = functools.partial(getattr(moe_cuda, launcher), wrap=compat.wrap_triton)
        return by_tokens(launch, args, args[ids].shape[0], DECODE_TOKENS)

    return implementation
