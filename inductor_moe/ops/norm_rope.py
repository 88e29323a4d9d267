"""Norm and rotary embedding of a position's queries and keys: `inductor_moe::norm_rope`, and
`inductor_moe::norm_rope_cache`, which stores keys and values in their cache."""

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
    q: Tensor, k: Tensor, *args: Any, wrap: Callable[[Any], Any] = lambda kernel: kernel
) -> tuple[Tensor, Tensor]:
    """`norm_rope` as one Triton launch; traceable with wrap=torch.library.wrap_triton."""
    k_out = k.new_empty(k.shape)
    return _launch(wrap, (q, k, *args), k_out.unsqueeze(2), None), k_out


def _launch(
    wrap: Callable[[Any], Any],
    args: tuple[Any, ...],
    k_out: Tensor,
    cache: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """The queries; keys go to k_out [B, Hkv, L, D].

    args   of `norm_rope`
    cache  v, v_cache and position, if they are stored there
    """
    from inductor_moe.kernels.norm_rope import norm_rope_kernel

    q, k, q_weight, k_weight, eps, offset, cos, sin = args
    batch, heads, dim = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    q_out: Tensor = q.new_empty(q.shape)
    v, v_out, position = cache or (q_out, k_out, q_out)
    kinds = 2 if cache else 1
    block = 1 << (max(dim, v.shape[2]) - 1).bit_length()
    wrap(norm_rope_kernel)[(heads + kinds * k.shape[1], batch)](
        q, k,
        q if q_weight is None else q_weight.contiguous(),
        k if k_weight is None else k_weight.contiguous(),
        cos, sin, q_out, k_out, v, v_out, position, k_out.shape[2], heads, k.shape[1],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), *v.stride(),
        *k_out.stride(), *v_out.stride(), *_steps(cos), *_steps(sin),
        EPS=eps, OFFSET=offset, NORM=q_weight is not None, D=dim, DV=v.shape[2],
        R=cos.shape[-1], CACHE=cache is not None, BLOCK_D=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return q_out


def check_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
) -> None:
    """Raise ValueError naming the first argument of `norm_rope_cache` that is off."""
    op = "norm_rope_cache"
    check_norm_rope(q, k, q_weight, k_weight, cos, sin)
    batch, heads, dim = k.shape
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.dtype != k.dtype:
        raise ValueError(
            f"{op}: v is {v.dtype} {list(v.shape)}; it must be {k.dtype} [{batch}, {heads}, DV]."
        )
    if v.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"{op}: v has {v.shape[2]} channels; at most {MAX_HEAD_DIM} fit.")
    for name, cache, width in (("k_cache", k_cache, dim), ("v_cache", v_cache, v.shape[2])):
        fits = cache.dim() == 4 and cache.shape[:2] == k.shape[:2] and cache.shape[3] == width
        if not fits or cache.dtype != k.dtype or cache.shape[2] != k_cache.shape[2]:
            raise ValueError(
                f"{op}: {name} is {cache.dtype} {list(cache.shape)}; it must be {k.dtype} "
                f"[{batch}, {heads}, L, {width}], L that of k_cache."
            )
    if tuple(position.shape) != (1,) or position.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: position is {position.dtype} {list(position.shape)}; it must be one integer."
        )


@torch.library.custom_op("inductor_moe::norm_rope_cache", mutates_args=("k_cache", "v_cache"))
def norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
) -> Tensor:
    """`norm_rope`, and its keys and the values are stored at one position of their cache.

    v         [B, Hkv, DV]     q.dtype, DV at most 1024
    k_cache   [B, Hkv, L, D]   q.dtype, any strides, written in place
    v_cache   [B, Hkv, L, DV]  likewise
    position  [1]              int32 or int64, from -L to L - 1; below 0 it counts from the end
    returns the queries as they came, contiguous. The other arguments are those of `norm_rope`.
    """
    check_norm_rope_cache(q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, position)
    args = q_weight, k_weight, eps, offset, cos, sin, k_cache, v_cache, position
    if kernels_serve(q):
        return norm_rope_cache_cuda(q, k, v, *args)
    return norm_rope_cache_plain(q, k, v, *args)


@norm_rope_cache.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    weights, tables_and_caches = args[:2], args[4:]
    check_norm_rope_cache(q, k, v, *weights, *tables_and_caches)
    return q.new_empty(q.shape)


def norm_rope_cache_plain(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """`norm_rope_cache` in aten, traceable."""
    k_cache, v_cache, position = args[-3:]
    q, k = norm_rope_plain(q, k, *args[:-3])
    for cache, value in ((k_cache, k), (v_cache, v)):
        cache[:, :, position] = value.unsqueeze(2)
    return q


def norm_rope_cache_cuda(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, wrap: Callable[[Any], Any] = lambda kernel: kernel
) -> Tensor:
    """`norm_rope_cache` as one Triton launch; traceable with wrap=torch.library.wrap_triton."""
    k_cache, v_cache, position = args[-3:]
    return _launch(wrap, (q, k, *args[:-3]), k_cache, (v, v_cache, position))


def _steps(table: Tensor) -> tuple[int, int]:
    """From a row of the batch to the next, and from a channel."""
    return (table.stride(0) if table.dim() == 2 else 0), table.stride(-1)
