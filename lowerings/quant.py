"""Lowerings of the ops on packed weights: Triton kernels on a GPU, aten elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import DECODE_TOKENS, by_tokens, lower
from inductor_moe.ops import quant
from inductor_moe.ops.dispatch import PACKED_KERNEL_DTYPES, kernels_serve
from inductor_moe.reference.quant import dequantize_reference


def register() -> None:
    """Register the lowerings of dequantize, quantized_linear and the quantised expert ops."""
    lower(quant.dequantize, dequantize_reference)
    for op, plain, tokens, few, weights in (
        (quant.quantized_linear, quant.quantized_linear_plain, 0, 0, (1, 2, 3)),
        (
            quant.moe_experts_quantized, quant.moe_experts_quantized_plain, 10, DECODE_TOKENS,
            (1, 2, 3, 5, 6, 7),
        ),
        (quant.moe_up_quantized, quant.moe_up_quantized_plain, 5, DECODE_TOKENS, ()),
        (
            quant.moe_down_combine_quantized, quant.moe_down_combine_quantized_plain, 5,
            DECODE_TOKENS, (),
        ),
    ):  # fmt: skip
        launcher = f"{plain.__name__.removesuffix('_plain')}_cuda"
        lower(op, _lowering(launcher, plain, tokens, few, weights))


def _lowering(
    launcher: str, plain: Callable[..., Any], tokens: int, few: int, weights: tuple[int, ...]
) -> Callable[..., Any]:
    """The Triton implementation where the device and dtype run our kernels, else the aten one.

    launcher  its name in ops.quant_cuda, which cannot be imported without Triton
    tokens    the position of the argument whose first dim is the number of tokens
    few       the most tokens that the kernels for few of them are for; a linear layer's are for
              one row, and a size that a graph leaves open is at least 2
    weights   the positions of the weights that its kernels may ask for before they wait
    """

    def implementation(*args: Any) -> Any:
        if not kernels_serve(args[0], dtypes=PACKED_KERNEL_DTYPES):
            return plain(*args)
        from inductor_moe.ops import quant_cuda

        options = {"settled": compat.settled(0, *weights)} if weights else {}
        launch = functools.partial(
            getattr(quant_cuda, launcher), **options, wrap=compat.wrap_triton
        )
        return by_tokens(launch, args, args[tokens].shape[0], few)

    return implementation
