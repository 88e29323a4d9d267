"""Argument checks that the ops of attention share."""

from __future__ import annotations

from torch import Tensor

MAX_HEAD_DIM = 256


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, queries: str) -> None:
    """Raise ValueError naming the first of q, k and v that is off.

    queries  the dims of q: "B, Hq, D", or more between the heads and the head dim
    """
    for name, tensor, letters in (("q", q, queries), ("k", k, "B, Hkv, L, D"),
                                  ("v", v, "B, Hkv, L, DV")):  # fmt: skip
        if tensor.dim() != letters.count(",") + 1 or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype} and shape "
                f"{list(tensor.shape)}; it must be a float tensor [{letters}]."
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}; it must be like "
                f"q, {q.dtype} on {q.device}."
            )
    batch, heads, dim = q.shape[0], q.shape[1], q.shape[-1]
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"{op}: k has shape {list(k.shape)}; for q of shape {list(q.shape)} it "
            f"must be [{batch}, Hkv, L, {dim}]."
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: v has shape {list(v.shape)}; for k of shape {list(k.shape)} it "
            f"must be {[*k.shape[:3]]} and its own head dim."
        )
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            f"{op}: q has {heads} heads; they must be a multiple of the {k.shape[1]} heads of k."
        )
    for name, tensor in (("k", k), ("v", v)):
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: {name} has head dim {tensor.shape[3]}; it must be between 1 "
                f"and {MAX_HEAD_DIM}."
            )


def check_mask_rows(op: str, q: Tensor, mask: Tensor) -> None:
    """Raise ValueError where the mask has other rows than q, or is on another device."""
    if mask.shape[0] != 1 and mask.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: mask has {mask.shape[0]} rows; it must have 1 or {q.shape[0]}.")
    if mask.device != q.device:
        raise ValueError(f"{op}: mask is on {mask.device}; q is on {q.device}.")
