"""Where the Triton kernels serve an op; elsewhere PyTorch's own ops compute."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_moe import compat

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKED_KERNEL_DTYPES = KERNEL_DTYPES[:2]  # of activations that meet packed weights
FLOATS = (*KERNEL_DTYPES, torch.float64)


def kernels_serve(
    x: Tensor, *others: Tensor | None, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
) -> bool:
    """Whether kernels run on x's device, and take x and the others in their dtypes."""
    given = all(tensor is None or tensor.dtype in dtypes for tensor in (x, *others))
    return given and compat.runs_triton_kernels(x.device)
