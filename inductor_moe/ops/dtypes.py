"""The dtypes of activations: those that kernels serve, and those that ops take."""

from __future__ import annotations

import torch

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*KERNEL_DTYPES, torch.float64)  # without a kernel, PyTorch's own ops compute
