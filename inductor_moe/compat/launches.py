"""Inductor's analysis of what a Triton launch writes, done once for launches that are alike.

Inductor generates and analyses the Triton IR of every launch in a graph, twice. Models repeat
their launches in every layer, and the answer depends on the kernel, its constants and the dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")  # from torch 2.13; before


@functools.cache
def remember_launches() -> None:
    """Analyse launches of this package's kernels that are alike once in a process. Idempotent."""
    from torch._higher_order_ops import triton_kernel_wrap

    for name in ANALYSES:
        if hasattr(triton_kernel_wrap, name):
            setattr(triton_kernel_wrap, name, remembering(getattr(triton_kernel_wrap, name)))


def remembering(analyse: Callable[..., Any]) -> Callable[..., Any]:
    """`analyse`, called once for each kind of launch of this package's kernels."""
    known: dict[Hashable, Any] = {}

    @functools.wraps(analyse)
    def answer(
        kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any, *rest: Any
    ) -> Any:
        key = None if rest or tma_descriptor_metadata else _launch(kernel, kwargs)
        if key is None:
            return analyse(kernel, kwargs, tma_descriptor_metadata, *rest)
        if key not in known:
            known[key] = analyse(kernel, kwargs, tma_descriptor_metadata)
        found = known[key]
        return list(found) if isinstance(found, list) else found

    return answer


def _launch(kernel: Any, kwargs: Mapping[str, Any]) -> Hashable | None:
    """All that the analysis looks at; None for a kernel of others, or what cannot be compared."""
    configs = getattr(kernel, "configs", None)
    if configs:  # an Autotuner, as which a launch with options comes to the lowering
        kernel, kwargs = kernel.fn, {**kwargs, **configs[0].kwargs}
    function = getattr(kernel, "fn", None)
    if not getattr(function, "__module__", "").startswith("inductor_moe."):
        return None
    try:
        key = (function, tuple((name, _kind(value)) for name, value in sorted(kwargs.items())))
        hash(key)
    except TypeError:
        return None
    return key


def _kind(value: Any) -> Hashable:
    import sympy  # type: ignore[import-untyped]
    from torch._inductor.ir import TensorBox

    if isinstance(value, torch.Tensor | TensorBox):
        return "tensor", value.dtype
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr):
        return "symbol", None
    return type(value), value
