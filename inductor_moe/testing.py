"""What tests of models and kernels share: error measures."""

from __future__ import annotations

import torch

from inductor_moe.capture.graphs import capture, graph_backend
from inductor_moe.patterns import ALL
from inductor_moe.report import Report


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64; NaN if value holds one."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-300))


def fused_layers(report: Report) -> dict[str, int]:
    """The matched sites per op of a report, without the ops of optional rewrites alone."""
    kept = {rewrite.op for rewrite in ALL if not rewrite.optional}
    return {op: count for op, count in report.counts().items() if op in kept}


__all__ = ["capture", "fused_layers", "graph_backend", "relative_error"]
