"""Experts that loop over data-dependent lists become two ops around their own activation.

Transformers' switchable experts are reached by its own hook: an experts implementation named
"inductor_moe". Families whose experts are not switchable get a second forward, which only runs
while Dynamo traces for our backend; eager calls, other backends and graphs with gradients keep
the original one.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_moe.capture.delta_rule import applies
from inductor_moe.capture.imports import MODULES, watch_imports
from inductor_moe.ops.moe import moe_down_combine, moe_up

IMPLEMENTATION = "inductor_moe"


def _up(x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    rows: Tensor = moe_up(x, weight, ids, bias, None)
    return rows


def _down(
    h: Tensor,
    weight: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out: Tensor = moe_down_combine(h, weight, ids, weights, bias, dtype)
    return out


def experts_forward(self: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An experts implementation for transformers: same arguments and result as "grouped_mm".

    hidden_states  [T, H]
    ids            [T, K]  the number of experts and above: skipped
    weights        [T, K]
    """
    if torch.is_grad_enabled() and (hidden_states.requires_grad or self.down_proj.requires_grad):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, ids, weights)  # type: ignore[no-any-return]
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, name), self.down_proj
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    bias = getattr(self, f"{name}_bias") if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    rows = _up(hidden_states.to(up.dtype), up, ids, bias)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    return _down(rows, down, ids, weights, down_bias, hidden_states.dtype)


def register() -> None:
    """Make the implementation known to transformers, if that is loaded and has the hook."""
    module = sys.modules.get("transformers.integrations.moe")
    functions = getattr(module, "ALL_EXPERTS_FUNCTIONS", None)
    if functions is not None and IMPLEMENTATION not in functions:
        functions.register(IMPLEMENTATION, experts_forward)


def _aria(self: Any, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
    ids, weights = self.route_tokens_to_experts(router_logits)
    rows = _up(hidden_states, self.fc1.weight.transpose(1, 2), ids)
    first, second = rows.chunk(2, dim=-1)
    rows = torch.nn.functional.silu(first) * second
    return _down(rows, self.fc2.weight.transpose(1, 2), ids, weights)


def _dbrx(self: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Any:
    x = hidden_states.reshape(-1, self.hidden_size)
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    gate = _up(x, self.mlp.w1.view(shape), ids)
    up = _up(x, self.mlp.v1.view(shape), ids)
    down = self.mlp.w2.view(shape).transpose(1, 2)
    rows = self.mlp.activation_fn(gate) * up
    out = _down(rows, down, ids, weights)
    return out.view(hidden_states.shape[0], -1, self.hidden_size)


def _jetmoe(self: Any, layer_input: Tensor) -> Any:
    x = layer_input.reshape(-1, layer_input.shape[-1])
    logits = self.router.layer(x).float()
    scores, ids = logits.topk(self.router.top_k, dim=1)
    weights = torch.softmax(scores, dim=1).type_as(x)
    rows = _up(x, self.input_linear.weight, ids)
    first, second = rows.chunk(2, dim=-1)
    rows = self.activation(first) * second
    out = _down(rows, self.output_linear.weight, ids, weights)
    return out.view(layer_input.shape) + self.bias


def _longcat_flash(self: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    routed = self.num_routed_experts
    # Choices beyond the routed experts are identities; the ops skip them.
    identity = (weights * (ids >= routed)).sum(-1, keepdim=True) * hidden_states
    rows = _up(hidden_states, self.gate_up_proj[:routed], ids)
    gate, up = rows.chunk(2, dim=-1)
    rows = self.act_fn(gate) * up
    dtype = hidden_states.dtype
    out: Tensor = _down(rows, self.down_proj, ids, weights, dtype=dtype) + identity.to(dtype)
    return out


def _step3p7(self: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = self._apply_gate(_up(hidden_states, self.gate_up_proj, ids))
    return _down(rows, self.down_proj, ids, weights, dtype=hidden_states.dtype)


Forward = Callable[..., Tensor]

# Class in transformers.models.*.modeling_* -> its forward in a form that can be traced.
FORWARDS: dict[str, Forward] = {
    "AriaExperts": _aria,
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
    "LongcatFlashExperts": _longcat_flash,
    "Step3p7Experts": _step3p7,
}


def install() -> None:
    """Register the implementation and the forwards, now and for modules loaded later."""
    register()
    for name, module in list(sys.modules.items()):
        if name.startswith(MODULES) and ".modeling_" in name:
            substitute(module)
    watch_imports(substitute)


def substitute(module: types.ModuleType) -> None:
    """Give the classes of one modeling module their second forward. Idempotent."""
    register()
    for name, traced in FORWARDS.items():
        owner = vars(module).get(name)
        if isinstance(owner, type) and owner.__module__ == module.__name__:
            original = owner.__dict__.get("forward")
            if original is not None and not hasattr(original, "_inductor_moe_original"):
                setattr(owner, "forward", _choosing(original, traced))  # noqa: B010


def _choosing(original: Forward, traced: Forward) -> Forward:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and not torch.is_grad_enabled() and applies():
            return traced(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    forward._inductor_moe_original = original  # type: ignore[attr-defined]
    return forward
