"""Lowerings of the delta-rule ops: our Triton kernels on a GPU, Inductor's own code elsewhere."""

from __future__ import annotations

from typing import Any

from inductor_moe import compat
from inductor_moe.lowerings.trace import by_tokens, lower
from inductor_moe.ops import delta_rule as ops
from inductor_moe.ops.dispatch import kernels_serve
from inductor_moe.reference import delta_rule as reference
from inductor_moe.reference.delta_scan import delta_rule_scan

UNROLLED = 128  # tokens whose chunks still unroll into a graph of reasonable size


def register() -> None:
    """Register the lowerings of delta_rule and delta_decode."""
    lower(ops.delta_rule, delta_rule_lowering, traceable=_traceable)
    lower(ops.delta_decode, delta_decode_lowering)


def delta_rule_lowering(q: Any, *args: Any) -> Any:
    """The implementation that is traced into the graph."""
    if not kernels_serve(q, args[4]):
        tokens = q.shape[1]
        if not compat.is_symbolic(tokens) and tokens <= UNROLLED:
            return reference.delta_rule(q, *args)
        bound = compat.upper_bound(tokens)
        assert bound is not None
        return delta_rule_scan(q, *args[:7], max_tokens=bound)
    from inductor_moe.kernels import delta_rule as kernels

    few = kernels.RECURRENT_TOKENS if kernels.has_chunks(q, args[1], args[2]) else 0
    return by_tokens(kernels.delta_rule, (q, *args), q.shape[1], few)


def delta_decode_lowering(qkv: Any, *args: Any) -> Any:
    """The implementation that is traced into the graph; it updates both states in place."""
    if not kernels_serve(qkv, args[7]):
        return reference.delta_decode(qkv, *args)
    from inductor_moe.kernels.delta_decode import delta_decode

    return delta_decode(qkv, *args)


def _traceable(q: Any, *args: Any) -> bool:
    """Whether the op's body can be traced, where there are no kernels for it.

    A package must do without the op's eager kernel, so there the count of chunks may be symbolic
    (with a bound); under torch.compile the eager kernel is the faster of the two. Chunks are for
    the CPU alone: what Inductor made of them in fp64 for a GPU was wrong by 4 to 7 %.
    """
    if kernels_serve(q, args[4]):
        return True
    if len(args) > 7 and args[7] is not None:
        return False
    tokens = q.shape[1]
    known = not compat.is_symbolic(tokens)
    if q.device.type != "cpu":
        return known and tokens <= reference.UNROLLED_TOKENS
    if compat.packaging():
        return compat.upper_bound(tokens) is not None
    return known and tokens <= UNROLLED
