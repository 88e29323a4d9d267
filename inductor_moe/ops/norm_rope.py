"""`inductor_moe::norm_rope`: norm and rotary embedding of a position's queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_moe.ops.dispatch import kernels_serve

MAX_HEAD_DIM = 1024


def check_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Raise ValueError naming the first argument of `norm_rope` that is off."""
    op = "norm_rope"
    for name, value in (("q", q), ("k", k)):
        if value.dim() != 3 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{op}: {name} has dtype {value.dtype} and shape {list(value.shape)}; it must be "
                "a float tensor [B, heads, D]."
            )
    dim = q.shape[2]
    if k.shape[0] != q.shape[0] or k.shape[2] != dim or k.dtype != q.dtype:
        raise ValueError(
            f"{op}: k is {k.dtype} {list(k.shape)}; for q, {q.dtype} {list(q.shape)}, it must "
            f"have {q.shape[0]} rows and {dim} channels of that dtype."
        )
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"{op}: q has {dim} channels; at most {MAX_HEAD_DIM} fit.")
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight must both be given, or neither.")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and tuple(weight.shape) != (dim,):
            raise ValueError(f"{op}: {name} has shape {list(weight.shape)}; it must be [{dim}].")
    rows = (q.shape[0],) if cos.dim() == 2 else ()
    fits = 1 <= cos.dim() <= 2 and cos.shape[:-1] == rows and cos.shape[-1] <= dim
    if not fits or cos.shape != sin.shape or cos.shape[-1] % 2:
        raise ValueError(
            f"{op}: cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}; they must "
            f"be alike and [R] or [{q.shape[0]}, R], R even and at most {dim}."
        )


@torch.library.custom_op("inductor_moe::norm_rope", mutates_args=())
def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """RMS norm over each head, then rotation of its first R channels, of one position.

    q         [B, Hq, D]   any float, D at most 1024
    k         [B, Hkv, D]  q.dtype
    q_weight  [D]          any float, and k_weight; both None: no norm. The norm is
                           x * rsqrt(mean(x^2) + eps) * (weight + offset)
    cos, sin  [R] or [B, R]  any float, R even: channel i < R / 2 is rotated with i + R / 2
    returns both as they came, contiguous. Source: Su et al., arXiv:2104.09864.
    """
    check_norm_rope(q, k, q_weight, k_weight, cos, sin)
    run = norm_rope_cuda if kernels_serve(q) else norm_rope_plain
    return run(q, k, q_weight, k_weight, eps, offset, cos, sin)


@norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    *tables: Tensor,
) -> tuple[Tensor, Tensor]:
    del eps, offset
    check_norm_rope(q, k, q_weight, k_weight, *tables)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def norm_rope_plain(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """`norm_rope` in aten, traceable."""
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1] // 2
    wide = torch.promote_types(q.dtype, torch.float32)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        dtype, x = x.dtype, x.to(wide)
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x = (x * (weight.to(wide) + offset)).to(dtype).to(wide)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = x[..., : 2 * half] * cos.to(wide) + torch.cat([-second, first], -1) * sin.to(wide)
        return torch.cat([turned, rest], -1).to(dtype)

    return one(q, q_weight), one(k, k_weight)


def norm_rope_cuda(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    cos: Tensor,
    sin: Tensor,
    *,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> tuple[Tensor, Tensor]:
    """`norm_rope` as one Triton launch; traceable with wrap=torch.library.wrap_triton."""
    from inductor_moe.kernels.norm_rope import norm_rope_kernel

    batch, heads, dim = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    block = 1 << (dim - 1).bit_length()
    wrap(norm_rope_kernel)[(heads + k.shape[1], batch)](
        q, k,
        q if q_weight is None else q_weight.contiguous(),
        k if k_weight is None else k_weight.contiguous(),
        cos, sin, q_out, k_out, heads, k.shape[1],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), *_steps(cos), *_steps(sin),
        EPS=eps, OFFSET=offset, NORM=q_weight is not None, D=dim, R=cos.shape[-1], BLOCK_D=block,
        num_warps=max(1, block // 256),
    )  # fmt: skip
    return q_out, k_out


def _steps(table: Tensor) -> tuple[int, int]:
    """From a row of the batch to the next, and from a channel."""
    return (table.stride(0) if table.dim() == 2 else 0), table.stride(-1)
