"""Reading attention in any of the forms that PyTorch chooses for a device."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_moe.compat import schema_of
from inductor_moe.ops.attention_checks import MAX_HEAD_DIM
from inductor_moe.ops.dispatch import KERNEL_DTYPES
from inductor_moe.patterns.rewrite import Refusal
from inductor_moe.patterns.walk import (
    COPIES,
    aten,
    call,
    dtype,
    is_call,
    is_number,
    is_transparent,
    number,
    same,
    same_sizes,
    sizes,
)

# True where heads of q may outnumber those of k and v: each then serves its neighbours.
ATTENTION = {
    aten.scaled_dot_product_attention.default: True,
    aten._scaled_dot_product_flash_attention.default: True,
    aten._scaled_dot_product_cudnn_attention.default: True,
    aten._scaled_dot_product_efficient_attention.default: False,
    aten._scaled_dot_product_flash_attention_for_cpu.default: False,
    aten._scaled_dot_product_fused_attention_overrideable.default: False,
}
# What stands for -inf where PyTorch hands a bool mask to cuDNN, before it is rounded to the dtype.
CUDNN_HIDDEN = -65504.0
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclasses.dataclass(frozen=True)
class Attention:
    """q [B, Hq, T, D], k [B, Hkv, L, D], v [B, Hkv, L, DV], and `output` [B, Hq, T, DV].

    Keys and values that the graph repeats for groups of query heads are those before that.
    mask  a bool or float node that broadcasts to [B, 1, T, L], or None
    """

    anchor: fx.Node
    output: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float

    def describe(self) -> str:
        batch, heads, queries, dim = sizes(self.q)
        _, kv_heads, length, value_dim = sizes(self.v)
        dims = f"D={dim}" if dim == value_dim else f"D={dim} DV={value_dim}"
        rows = "" if same(queries, 1) else f" T={queries}"
        text = f"B={batch} Hq={heads} Hkv={kv_heads} {dims}{rows} L={length}"
        if self.mask is None:
            return text
        return text + ("; mask" if dtype(self.mask) == torch.bool else "; float mask")


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Attention in any form."""
    for node in graph.nodes:
        if is_call(node, *ATTENTION):
            yield node


def read_attention(anchor: fx.Node) -> Attention:
    """The attention that `anchor` computes; refuses what is not over one mask a batch row."""
    given = _arguments(anchor)
    q, k, v = given["query"], given["key"], given["value"]
    if any(len(sizes(node)) != 4 for node in (q, k, v)):
        raise Refusal("the attention is not over [batch, heads, positions, head dim]")
    if not is_number(given["dropout_p"], 0):
        raise Refusal("there is dropout")
    if given["is_causal"] is not False:
        raise Refusal("the attention is causal by a flag, not by its mask")
    if dtype(q) not in KERNEL_DTYPES or not dtype(q) == dtype(k) == dtype(v):
        raise Refusal(f"the dtypes are {dtype(q)}, {dtype(k)} and {dtype(v)}")
    if not same(sizes(k)[0], sizes(q)[0]) or not same_sizes(sizes(k)[:3], sizes(v)[:3]):
        raise Refusal("queries, keys and values differ in more than heads and head dim")
    for node in (q, k, v):
        heads, dim = sizes(node)[1], sizes(node)[3]
        if not isinstance(heads, int) or not isinstance(dim, int) or not 1 <= dim <= MAX_HEAD_DIM:
            raise Refusal(f"{node.name} has {heads} heads of {dim}")
    repeated = given.get("enable_gqa", ATTENTION[anchor.target])
    if (sizes(q)[1] != sizes(k)[1] and not repeated) or sizes(q)[1] % sizes(k)[1]:
        raise Refusal(f"{sizes(q)[1]} query heads share {sizes(k)[1]} heads of keys")
    cache = _unrepeated(k), _unrepeated(v)
    if same(*(sizes(node)[1] for node in cache)):
        k, v = cache
    mask = given.get("attn_bias", given.get("attn_mask"))
    if mask is not None:
        cudnn = is_call(anchor, aten._scaled_dot_product_cudnn_attention.default)
        mask = _read_mask(mask, sizes(q)[0], sizes(q)[2], sizes(k)[2], cudnn)
    scale = given["scale"]
    scale = sizes(q)[3] ** -0.5 if scale is None else number(scale)
    if scale is None:
        raise Refusal("the scale is not a constant")
    return Attention(anchor, _output(anchor), q, k, v, mask, float(scale))


def mask_of_four_dims(graph: fx.Graph, site: Attention) -> fx.Node | None:
    """The mask with as many dims as the queries, dims of size 1 added in front."""
    mask = site.mask
    if mask is not None:
        for _ in range(4 - len(sizes(mask))):
            mask = call(graph, aten.unsqueeze.default, mask, 0, like=site.anchor)
    return mask


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    schema = schema_of(node.target).arguments
    given = {argument.name: argument.default_value for argument in schema}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**given, **node.kwargs}


def _output(anchor: fx.Node) -> fx.Node:
    """The node that holds the attention's output; refuses one whose other results are used."""
    if isinstance(anchor.meta["val"], torch.Tensor):
        return anchor
    used = [user for user in anchor.users if user.users]
    if any(not is_call(user, operator.getitem) or user.args[1] != 0 for user in used):
        raise Refusal("more than the attention's output is used")
    if len(used) != 1:
        raise Refusal("the attention's output is not used, or read in several places")
    return used[0]


def _unrepeated(node: fx.Node) -> fx.Node:
    """The [B, Hkv, L, D] whose heads `node` repeats, each for its neighbours; else node itself."""
    batch, heads, length, dim = sizes(node)
    source = node
    while is_call(source, *COPIES):
        source = source.args[0]
    if is_call(source, *VIEWS):
        source = source.args[0]
        while is_call(source, *COPIES):
            source = source.args[0]
    if not is_call(source, aten.expand.default):
        return node
    shape, once = sizes(source), source.args[0]
    if len(shape) == 4:
        # One head of keys for all heads of queries needs no dim of its own.
        kv_heads = sizes(once)[1] if len(sizes(once)) == 4 else None
        if not same(kv_heads, 1) or not same_sizes(shape, (batch, heads, length, dim)):
            return node
    elif len(shape) == 5:
        kv_heads, group = shape[1], shape[2]
        unrolled = (batch, kv_heads, group, length, dim)
        if not isinstance(kv_heads, int) or not isinstance(group, int):
            return node
        if kv_heads * group != heads or not same_sizes(shape, unrolled):
            return node
        if not same_sizes(sizes(once), (batch, kv_heads, 1, length, dim)):
            return node
    else:
        return node
    wanted = (batch, kv_heads, length, dim)
    while not same_sizes(sizes(once), wanted) and is_transparent(once):
        once = once.args[0]
    return once if same_sizes(sizes(once), wanted) else node


def _read_mask(mask: fx.Node, batch: Any, queries: Any, length: Any, cudnn: bool) -> fx.Node:
    """What broadcasts to the mask; bool where the mask is 0 and -inf by a condition.

    Of a bool mask cuDNN's attention gets 0 and the lowest number of float16. A row that hides
    everything is then zeros, as everywhere else; cuDNN made it attend to everything.
    """
    node = mask
    while True:
        if is_call(node, *COPIES) or is_call(node, aten.expand.default):
            node = node.args[0]
        elif _is_unpadded(node):
            node = node.args[0].args[0]
        elif _is_condition(node, cudnn):
            node = node.args[0]
        else:
            break
    shape = sizes(node)
    padded = (1,) * (4 - len(shape)) + shape
    every_query = same_sizes(padded[1:], (1, 1, length))
    if not every_query and not same_sizes(padded[1:], (1, queries, length)):
        raise Refusal(f"the mask has shape {list(shape)}, not one value for each position")
    if not same(padded[0], 1) and not same(padded[0], batch):
        raise Refusal(f"the mask has {padded[0]} rows for a batch of {batch}")
    if dtype(node) != torch.bool and dtype(node) not in KERNEL_DTYPES:
        raise Refusal(f"the mask is {dtype(node)}")
    return node


def _is_condition(node: fx.Node, cudnn: bool) -> bool:
    """Whether node is 0 where a bool tensor holds and -inf, or what cuDNN gets, elsewhere."""
    hidden = [float("-inf")]
    if cudnn and dtype(node).is_floating_point:
        hidden.append(torch.tensor(CUDNN_HIDDEN, dtype=dtype(node)).item())
    return (
        is_call(node, aten.where.self)
        and dtype(node).is_floating_point
        and dtype(node.args[0]) == torch.bool
        and is_number(node.args[1], 0)
        and any(is_number(node.args[2], value) for value in hidden)
    )


def _is_unpadded(node: fx.Node) -> bool:
    """Whether node cuts off what a padding of the last dim has added, as for aligned rows."""
    if not is_call(node, aten.slice.Tensor):
        return False
    padding = node.args[0]
    start, step = (node.args[i] if len(node.args) > i else d for i, d in ((2, 0), (4, 1)))
    return (
        is_call(padding, aten.constant_pad_nd.default)
        and len(padding.args[1]) == 2
        and padding.args[1][0] == 0
        and start in (0, None)
        and step == 1
        and same_sizes(sizes(node), sizes(padding.args[0]))
    )
