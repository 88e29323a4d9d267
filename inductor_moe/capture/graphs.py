"""Compiling without code generation: the graphs that Inductor would get, run op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_moe import backend as backends
from inductor_moe import compat
from inductor_moe.backend import collected
from inductor_moe.report import Report, merge


def graph_backend(
    options: Mapping[str, Any] | None = None, graphs: list[fx.GraphModule] | None = None
) -> Callable[..., Any]:
    """A backend that does all that ours does but code generation: graphs run op by op.

    graphs  receives each graph as it is after Inductor's post-grad passes
    """

    def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        compat.run_post_grad_passes(gm)
        if graphs is not None:
            graphs.append(gm)
        return compat.boxed(gm.forward)

    compile_graph: Any = backends.inductor_moe

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        with compat.no_caches():
            return compile_graph(gm, example_inputs, options=options, inner_compile=inner_compile)

    backend.is_inductor_moe = True  # type: ignore[attr-defined]
    return backend


def capture(
    function: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    fullgraph: bool = True,
    options: Mapping[str, Any] | None = None,
    graphs: list[fx.GraphModule] | None = None,
    **kwargs: Any,
) -> tuple[Any, Report]:
    """Run function(*args, **kwargs) through graph_backend; its result and the report."""
    torch.compiler.reset()
    compiled = torch.compile(
        function, backend=graph_backend(options, graphs), fullgraph=fullgraph, dynamic=dynamic
    )
    with torch.no_grad(), collected() as found:
        result = compiled(*args, **kwargs)
    return result, merge(found)
