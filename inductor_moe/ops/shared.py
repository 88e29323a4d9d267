"""`inductor_moe::moe_experts_shared`: routed experts and one that every token takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_moe.ops import quant
from inductor_moe.ops.dispatch import KERNEL_DTYPES, PACKED_KERNEL_DTYPES, kernels_serve
from inductor_moe.ops.moe_checks import check_experts, check_shared
from inductor_moe.ops.moe_cpu import moe_experts_cpu
from inductor_moe.ops.quant_checks import check_packed
from inductor_moe.reference.moe import moe_experts_reference, shared_expert_reference
from inductor_moe.reference.quant import dequantize_reference

OP = "moe_experts_shared"
NAMES = ("w_up", "w_down", "v_gate", "v_up", "v_down")


class Projection(NamedTuple):
    """One weight [..., N, K]: its values alone, or the packed buffers of `dequantize`."""

    values: Tensor
    scales: Tensor | None
    zeros: Tensor | None

    def dense(self, group_size: int, inputs: int) -> Tensor:
        """The weight itself, dequantised if it is packed."""
        if self.scales is None:
            return self.values
        return dequantize_reference(self.values, self.scales, self.zeros, group_size, inputs)


@torch.library.custom_op("inductor_moe::moe_experts_shared", mutates_args=())
def moe_experts_shared(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    routed: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    group_size: int,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Routed experts plus a shared one: moe_experts(x)[t] + sigmoid(logits[t]) * v_down h[t].

    h[t] is act(v_gate x[t]) * v_up x[t], or act(v_up x[t]) for gate "none", with the activation,
    alpha, up_offset and limit of the routed experts. Made for few tokens: two launches for all.

    x, ids, weights  as in `moe_experts`
    logits      [T, 1]  any float; None is a factor of 1 in place of the sigmoid
    routed      w_up [E, N, H] and w_down [E, H, I], three tensors each
    shared      v_gate [S, H] (None for gate "none"), v_up [S, H], v_down [H, S], three each
    group_size  of all packed weights
    returns     [T, H]  out_dtype or x.dtype; sums in fp32, h rounded to x.dtype between GEMMs

    A weight's three tensors are (weight in x.dtype, None, None) or the arguments (packed, scales
    in x.dtype, zeros) of `dequantize`; all weights are packed alike or none is.
    """
    arguments = (x, ids, weights, logits, routed, shared, group_size,
                 activation, gate, alpha, up_offset, limit)  # fmt: skip
    _check(*arguments)
    if _runs_kernels(x, routed):
        from inductor_moe.ops import shared_cuda

        return shared_cuda.moe_experts_shared_cuda(*arguments, out_dtype)
    return _in_aten(moe_experts_reference, *arguments, out_dtype)


@moe_experts_shared.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    routed: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    group_size: int,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check(x, ids, weights, logits, routed, shared, group_size,
           activation, gate, alpha, up_offset, limit)  # fmt: skip
    return torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)


def moe_experts_shared_plain(*arguments: Any, **options: Any) -> Tensor:
    """`moe_experts_shared` in aten, traceable like `moe_experts_cpu`."""
    return _in_aten(moe_experts_cpu, *arguments, **options)


def _in_aten(
    experts: Callable[..., Tensor],
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    routed: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    group_size: int,
    activation: str,
    gate: str,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    up, down, own_gate, own_up, own_down = read_projections(routed, shared, gate)
    inner = up.values.shape[1] // (1 if gate == "none" else 2)

    def linear(rows: Tensor, projection: Projection) -> Tensor:
        return F.linear(rows, projection.dense(group_size, rows.shape[1]))

    y = experts(
        x, up.dense(group_size, x.shape[1]), down.dense(group_size, inner), ids, weights,
        None, None, activation, gate, alpha, up_offset, limit, False,
        torch.promote_types(x.dtype, torch.float32),
    )  # fmt: skip
    other = shared_expert_reference(
        x, own_gate, own_up, own_down, logits, activation, alpha, up_offset, limit, linear
    )
    return (y + other).to(out_dtype or x.dtype)


def read_projections(
    routed: Sequence[Tensor | None], shared: Sequence[Tensor | None], gate: str
) -> tuple[Projection, Projection, Projection | None, Projection, Projection]:
    """w_up, w_down, v_gate (None without a gate), v_up and v_down of the op's arguments."""
    for name, tensors, count in (("routed", routed, 6), ("shared", shared, 9)):
        if len(tensors) != count:
            raise ValueError(
                f"{OP}: {name} has {len(tensors)} tensors; it must have {count}, three a weight."
            )
    found: list[Projection] = []
    for name, start in zip(NAMES, range(0, 15, 3), strict=True):
        values, scales, zeros = [*routed, *shared][start : start + 3]
        if (values is None) != (name == "v_gate" and gate == "none"):
            raise ValueError(f"{OP}: gate {gate!r} does not go with {name} {_given(values)}.")
        found.append(Projection(values, scales, zeros))  # type: ignore[arg-type]
    up, down, own_gate, own_up, own_down = found
    return up, down, None if gate == "none" else own_gate, own_up, own_down


def _given(values: Tensor | None) -> str:
    return "None" if values is None else f"of shape {list(values.shape)}"


def _check(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    routed: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    group_size: int,
    activation: str,
    gate: str,
    alpha: float,
    up_offset: float,
    limit: float | None,
) -> None:
    """Raise if `moe_experts_shared` cannot take these arguments."""
    projections = read_projections(routed, shared, gate)
    up, own_up = projections[0], projections[3]
    inner = up.values.shape[-2] // (1 if gate == "none" else 2)
    inputs = (x.shape[-1], inner, x.shape[-1], x.shape[-1], own_up.values.shape[0])
    dense: list[Any] = []
    for name, projection, count in zip(NAMES, projections, inputs, strict=True):
        if projection is None:
            dense.append(None)
            continue
        values, scales, zeros = projection
        if (scales is None, zeros is None) != (up.scales is None, up.zeros is None):
            raise ValueError(f"{OP}: {name} must be packed as w_up is, zeros included.")
        if scales is not None:
            check_packed(OP, f"{name} ", values, scales, zeros, group_size, count)
            if scales.dtype != x.dtype or values.dtype != up.values.dtype:
                raise TypeError(
                    f"{OP}: {name} has codes {values.dtype} and scales {scales.dtype}; they must "
                    f"be {up.values.dtype} as those of w_up and {x.dtype} as x."
                )
            values = quant._stand_in(values, count, x)
        dense.append(values)
    w_up, w_down, v_gate, v_up, v_down = dense
    check_experts(x, w_up, w_down, ids, weights, None, None,
                  activation, gate, alpha, up_offset, limit)  # fmt: skip
    check_shared(x, v_gate, v_up, v_down, logits)


def _runs_kernels(x: Tensor, routed: Sequence[Tensor | None]) -> bool:
    return kernels_serve(x, dtypes=KERNEL_DTYPES if routed[1] is None else PACKED_KERNEL_DTYPES)
