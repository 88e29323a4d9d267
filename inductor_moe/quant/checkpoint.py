"""Packed models on disk: one safetensors file, which loads without unpacked weights existing."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn

from inductor_moe.errors import QuantizationError
from inductor_moe.quant.fit import Packed
from inductor_moe.quant.modules import SUFFIXES, Slot, packed_modules, replace_parameter

KEY, VERSION = "inductor_moe.quantized", 1


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write every parameter and persistent buffer of a model packed by `quantize_` to one file.

    Tied tensors are written once. Raises QuantizationError if nothing is packed.
    """
    from safetensors.torch import save_file

    slots = [{"module": path_, **_fields(slot)} for path_, _, slot in packed_modules(model)]
    if not slots:
        raise QuantizationError("the model has no packed weights; call quantize_ first")
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            ties[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    description = {"version": VERSION, "slots": slots, "ties": ties}
    save_file(tensors, os.fspath(path), metadata={KEY: json.dumps(description)})


def load_quantized(
    model: nn.Module, path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a file of `save_quantized` into a model, in place, and return it.

    model   built like the saved one, best under `with torch.device("meta")`: its unpacked
            weights are dropped without ever being needed
    device  where the tensors go

    Buffers that no checkpoint holds (rotary frequencies) are left as they are; if they are on the
    meta device, make them before use. Raises QuantizationError if model and file do not fit.
    """
    with _opened(path, device) as file:
        description = _description(file.metadata(), path)
        names = set(file.keys())
        _check(model, description, names, path)
        by_module: dict[str, list[Slot]] = {}
        for entry in description["slots"]:
            fields = dict(entry)
            by_module.setdefault(fields.pop("module"), []).append(Slot(**fields))
        for where, slots in by_module.items():
            module = model.get_submodule(where)
            for slot in slots:
                base = f"{where}.{slot.name}" if where else slot.name
                keys = [f"{base}_{suffix}" for suffix in SUFFIXES]
                values = [file.get_tensor(key) if key in names else None for key in keys]
                replace_parameter(module, slot, Packed(*values))  # type: ignore[arg-type]
                names -= set(keys)
        for name in names:
            _assign(model, name, file.get_tensor(name))
    for name, source in description["ties"].items():
        _tie(model, name, source)
    return model


def _opened(path: str | os.PathLike[str], device: torch.device | str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(os.fspath(path), framework="pt", device=str(device))
    except SafetensorError as error:
        raise QuantizationError(
            f"{path} cannot be read to device {str(device)!r}: {error}"
        ) from error


def _fields(slot: Slot) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(slot)


def _description(metadata: dict[str, str] | None, path: Any) -> dict[str, Any]:
    text = (metadata or {}).get(KEY)
    if text is None:
        raise QuantizationError(f"{path} is no file of save_quantized: it has no {KEY!r} metadata")
    description: dict[str, Any] = json.loads(text)
    if description["version"] != VERSION:
        raise QuantizationError(
            f"{path} has version {description['version']}; this package reads {VERSION}"
        )
    return description


def _check(model: nn.Module, description: dict[str, Any], names: set[str], path: Any) -> None:
    """Raise before anything is changed if the file has other tensors than the model."""
    packed = set()
    wanted = set(model.state_dict())
    for entry in description["slots"]:
        base = f"{entry['module']}.{entry['name']}" if entry["module"] else entry["name"]
        if base not in wanted:
            raise QuantizationError(f"{path} holds {base}, which the model does not have")
        wanted.discard(base)
        packed |= {f"{base}_{suffix}" for suffix in SUFFIXES}
    held = (names - packed) | set(description["ties"])
    if held != wanted:
        missing, extra = sorted(wanted - held)[:3], sorted(held - wanted)[:3]
        raise QuantizationError(
            f"{path} does not fit the model: missing {missing}, unknown {extra}"
        )


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    where, _, leaf = name.rpartition(".")
    module = model.get_submodule(where)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        if old is not None and old.shape != value.shape:
            raise QuantizationError(
                f"{name} has shape {list(value.shape)} in the file and {list(old.shape)} in the "
                "model"
            )
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _tie(model: nn.Module, name: str, source: str) -> None:
    where, _, leaf = name.rpartition(".")
    into = model.get_submodule(where)
    from_where, _, from_leaf = source.rpartition(".")
    origin = model.get_submodule(from_where)
    if leaf in into._parameters:
        into._parameters[leaf] = origin._parameters[from_leaf]
    else:
        into._buffers[leaf] = origin._buffers[from_leaf]
