"""A packed weight inside a module: buffers, and a property that is the weight.

The module's class becomes a subclass of itself in which the weight's name is a property. Its value
is `inductor_moe::dequantize` of the buffers, so that the forward code stays as it is: run eagerly
it dequantises at each use, compiled with our backend the op is matched with what uses it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from inductor_moe.ops.quant import dequantize
from inductor_moe.quant.fit import Packed

SUFFIXES = ("packed", "scales", "zeros")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One packed weight of a module.

    name         the parameter that it replaces
    bits         4 or 8
    group_size   inputs that share a scale; 0 is one group a row
    in_features  inputs of a row
    transposed   the forward code sees [..., K, N], as gpt-oss stores its experts
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    transposed: bool


def slots_of(module: nn.Module) -> tuple[Slot, ...]:
    """The packed weights of a module itself, its children not counted."""
    return getattr(type(module), "inductor_moe_slots", ())


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """(path of the module, module, slot) of every packed weight of a model."""
    for path, module in model.named_modules():
        for slot in slots_of(module):
            yield path, module, slot


def replace_parameter(module: nn.Module, slot: Slot, value: Packed) -> None:
    """Put packed buffers in the place of a parameter, buffer or packed weight `slot.name`."""
    for held in (module._parameters, module._buffers, module.__dict__):
        held.pop(slot.name, None)
    module._non_persistent_buffers_set.discard(slot.name)
    for suffix in SUFFIXES:
        module.register_buffer(f"{slot.name}_{suffix}", getattr(value, suffix))
    others = (other for other in slots_of(module) if other.name != slot.name)
    slots = (*others, slot)
    base = getattr(type(module), "inductor_moe_base", type(module))
    module.__class__ = _with_slots(base, slots)  # type: ignore[arg-type]


@functools.cache
def _with_slots(base: type[nn.Module], slots: tuple[Slot, ...]) -> type[nn.Module]:
    names: dict[str, Any] = {slot.name: property(_reader(slot)) for slot in slots}
    names |= {"inductor_moe_slots": slots, "inductor_moe_base": base}
    names |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), names)


def _reader(slot: Slot) -> Any:
    packed, scales, zeros = (f"{slot.name}_{suffix}" for suffix in SUFFIXES)
    group_size, in_features, transposed = slot.group_size, slot.in_features, slot.transposed

    def weight(self: nn.Module) -> Tensor:
        buffers = self._buffers
        value: Tensor = dequantize(
            buffers[packed], buffers[scales], buffers[zeros], group_size, in_features
        )
        return value.transpose(-1, -2) if transposed else value

    weight.__doc__ = f"{slot.name}, dequantised from its {slot.bits}-bit codes."
    return weight


def buffers_of(module: nn.Module, slot: Slot) -> Packed:
    """The buffers of a packed weight."""
    return Packed(*(module._buffers[f"{slot.name}_{suffix}"] for suffix in SUFFIXES))  # type: ignore[arg-type]
