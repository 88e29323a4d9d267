"""FLA's gated delta rule and KDA become one op while Dynamo traces for our backend.

Their chunked functions opt out of torch.compile and break the graph. Here each keeps its
signature and defaults; a call with an argument whose meaning the op lacks runs FLA as before.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from inductor_moe.errors import FallbackWarning
from inductor_moe.ops.delta_rule import delta_rule

FUNCTIONS = {
    "fla.ops.gated_delta_rule.chunk": "chunk_gated_delta_rule",
    "fla.ops.gated_delta_rule.fused_recurrent": "fused_recurrent_gated_delta_rule",
    "fla.ops.kda.chunk": "chunk_kda",
    "fla.ops.kda.fused_recurrent": "fused_recurrent_kda",
}
L2NORM_EPS = 1e-6
CHUNK_SIZES = (16, 32, 64)
COMPUTED = {
    "q", "k", "v", "g", "gk", "beta", "scale", "initial_state", "output_final_state",
    "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "A_log", "dt_bias",
    "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "lower_bound", "state_v_first",
    "cu_seqlens", "chunk_size",
}  # fmt: skip
HINTS = {
    "cu_seqlens_cpu",
    "chunk_indices",
    "disable_recompute",
    "safe_gate",
}  # no other result


def original_of(function: types.FunctionType, copied: Callable[..., Any]) -> Any:
    """What a refused call runs: FLA's function, still out of the graph where it opted out."""
    inner = getattr(function, "_torchdynamo_orig_callable", None)
    return copied(function) if inner is None else torch.compiler.disable(inner)


def substitute_for(
    function: types.FunctionType, original: Any, applies: Callable[[], bool]
) -> Callable[..., Any]:
    """The function that Dynamo inlines instead of one of FLA's."""
    names = tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )
    label = function.__name__
    per_channel = label.endswith("kda")

    def substitute(*args: Any, **kwargs: Any) -> Any:
        if not applies() or torch.is_grad_enabled():
            return original(*args, **kwargs)
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        reason = refusal(given, per_channel)
        if reason is not None:
            _report(label, reason)
            return original(*args, **kwargs)
        return run(given, per_channel)

    return substitute


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report(name: str, reason: str) -> bool:
    warnings.warn(f"inductor_moe: {name} is left to FLA: {reason}", FallbackWarning, stacklevel=2)
    return True


def refusal(given: Mapping[str, Any], per_channel: bool) -> str | None:
    """Why a call of FLA's function is not the op, or None."""
    for name in given:
        value = given[name]
        if name == "head_first":
            return "head_first was removed from FLA"
        if name not in COMPUTED and name not in HINTS and not (value is None or value is False):
            return f"the op has nothing like {name}"
    if given.get("chunk_size", 64) not in (CHUNK_SIZES[1:] if per_channel else CHUNK_SIZES):
        return f"chunk_size is {given['chunk_size']}"
    if given.get("allow_neg_eigval", False) and not given.get("use_beta_sigmoid_in_kernel", False):
        return "allow_neg_eigval needs use_beta_sigmoid_in_kernel"
    beta = given.get("beta")
    if beta is not None and beta.dim() != 3:
        return f"beta has {beta.dim()} dims"
    if given.get("g") is not None and given.get("gk") is not None:
        return "both g and gk are given"
    if given.get("use_gate_in_kernel", False):
        if given.get("A_log") is None or given.get("g") is None:
            return "use_gate_in_kernel needs g and A_log"
        if given.get("lower_bound") is not None and not per_channel:
            return "lower_bound belongs to KDA"
        if given.get("safe_gate", False) and given.get("lower_bound") is None:
            return "safe_gate needs lower_bound"
    elif given.get("lower_bound") is not None:
        return "lower_bound is given without use_gate_in_kernel"
    return None


def run(given: Mapping[str, Any], per_channel: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op on FLA's arguments.

    q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV] or, for KDA and gk, [B, T, HV, K]; beta
    [B, T, HV]; initial_state [B or N, HV, K, V], or [.., V, K] with state_v_first. Returns the
    output in v's dtype and the final state in fp32, or None.
    """
    q, k, v = given["q"], given["k"], given["v"]
    dtype = v.dtype
    g = given["gk"] if given.get("gk") is not None else given.get("g")
    if given.get("use_gate_in_kernel", False):
        g = log_decay(g, given["A_log"], given.get("dt_bias"), given.get("lower_bound"))
    beta = given.get("beta")
    if beta is None:
        beta = torch.ones(v.shape[:3], dtype=torch.float32, device=v.device)
    elif given.get("use_beta_sigmoid_in_kernel", False):
        beta = beta.float().sigmoid() * (2.0 if given.get("allow_neg_eigval", False) else 1.0)
    state = given.get("initial_state")
    turned = bool(given.get("state_v_first", False))
    if state is not None:
        state = state.float()
        if turned:
            state = state.transpose(-1, -2)
    if not (q.dtype == k.dtype == dtype):
        q, k, v = q.float(), k.float(), v.float()
    scale = given.get("scale")
    if scale is None:
        scale = k.shape[-1] ** -0.5
    eps = L2NORM_EPS if given.get("use_qk_l2norm_in_kernel", False) else None
    out, final = delta_rule(q, k, v, g, beta, state, scale, eps, given.get("cu_seqlens"))
    if not given.get("output_final_state", False):
        return out.to(dtype), None
    return out.to(dtype), final.transpose(-1, -2).contiguous() if turned else final


def log_decay(
    g: Any,
    A_log: Any,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
) -> torch.Tensor:
    """-exp(A_log) * softplus(g + dt_bias), or lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).

    g [B, T, HV] or [B, T, HV, K]; A_log [HV]; dt_bias of g's last dims, flat or not
    """
    rows = g.float()
    if dt_bias is not None:
        rows = rows + dt_bias.float().reshape(g.shape[2:])
    rate = A_log.float().exp().reshape(-1, *(1,) * (g.dim() - 3))
    if lower_bound is None:
        decay: torch.Tensor = -rate * F.softplus(rows)
    else:
        decay = lower_bound * torch.sigmoid(rate * rows)
    return decay
