"""What a rewrite did to a graph, for the report: calls before and after, bytes, FLOPs, kernels."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from inductor_moe import compat

NAMESPACE = "inductor_moe"
Shapes = dict[str, list[int]]  # of tensors; of an integer, its value

# A site's own nodes are few; a search that meets more has left the site.
SITE_NODES = 1024

FEW = "moe_up_decode_kernel, moe_down_decode_kernel"
SORT = (
    "moe_sort_by_rank_kernel (many pairs: moe_sort_count_kernel, moe_sort_scan_kernel, "
    "moe_sort_blocks_kernel, moe_sort_place_kernel)"
)
UP = "quantized_up_decode_kernel (int4 on Hopper: quantized_up_vector_kernel)"
DOWN = "quantized_down_decode_kernel (int4 on Hopper, one token: quantized_down_vector_kernel)"
INT8 = "int8 activations: quantize_activations_kernel and"
# The Triton kernels of each op by regime, most of them chosen by the tile table of the GPU.
KERNELS = {
    "moe_experts": f"few tokens: {FEW}; more: {SORT}, moe_grouped_gemm_kernel twice, "
    "moe_combine_kernel",
    "moe_up": f"few tokens: moe_up_decode_kernel; more: {SORT}, moe_grouped_gemm_kernel",
    "moe_down_combine": f"few tokens: moe_down_decode_kernel; more: {SORT}, "
    "moe_grouped_gemm_kernel, moe_combine_kernel",
    "moe_experts_shared": f"{FEW}; packed weights: {UP}, {DOWN}",
    "moe_route": "moe_route_kernel",
    "moe_router": "moe_router_kernel",
    "norm_rope": "norm_rope_kernel",
    "norm_rope_cache": "norm_rope_kernel",
    "all_reduce": "all_reduce_kernel",
    "delta_rule": "few tokens: delta_recurrent_kernel; more: delta_chunk_intra_kernel, "
    "delta_chunk_scan_kernel (a decay per channel: delta_channel_intra_kernel, "
    "delta_channel_scan_kernel); of many states on Hopper delta_scan_transposed_kernel, "
    "not the scans",
    "delta_decode": "delta_decode_kernel, delta_decode_tail_kernel",
    "attention_decode": "attention_decode_kernel, attention_combine_kernel",
    "attention_prompt": "attention_mask_kernel, attention_prompt_kernel",
    "quantized_linear": "one token: quantized_vector_kernel, quantized_up_decode_kernel; more: "
    f"quantized_slices_kernel, quantized_linear_kernel ({INT8} int8_linear_kernel), on Hopper "
    "from 512 on widen_kernel and a library's product",
    "merged_linear": "one token: merged_vector_kernel, merged_linear_kernel; more: "
    "merged_rows_kernel",
    "moe_experts_quantized": f"few tokens: {UP}, {DOWN}; more: {SORT}, "
    "moe_quantized_gemm_kernel twice "
    f"({INT8} moe_int8_gemm_kernel), moe_combine_kernel",
    "moe_up_quantized": f"few tokens: {UP}; more: {SORT}, "
    f"moe_quantized_gemm_kernel ({INT8} moe_int8_gemm_kernel)",
    "moe_down_combine_quantized": f"few tokens: {DOWN}; more: {SORT}, "
    f"moe_quantized_gemm_kernel ({INT8} moe_int8_gemm_kernel), moe_combine_kernel",
}
# Tensors of an op on pairs that are read whatever the choice; the others have a row an expert.
WHOLE = {"x", "h", "ids", "weights", "input_weights", "logits", "shared"}


@dataclasses.dataclass(frozen=True)
class Costs:
    """What is known of one rewritten site; the fields are those of `report.Site`."""

    before: str = ""
    after: str = ""
    kernels: str = ""
    bytes: int | None = None
    flops: int | None = None


def costs_of(anchor: fx.Node, added: Iterable[fx.Node], orphans: Iterable[fx.Node] = ()) -> Costs:
    """Read the costs of a site from its graph, after the rewrite and before dead code goes.

    anchor   the node at which the site was found
    added    the nodes that the rewrite inserted or kept as its result
    orphans  the nodes whose last user the rewrite took away
    """
    ops = [node for node in dict.fromkeys(added) if _name(node)]
    if not ops:
        return Costs()
    needed = [_bytes(node) for node in ops]
    work = [_flops(node) for node in ops]
    dead = dict.fromkeys([*dead_with(anchor), *_dead_from(orphans, anchor)])
    return Costs(
        before=_listed(node_name(node) for node in reversed(dead)),
        after="; ".join(_signature(node) for node in ops),
        kernels="; ".join(dict.fromkeys(_kernels(node) for node in ops)),
        bytes=None if None in needed else sum(n for n in needed if n is not None),
        flops=None if None in work else sum(n for n in work if n is not None),
    )


def dead_with(anchor: fx.Node) -> list[fx.Node]:
    """The nodes that nothing needs once nothing needs `anchor`; none if something still does."""
    last, seen = [anchor], {anchor}
    ends = []
    while last:
        node = last.pop()
        impure = node.is_impure(impure_random=node is not anchor)
        if node.op == "output" or impure or len(seen) > SITE_NODES:
            return []
        if not node.users:
            ends.append(node)
        fresh = [user for user in node.users if user not in seen]
        seen.update(fresh)
        last.extend(fresh)
    return _dead_from(ends, anchor)


def _dead_from(unused: Iterable[fx.Node], anchor: fx.Node) -> list[fx.Node]:
    """Nodes without users, and those that only they need."""
    ends = list(unused)
    dead: dict[fx.Node, None] = {}
    while ends:
        node = ends.pop(0)
        impure = node.is_impure(impure_random=node is not anchor)
        if node in dead or node.op == "placeholder" or impure:
            continue
        if all(user in dead for user in node.users):
            dead[node] = None
            ends.extend(node.all_input_nodes)
    return list(dead)


def joined_calls(earlier: Costs, later: Costs) -> str:
    """The calls before both rewrites of one site, without the ops that the first one put there."""
    counts = _counted(earlier.before) + _counted(later.before)
    counts -= collections.Counter(part.partition("(")[0] for part in earlier.after.split("; "))
    return _listed(counts.elements())


def _counted(listed: str) -> collections.Counter[str]:
    """The inverse of _listed."""
    counts: collections.Counter[str] = collections.Counter()
    for part in listed.split(", ") if listed else ():
        name, _, number = part.partition(" \N{MULTIPLICATION SIGN}")
        counts[name] += int(number or 1)
    return counts


def node_name(node: fx.Node) -> str:
    """What a node calls, without namespace and overload."""
    name = compat.schema_of(node.target).name if _namespace(node) else ""
    return str(name.split("::")[-1] or getattr(node.target, "__name__", node.target))


def _namespace(node: fx.Node) -> str:
    """The namespace of the op that a node calls, or ""."""
    return str(getattr(node.target, "namespace", ""))


def _listed(names: Iterable[str]) -> str:
    counts = collections.Counter(name for name in names if name != "getitem")
    return ", ".join(
        name if number == 1 else f"{name} \N{MULTIPLICATION SIGN}{number}"
        for name, number in counts.items()
    )


def _name(node: fx.Node) -> str:
    """The name of our op that a node calls, or ""."""
    return node_name(node) if _namespace(node) == NAMESPACE else ""


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The values of a node's arguments by name, tensors as they were traced.

    Tensors of a list are numbered: "packed.0", "packed.1".
    """
    named = dict(
        zip((a.name for a in compat.schema_of(node.target).arguments), node.args, strict=False)
    )
    named.update(node.kwargs)
    for name, value in list(named.items()):
        if isinstance(value, (list, tuple)):
            del named[name]
            named |= {f"{name}.{i}": part for i, part in enumerate(value)}
    return {
        name: value.meta.get("val") if isinstance(value, fx.Node) else value
        for name, value in named.items()
    }


def _outputs(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def _shape(tensor: torch.Tensor) -> list[int]:
    return [compat.size_hint(size) for size in tensor.shape]


def _size(tensor: torch.Tensor) -> int:
    return math.prod(_shape(tensor)) * tensor.element_size()


def _signature(node: fx.Node) -> str:
    given = ", ".join(
        f"{name} {_shown(value)}"
        for name, value in _arguments(node).items()
        if isinstance(value, torch.Tensor)
    )
    found = ", ".join(_shown(tensor) for tensor in _outputs(node))
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in _outputs(node))
    return f"{_name(node)}({given}) -> {found} {', '.join(dtypes)}".rstrip()


def _shown(tensor: torch.Tensor) -> str:
    return str([size if isinstance(size, int) else str(size) for size in tensor.shape]).replace(
        "'", ""
    )


def _bytes(node: fx.Node) -> int | None:
    """Every tensor once, states that are updated twice, and the weights that can be reached."""
    if _name(node) not in KERNELS:
        return None
    arguments = _arguments(node)
    arguments.pop("counters", None)  # a call touches one of them
    written = {
        a.name
        for a in compat.schema_of(node.target).arguments
        if a.alias_info and a.alias_info.is_write
    }
    total = float(sum(_size(tensor) for tensor in _outputs(node)))
    pairs = math.prod(_shape(arguments["ids"])) if "ids" in arguments else 0
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        share = 2.0 if name in written else 1.0
        if pairs and name.split(".")[0] not in WHOLE:
            share = min(1.0, pairs / _shape(value)[0])
        total += share * _size(value)
    return round(total)


def _experts_flops(shapes: Shapes) -> int:
    """Two for each weight of each pair's expert."""
    weights = [shapes[name] for name in ("w_up", "w_down") if name in shapes]
    return 2 * math.prod(shapes["ids"]) * sum(math.prod(shape[1:]) for shape in weights)


def _packed_experts_flops(shapes: Shapes) -> int:
    hidden, inner = shapes["x"][1], shapes["inner"][0]
    weights = shapes["up_packed"][1] * hidden + hidden * inner
    return 2 * math.prod(shapes["ids"]) * weights


def _shared_experts_flops(shapes: Shapes) -> int:
    """Rows of weights are the same packed or not."""
    hidden, halves = shapes["x"][1], 2 if "shared.0" in shapes else 1
    rows, own = shapes["routed.0"][1], shapes["shared.3"][0]
    pair = rows * hidden + hidden * (rows // halves)
    return 2 * (math.prod(shapes["ids"]) * pair + shapes["x"][0] * (halves + 1) * own * hidden)


def _packed_half_flops(shapes: Shapes) -> int:
    width = shapes["x" if "x" in shapes else "h"][1]
    return 2 * math.prod(shapes["ids"]) * shapes["packed"][1] * width


def _delta_flops(shapes: Shapes) -> int:
    """Token by token: decay and read, write, and query, a multiply and an add each."""
    return 6 * math.prod(shapes["v"]) * shapes["k"][-1]


def _merged_rows(shapes: Shapes) -> int:
    return sum(
        shape[0] for name, shape in shapes.items() if name.startswith(("packed.", "dense."))
    )


def _router_flops(shapes: Shapes) -> int:
    """Those of its linear layers; the norm and the choice are next to nothing."""
    tokens, hidden = shapes["x"]
    return 2 * tokens * hidden * (shapes["router"][0] + shapes.get("gate", [0])[0])


def _attention_flops(shapes: Shapes) -> int:
    """Two for each number of the cache and each query that reads it, whatever a mask hides."""
    queries = math.prod(shapes["q"][1:-1]) // shapes["k"][1]
    return 2 * queries * (math.prod(shapes["k"]) + math.prod(shapes["v"]))


_FLOPS: dict[str, Callable[[Shapes], int]] = {
    "moe_experts": _experts_flops,
    "moe_up": _experts_flops,
    "moe_down_combine": _experts_flops,
    "moe_experts_shared": _shared_experts_flops,
    "moe_router": _router_flops,
    "delta_rule": _delta_flops,
    "delta_decode": lambda shapes: 6 * math.prod(shapes["recurrent_state"]),
    "attention_decode": _attention_flops,
    "attention_prompt": _attention_flops,
    "quantized_linear": lambda shapes: 2 * math.prod(shapes["x"]) * shapes["packed"][0],
    "merged_linear": lambda shapes: 2 * math.prod(shapes["x"]) * _merged_rows(shapes),
    "moe_experts_quantized": _packed_experts_flops,
    "moe_up_quantized": _packed_half_flops,
    "moe_down_combine_quantized": _packed_half_flops,
}


def _flops(node: fx.Node) -> int | None:
    count = _FLOPS.get(_name(node))
    shapes = {
        name: _shape(value) if isinstance(value, torch.Tensor) else [value]
        for name, value in _arguments(node).items()
        if isinstance(value, (torch.Tensor, int))
    }
    return count(shapes) if count else None


def _kernels(node: fx.Node) -> str:
    kernels = KERNELS.get(_name(node))
    tensors = _outputs(node)
    if kernels is None or not tensors:
        return ""
    if compat.runs_triton_kernels(tensors[0].device):
        return kernels
    return f"on this device Inductor compiles the op's aten code; on a GPU: {kernels}"
