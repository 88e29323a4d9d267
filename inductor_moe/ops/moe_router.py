"""`inductor_moe::moe_router`: from tokens' hidden states to their experts, the norm included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops.dispatch import kernels_serve
from inductor_moe.ops.moe_route import (
    check_route,
    check_weights_dtype,
    moe_route_cpu,
    route_constants,
)

MAX_HIDDEN = 8192
MAX_TOKENS = 16
MAX_READ = 16 * 2048  # channels of all tokens: more are faster apart
COUNTERS = 2048  # tokens of the routers of one graph


def check_router(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    router: Tensor,
    gate: Tensor | None,
    counters: Tensor,
    index: int,
    *route: Any,
) -> None:
    """Raise ValueError naming the first argument of `moe_router` that is off."""
    op = "moe_router"
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_TOKENS or not x.dtype.is_floating_point:
        raise ValueError(
            f"{op}: x has dtype {x.dtype} and shape {list(x.shape)}; it must be a float tensor "
            f"[T, H], T from 1 to {MAX_TOKENS}."
        )
    tokens, hidden = x.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"{op}: x has {hidden} channels; at most {MAX_HIDDEN} fit.")
    for name, value, shape in (
        ("residual", residual, (tokens, hidden)),
        ("norm_weight", norm_weight, (hidden,)),
        ("router", router, (router.shape[0], hidden)),
        ("gate", gate, (1, hidden)),
    ):
        if value is not None and (tuple(value.shape) != shape or value.device != x.device):
            raise ValueError(
                f"{op}: {name} has shape {list(value.shape)} on {value.device}; it must be "
                f"{list(shape)} on {x.device}."
            )
        if value is not None and name != "norm_weight" and value.dtype != x.dtype:
            raise ValueError(f"{op}: {name} has dtype {value.dtype}; it must be {x.dtype} like x.")
    counted = counters.dtype == torch.int32 and counters.dim() == 1
    if not counted or not 0 <= index <= counters.shape[0] - tokens:
        raise ValueError(
            f"{op}: counters has dtype {counters.dtype} and shape {list(counters.shape)} and "
            f"index is {index}; it must be an int32 tensor that has {tokens} elements from index "
            "on, one for each token."
        )
    check_route(x.new_empty((tokens, router.shape[0])), *route)


def check_own(first: int, own: int, experts: int) -> None:
    """Raise ValueError if experts first to first + own - 1 are not all there."""
    if not (first >= 0 and own >= 0 and first + own <= experts):
        raise ValueError(
            f"moe_router: first is {first} and own is {own}; they must be experts of {experts}."
        )


@torch.library.custom_op("inductor_moe::moe_router", mutates_args=("counters",))
def moe_router(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    router: Tensor,
    gate: Tensor | None,
    counters: Tensor,
    index: int,
    top_k: int,
    scoring: str,
    normalise: bool,
    bias: Tensor | None = None,
    epsilon: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_top: int = 1,
    *,
    first: int = 0,
    own: int = 0,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual, RMS norm, logits of the experts and of one gate, and the choice, of each token.

    x            [T, H]  any float; T at most 16, H at most 8192
    residual     [T, H]  x.dtype, added to x
    norm_weight  [H]     any float; None: no norm. The norm is
                         x * rsqrt(mean(x^2) + norm_eps) * (norm_weight + norm_offset)
    router       [E, H]  x.dtype
    gate         [1, H]  x.dtype, a row of logits more
    counters     [n]     int32; T elements from `index` on must be 0, and are anything afterwards
    own                  experts from `first` on are numbered from 0 in ids, and all others E; 0:
                         each keeps its number
    the others           as in `moe_route`
    returns total [T, H] x.dtype (x + residual, [0] without one), normed [T, H] x.dtype ([0]
    without a norm), weights [T, K] in weights_dtype, ids [T, K] int64, gate's logit [T, 1]
    x.dtype ([0] without one). Values are rounded to x.dtype before they are normalised, multiplied
    and scored.
    """
    route = (top_k, scoring, normalise, bias, epsilon, floor, scale, groups, kept_groups,
             group_top)  # fmt: skip
    check_router(x, residual, norm_weight, router, gate, counters, index, *route)
    check_own(first, own, router.shape[0])
    check_weights_dtype("moe_router", weights_dtype)
    run = moe_router_cuda if kernels_serve(x) else moe_router_plain
    return run(x, residual, norm_weight, norm_eps, norm_offset, router, gate, counters, index,
               *route, first=first, own=own, weights_dtype=weights_dtype)  # fmt: skip


@moe_router.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    router: Tensor,
    gate: Tensor | None,
    counters: Tensor,
    index: int,
    top_k: int,
    *route: Any,
    first: int = 0,
    own: int = 0,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del norm_eps, norm_offset
    check_own(first, own, router.shape[0])
    check_weights_dtype("moe_router", weights_dtype)
    check_router(x, residual, norm_weight, router, gate, counters, index, top_k, *route)
    return _outputs(x, residual, norm_weight, gate, top_k, weights_dtype)


def _outputs(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    top_k: int,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = tuple(x.shape)
    return (
        x.new_empty((0,) if residual is None else shape),
        x.new_empty((0,) if norm_weight is None else shape),
        x.new_empty((shape[0], top_k), dtype=weights_dtype),
        x.new_empty((shape[0], top_k), dtype=torch.int64),
        x.new_empty((0,) if gate is None else (shape[0], 1)),
    )


def moe_router_plain(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    router: Tensor,
    gate: Tensor | None,
    counters: Tensor,
    index: int,
    *route: Any,
    first: int = 0,
    own: int = 0,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_router` in aten alone, traceable."""
    del counters, index
    total, normed = x.new_empty(0), x.new_empty(0)
    if residual is not None:
        x = total = x + residual
    if norm_weight is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        value = x.to(wide)
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + norm_eps)
        x = normed = (value * (norm_weight.to(wide) + norm_offset)).to(x.dtype)
    weights, ids = moe_route_cpu(F.linear(x, router), *route, weights_dtype=weights_dtype)
    if own:
        ids = ids - first
        ids = ids.masked_fill((ids < 0) | (ids >= own), router.shape[0])
    logit = x.new_empty(0) if gate is None else F.linear(x, gate)
    return total, normed, weights, ids, logit


def moe_router_cuda(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    router: Tensor,
    gate: Tensor | None,
    counters: Tensor,
    index: int,
    top_k: int,
    scoring: str,
    normalise: bool,
    bias: Tensor | None = None,
    *options: Any,
    first: int = 0,
    own: int = 0,
    weights_dtype: torch.dtype = torch.float32,
    settled: bool = False,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_router` as one Triton launch; traceable with wrap=torch.library.wrap_triton.

    settled  router and gate were there before the kernel that launches before this one
    """
    from inductor_moe.kernels.moe_router import moe_router_kernel

    tokens = x.shape[0]
    experts, hidden = router.shape
    total, normed, weights, ids, _ = _outputs(x, residual, norm_weight, gate, top_k, weights_dtype)
    logits = x.new_empty(tokens, -(-(experts + 1) // 16) * 16)  # rows that vectors load
    constants = route_constants(experts, top_k, scoring, normalise, bias is not None, *options)
    block = 1 << (hidden - 1).bit_length()
    rows, warps = _tile(tokens, block)
    programs = -(-(experts + (gate is not None)) // rows)
    wrap(moe_router_kernel)[(programs, tokens)](
        x.contiguous(),
        x if residual is None else residual.contiguous(),
        x if norm_weight is None else norm_weight.contiguous(),
        router.contiguous(),
        x if gate is None else gate.contiguous(),
        x if bias is None else bias,
        logits if residual is None else total,
        logits if norm_weight is None else normed,
        logits, weights, ids, counters, index,
        0 if bias is None else bias.stride(0),
        NORM_EPS=norm_eps, NORM_OFFSET=norm_offset,
        HAS_RESIDUAL=residual is not None, HAS_NORM=norm_weight is not None,
        HAS_GATE=gate is not None, HIDDEN=hidden, BLOCK_H=block,
        ROWS=rows, PITCH=logits.shape[1],
        EARLY=settled and rows == 1 and all(
            weight is None or weight.is_contiguous() for weight in (router, gate)
        ),
        **constants, FIRST=first, OWN=own, num_warps=warps,
    )  # fmt: skip
    logit = x.new_empty(0) if gate is None else logits[:, experts : experts + 1]
    return total, normed, weights, ids, logit


def _tile(tokens: int, block: int) -> tuple[int, int]:
    """(logits of a program, its warps): several tokens share L2, so more is made of a load."""
    return (1 if tokens == 1 else 4), max(1, block // 2048)
