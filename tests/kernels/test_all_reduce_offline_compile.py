"""The sum over ranks compiles for each architecture without spills."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from kernels.test_moe_offline_compile import GPUS, Recorder, compile_all

from inductor_moe.ops.all_reduce import PROGRAMS, SharedMemory, all_reduce_cuda
from inductor_moe.ops.dispatch import KERNEL_DTYPES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux",
    reason="needs Triton's compiler",
)


def record(ranks: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """The launch of a rank."""
    memory = SharedMemory(
        ranks - 1, ranks,
        torch.empty(ranks, dtype=torch.int64, device="meta"),
        torch.empty(PROGRAMS, dtype=torch.int32, device="meta"),
        600.0,
    )  # fmt: skip
    launches: dict[str, Any] = {}
    x = torch.empty(count, dtype=dtype, device="meta")
    out = all_reduce_cuda(x, memory, wrap=Recorder(launches))
    assert out.shape == x.shape and out.dtype == dtype and len(launches) == 1
    return launches


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
def test_it_compiles_without_spills(gpu):
    for dtype in KERNEL_DTYPES:
        compile_all(record(2, 2048, dtype), gpu)
    compile_all(record(8, 131072, torch.bfloat16), gpu)


def test_no_program_has_more_words_than_room():
    from inductor_moe.ops.all_reduce import MAX_BYTES, ROOM

    ((source, options),) = record(2, MAX_BYTES // 4, torch.float32).values()
    names = [source.fn.arg_names[place] for (place,) in source.constants]
    assert dict(zip(names, source.constants.values(), strict=True))["BLOCK"] == ROOM
    assert options["num_warps"] == 32
