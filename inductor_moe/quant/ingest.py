"""Weights that were quantised elsewhere: into the packed layout, with the same codes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inductor_moe.errors import QuantizationError
from inductor_moe.quant.codes import Codes
from inductor_moe.quant.fit import Packed
from inductor_moe.quant.modules import Slot, replace_parameter, slots_of
from inductor_moe.quant.progress import progress
from inductor_moe.quant.quantize import Skipped, is_transposed, lines_of
from inductor_moe.quant.torchao import Unreadable, is_torchao, read
from inductor_moe.reference.quant import group_count

RANGES = {4: (0, 15), 8: (-128, 127)}


@dataclasses.dataclass(frozen=True)
class Repacking:
    """What `repack_` did.

    repacked  the names of the repacked weights in the model's order, and how each is stored
    skipped   the weights of torchao that were left as they were, and why
    """

    repacked: dict[str, str]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        kinds = Counter(self.repacked.values())
        stored = "; ".join(f"{count} in {kind}" for kind, count in kinds.items())
        line = f"repacked {len(self.repacked)} weights of torchao" + (f": {stored}" * bool(kinds))
        return "\n".join([line, *lines_of(self.skipped)])


def repack_(model: nn.Module, *, verbose: bool = True) -> Repacking:
    """Convert the weights that torchao quantised to the layout of our kernels, in place.

    Codes, scales and zero points stay what they are, so that the model computes with the same
    weights. Read are the integer weights of torchao's Int4WeightOnlyConfig (plain, tile-packed,
    and the CPU's own layout), Int8WeightOnlyConfig and IntxWeightOnlyConfig, of linear layers and
    of experts [E, N, K]; not those whose activations are quantised too. Scales are rounded to the
    weight's dtype where torchao keeps them in fp32; zero points are kept in fp32 where that dtype
    would round them.

    verbose  show progress and print what was done
    returns  what was repacked, and what was left with the reason

    One weight at a time; memory beyond the model's own is a few times that weight's codes.
    Raises QuantizationError if the model has no weight of torchao.
    """
    if not isinstance(model, nn.Module):
        raise QuantizationError(f"model must be an nn.Module (got {type(model).__name__})")
    found = list(_weights(model))
    if not found:
        raise QuantizationError(
            "the model has no weight of torchao; quantize_ packs float weights, and "
            "replace_weight takes integer codes"
        )
    # Before the first replacement: it reads the shapes of all weights of a module.
    transposed = {module: is_transposed(module) for _, module, _ in found}
    repacked: dict[str, str] = {}
    skipped: list[Skipped] = []
    done: dict[int, tuple[nn.Parameter, Packed, Slot, str]] = {}
    shared = Counter(id(module._parameters[leaf]) for _, module, leaf in found)
    with torch.no_grad(), progress(len(found), "repacking", verbose) as step:
        for name, module, leaf in found:
            step(name)
            weight = module._parameters[leaf]
            assert weight is not None
            try:
                if id(weight) in done:
                    _, packed, slot, kind = done[id(weight)]
                    slot = dataclasses.replace(slot, name=leaf)
                else:
                    codes = _read(module, weight, transposed[module])
                    packed, kind = codes.pack(), codes.describe()
                    slot = Slot(leaf, codes.bits, codes.group_size, codes.codes.shape[-1], False)
                    if shared[id(weight)] > 1:
                        done[id(weight)] = (weight, packed, slot, kind)
            except Unreadable as error:
                skipped.append(Skipped(name, tuple(weight.shape), str(error)))
                continue
            replace_parameter(module, slot, packed)
            # torchao's own description of the module reads its weight.
            module.__dict__.pop("extra_repr", None)
            repacked[name] = kind
    result = Repacking(repacked, tuple(skipped))
    if verbose:
        print(result)
    return result


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if is_torchao(parameter):
                yield f"{path}.{leaf}" if path else leaf, module, leaf


def _read(module: nn.Module, weight: Tensor, transposed: bool) -> Codes:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise Unreadable("rows of an embedding are looked up, not multiplied")
    if weight.dim() not in (2, 3) or isinstance(module, nn.modules.conv._ConvNd):
        raise Unreadable("neither a linear layer's weight [N, K] nor experts [E, N, K]")
    if weight.dim() == 3 and transposed:
        raise Unreadable("experts stored [E, in, out], whose groups run along the outputs")
    return read(weight)


def replace_weight(
    module: nn.Module,
    name: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int,
    transposed: bool = False,
) -> None:
    """Give a module a packed weight made of integer codes: (codes - zeros) * scales.

    Afterwards `module.<name>` is a property that dequantises; a linear layer or experts that
    multiply by it run on the packed weight under this backend.

    module      a parameter, buffer or attribute of that name is replaced; it may be on the meta
                device, and it may not exist
    codes       [..., N, K]  integers, K the input dim: 0 to 15 for 4 bits, -128 to 127 for 8;
                `unpack_codes` reads them out of bytes and words
    scales      [..., N, G]  bf16, fp16 or fp32, which becomes the weight's dtype; one for each
                group of inputs, G = ceil(K / group_size)
    zeros       [..., N, G]  integers or floats; None is 8 for 4 bits and 0 for 8
    bits        4 or 8
    group_size  inputs that share a scale: 16, 32 or a multiple of 64; 0 is the whole row
    transposed  the module's code reads the weight as [..., K, N]

    The tensors are copied. Raises QuantizationError, naming the argument, before anything changes.
    """
    if not isinstance(module, nn.Module):
        raise QuantizationError(f"module must be an nn.Module (got {type(module).__name__})")
    _check_codes(codes, bits)
    _check_groups(codes, scales, zeros, group_size)
    _check_place(module, name, codes, transposed)
    with torch.no_grad():
        packed = Codes(codes, scales, zeros, bits, group_size).pack()
    replace_parameter(module, Slot(name, bits, group_size, codes.shape[-1], transposed), packed)


def _check_codes(codes: Tensor, bits: int) -> None:
    if bits not in RANGES:
        raise QuantizationError(f"bits is {bits!r}; it must be 4 or 8")
    if codes.is_floating_point() or codes.dtype == torch.bool or codes.dim() < 2:
        raise QuantizationError(
            f"codes has shape {list(codes.shape)} and dtype {codes.dtype}; it must be integers "
            "[..., N, K]"
        )
    if codes.numel() == 0:
        raise QuantizationError(f"codes has shape {list(codes.shape)}; it is empty")
    low, high = RANGES[bits]
    least, most = int(codes.min()), int(codes.max())
    if least < low or most > high:
        shift = "add 8 to" if bits == 4 else "subtract 128 from"
        raise QuantizationError(
            f"codes has values from {least} to {most}; {bits}-bit codes are {low} to {high}: for "
            f"codes with another origin {shift} codes and zeros"
        )


def _check_groups(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> None:
    if group_size not in (0, 16, 32) and (group_size < 0 or group_size % 64):
        raise QuantizationError(
            f"group_size is {group_size}; it must be 0, 16, 32 or a multiple of 64"
        )
    expected = [*codes.shape[:-1], group_count(codes.shape[-1], group_size)]
    for name, value in (("scales", scales), ("zeros", zeros)):
        if value is None:
            continue
        if list(value.shape) != expected:
            raise QuantizationError(
                f"{name} has shape {list(value.shape)}; it must be {expected}: one for each group "
                f"of {group_size or codes.shape[-1]} of {codes.shape[-1]} inputs"
            )
        if value.device != codes.device:
            raise QuantizationError(f"{name} is on {value.device}, codes on {codes.device}")
    if scales.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise QuantizationError(f"scales has dtype {scales.dtype}; it must be a float")


def _check_place(module: nn.Module, name: str, codes: Tensor, transposed: bool) -> None:
    if not name.isidentifier():
        raise QuantizationError(f"name is {name!r}; it must be the name of an attribute")
    if name in module._modules or any(slot.name == name for slot in slots_of(module)):
        raise QuantizationError(f"name is {name!r}, which is a submodule or packed already")
    parameter = module._parameters.get(name)
    *lead, rows, columns = codes.shape
    expected = [*lead, columns, rows] if transposed else [*lead, rows, columns]
    if parameter is not None and list(parameter.shape) != expected:
        raise QuantizationError(
            f"codes has shape {list(codes.shape)}, a weight {expected}; {name} has shape "
            f"{list(parameter.shape)}"
        )
