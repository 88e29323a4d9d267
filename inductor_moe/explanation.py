"""What would be fused in a model, without generating code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from inductor_moe import compat
from inductor_moe.capture.graphs import capture
from inductor_moe.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run model(*args, **kwargs) once through the backend without code generation.

    Every site is reported, fused or refused with its reason; so is every graph break. Runs under
    torch.no_grad(). The model's state (a KV cache in the arguments, say) advances as in a normal
    call. `dynamic` and `options` are those of torch.compile.
    """
    if not callable(model):
        raise TypeError(
            f"explain: model is a {type(model).__name__}; it must be a module or a function"
        )
    compat.clear_graph_breaks()
    _, report = capture(model, *args, dynamic=dynamic, fullgraph=False, options=options, **kwargs)
    return dataclasses.replace(report, breaks=compat.graph_breaks())
