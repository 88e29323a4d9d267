"""Packaging with AOTInductor: the same rewrites as under torch.compile."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from inductor_moe import compat
from inductor_moe import report as reporting
from inductor_moe.aoti import audit
from inductor_moe.backend import check_strict, make_pass
from inductor_moe.config import parse
from inductor_moe.errors import ExportError
from inductor_moe.files import unwritable


def inductor_configs(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Inductor config patches with our pass in them, for PyTorch's own packaging functions.

    options  ours (``inductor_moe.*``) and Inductor's, mixed, as for torch.compile
    returns  a new dict, for ``torch._inductor.aoti_compile_and_package(inductor_configs=...)``;
             use it for one package: the pass in it collects the report of one compile
    """
    return fused_configs(options)[0]


def aoti_compile_and_package(
    exported_program: ExportedProgram,
    *,
    package_path: str | os.PathLike[str] | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """PyTorch's function of this name, with MoE and delta-rule sites fused.

    exported_program  from torch.export.export, with static or dynamic shapes
    package_path      where to write the .pt2; its path is returned
    inductor_configs  Inductor's settings, as in PyTorch's function
    options           ours (``inductor_moe.*``), and Inductor's too
    The report is appended to inductor_moe.reports(). Raises StrictError under ``strict``,
    PackageError if the package would need Python.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise ExportError(
            f"aoti_compile_and_package: exported_program is a {type(exported_program).__name__}; "
            "it must be an ExportedProgram, which torch.export.export makes of a model"
        )
    check_path("aoti_compile_and_package", package_path)
    patches, fusion, ours = fused_configs({**(inductor_configs or {}), **(options or {})})
    path = compat.aoti_compile_and_package(exported_program, package_path, patches)
    report = reporting.merge(fusion.reports)
    reporting.record(report)
    if ours.strict:
        check_strict(report)
    audit.check_package(path, fusion.origins)
    return path


def check_path(function: str, path: Any) -> None:
    """Raise ExportError where a package cannot be written, before it is compiled."""
    reason = unwritable(path) if isinstance(path, (str, os.PathLike)) else None
    if reason is not None:
        raise ExportError(f"{function}: package_path: {reason}")


def fused_configs(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], Any, Any]:
    """Inductor's patches with our pass in them, the pass, our options."""
    ours, inductor = parse(options)
    patches = compat.inductor_config(None, inductor)
    return patches, make_pass(ours, patches), ours
