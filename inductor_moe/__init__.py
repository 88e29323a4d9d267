"""Fused Mixture-of-Experts and delta-rule layers for unmodified PyTorch models.

torch.compile(model, backend="inductor_moe")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inductor_moe.aoti.generation import export_generation
    from inductor_moe.aoti.packaging import aoti_compile_and_package, inductor_configs
    from inductor_moe.aoti.runner import load_generation
    from inductor_moe.bisection import bisect
    from inductor_moe.capture.delta_rule import capture_for_export
    from inductor_moe.compiling import compile
    from inductor_moe.explanation import explain
    from inductor_moe.parallel import Parallelization, parallelize
    from inductor_moe.quant.checkpoint import load_quantized, save_quantized
    from inductor_moe.quant.codes import unpack_codes
    from inductor_moe.quant.ingest import Repacking, repack_, replace_weight
    from inductor_moe.quant.quantize import Quantization, quantize_, randomize_
    from inductor_moe.report import Report, Site, reports

__version__ = "0.1.0"

# Resolved on first use, so that importing the package costs nothing.
_HOME = {
    "aoti_compile_and_package": "inductor_moe.aoti.packaging",
    "inductor_configs": "inductor_moe.aoti.packaging",
    "Parallelization": "inductor_moe.parallel",
    "Quantization": "inductor_moe.quant.quantize",
    "export_generation": "inductor_moe.aoti.generation",
    "load_generation": "inductor_moe.aoti.runner",
    "capture_for_export": "inductor_moe.capture.delta_rule",
    "Repacking": "inductor_moe.quant.ingest",
    "Report": "inductor_moe.report",
    "Site": "inductor_moe.report",
    "bisect": "inductor_moe.bisection",
    "compile": "inductor_moe.compiling",
    "explain": "inductor_moe.explanation",
    "load_quantized": "inductor_moe.quant.checkpoint",
    "parallelize": "inductor_moe.parallel",
    "quantize_": "inductor_moe.quant.quantize",
    "randomize_": "inductor_moe.quant.quantize",
    "repack_": "inductor_moe.quant.ingest",
    "replace_weight": "inductor_moe.quant.ingest",
    "save_quantized": "inductor_moe.quant.checkpoint",
    "unpack_codes": "inductor_moe.quant.codes",
    "reports": "inductor_moe.report",
}

__all__ = [
    "Parallelization",
    "Quantization",
    "Repacking",
    "Report",
    "Site",
    "__version__",
    "aoti_compile_and_package",
    "bisect",
    "capture_for_export",
    "compile",
    "explain",
    "export_generation",
    "inductor_configs",
    "load_generation",
    "load_quantized",
    "parallelize",
    "quantize_",
    "randomize_",
    "repack_",
    "replace_weight",
    "reports",
    "save_quantized",
    "unpack_codes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'inductor_moe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
