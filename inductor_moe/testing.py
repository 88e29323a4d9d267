"""What tests of models and kernels share: error measures."""

from __future__ import annotations

import torch

from inductor_moe.capture.graphs import capture, graph_backend


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64; NaN if value holds one."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-300))


__all__ = ["capture", "graph_backend", "relative_error"]
