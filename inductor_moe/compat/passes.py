"""Graph passes of Inductor, and which products its decompositions leave whole."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

GraphPass = Callable[[fx.Graph], None]
_kept = threading.local()


@contextlib.contextmanager
def keep_matmuls(graph: fx.Graph) -> Iterator[None]:
    """Within the block, in this thread, coordinate descent tuning leaves matmuls that we match.

    That setting (part of mode="max-autotune") makes Inductor decompose a product with a vector
    into a multiplication and a sum before any graph pass runs: a bmm, which hides the experts'
    gathered matmuls, and an mm, kept only where the graph has packed weights. A decomposition
    table of our own would say so directly, but it bypasses Inductor's caches.
    """
    aten = torch.ops.aten
    _wrap_decompositions()
    before = getattr(_kept, "ops", ())
    packed = any(_holds_codes(node) for node in graph.nodes)
    linear = (aten.mm.default, aten.addmm.default) if packed else ()
    _kept.ops = (*before, aten.bmm.default, *linear)
    try:
        yield
    finally:
        _kept.ops = before


def _holds_codes(node: fx.Node) -> bool:
    """Whether a node dequantises with our op, or is an input of int8 codes."""
    if "inductor_moe.dequantize" in str(node.target):
        return True
    value = node.meta.get("val", node.meta.get("example_value"))
    return node.op == "placeholder" and getattr(value, "dtype", None) == torch.int8


@functools.cache
def _wrap_decompositions() -> None:
    from torch._inductor import decomposition

    aten = torch.ops.aten
    for op in (aten.bmm.default, aten.mm.default, aten.addmm.default):
        original = decomposition.decompositions.get(op)
        if original is not None:
            decomposition.decompositions[op] = _unless_kept(op, original)
    merged: Any = getattr(decomposition, "fast_random_decomps", None)
    if hasattr(merged, "cache_clear"):
        merged.cache_clear()


def _unless_kept(op: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's decomposition, without coordinate descent tuning where the op is kept."""
    from torch._inductor import config

    @functools.wraps(original)
    def decompose(*args: Any, **kwargs: Any) -> Any:
        if op not in getattr(_kept, "ops", ()):
            return original(*args, **kwargs)
        with config.patch(coordinate_descent_tuning=False):
            return original(*args, **kwargs)

    return decompose


@functools.cache
def graph_pass_base() -> type:
    """The base class whose uuid() lets Inductor cache graphs that a custom pass changed."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def graph_passes(value: Any) -> tuple[GraphPass, ...]:
    """A custom-pass setting (None, a callable, or a sequence from torch 2.13) as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def run_post_grad_passes(gm: fx.GraphModule) -> None:
    """Inductor's post-grad passes, ours among them, without code generation."""
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.virtualized import V

    fake_mode = graph_fake_mode(gm.graph)
    with V.set_fake_mode(fake_mode):
        post_grad_passes(gm, is_inference=True)


def graph_fake_mode(graph: fx.Graph) -> Any:
    """The fake mode of the values in a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for node in graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            if hasattr(value, "fake_mode"):
                return value.fake_mode
    return FakeTensorMode()


def tree_leaves(value: Any) -> list[Any]:
    """What is in nested tuples, lists, dicts and registered classes, in order."""
    from torch.utils import _pytree as pytree

    return pytree.tree_leaves(value)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute on real tensors although a compile with its fake mode is going on."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a compiled callable as taking one list of inputs."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]

    return make_boxed_func(function)  # type: ignore[no-any-return]
