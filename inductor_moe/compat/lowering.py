"""Inductor lowerings, the ops they are for, and symbolic sizes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import warnings
from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx

from inductor_moe.errors import FallbackWarning


def statically_true(condition: Any) -> bool:
    """Whether a condition over SymInts holds for every value, without adding a guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def is_symbolic(value: Any) -> bool:
    """Whether a size is symbolic."""
    return isinstance(value, torch.SymInt)


def upper_bound(size: Any) -> int | None:
    """The largest value a size can have, None if it has no bound."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(bound) if bound.is_Integer and int(bound) < 2**40 else None


def lower_bound(size: Any) -> int:
    """The smallest value a size can have."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).lower
    return max(0, int(bound)) if bound.is_Integer else 0


def packaging() -> bool:
    """Whether the graph that is being lowered is for an AOTInductor package."""
    from torch._inductor.virtualized import V

    return bool(getattr(V.graph, "aot_mode", False))


def calls_grouped_mm() -> bool:
    """Whether generated code can call aten's `_grouped_mm`; packages on torch 2.11 cannot."""
    if torch.compiler.is_dynamo_compiling():
        return True
    from torch._inductor.virtualized import V

    if not getattr(V.graph, "cpp_wrapper", False):
        return True
    from torchgen.aoti.fallback_ops import inductor_fallback_ops

    return "aten._grouped_mm.default" in inductor_fallback_ops


def compiles_package() -> bool:
    """Whether the graph that passes run on is for an AOTInductor package."""
    from torch._inductor.virtualized import V

    return getattr(V, "aot_compilation", False) is True


@functools.cache
def runs_triton_kernels(device: torch.device) -> bool:
    """Whether our kernels run on a device: NVIDIA, sm_80 or later, with Triton. Warns once."""
    if device.type == "cpu":
        return False
    reason = no_kernels_reason(device)
    if reason is not None:
        warnings.warn(
            f"inductor_moe: {reason}; fused sites run through PyTorch's own ops instead",
            FallbackWarning,
            stacklevel=2,
        )
    return reason is None


def no_kernels_reason(device: torch.device) -> str | None:
    """Why our kernels do not run on a device that is no CPU; None if they do."""
    if device.type != "cuda":
        return f"there are no kernels for device {device.type}"
    if torch.version.hip is not None:
        return "there are no kernels for AMD GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


def wrap_triton(kernel: Any) -> Any:
    """A Triton kernel whose launch can be traced into a graph."""
    from torch.library import wrap_triton as wrap

    return wrap(kernel)


def register_lowering(op: Any, lowering: Callable[..., Any]) -> None:
    """Register the Inductor lowering of an op overload."""
    from torch._inductor.lowering import register_lowering as inductor_register

    inductor_register(op, type_promotion_kind=None)(lowering)


def fake_arguments() -> tuple[Any, ...]:
    """The fake values of the positional arguments of the node that is being lowered."""
    from torch._inductor.virtualized import V

    return tuple(fx.map_arg(V.graph.current_node.args, lambda n: n.meta["val"]))


def settled(x: int, *weights: int) -> bool:
    """Whether the weights of the node that is being lowered were there before the launch that
    precedes its own: they are inputs of the graph that nothing in it writes, and its x is none, so
    that the graph launches something before.

    x, weights  positions of arguments; weights may be lists, and None
    """
    from torch._inductor.graph import SubgraphLowering
    from torch._inductor.virtualized import V

    if isinstance(V.graph, SubgraphLowering):
        return False
    args = V.graph.current_node.args
    nodes: list[fx.Node] = []
    fx.map_arg([args[position] for position in weights if position < len(args)], nodes.append)
    source = args[x]
    while isinstance(source, fx.Node) and (source.target is getitem or _is_view(source)):
        source = source.args[0]
    made = isinstance(source, fx.Node) and source.op == "call_function"
    return made and bool(nodes) and all(_is_unwritten_input(node) for node in nodes)


def _is_view(node: fx.Node) -> bool:
    """Whether a node may hold its first argument itself, so that nothing is launched for it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    copies = (torch.ops.aten.clone.default, torch.ops.prims.convert_element_type.default,
              torch.ops.aten._to_copy.default)  # fmt: skip
    return node.target in copies or any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def _is_unwritten_input(node: fx.Node) -> bool:
    """Whether a node is an input or constant of its graph and only read there, never viewed."""
    return node.op in ("placeholder", "get_attr") and all(
        isinstance(user.target, torch._ops.OpOverload)
        and not writes(user.target)
        and all(result.alias_info is None for result in user.target._schema.returns)
        for user in node.users
    )


def lower_to_eager_call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lower to a call of the op's eager kernel."""
    from torch._inductor.lowering import fallback_handler

    handler: Any = fallback_handler
    return handler(op, add_to_fallback_set=False)(*args, **kwargs)


def lower_by_tracing(
    implementation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Lower implementation(*args) where the args are Inductor IR, from inside a lowering.

    Runs the function on fake tensors and lowers the graph it leaves. Inputs of Triton launches
    are realised first and their fakes get the strides of the buffers, which Inductor may have
    padded: what the kernels are told is what the buffers are.
    """
    from torch._inductor import ir
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    node = V.graph.current_node
    fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # Where Inductor constrains the layout of an op's arguments it adds the defaults.
    kwargs = {name: kwargs[name] for name in fake_kwargs}
    values, spec = pytree.tree_flatten((args, kwargs))
    fakes = pytree.tree_leaves((tuple(fake_args), dict(fake_kwargs)))
    boxes, inputs = [], []
    for position, (value, fake) in enumerate(zip(values, fakes, strict=True)):
        if not isinstance(fake, torch.Tensor):
            continue
        if fake.device.type != "cpu":
            value = _realised(value, ir)
            values[position] = value
            with V.fake_mode:
                fake = _as_laid_out(fake, value.get_layout())
        boxes.append(value)
        inputs.append(fake)
        fakes[position] = _Hole

    def call(*tensors: torch.Tensor) -> Any:
        remaining = iter(tensors)
        filled = [next(remaining) if fake is _Hole else fake for fake in fakes]
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        return implementation(*call_args, **call_kwargs)

    with V.fake_mode:
        traced = make_fx(call, decomposition_table=select_decomp_table())(*inputs)
    _own_subgraphs(traced)
    _share_inputs(traced)
    return process_subgraph_nodes(traced, boxes)


class _Hole:
    """Stands where a tensor argument goes."""


def _realised(value: Any, ir: Any) -> Any:
    value = ir.ExternKernel.realize_input(value)
    storage = value.data if isinstance(value, ir.TensorBox) else value
    if ir.is_storage_and_layout(storage):
        ir.as_storage_and_layout(storage, freeze=True)
    return value if isinstance(value, ir.TensorBox) else ir.TensorBox(value)


def _as_laid_out(fake: torch.Tensor, layout: Any) -> torch.Tensor:
    """The fake with a buffer's strides and offset, where they differ."""
    from torch._inductor.virtualized import V

    told = (*fake.stride(), fake.storage_offset())
    known = [x.node.expr if isinstance(x, torch.SymInt) else x for x in told]
    found = (*layout.stride, layout.offset)
    if all(left == right for left, right in zip(known, found, strict=True)):
        return fake
    shape_env = V.graph.sizevars.shape_env
    *strides, offset = [
        int(x) if getattr(x, "is_number", True) else shape_env.create_symintnode(x, hint=None)
        for x in found
    ]
    base = torch.empty_strided(fake.shape, strides, dtype=fake.dtype, device=fake.device)
    return base.as_strided(fake.shape, strides, offset)


def branch(
    condition: Any, yes: Callable[..., Any], no: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """yes(*args) or no(*args), by a condition on sizes that is decided when the graph runs.

    For implementations under `lower_by_tracing`. Both return the same number of new tensors, of
    equal shapes, strides and dtypes.
    """
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def over_tensors(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def call(*given: torch.Tensor) -> tuple[Any, ...]:
            remaining = iter(given)
            filled = [next(remaining) if isinstance(x, torch.Tensor) else x for x in leaves]
            found = function(*pytree.tree_unflatten(filled, spec))
            return found if isinstance(found, tuple) else (found,)

        return call

    cond: Any = torch.ops.higher_order.cond
    return tuple(cond(condition, over_tensors(yes), over_tensors(no), tensors))


EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)


def _share_inputs(traced: fx.GraphModule) -> None:
    """Have what several launches read computed once. Left to Inductor, each has its own copy."""
    launch = torch.ops.higher_order.triton_kernel_wrapper_mutation
    graphs = [module.graph for module in traced.modules() if isinstance(module, fx.GraphModule)]
    for graph in graphs:  # with those of branches
        for node in list(graph.nodes):
            launches = sum(user.target is launch for user in node.users)
            if launches < 2 or node.op != "call_function" or node.target in EMPTY:
                continue
            if not isinstance(node.meta["val"], torch.Tensor):
                continue
            with graph.inserting_after(node):
                shared = graph.call_function(_realise, (node,))
            shared.meta = dict(node.meta)
            node.replace_all_uses_with(shared, lambda user, shared=shared: user is not shared)


def _realise(x: Any) -> Any:
    x.realize()
    return x


_realise._inductor_lowering_function = True  # type: ignore[attr-defined]


def _own_subgraphs(traced: fx.GraphModule) -> None:
    """Move the branches of a traced graph to the graph being lowered, where Inductor looks."""
    from torch._inductor.virtualized import V

    owner = V.graph.module
    for node in traced.graph.find_nodes(op="get_attr"):
        found = getattr(traced, node.target, None)
        if isinstance(found, fx.GraphModule):
            names = (f"{node.target}_{count}" for count in itertools.count())
            node.target = next(name for name in names if not hasattr(owner, name))
            setattr(owner, node.target, found)


def schema_of(op: Any) -> Any:
    """The schema of an op overload: its qualified name and its arguments."""
    return op._schema


def writes(op: Any) -> bool:
    """Whether a node's target is an op that writes one of its arguments."""
    return isinstance(op, torch._ops.OpOverload) and bool(op._schema.is_mutable)


def size_hint(size: Any, fallback: int = 1024) -> int:
    """A Python int for a size: itself, or the value its symbol had when it was first traced."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return fallback if hint is None else int(hint)
