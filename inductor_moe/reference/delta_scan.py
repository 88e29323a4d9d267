"""The delta rule over any number of chunks without a loop over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.reference.delta_rule import (
    CHUNK,
    chunk_factors,
    compute_dtype,
    initial_state,
    state_dtype,
)


def delta_rule_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    *,
    max_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`delta_rule_chunk` for a token count that is known only at run time, up to max_tokens.

    A chunk maps the state by S -> M S + U. Such maps compose, so the states before all chunks come
    from about log2(max_tokens / 64) doublings of the reach of each, Hillis and Steele's scan. A
    doubling costs a product of K x K matrices per chunk, which the loop over chunks does not have.
    Shapes and results as `inductor_moe::delta_rule`.
    """
    dtype = compute_dtype(q, v, state)
    tokens, width = q.shape[1], q.shape[3]
    # One chunk too many, so that there are always several: where T is symbolic, a count that may
    # be 1 would be decided by the length the graph was traced with.
    padding = (tokens // CHUNK + 2) * CHUNK - tokens
    f = chunk_factors(q, k, v, g, beta, scale, l2norm_eps, CHUNK, padding, dtype)
    unit = torch.eye(width, dtype=dtype, device=q.device)
    moved = unit * f.whole - f.key_end @ (f.solve @ f.key_start)
    written = f.key_end @ (f.solve @ f.values)
    # The state before the first chunk is one more map, which forgets whatever came before it.
    moved = F.pad(moved, (0, 0, 0, 0, 1, 0))
    written = torch.cat([initial_state(q, v, state, dtype).unsqueeze(2), written], 2)
    reach, chunks = 1, max_tokens // CHUNK + 2
    while reach <= chunks:
        written = written + moved @ _shifted(written, reach)
        moved = moved @ _shifted(moved, reach)
        reach *= 2
    before = written[:, :, :-1]
    delta = f.solve @ (f.values - f.key_start @ before)
    out = (f.query_start @ before + f.qk @ delta).flatten(2, 3)
    out = out[:, :, :tokens].transpose(1, 2)
    return out.to(v.dtype).contiguous(), written[:, :, -1].to(state_dtype(v, state))


def _shifted(x: Tensor, by: int) -> Tensor:
    """x moved along dim 2 by `by`, zeros in front."""
    return F.pad(x, (0, 0, 0, 0, by, 0))[:, :, : x.shape[2]]
