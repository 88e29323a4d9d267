"""A lowering from a plain function, for every op alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inductor_moe import compat


def lower(
    op: Any,
    implementation: Callable[..., Any],
    traceable: Callable[..., bool] = lambda *_: True,
) -> None:
    """Register `implementation`, called with the op's arguments, as the op's lowering.

    The function runs on fake tensors and may launch Triton kernels through
    torch.library.wrap_triton; Inductor then owns the launches, in its Python wrapper and in
    AOTInductor packages alike, so that no package needs Python. Where `traceable`, called with
    the fake arguments, says no, the op stays a call of its eager kernel.
    """

    def lowering(*args: Any, **kwargs: Any) -> Any:
        if not traceable(*compat.fake_arguments()):
            return compat.lower_to_eager_call(op._opoverload, args, kwargs)
        return compat.lower_by_tracing(implementation, args, kwargs)

    lowering.__name__ = f"{op._name}_lowering"
    compat.register_lowering(op._opoverload, lowering)
