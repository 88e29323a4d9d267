"""`quantize_`: pack the weights of a model in place; `randomize_`: pack random ones."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from inductor_moe.errors import QuantizationError
from inductor_moe.quant.fit import Packed, Scheme, empty, quantize_weight
from inductor_moe.quant.modules import Slot, packed_modules, replace_parameter
from inductor_moe.quant.progress import progress
from inductor_moe.quant.torchao import is_torchao
from inductor_moe.reference.quant import CENTER
from inductor_moe.report import scaled

BITS = {"int4": 4, "int8": 8}
METHODS = ("rtn", "hqq")
FEWEST = 16  # outputs or inputs: below, a weight is not worth a launch of its own
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A weight that was left as it was, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What `quantize_` did.

    scheme            "int4, groups of 128, symmetric, rtn"
    quantized         the names of the packed weights, in the model's order
    skipped           every other weight of a Linear or of experts
    bytes_before      of the packed weights, as they were
    bytes_after       of their codes, scales and zero points
    """

    scheme: str
    quantized: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"quantised {len(self.quantized)} weights to {self.scheme}: "
            f"{scaled(self.bytes_before)}B -> {scaled(self.bytes_after)}B"
        ]
        return "\n".join(lines + lines_of(self.skipped))


def lines_of(skipped: Iterable[Skipped]) -> list[str]:
    """A line for each reason, with the first names."""
    by_reason: dict[str, list[Skipped]] = {}
    for skip in skipped:
        by_reason.setdefault(skip.reason, []).append(skip)
    lines = []
    for reason, skips in by_reason.items():
        names = ", ".join(f"{s.name} {list(s.shape)}" for s in skips[:3])
        more = f" and {len(skips) - 3} more" if len(skips) > 3 else ""
        lines.append(f"  left {len(skips)}: {reason}: {names}{more}")
    return lines


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    module: nn.Module
    leaf: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        """[..., N, K]"""
        *lead, rows, columns = self.parameter.shape
        return torch.Size([*lead, columns, rows] if self.transposed else self.parameter.shape)


def quantize_(
    model: nn.Module,
    dtype: str,
    *,
    group_size: int | None = None,
    method: str = "rtn",
    symmetric: bool | None = None,
    skip: Iterable[str] = (),
    verbose: bool = True,
) -> Quantization:
    """Pack the weights of every nn.Linear and every expert tensor of a model, in place.

    The model's code stays: each packed weight becomes a property that dequantises, and
    torch.compile(model, backend="inductor_moe") runs kernels on the packed weights. Routers,
    tied embeddings and tiny layers are left as they are.

    dtype       "int4" or "int8"
    group_size  inputs that share a scale: 16, 32 or a multiple of 64; 0 is the whole row. The
                default is 128 for int4 and 0 for int8. A row's last group may be shorter
    method      "rtn", round to nearest, or "hqq", half-quadratic search of scales and zero points
    symmetric   no zero points; the default is True for rtn and False for hqq
    skip        names of weights or modules to leave, or patterns: "lm_head", "*.down_proj"
    verbose     show progress and print what was done
    returns     what was packed, and what was left with the reason

    Memory beyond the model's own: one weight's packed form and the work on a part of it.
    Raises QuantizationError, before anything is changed.
    """
    scheme = _scheme(dtype, group_size, method, symmetric)
    return _pack(model, scheme, skip, verbose, lambda found: _quantized(found, scheme))


def randomize_(
    model: nn.Module,
    dtype: str | None,
    device: torch.device | str,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    skip: Iterable[str] = (),
    std: float = 0.02,
    seed: int = 0,
    verbose: bool = False,
) -> Quantization | None:
    """Give a model on the meta device random weights on `device`, packed ones where they can be.

    For benchmarks at full size: the unpacked weights never exist. Packed weights have mean 0 (one
    common to a whole matrix would decide what the model computes) and, by their scales, the
    standard deviation `std`; other parameters are normal with that deviation (1 for
    one-dimensional weights such as norms, 0 for biases). Buffers that are
    on the meta device are made by the modules' own code or must be filled by the caller. With
    dtype None nothing is packed, and None is returned.
    """
    generator = torch.Generator(device).manual_seed(seed)
    result = None
    if dtype is not None:
        scheme = _scheme(dtype, group_size, "rtn", symmetric)
        make = _random_codes(scheme, torch.device(device), std, generator)
        result = _pack(model, scheme, skip, verbose, make)
    _fill(model, device, std, generator)
    return result


def _random_codes(
    scheme: Scheme, device: torch.device, std: float, generator: torch.Generator
) -> Callable[[_Candidate], Packed]:
    # Codes -7..7, or -127..127, about as likely each, and 0 twice as much in int4.
    greatest = 2 ** (scheme.bits - 1) - 1
    weight = 16 if scheme.bits == 4 else 255
    spread = (greatest * (greatest + 1) * (2 * greatest + 1) / 3 / weight) ** 0.5

    def make(found: _Candidate) -> Packed:
        out = empty(found.shape, found.parameter.dtype, device, scheme)
        if scheme.bits == 4:
            out.packed.random_(-(2**15), 2**15, generator=generator)
            _centre(out.packed)
        else:
            out.packed.random_(-greatest, greatest + 1, generator=generator)
        out.scales.fill_(std / spread)
        if out.zeros is not None:
            out.zeros.fill_(CENTER if scheme.bits == 4 else 0)
        return out

    return make


def _centre(packed: Tensor) -> None:
    """Make 8, which stands for 0, of every int4 code 0, which stands for -8, in place."""
    nonzero = packed | packed >> 1
    nonzero |= nonzero >> 2
    packed |= (~nonzero & 0x1111) << 3


def _fill(
    model: nn.Module, device: torch.device | str, std: float, generator: torch.Generator
) -> None:
    """Random values for every parameter that is still on the meta device; ties stay."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                value = torch.empty_like(parameter, device=device, requires_grad=False)
                if parameter.dim() > 1:
                    value.normal_(0, std, generator=generator)
                else:
                    value.fill_(0.0 if name.endswith("bias") else 1.0)
                made[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made[parameter]


def _quantized(found: _Candidate, scheme: Scheme) -> Packed:
    weight = found.parameter.detach()
    return quantize_weight(weight.transpose(-1, -2) if found.transposed else weight, scheme)


def _scheme(dtype: str, group_size: int | None, method: str, symmetric: bool | None) -> Scheme:
    if dtype not in BITS:
        raise QuantizationError(f"dtype must be one of {', '.join(BITS)} (got {dtype!r})")
    if method not in METHODS:
        raise QuantizationError(f"method must be one of {', '.join(METHODS)} (got {method!r})")
    if group_size is None:
        group_size = 128 if dtype == "int4" else 0
    fits = isinstance(group_size, int) and (
        group_size in (0, 16, 32) or (group_size > 0 and group_size % 64 == 0)
    )
    if not fits:
        raise QuantizationError(
            f"group_size must be 0, 16, 32 or a multiple of 64 (got {group_size!r})"
        )
    if symmetric is None:
        symmetric = method == "rtn"
    return Scheme(BITS[dtype], group_size, symmetric, method)


def _pack(
    model: nn.Module,
    scheme: Scheme,
    skip: Iterable[str],
    verbose: bool,
    make: Callable[[_Candidate], Packed],
) -> Quantization:
    candidates, skipped = _select(model, (skip,) if isinstance(skip, str) else tuple(skip))
    before = after = 0
    with torch.no_grad(), progress(len(candidates), scheme.describe(), verbose) as step:
        for found in candidates:
            step(found.name)
            value = make(found)
            before += found.parameter.numel() * found.parameter.element_size()
            tensors = (value.packed, value.scales, value.zeros)
            after += sum(t.numel() * t.element_size() for t in tensors if t is not None)
            slot = Slot(
                found.leaf, scheme.bits, scheme.group_size, found.shape[-1], found.transposed
            )
            replace_parameter(found.module, slot, value)
    names = tuple(found.name for found in candidates)
    result = Quantization(scheme.describe(), names, tuple(skipped), before, after)
    if verbose:
        print(result)
    return result


def _select(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[_Candidate], list[Skipped]]:
    """The weights to pack, and the others with the reason."""
    if not isinstance(model, nn.Module):
        raise QuantizationError(f"model must be an nn.Module (got {type(model).__name__})")
    shared: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(parameter, []).append(name)
    candidates: list[_Candidate] = []
    skipped: list[Skipped] = []
    matched: set[str] = set()
    for found in _weights(model):
        pattern = next((p for p in skip if _names(p, found.name)), None)
        others = [name for name in shared[found.parameter] if name != found.name]
        reason = f"skip={pattern!r}" if pattern else _unfit(found, others)
        matched |= {pattern} if pattern else set()
        if reason is None:
            candidates.append(found)
        else:
            skipped.append(Skipped(found.name, tuple(found.parameter.shape), reason))
    unknown = [pattern for pattern in skip if pattern not in matched]
    if unknown:
        raise QuantizationError(f"skip names {unknown[0]!r}, which no weight of the model has")
    if not candidates:
        reason = "no nn.Linear and no experts"
        if next(packed_modules(model), None) is not None:
            reason = "those that can be are packed already"
        elif skipped:
            reason = f"of {skipped[0].name} and {len(skipped) - 1} more, {skipped[0].reason}"
        raise QuantizationError(f"the model has no weight to quantise: {reason}")
    return candidates, skipped


def _weights(model: nn.Module) -> Iterator[_Candidate]:
    """Weights of linear layers, and three-dimensional parameters of anything but convolutions."""
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.dtype.is_floating_point:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if isinstance(module, nn.Linear) and leaf == "weight":
                yield _Candidate(name, module, leaf, parameter, False)
            elif parameter.dim() == 3 and not _is_convolution(module):
                yield _Candidate(name, module, leaf, parameter, is_transposed(module))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def is_transposed(experts: nn.Module) -> bool:
    """Whether expert weights are [E, in, out]: as the module says, or as its two shapes show."""
    said = getattr(experts, "is_transposed", None)
    if isinstance(said, bool):
        return said
    up = next((getattr(experts, n) for n in ("gate_up_proj", "up_proj") if hasattr(experts, n)),
              None)  # fmt: skip
    down = getattr(experts, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or down.dim() != 3:
        return False
    _, first, second = up.shape
    _, rows, columns = down.shape
    straight = second == rows and first in (columns, 2 * columns)
    return first == columns and second in (rows, 2 * rows) and not straight


def _names(pattern: str, name: str) -> bool:
    module = name.rpartition(".")[0]
    return any(
        fnmatch.fnmatchcase(candidate, pattern)
        or candidate.endswith("." + pattern)
        or candidate == pattern
        for candidate in (name, module)
    )


def _unfit(found: _Candidate, others: list[str]) -> str | None:
    """Why a weight is not packed, or None."""
    if is_torchao(found.parameter):
        return f"a {type(found.parameter).__name__} of torchao; repack_ converts it"
    if others:
        return f"tied to {others[0]}, which is no linear layer's alone"
    if min(found.shape[-2:]) < FEWEST:
        return f"fewer than {FEWEST} inputs or outputs"
    parts = found.name.split(".")
    if any(part in ROUTERS for part in parts[-3:-1]):
        return "routers stay as they are"
    return None
