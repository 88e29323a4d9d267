"""Attention in the forms that PyTorch chooses for a device, its exact value, and rewriting it."""

from __future__ import annotations

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe.config import Options
from inductor_moe.passes import rewrite

aten = torch.ops.aten
B, HQ, HKV, L, D = 2, 6, 2, 21, 16
INF = float("inf")


def cudnn(q, k, v, mask, scale=None, dropout=0.0, causal=False):
    return aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, False, dropout, causal, False, scale=scale
    )


def efficient(q, k, v, mask, scale=None):
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, scale=scale)


def on_cpu(q, k, v, mask, scale=None):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def overrideable(q, k, v, mask, scale=None):
    return aten._scaled_dot_product_fused_attention_overrideable(q, k, v, mask, scale=scale)


def flash(q, k, v, mask, scale=None):
    assert mask is None
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)


def composite(q, k, v, mask, scale=None):
    return (
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale),
    )


FORMS = {f.__name__: f for f in (cudnn, efficient, on_cpu, overrideable, composite, flash)}


def draw(
    batch=B, heads=HQ, kv_heads=HKV, queries=1, length=L, dim=D, value_dim=D, dtype=torch.float32
):
    q = torch.randn(batch, heads, queries, dim)
    k = torch.randn(batch, kv_heads, length, dim)
    v = torch.randn(batch, kv_heads, length, value_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def repeat(x, group=HQ // HKV):
    batch, heads, length, dim = x.shape
    x = x[:, :, None].expand(batch, heads, group, length, dim)
    return x.reshape(batch, heads * group, length, dim)


def additive(keep, dtype=torch.float32):
    return torch.where(keep, torch.full([], 0.0, dtype=dtype), torch.full([], -INF, dtype=dtype))


def exact(q, k, v, mask=None, scale=None):
    """In fp64 with heads repeated by indexing."""
    q, k, v = q.double(), k.double(), v.double()
    head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    scores = q @ k[:, head].transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        bool_mask = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -INF) if bool_mask else scores + mask.double()
    return scores.softmax(-1) @ v[:, head]


def fused(function, arguments):
    """The graph of a function after the rewrites, and the one site in it.

    Traced on fake tensors: most forms of attention have no kernel on a CPU.
    """
    graph = make_fx(
        functionalize(function, remove="mutations"),
        decomposition_table=select_decomp_table(),
        tracing_mode="fake",
    )(*arguments)
    (site,) = rewrite(graph.graph, Options(strict=True))
    graph.recompile()
    return graph, site


def op_arguments(op, function, *arguments):
    """The fake values of the op's arguments after the rewrite."""
    graph, _ = fused(function, arguments)
    (node,) = (n for n in graph.graph.nodes if op in str(n.target))
    return [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args]
