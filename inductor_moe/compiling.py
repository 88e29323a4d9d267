"""`inductor_moe.compile`: torch.compile with the settings that a model's experts need."""

from __future__ import annotations

import inspect
import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inductor_moe import compat
from inductor_moe.backend import inductor_moe as backend
from inductor_moe.capture import experts

log = logging.getLogger("inductor_moe")

# What makes the sizes or numbers of a graph depend on data, in a forward's source.
_DATA_DEPENDENT = re.compile(
    r"nonzero|torch\.where\([^,()]*(\([^()]*\))?[^,()]*\)|bincount|\[mask"
)
_SCALARS = re.compile(r"\.tolist\(\)|\.item\(\)")


def compile(model: Callable[..., Any], **kwargs: Any) -> Any:
    """torch.compile(model, backend="inductor_moe", **kwargs), after setting what it needs.

    What was set is logged, and kept on the result as `inductor_moe_settings`, a tuple of texts:
    - a transformers model whose experts implementation is "eager" gets "inductor_moe" through
      model.set_experts_implementation; its eager calls use the same ops from then on;
    - for forwards that select tokens by value (nonzero, where, bincount) Dynamo's
      capture_dynamic_output_shape_ops, and for .item() and .tolist() its capture_scalar_outputs,
      are turned on for the process.
    """
    if "backend" in kwargs:
        raise TypeError(
            f"inductor_moe.compile takes no backend (got {kwargs['backend']!r}); "
            "use torch.compile for another backend"
        )
    settings = prepare(model)
    for setting in settings:
        log.info("inductor_moe.compile: %s", setting)
    compiled = torch.compile(model, backend=backend, **kwargs)
    object.__setattr__(compiled, "inductor_moe_settings", settings)
    return compiled


def prepare(model: Callable[..., Any]) -> tuple[str, ...]:
    """Set what `compile` sets, and say what that was."""
    if not isinstance(model, torch.nn.Module):
        return ()
    done = []
    if uses_eager_experts(model):
        experts.register()
        model.set_experts_implementation(experts.IMPLEMENTATION)  # type: ignore[operator]
        done.append(
            f'model.set_experts_implementation("{experts.IMPLEMENTATION}") (it was "eager", '
            "whose loop over the chosen experts cannot be traced)"
        )
    source = "\n".join(forward_sources(model))
    for name, pattern in (
        ("capture_dynamic_output_shape_ops", _DATA_DEPENDENT),
        ("capture_scalar_outputs", _SCALARS),
    ):
        if pattern.search(source) and compat.turn_on_dynamo_setting(name):
            done.append(f"torch._dynamo.config.{name} = True")
    return tuple(done)


def uses_eager_experts(model: torch.nn.Module) -> bool:
    """Whether a transformers model runs its experts by the loop that cannot be traced."""
    return hasattr(model, "set_experts_implementation") and any(
        getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"
        for module in model.modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    )


def forward_sources(model: torch.nn.Module) -> Iterator[str]:
    """The source of each class's forward, outside torch and without substitutes of ours."""
    for kind in {type(module) for module in model.modules()}:
        forward = kind.forward
        substituted = kind.__name__ in experts.FORWARDS
        if kind.__module__.startswith("torch.") or substituted:
            continue
        if hasattr(kind, "has_gate") or hasattr(kind, "_apply_gate"):
            continue  # switchable experts, whose own forward only runs as "eager"
        try:
            yield textwrap.dedent(inspect.getsource(forward))
        except (OSError, TypeError):
            continue
