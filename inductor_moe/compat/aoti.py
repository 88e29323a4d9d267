"""AOTInductor: compiling methods, PT2 archives, loading them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from inductor_moe.compat.passes import keep_matmuls


def aoti_compile_and_package(
    exported_program: Any, package_path: Any, config_patches: Mapping[str, Any]
) -> str:
    """PyTorch's packaging, with config patches."""
    import torch._inductor as module

    path = None if package_path is None else os.fspath(package_path)
    with keep_matmuls(exported_program.graph):
        return module.aoti_compile_and_package(
            exported_program, package_path=path, inductor_configs=dict(config_patches)
        )


def aoti_compile(
    exported_program: Any, config_patches: Mapping[str, Any]
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """AOTInductor's files for a package, without the constants, and the constants by name."""
    import torch._inductor as module

    arguments, keywords = exported_program.example_inputs
    patches = {
        **config_patches,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    program = _share_buffers(exported_program)
    with keep_matmuls(exported_program.graph):
        found: Any = module.aot_compile(program, arguments, keywords, options=patches)
    files = [item for item in found if isinstance(item, str) and item]
    constants: dict[str, torch.Tensor] = {}
    for item in found:
        if isinstance(item, str):
            continue
        for name, (tensor, properties) in item.items():
            constants[name] = torch.as_strided(
                tensor, tuple(properties.shape), tuple(properties.stride), properties.offset
            )
    return files, constants


def _share_buffers(exported_program: Any) -> torch.fx.GraphModule:
    """The program as a module, the buffers that it does not change as parameters.

    AOTInductor copies every buffer, because tracing could change it: packed weights would be in
    memory twice.
    """
    program: torch.fx.GraphModule = exported_program.module(check_guards=False)
    changed = set(exported_program.graph_signature.buffers_to_mutate.values())
    for path, buffer in list(program.named_buffers(remove_duplicate=False)):
        if path in changed:
            continue
        parent, _, name = path.rpartition(".")
        owner = program.get_submodule(parent)
        del owner._buffers[name]
        owner.register_parameter(name, torch.nn.Parameter(buffer, requires_grad=False))
    return program


@functools.cache
def keep_array_scopes() -> None:
    """Have the C++ of a package declare sizes and strides wherever it uses them. Idempotent.

    The generator looks for a declaration by the `id` of the method that writes it. Before torch
    2.13 this is a bound method that dies with the call, and one of another buffer may be born at
    its address: by chance, the C++ names an array of another scope and does not compile. So the
    first such method of each buffer is kept, and stands for those that come later.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    declare = CppWrapperCpu.codegen_int_array_var

    @functools.wraps(declare)
    def codegen_int_array_var(
        self: Any, int_array: str, writeline: Callable[..., None], *args: Any, **kwargs: Any
    ) -> str:
        target = id(getattr(writeline, "__self__", writeline))
        kept = vars(self).setdefault("_inductor_moe_writers", {}).setdefault(target, writeline)
        return declare(self, int_array, kept, *args, **kwargs)

    CppWrapperCpu.codegen_int_array_var = codegen_int_array_var  # type: ignore[method-assign]


def write_pt2(path: Path, files: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Write a PT2 archive: compiled files by method, and records of text or of a storage."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    with PT2ArchiveWriter(str(path)) as writer:
        for method, paths in files.items():
            for file in paths:
                name = f"data/aotinductor/{method}/{os.path.basename(file)}"
                writer.write_file(name, file)
        for name, content in records.items():
            if isinstance(content, str):
                writer.write_string(name, content)
            else:
                storage = content.cpu()
                writer.archive_file.write_record(name, storage, storage.nbytes())


def pt2_reader(path: Path) -> Any:
    """A reader of a PT2 archive: get_all_records, get_record, get_record_offset."""
    return torch._C.PyTorchFileReader(str(path))


def load_method(path: Path, name: str, device_index: int) -> Any:
    """AOTInductor's loader of one method of a package.

    Single-threaded, because the loader's own events cannot be captured in a CUDA graph.
    """
    aoti: Any = torch._C._aoti
    return aoti.AOTIModelPackageLoader(str(path), name, True, 1, device_index)


def op_overload_type() -> Any:
    """The class of the ops in a graph."""
    return torch._ops.OpOverload


def is_python_op(name: str) -> bool:
    """Whether this process knows Python kernels of an op ("namespace::name")."""
    from torch._library.custom_ops import OPDEFS

    if name in OPDEFS:
        return True
    prefix = name.replace("::", "/") + "/"
    keys = ("CPU", "CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    implemented: Any = getattr(torch.library, "_impls", ())
    return any(key.startswith(prefix) and key.endswith(keys) for key in implemented)


def compute_capability(device: torch.device) -> str:
    """ "9.0" and the like for a GPU, "" for another device."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
