"""Lowerings of the delta-rule ops: our Triton kernels on a GPU, Inductor's own code elsewhere."""

from __future__ import annotations

from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import lower
from inductor_moe.ops import delta_rule as ops
from inductor_moe.reference import delta_rule as reference


def register() -> None:
    """Register the lowerings of delta_rule and delta_decode."""
    lower(ops.delta_rule, delta_rule_lowering, traceable=_traceable)
    lower(ops.delta_decode, delta_decode_lowering)


def delta_rule_lowering(q: Any, *args: Any) -> Any:
    """The implementation that is traced into the graph."""
    if not compat.runs_triton_kernels(q.device):
        return reference.delta_rule(q, *args)
    from inductor_moe.kernels.delta_rule import delta_rule

    hint: dict[str, Any] = {"tokens_hint": compat.size_hint(q.shape[1])}
    return delta_rule(q, *args, **hint)


def delta_decode_lowering(qkv: Any, *args: Any) -> Any:
    """The implementation that is traced into the graph; it updates both states in place."""
    if not compat.runs_triton_kernels(qkv.device):
        return reference.delta_decode(qkv, *args)
    from inductor_moe.kernels.delta_decode import delta_decode

    return delta_decode(qkv, *args)


def _traceable(q: Any, *args: Any) -> bool:
    """Whether the op's body can be traced: without kernels, a symbolic T has no static loop."""
    if compat.runs_triton_kernels(q.device):
        return True
    packed = len(args) > 7 and args[7] is not None
    return not packed and not compat.is_symbolic(q.shape[1]) and q.shape[1] <= 128
