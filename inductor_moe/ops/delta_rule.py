"""`inductor_moe::delta_rule` and `inductor_moe::delta_decode`: schema, fake, checks, devices."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from inductor_moe.ops.dispatch import FLOATS, kernels_serve
from inductor_moe.reference import delta_rule as reference

GATES = ("softplus", "sigmoid", "given")
NORM_ACTIVATIONS = ("silu", "sigmoid")


def _check_shape(op: str, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(x != y for x, y in zip(got, shape, strict=True)):
        raise ValueError(
            f"{op}: {name} has shape {list(got)}; it must be {letters} = {list(shape)}."
        )


def _check_dim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    dims = letters.count(",") + 1
    if tensor.dim() != dims:
        raise ValueError(
            f"{op}: {name} has {tensor.dim()} dims, shape {list(tensor.shape)}; "
            f"it must have {dims}: {letters}."
        )


def _check_float(op: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be one of {FLOATS}.")


def _check_same(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{op}: {name} has dtype {tensor.dtype} but {other_name} has {other.dtype}; "
            "they must be equal."
        )


def _check_integer(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be int32 or int64.")


def _check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}; it must be on {device} as the others."
            )


def check_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError naming the first argument of `delta_rule` that is off."""
    op = "delta_rule"
    _check_dim(op, "q", q, "[B, T, H, K]")
    _check_dim(op, "v", v, "[B, T, HV, V]")
    batch, tokens, heads, width = q.shape
    value_heads, value_width = v.shape[2:]
    _check_shape(op, "k", k, "[B, T, H, K]", (batch, tokens, heads, width))
    _check_shape(op, "v", v, "[B, T, HV, V]", (batch, tokens, value_heads, value_width))
    if value_heads % heads:
        raise ValueError(
            f"{op}: v has {value_heads} heads and q has {heads}; HV must be a multiple of H."
        )
    _check_shape(op, "beta", beta, "[B, T, HV]", (batch, tokens, value_heads))
    if g is not None and g.dim() == 4:
        shape = (batch, tokens, value_heads, width)
        _check_shape(op, "g", g, "[B, T, HV, K] (per channel)", shape)
    elif g is not None:
        _check_shape(op, "g", g, "[B, T, HV]", (batch, tokens, value_heads))
    sequences = batch
    if cu_seqlens is not None:
        _check_dim(op, "cu_seqlens", cu_seqlens, "[N + 1]")
        _check_integer(op, "cu_seqlens", cu_seqlens)
        if batch != 1:
            raise ValueError(f"{op}: cu_seqlens packs sequences into one row; got B = {batch}.")
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        shape = (sequences, value_heads, width, value_width)
        _check_shape(op, "state", state, "[B or N, HV, K, V]", shape)
    for name, tensor in (("q", q), ("v", v), ("g", g), ("beta", beta), ("state", state)):
        _check_float(op, name, tensor)
    _check_same(op, "k", k, "q", q)
    _check_same(op, "v", v, "q", q)
    _check_device(op, q.device, k=k, v=v, g=g, beta=beta, state=state, cu_seqlens=cu_seqlens)


@torch.library.custom_op("inductor_moe::delta_rule", mutates_args=(), device_types="cpu")
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over a sequence, dispatching on its length.

    Per token and value head: S *= exp(g); d = (v - S^T k) * beta; S += k (x) d; o = scale * S^T q.

    q, k        [B, T, H, K]      any float; x / sqrt(sum(x * x) + l2norm_eps) if that is given
    v           [B, T, HV, V]     q's dtype; HV is a multiple of H, value head j reads key head
                                  j // (HV // H)
    g           [B, T, HV]        log decay, natural base, <= 0, -inf allowed; or [B, T, HV, K] per
                                  channel of the key; or None for no decay
    beta        [B, T, HV]        write strength in [0, 1], or [0, 2] for negative eigenvalues
    state       [B, HV, K, V]     state before the first token, fp32 or bf16, not written; None = 0
    scale                         multiplies q, usually K ** -0.5
    cu_seqlens  [N + 1]           ends of N sequences packed into T (then B is 1, states are
                                  [N, HV, K, V]); ascending from 0 to T
    returns o [B, T, HV, V] in v's dtype, and the last state [B, HV, K, V] in state's dtype (fp32
    where state is None); neither aliases an argument
    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464, eq. 10.
    """
    check_delta_rule(q, k, v, g, beta, state, cu_seqlens)
    out, final = reference.delta_rule(q, k, v, g, beta, state, scale, l2norm_eps, cu_seqlens)
    return out.contiguous(), final.contiguous()


@delta_rule.register_fake
def _delta_rule_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_delta_rule(q, k, v, g, beta, state, cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(
        (sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=reference.state_dtype(v, state)
    )
    return v.new_empty(v.shape), final


@delta_rule.register_kernel("cuda")
def _delta_rule_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    l2norm_eps: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from inductor_moe.kernels import delta_rule as kernels

    check_delta_rule(q, k, v, g, beta, state, cu_seqlens)
    run = kernels.delta_rule if kernels_serve(q, state) else reference.delta_rule
    out, final = run(q, k, v, g, beta, state, scale, l2norm_eps, cu_seqlens)
    return out.contiguous(), final.contiguous()


def check_delta_decode(
    qkv: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    recurrent_state: Tensor,
    z: Tensor | None,
    norm_weight: Tensor | None,
    slots: Tensor | None,
    norm_activation: str,
    gate: str,
    **scalars: object,
) -> None:
    """Raise ValueError naming the first argument of `delta_decode` that is off."""
    op = "delta_decode"
    _check_dim(op, "qkv", qkv, "[B, C]")
    _check_dim(op, "recurrent_state", recurrent_state, "[S, HV, K, V]")
    _check_dim(op, "conv_state", conv_state, "[S, C, L]")
    _check_dim(op, "conv_weight", conv_weight, "[C, W]")
    batch, channels = qkv.shape
    rows, value_heads, key_width, value_width = recurrent_state.shape
    if slots is not None:
        _check_shape(op, "slots", slots, "[B]", (batch,))
        _check_integer(op, "slots", slots)
    elif rows != batch:
        raise ValueError(
            f"{op}: recurrent_state has {rows} rows and qkv has {batch}; "
            "they must be equal where slots is absent."
        )
    keys_total = channels - value_heads * value_width
    if keys_total <= 0 or keys_total % (2 * key_width):
        raise ValueError(
            f"{op}: qkv has {channels} channels; C must be 2 * H * K + HV * V with "
            f"K = {key_width}, HV * V = {value_heads * value_width}."
        )
    heads = keys_total // (2 * key_width)
    if value_heads % heads:
        raise ValueError(
            f"{op}: recurrent_state has {value_heads} value heads and qkv implies {heads} key "
            "heads; HV must be a multiple of H."
        )
    width, length = conv_weight.shape[1], conv_state.shape[2]
    _check_shape(op, "conv_state", conv_state, "[S, C, L]", (rows, channels, length))
    _check_shape(op, "conv_weight", conv_weight, "[C, W]", (channels, width))
    if length < width - 1:
        raise ValueError(
            f"{op}: conv_state keeps {length} inputs; "
            f"a width of {width} needs at least {width - 1}."
        )
    if conv_bias is not None:
        _check_shape(op, "conv_bias", conv_bias, "[C]", (channels,))
    if gate not in GATES:
        raise ValueError(f"{op}: gate is {gate!r}; it must be one of {GATES}.")
    _check_shape(op, "b", b, "[B, HV]", (batch, value_heads))
    per_channel = a.dim() == 3
    if per_channel:
        _check_shape(op, "a", a, "[B, HV, K]", (batch, value_heads, key_width))
    else:
        _check_shape(op, "a", a, "[B, HV]", (batch, value_heads))
    if gate != "given" and A_log is None:
        raise ValueError(f"{op}: A_log is None; gate={gate!r} needs it, [HV] = [{value_heads}].")
    if A_log is not None:
        _check_shape(op, "A_log", A_log, "[HV]", (value_heads,))
    if dt_bias is not None:
        shape = (value_heads, key_width) if per_channel else (value_heads,)
        _check_shape(op, "dt_bias", dt_bias, "a.shape[1:]", shape)
    if z is not None:
        if norm_weight is None:
            raise ValueError(f"{op}: z is given but norm_weight is None; the gate follows a norm.")
        _check_shape(op, "z", z, "[B, HV, V]", (batch, value_heads, value_width))
    if norm_weight is not None:
        _check_shape(op, "norm_weight", norm_weight, "[V]", (value_width,))
    if norm_activation not in NORM_ACTIVATIONS:
        raise ValueError(
            f"{op}: norm_activation is {norm_activation!r}; it must be one of {NORM_ACTIVATIONS}."
        )
    tensors = {
        "qkv": qkv,
        "conv_state": conv_state,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "a": a,
        "b": b,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "recurrent_state": recurrent_state,
        "z": z,
        "norm_weight": norm_weight,
    }
    for name, tensor in tensors.items():
        _check_float(op, name, tensor)
    _check_device(op, qkv.device, **tensors, slots=slots)


def _delta_decode_cpu(
    qkv: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    recurrent_state: Tensor,
    z: Tensor | None,
    norm_weight: Tensor | None,
    slots: Tensor | None,
    scale: float,
    l2norm_eps: float | None = 1e-6,
    norm_eps: float = 1e-6,
    norm_activation: str = "silu",
    gate: str = "softplus",
    gate_lower_bound: float = 0.0,
    beta_scale: float = 1.0,
) -> Tensor:
    """One token through a delta-rule layer, from the convolution's input to the gated norm.

    qkv = silu(conv(conv_state, qkv)), split into q, k, v; q, k normalised; g and beta from a and
    b; one step of `delta_rule`; then RMSNorm over V and the gate of z.

    qkv              [B, C]        C = 2 * H * K + HV * V: queries, keys, values, any float
    conv_state       [S, C, L]     the last L >= W - 1 inputs, newest last; shifted in place
    conv_weight      [C, W]        newest last; conv_bias [C]
    a                [B, HV] or [B, HV, K] (decay per channel)
    b                [B, HV]
    A_log            [HV]; dt_bias of a's shape without B
    gate             "softplus": g = -exp(A_log) * softplus(a + dt_bias)
                     "sigmoid":  g = gate_lower_bound * sigmoid(exp(A_log) * (a + dt_bias))
                     with beta = sigmoid(b) * beta_scale; "given": g = a, beta = b
    recurrent_state  [S, HV, K, V] fp32 or bf16; updated in place
    z                [B, HV, V]    gate of the norm, or None; norm_weight [V], or None for no norm
    slots            [B]           rows of both states, distinct, or negative: output 0, no update;
                                   None: row i
    returns [B, HV, V] in qkv's dtype
    Source: transformers, Qwen3NextGatedDeltaNet.forward and KimiLinearDeltaAttention.forward.
    """
    arguments = dict(locals())
    check_delta_decode(**arguments)
    return reference.delta_decode(**arguments)


delta_decode = torch.library.custom_op(
    "inductor_moe::delta_decode",
    _delta_decode_cpu,
    mutates_args=("conv_state", "recurrent_state"),
    device_types="cpu",
)
_DECODE_SIGNATURE = inspect.signature(_delta_decode_cpu)


def _decode_arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """By name, defaults filled in, checked."""
    bound = _DECODE_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    check_delta_decode(**bound.arguments)
    return bound.arguments


@delta_decode.register_fake
def _delta_decode_fake(*args: Any, **kwargs: Any) -> Tensor:
    arguments = _decode_arguments(*args, **kwargs)
    qkv, state = arguments["qkv"], arguments["recurrent_state"]
    out: Tensor = qkv.new_empty((qkv.shape[0], state.shape[1], state.shape[3]))
    return out


@delta_decode.register_kernel("cuda")
def _delta_decode_cuda(*args: Any, **kwargs: Any) -> Tensor:
    from inductor_moe.kernels import delta_decode as kernels

    arguments = _decode_arguments(*args, **kwargs)
    served = kernels_serve(arguments["qkv"], arguments["recurrent_state"])
    run = kernels.delta_decode if served else reference.delta_decode
    return run(**arguments)
