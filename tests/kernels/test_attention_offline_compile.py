"""The decode attention kernels become machine code for each architecture without spills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.test_moe_offline_compile import GPUS, POINTERS, Recorder, compile_all, pytestmark

from inductor_moe.attention_tiles import choose_attention_tile
from inductor_moe.ops.attention import attention_decode_cuda

__all__ = ["pytestmark"]

SHAPES = {
    "qwen3_5": (1, 16, 2, 2048, 256, 256, torch.bfloat16, torch.bool),
    "qwen3": (16, 32, 4, 32768, 128, 128, torch.bfloat16, torch.bool),
    "olmoe": (1, 16, 16, 512, 128, 128, torch.bfloat16, torch.bool),
    "deepseek_v3": (1, 128, 128, 2048, 192, 128, torch.bfloat16, torch.bfloat16),
    "wide group": (4, 128, 1, 8192, 256, 256, torch.bfloat16, None),
    "fp32": (1, 16, 2, 2048, 256, 256, torch.float32, torch.float32),
}

QUICK = ("qwen3_5", "wide group", "fp32")


def record(shape: str, gpu: Any, launches: dict[str, Any], gated: bool) -> None:
    batch, heads, kv_heads, length, dim, value_dim, dtype, mask_dtype = SHAPES[shape]

    def empty(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    tile = choose_attention_tile(
        batch=batch, kv_heads=kv_heads, group=heads // kv_heads, length=length,
        dim=max(dim, value_dim), itemsize=dtype.itemsize, gpu=gpu,
    )  # fmt: skip
    attention_decode_cuda(
        empty(batch, heads, dim),
        empty(batch, kv_heads, length, dim),
        empty(batch, kv_heads, length, value_dim),
        empty(batch, 1, 1, length, of=mask_dtype) if mask_dtype else None,
        0.125,
        empty(batch, heads, value_dim) if gated else None,
        tile=tile,
        wrap=Recorder(launches),
    )


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize(
    "shape",
    [shape if shape in QUICK else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES],
)
@pytest.mark.parametrize("gated", [False, True])
def test_kernels_compile_without_spills(monkeypatch, gated, shape, gpu):
    monkeypatch.setitem(POINTERS, torch.bool, "*i1")
    launches: dict[str, Any] = {}
    record(shape, gpu, launches, gated)
    assert launches
    compile_all(launches, gpu)
