"""Choosing codes, scales and zero points for a weight: round to nearest, and HQQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inductor_moe.reference.quant import CENTER, group_count, pack_int4, packed_width

# Elements widened to fp32 at a time: bounds the memory of fitting one large weight.
BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight is stored.

    bits        4 or 8
    group_size  inputs that share a scale; 0 is one group a row
    symmetric   no zero points
    method      "rtn" or "hqq"
    """

    bits: int
    group_size: int
    symmetric: bool
    method: str

    def describe(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "a scale per channel"
        kind = "symmetric" if self.symmetric else "with zero points"
        return f"int{self.bits}, {groups}, {kind}, {self.method}"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight; see `inductor_moe.reference.quant`."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device, scheme: Scheme) -> Packed:
    """Uninitialised buffers for a weight [..., N, K]."""
    *lead, in_features = shape
    kind = torch.int16 if scheme.bits == 4 else torch.int8
    groups = [*lead, group_count(in_features, scheme.group_size)]
    return Packed(
        torch.empty([*lead, packed_width(in_features, scheme.bits)], dtype=kind, device=device),
        torch.empty(groups, dtype=dtype, device=device),
        None if scheme.symmetric else torch.empty(groups, dtype=dtype, device=device),
    )


def quantize_weight(weight: Tensor, scheme: Scheme) -> Packed:
    """Pack a weight [..., N, K], K the input dim, any strides; scales get its dtype."""
    if not weight.dtype.is_floating_point or weight.dim() < 2:
        raise ValueError(
            f"weight must be a float tensor [..., N, K] (got {weight.dtype}, {list(weight.shape)})"
        )
    out = empty(weight.shape, weight.dtype, weight.device, scheme)
    for part, into in zip(_blocks(weight), _packed_blocks(out, weight), strict=True):
        fitted = _fit(part, scheme)
        into.packed.copy_(fitted.packed)
        into.scales.copy_(fitted.scales)
        if into.zeros is not None and fitted.zeros is not None:
            into.zeros.copy_(fitted.zeros)
    return out


def _blocks(value: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Parts along the first dim of about BLOCK elements of `like`."""
    like = value if like is None else like
    rows = max(1, BLOCK * like.shape[0] // max(like.numel(), 1))
    for start in range(0, value.shape[0], rows):
        yield value[start : start + rows]


def _packed_blocks(out: Packed, like: Tensor) -> Iterator[Packed]:
    zeros = _blocks(out.zeros, like) if out.zeros is not None else None
    for packed, scales in zip(_blocks(out.packed, like), _blocks(out.scales, like), strict=True):
        yield Packed(packed, scales, next(zeros) if zeros is not None else None)


def _fit(weight: Tensor, scheme: Scheme) -> Packed:
    in_features = weight.shape[-1]
    group = scheme.group_size or in_features
    short = -in_features % group
    wide = weight.float()
    if short:
        # A short last group is filled with copies of its own weights.
        own = in_features % group
        copies = in_features - own + torch.arange(short, device=weight.device) % own
        wide = torch.cat([wide, wide.index_select(-1, copies)], -1)
    wide = wide.unflatten(-1, (-1, group))
    levels = _Levels(scheme, weight.dtype)
    scale, zero = levels.nearest(wide)
    if scheme.method == "hqq":
        scale, zero = levels.half_quadratic(wide, scale, zero)
    codes = levels.codes(wide, scale, zero).flatten(-2)[..., :in_features]
    packed = pack_int4(codes) if scheme.bits == 4 else codes.to(torch.int8)
    dtype = weight.dtype
    zeros = None if scheme.symmetric else zero.squeeze(-1).to(dtype)
    return Packed(packed, scale.squeeze(-1).to(dtype), zeros)


class _Levels:
    """The codes of a scheme, and scales and zero points as they will be stored.

    Weights are [..., G, group]; scales and zeros [..., G, 1] in fp32, rounded to `dtype`.
    """

    def __init__(self, scheme: Scheme, dtype: torch.dtype) -> None:
        self.symmetric = scheme.symmetric
        self.dtype = dtype
        if scheme.bits == 4:
            self.low, self.high, self.center = 0, 15, float(CENTER)
        else:
            self.low, self.high, self.center = -128, 127, 0.0

    def stored(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).float()

    def scale(self, value: Tensor) -> Tensor:
        """A stored scale is never zero: a group of zeros takes any other."""
        value = self.stored(value)
        return torch.where(value == 0, torch.ones_like(value), value)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (weight / scale + zero).round_().clamp_(self.low, self.high)

    def error(self, weight: Tensor, scale: Tensor, zero: Tensor, power: float) -> Tensor:
        """Sum of |error| ** power in each group, [..., G, 1]."""
        back = (self.codes(weight, scale, zero) - zero) * scale
        return (weight - back).abs_().pow_(power).sum(-1, keepdim=True)

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point from the range of each group.

        Symmetric: the better of |w| <= high - center, and the extreme on the longer negative side.
        """
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        if not self.symmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = self.scale((high - low) / (self.high - self.low))
            return scale, (self.low - low / scale).round().clamp(self.low, self.high)
        zero = torch.full_like(low, self.center)
        extreme = torch.where(-low > high, low, high)
        safe = self.scale(extreme.abs() / (self.high - self.center))
        full = self.scale(extreme / (self.low - self.center))
        better = self.error(weight, full, zero, 2.0) < self.error(weight, safe, zero, 2.0)
        return torch.where(better, full, safe), zero

    def half_quadratic(self, weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Half-quadratic search from (scale, zero), keeping each group's best.

        The proximal step of |e| ** 0.7 splits off outliers, and what is left is fitted by least
        squares in zero alone (as HQQ has it) and then in scale and zero together.
        Source: Badri and Shaji, Half-Quadratic Quantization, 2023.
        """
        best = (scale, zero)
        least = self.error(weight, *best, POWER)
        if not self.symmetric:
            low = weight.amin(-1, keepdim=True)
            spread = weight.amax(-1, keepdim=True) - low
            scale = self.scale(spread / (self.high - self.low))
            zero = self.stored(self.low - low / scale)
        refits = (self._refit_both,) if self.symmetric else (self._refit_zero, self._refit_both)
        for refit in refits:
            beta = BETA
            for _ in range(STEPS):
                error = self.error(weight, scale, zero, POWER)
                better = error < least
                least = torch.where(better, error, least)
                best = (
                    torch.where(better, scale, best[0]),
                    torch.where(better, zero, best[1]),
                )
                scale, zero = self._step(weight, scale, zero, beta, refit)
                beta *= KAPPA
            scale, zero = best
        return best

    def _step(
        self,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        beta: float,
        refit: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        codes = self.codes(weight, scale, zero)
        target = weight - _shrink(weight - (codes - zero) * scale, beta)
        new_scale, new_zero = refit(codes, target, scale)
        bad = ~(new_scale.isfinite() & new_zero.isfinite()) | (new_scale == 0)
        return torch.where(bad, scale, new_scale), torch.where(bad, zero, new_zero)

    def _refit_zero(self, codes: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return scale, self.stored((codes - target / scale).mean(-1, keepdim=True))

    def _refit_both(self, codes: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Least squares of target against codes: a line, through the centre if symmetric."""
        if self.symmetric:
            codes = codes - self.center
            slope = (codes * target).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
            return self.scale(slope), torch.full_like(slope, self.center)
        code_mean, mean = codes.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
        centred = codes - code_mean
        slope = (centred * target).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
        slope = self.scale(slope)
        return slope, self.stored(code_mean - mean / slope)


# HQQ's own settings.
POWER, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal step of |e| ** POWER."""
    size = error.abs()
    return error.sign() * (size - size.pow(POWER - 1) / beta).clamp_(min=0)
