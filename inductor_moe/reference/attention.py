"""Attention of one query position, and of many, in plain torch, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """`inductor_moe::attention_decode`, in the dtype of its inputs."""
    batch, heads, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(batch, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("bhgd,bhld->bhgl", grouped, k) * scale
    keep = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        if mask.dtype == torch.bool:
            keep = mask.expand_as(scores)
        else:
            scores = scores + mask
            keep = (mask != float("-inf")).expand_as(scores)
    weights = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1)
    weights = torch.where(keep.any(-1, keepdim=True), weights, 0.0)
    # What is masked counts nothing, whatever it holds.
    v = v.masked_fill(~keep[:, :, :1].transpose(2, 3), 0.0)
    out = torch.einsum("bhgl,bhle->bhge", weights, v).reshape(batch, heads, v.shape[-1])
    return out if gate is None else out * gate.sigmoid()


def attention_prompt_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """`inductor_moe::attention_prompt`, in the dtype of its inputs."""
    batch, heads, queries, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, -1)
    scores = torch.einsum("bhgtd,bhld->bhgtl", grouped, k) * scale
    keep = mask[:, :, None]
    weights = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1)
    weights = torch.where(keep.any(-1, keepdim=True), weights, 0.0)
    out = torch.einsum("bhgtl,bhle->bhgte", weights, v)
    return out.reshape(batch, heads, queries, v.shape[-1])
