"""The attention kernels become machine code for each architecture without spills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.test_moe_offline_compile import GPUS, POINTERS, Recorder, compile_all, pytestmark

from inductor_moe.attention_tiles import choose_attention_tile, choose_prompt_tile
from inductor_moe.ops.attention import attention_decode_cuda
from inductor_moe.ops.attention_prompt import attention_prompt_cuda

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


PROMPTS = {
    "qwen3_5": (1, 16, 2, 2048, 4160, 256, 256),
    "qwen3_5, short": (1, 16, 2, 100, 4160, 256, 256),
    "qwen3_5, shorter": (1, 16, 2, 20, 4161, 256, 256),
    "qwen3": (16, 32, 4, 2048, 32768, 128, 128),
    "qwen3, short": (1, 32, 4, 100, 2048, 128, 128),
    "gpt_oss": (1, 64, 8, 2048, 2112, 64, 64),
    "deepseek_v3": (1, 128, 128, 2048, 2048, 192, 128),
    "odd dims": (1, 12, 4, 2048, 2048, 96, 80),
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize(
    "shape",
    [s if s in ("qwen3_5", "qwen3") else pytest.param(s, marks=pytest.mark.slow) for s in PROMPTS],
)
def test_prompt_kernels_compile_without_spills(monkeypatch, shape, gpu):
    batch, heads, kv_heads, queries, length, dim, value_dim = PROMPTS[shape]
    monkeypatch.setitem(POINTERS, torch.bool, "*i1")
    monkeypatch.setitem(POINTERS, torch.int8, "*i8")

    def empty(*sizes: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    launches: dict[str, Any] = {}
    attention_prompt_cuda(
        empty(batch, heads, queries, dim),
        empty(batch, kv_heads, length, dim),
        empty(batch, kv_heads, length, value_dim),
        empty(batch, 1, queries, length, of=torch.bool),
        0.0625,
        tile=choose_prompt_tile(
            programs=batch * heads, queries=queries, dim=max(dim, value_dim), gpu=gpu
        ),
        wrap=Recorder(launches),
    )
    assert len(launches) == 2
    compile_all(launches, gpu)
