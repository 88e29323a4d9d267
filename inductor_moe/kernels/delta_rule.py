"""The delta rule on a GPU: which kernels a call takes."""

from __future__ import annotations

from torch import Tensor

from inductor_moe.kernels.delta_chunk import delta_rule_chunk
from inductor_moe.kernels.delta_chunk_channel import delta_rule_chunk_channel
from inductor_moe.kernels.delta_recurrent import delta_rule_recurrent

RECURRENT_TOKENS = 8


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: Tensor | None = None,
    tokens_hint: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`inductor_moe::delta_rule` by launches make_fx can trace.

    Every branch serves every length; tokens_hint, a typical length of one sequence, chooses the
    one to trace where T is symbolic. Without it a symbolic T takes the chunked kernels.
    """
    tokens = q.shape[1]
    if tokens_hint is None and isinstance(tokens, int):
        sequences = 1 if cu_seqlens is None else max(1, cu_seqlens.shape[0] - 1)
        tokens_hint = (tokens + sequences - 1) // sequences
    arguments = (q, k, v, g, beta, state, scale, l2norm_eps, cu_seqlens)
    if tokens_hint is not None and tokens_hint <= RECURRENT_TOKENS:
        return delta_rule_recurrent(*arguments)
    if g is not None and g.dim() == 4:
        return delta_rule_chunk_channel(*arguments)
    return delta_rule_chunk(*arguments)
