"""Norm and rotary embedding become machine code for each architecture, with a cache or without."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from kernels.generated import Drawn, source
from kernels.test_moe_offline_compile import GPUS, H100, Recorder, compile_all
from triton import compile
from triton.backends.compiler import GPUTarget

from inductor_moe.ops.attention import attention_decode
from inductor_moe.ops.norm_rope import norm_rope_cache, norm_rope_cache_cuda, norm_rope_cuda

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux",
    reason="needs Triton's compiler",
)

SHAPES = {"qwen3_5": (1, 16, 2, 256, 64), "qwen3": (4, 32, 4, 128, 128)}


def record(shape, cache):
    batch, heads, kv_heads, dim, rotated = SHAPES[shape]

    def empty(*sizes, dtype=torch.bfloat16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    launches = {}
    q, k, v = empty(batch, heads, dim), empty(batch, kv_heads, dim), empty(batch, kv_heads, dim)
    rest = (empty(dim), empty(dim), 1e-6, 1.0, empty(rotated), empty(rotated))
    if cache:
        caches = [empty(batch, kv_heads, 2048, dim) for _ in range(2)]
        position = empty(1, dtype=torch.int64)
        norm_rope_cache_cuda(q, k, v, *rest, *caches, position, wrap=Recorder(launches))
    else:
        norm_rope_cuda(q, k, *rest, wrap=Recorder(launches))
    assert len(launches) == 1
    return launches


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compile_without_spills(shape, cache, gpu):
    compile_all(record(shape, cache), gpu)


@pytest.mark.parametrize("cache", [False, True])
def test_a_position_outside_the_cache_fails_in_a_graph(cache):
    # Inductor compiles every kernel with debug, for the checks of its own indexing.
    ((source, options),) = record("qwen3_5", cache).values()
    major, minor = H100.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    code = compile(source, target=target, options={**options, "debug": True}).asm["ttir"]
    assert ("norm_rope_cache: the position is outside the cache" in code) == cache


def test_attention_reads_the_caches_after_they_are_written():
    drawn = Drawn(2, 8, 4)
    caches = [drawn.tensor(1, 2, 2048, 64) for _ in range(2)]
    rows = [drawn.tensor(1, n, 64) for n in (8, 2, 2)]
    tables = [drawn.tensor(64) for _ in range(2)]

    def run(q, k, v, cos, sin, keys, values, position):
        q = norm_rope_cache(q, k, v, None, None, 0.0, 0.0, cos, sin, keys, values, position)
        return attention_decode(q, keys, values, None, 0.125)

    tensors = [*rows, *tables, *caches, drawn.tensor(1, dtype=torch.int64)]
    code = source(drawn, run, tensors, package=False)
    launched = re.findall(r"(\w+?)_\d+\.run\((.*)\)", code)
    names = [name for name, _ in launched]
    assert names == ["norm_rope_kernel", "attention_decode_kernel", "attention_combine_kernel"]
    written, read = (text.split(", ") for _, text in launched[:2])
    assert [written[7], written[9]] == read[1:3]
