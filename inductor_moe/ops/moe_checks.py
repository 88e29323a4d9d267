"""Argument checks of the expert ops, shared by the fakes and every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_moe.ops.dispatch import FLOATS
from inductor_moe.reference.moe import ACTIVATIONS, GATES


def check_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias_up: Tensor | None,
    bias_down: Tensor | None,
    activation: str,
    gate: str,
    alpha: float,
    up_offset: float,
    limit: float | None,
) -> None:
    """Raise if `moe_experts` cannot take these arguments."""
    op = "moe_experts"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS} (got {activation!r}).")
    if gate not in GATES:
        raise ValueError(f"{op}: gate must be one of {GATES} (got {gate!r}).")
    if alpha != 1.0 and activation != "silu":
        raise ValueError(f"{op}: alpha only applies to silu (got {alpha} with {activation!r}).")
    if up_offset != 0.0 and gate == "none":
        raise ValueError(
            f"{op}: up_offset needs a gated up projection (got {up_offset} with 'none')."
        )
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit must be positive or None (got {limit}).")
    _check_activations(op, "x", x)
    _check_weight(op, "w_up", w_up, x, "[E, N, H]")
    _check_weight(op, "w_down", w_down, x, "[E, H, I]")
    _check_routing(op, "ids", ids, x.shape[0], x.device)
    _check_scale(op, "weights", weights, ids)
    experts, rows, hidden = w_up.shape
    if hidden != x.shape[1]:
        raise ValueError(
            f"{op}: w_up {_shape(w_up)} has H = {hidden}, but x {_shape(x)} has H = {x.shape[1]}."
        )
    inner = w_down.shape[2] if gate == "none" else 2 * w_down.shape[2]
    if rows != inner:
        halves = "I" if gate == "none" else "2 * I"
        raise ValueError(
            f"{op}: w_up {_shape(w_up)} must have N = {halves} rows = {inner} for gate {gate!r} "
            f"and w_down {_shape(w_down)}."
        )
    if w_down.shape[0] != experts or w_down.shape[1] != hidden:
        raise ValueError(
            f"{op}: w_down has shape {_shape(w_down)}; it must be [E, H, I] with E = {experts} "
            f"and H = {hidden}, as in w_up {_shape(w_up)}."
        )
    _check_bias(op, "bias_up", bias_up, w_up)
    _check_bias(op, "bias_down", bias_down, w_down)


def check_shared(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, logits: Tensor | None
) -> None:
    """Raise if these are no shared expert of `moe_experts_shared` for x [T, H]."""
    op, hidden = "moe_experts_shared", x.shape[1]
    inner = up.shape[0]
    shapes = {"v_gate": (inner, hidden), "v_up": (inner, hidden), "v_down": (hidden, inner)}
    for (name, shape), weight in zip(shapes.items(), (gate, up, down), strict=True):
        if weight is None:
            continue
        if weight.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {_dtype(weight.dtype)}; it must have the activations' "
                f"dtype {_dtype(x.dtype)} (got {_shape(weight)})."
            )
        if tuple(weight.shape) != shape or inner == 0:
            raise ValueError(
                f"{op}: {name} has shape {_shape(weight)}; it must be {list(shape)}: v_gate and "
                f"v_up [S, H], v_down [H, S] with S at least 1 and H = {hidden}."
            )
        _check_device(op, name, weight, x.device)
    if logits is None:
        return
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{op}: logits has dtype {_dtype(logits.dtype)}; it must be a float.")
    if logits.dim() != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] != 1:
        raise ValueError(
            f"{op}: logits has shape {_shape(logits)}; it must be [T, 1], a number for each row "
            f"of x {_shape(x)}."
        )
    _check_device(op, "logits", logits, x.device)


def check_up(
    x: Tensor, w_up: Tensor, ids: Tensor, bias_up: Tensor | None, input_weights: Tensor | None
) -> None:
    """Raise if `moe_up` cannot take these arguments."""
    op = "moe_up"
    _check_activations(op, "x", x)
    _check_weight(op, "w_up", w_up, x, "[E, N, H]")
    _check_routing(op, "ids", ids, x.shape[0], x.device)
    if w_up.shape[2] != x.shape[1]:
        raise ValueError(
            f"{op}: w_up {_shape(w_up)} has H = {w_up.shape[2]}, but x {_shape(x)} has "
            f"H = {x.shape[1]}."
        )
    _check_bias(op, "bias_up", bias_up, w_up)
    if input_weights is not None:
        _check_scale(op, "input_weights", input_weights, ids)


def check_down(
    h: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor | None, bias_down: Tensor | None
) -> None:
    """Raise if `moe_down_combine` cannot take these arguments."""
    op = "moe_down_combine"
    _check_activations(op, "h", h)
    _check_weight(op, "w_down", w_down, h, "[E, H, I]")
    _check_routing(op, "ids", ids, None, h.device)
    if h.shape[0] != ids.shape[0] * ids.shape[1]:
        raise ValueError(
            f"{op}: h has shape {_shape(h)}; it must have a row for each pair of ids "
            f"{_shape(ids)}."
        )
    if w_down.shape[2] != h.shape[1]:
        raise ValueError(
            f"{op}: w_down {_shape(w_down)} has I = {w_down.shape[2]}, but h {_shape(h)} has "
            f"I = {h.shape[1]}."
        )
    if weights is not None:
        _check_scale(op, "weights", weights, ids)
    _check_bias(op, "bias_down", bias_down, w_down)


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(n) for n in tensor.shape)}]"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_activations(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} has dtype {_dtype(tensor.dtype)}; it must be one of "
            f"{', '.join(map(_dtype, FLOATS))} (got {_shape(tensor)})."
        )
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must have 2 dimensions (got {_shape(tensor)}).")


def _check_weight(op: str, name: str, weight: Tensor, x: Tensor, layout: str) -> None:
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {_dtype(weight.dtype)}; it must have the activations' dtype "
            f"{_dtype(x.dtype)} (got {_shape(weight)})."
        )
    if weight.dim() != 3:
        raise ValueError(f"{op}: {name} has shape {_shape(weight)}; it must be {layout}.")
    if 0 in weight.shape:
        raise ValueError(f"{op}: {name} must not be empty (got {_shape(weight)}).")
    _check_device(op, name, weight, x.device)


def _check_routing(
    op: str, name: str, ids: Tensor, tokens: int | None, device: torch.device
) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: {name} has dtype {_dtype(ids.dtype)}; it must be an integer tensor of shape "
            f"[T, K] (got {_shape(ids)})."
        )
    if ids.dim() != 2 or ids.shape[1] < 1 or (tokens is not None and ids.shape[0] != tokens):
        expected = "[T, K]" if tokens is None else f"[T, K] with T = {tokens}"
        raise ValueError(
            f"{op}: {name} has shape {_shape(ids)}; it must be {expected} and K at least 1."
        )
    _check_device(op, name, ids, device)


def _check_scale(op: str, name: str, scale: Tensor, ids: Tensor) -> None:
    if not scale.dtype.is_floating_point:
        raise TypeError(
            f"{op}: {name} has dtype {_dtype(scale.dtype)}; it must be a float tensor of shape "
            f"[T, K] (got {_shape(scale)})."
        )
    if scale.dim() != 2 or scale.shape[0] != ids.shape[0] or scale.shape[1] != ids.shape[1]:
        raise ValueError(
            f"{op}: {name} has shape {_shape(scale)}; it must be [T, K] = {_shape(ids)}, as ids."
        )
    _check_device(op, name, scale, ids.device)


def _check_bias(op: str, name: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    if not bias.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} has dtype {_dtype(bias.dtype)}; it must be a float tensor.")
    if bias.dim() != 2 or bias.shape[0] != weight.shape[0] or bias.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {name} has shape {_shape(bias)}; it must be "
            f"[{weight.shape[0]}, {weight.shape[1]}], a row for each expert."
        )
    _check_device(op, name, bias, weight.device)


def _check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {device}.")
