"""The kernels on packed weights compile for each architecture: no spills, few instructions."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernels.test_moe_offline_compile import GPUS, H100, POINTERS, Recorder, assert_fits
from triton.backends.compiler import GPUTarget

from inductor_moe.ops.merged_linear_cuda import merged_linear_cuda
from inductor_moe.ops.quant_cuda import moe_experts_quantized_cuda, quantized_linear_cuda
from inductor_moe.quant.fit import Scheme, empty
from inductor_moe.quant_tiles import (
    PartsTile,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedPlan,
    VectorTile,
    choose_int8_plan,
    choose_quantized_plan,
    linear_by_rule,
    widens,
)
from inductor_moe.tiles import GemmTile, generic_gpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or sys.platform != "linux",
    reason="needs Triton's compiler",
)
META = torch.device("meta")
POINTERS |= {torch.int16: "*i16", torch.int8: "*i8", torch.float16: "*fp16"}
PARTS = PartsTile(16, 128, 8, 4, 3)
SCHEMES = {
    "int4": Scheme(4, 128, True, "rtn"),
    "int4 zeros": Scheme(4, 64, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}


def record_experts(
    scheme: Scheme, tokens: int, gpu: Any, dtype: Any = torch.bfloat16, int8: bool = False
) -> dict:
    launches: dict[str, Any] = {}
    up = empty(torch.Size([256, 1024, 2048]), dtype, META, scheme)
    down = empty(torch.Size([256, 2048, 512]), dtype, META, scheme)
    layer = QuantizedExperts(8, 256, 2048, 512, True, scheme.bits, scheme.group_size)
    moe_experts_quantized_cuda(
        torch.empty(tokens, 2048, dtype=dtype, device=META),
        up.packed, up.scales, up.zeros, scheme.group_size,
        down.packed, down.scales, down.zeros, scheme.group_size, 512,
        torch.empty(tokens, 8, dtype=torch.int64, device=META),
        torch.empty(tokens, 8, dtype=dtype, device=META),
        int8_activations=int8,
        plan=(choose_int8_plan if int8 else choose_quantized_plan)(layer, tokens, gpu),
        wrap=Recorder(launches),
    )  # fmt: skip
    return launches


def record_linear(
    scheme: Scheme,
    tokens: int,
    gpu: Any,
    outputs: int = 12352,
    zeros: Any = torch.bfloat16,
    int8: bool = False,
    inputs: int = 2048,
    plan: QuantizedPlan | None = None,
) -> dict:
    launches: dict[str, Any] = {}
    weight = empty(torch.Size([outputs, inputs]), torch.bfloat16, META, scheme)
    points = None if weight.zeros is None else weight.zeros.to(zeros)
    layer = QuantizedLinear(outputs, inputs, scheme.bits, scheme.group_size)
    quantized_linear_cuda(
        torch.empty(tokens, inputs, dtype=torch.bfloat16, device=META),
        weight.packed, weight.scales, points, None, scheme.group_size, int8,
        plan=plan or (choose_int8_plan if int8 else choose_quantized_plan)(layer, tokens, gpu),
        wrap=Recorder(launches),
    )  # fmt: skip
    return launches


def record_merged(
    scheme: Scheme,
    packed: tuple[int, ...],
    dense: tuple[int, ...],
    plan: QuantizedPlan | None = None,
    tokens: int = 1,
) -> dict:
    launches: dict[str, Any] = {}
    weights = [empty(torch.Size([n, 2048]), torch.bfloat16, META, scheme) for n in packed]
    merged_linear_cuda(
        torch.empty(tokens, 2048, dtype=torch.bfloat16, device=META),
        [w.packed for w in weights], [w.scales for w in weights],
        [w.zeros for w in weights if w.zeros is not None], scheme.group_size,
        [torch.empty(n, 2048, dtype=torch.bfloat16, device=META) for n in dense],
        plan=plan or QuantizedPlan(0, PARTS, PARTS), wrap=Recorder(launches),
    )  # fmt: skip
    return launches


def compiled(launches: dict[str, Any], gpu: Any) -> dict[str, Any]:
    """The kernels on packed weights, by name; asserts that none spills."""
    major, minor = gpu.capability
    found = {}
    for key, (source, options) in launches.items():
        name = source.fn.fn.__name__
        if not any(part in name for part in ("quantize", "merged", "int8")):
            continue
        kernel = triton.compile(
            source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options
        )
        assert_fits(kernel, gpu, key)
        found[name] = kernel
    return found


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
def test_int4_kernels_compile_without_spills(gpu):
    for tokens in (1, 4096):
        assert compiled(record_experts(SCHEMES["int4"], tokens, gpu), gpu)
    assert compiled(record_linear(SCHEMES["int4"], 1, gpu), gpu)


def test_sixteen_warps_of_experts_rows_find_room_on_sm_90():
    kernels = compiled(record_experts(SCHEMES["int4"], 1, H100), H100)
    assert registers(kernels["quantized_up_vector_kernel"].asm["cubin"]) <= 128


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
def test_merged_layers_compile_without_spills(gpu):
    for packed, dense in (((8192, 4096), (32, 32)), ((), (256, 1)), ((512, 512), ())):
        assert compiled(record_merged(SCHEMES["int4"], packed, dense), gpu)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize(("scheme", "tokens"), [("int4", 4), ("int4 zeros", 16), ("int8", 8)])
def test_merged_layers_of_a_batch_compile_without_spills(scheme, tokens, gpu):
    kind = SCHEMES[scheme]
    for packed, dense in (((8192, 4096), (32, 32)), ((512, 512), (256, 1))):
        layer = QuantizedLinear(sum(packed), 2048, kind.bits, kind.group_size)
        plan = choose_quantized_plan(layer, tokens, gpu)
        kernels = compiled(record_merged(kind, packed, dense, plan, tokens), gpu)
        kernel = kernels["merged_rows_kernel"]
        if gpu.capability == (9, 0):
            # Weights and inputs of dense rows, weights and planes of packed ones: copied ahead.
            assert instructions(kernel.asm["cubin"]).count("LDGSTS") >= 12


VECTORS = {
    "int4": (2048, VectorTile(6, 6, 1)),
    "int4 zeros": (2048, VectorTile(6, 6, 1)),
    "int4 long": (4096, VectorTile(2, 2, 2)),
    "int4 short": (512, VectorTile(1, 1, 1)),
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("name", VECTORS)
def test_one_row_compiles_without_spills(name, gpu):
    inputs, tile = VECTORS[name]
    scheme = SCHEMES["int4 zeros" if "zeros" in name else "int4"]
    plan = QuantizedPlan(0, tile, PARTS)
    launches = record_linear(scheme, 1, gpu, inputs=inputs, plan=plan)
    if inputs == 2048:
        launches |= record_merged(scheme, (8192, 4096), (32, 32), plan)
    kernels = compiled(launches, gpu)
    assert "quantized_vector_kernel" in kernels
    for kernel in kernels.values():
        if gpu.capability == (9, 0):
            # The rule of tiles counts on sixteen warps a multiprocessor; zero points take a few
            # registers more on Triton 3.9, and leave room for fifteen. With 96 registers, for
            # fewer rows ahead, the compiler asks for weights late, and 7.2 us become 8.8.
            used = registers(kernel.asm["cubin"])
            inputs_held, weights_held = inputs // tile.warps // 32, 8 * tile.ahead
            assert used <= (136 if "zeros" in name else 128)
            assert tile.steps < 5 or used >= inputs_held + weights_held


@pytest.mark.parametrize(("outputs", "inputs", "steps"), [
    (1024, 2048, 1), (2048, 512, 1), (2048, 4096, 2), (4096, 4096, 2), (5120, 2048, 2),
    (9216, 2048, 5), (12352, 2048, 6), (12672, 2048, 6), (12673, 2048, None),
    (248320, 2048, None), (1024, 3072, None),
])  # fmt: skip
def test_one_row_by_rule(outputs, inputs, steps):
    """A wave of warps on Hopper; elsewhere, and for more rows, tensor cores."""
    layer = QuantizedLinear(outputs, inputs, 4, 128)
    hopper = dataclasses.replace(generic_gpu((9, 0)), multiprocessors=132)
    warps = max(1, inputs // 2048)
    found = linear_by_rule(layer, 1, hopper)
    assert isinstance(found.down, PartsTile)
    assert found.up == (found.down if steps is None else VectorTile(steps, steps, warps))
    assert isinstance(linear_by_rule(layer, 1, generic_gpu((8, 0))).up, PartsTile)
    fine = dataclasses.replace(layer, group_size=32)
    assert isinstance(linear_by_rule(fine, 1, hopper).up, PartsTile)


@pytest.mark.parametrize(
    ("rows", "block_m"), [(2, 8), (8, 8), (9, 16), (17, 32), (33, 64), (64, 64)]
)
def test_few_rows_fill_a_block_of_a_linear_layer(rows, block_m):
    layer = QuantizedLinear(12352, 2048, 4, 128)  # its entry of the table is for one row
    plan = choose_quantized_plan(layer, rows, H100)
    assert plan.block_m == block_m
    assert isinstance(choose_quantized_plan(layer, 1, H100).up, VectorTile)
    narrow = linear_by_rule(dataclasses.replace(layer, outputs=512), rows, H100)
    slices = rows <= 16
    assert narrow.up.block_n == (16 if slices else 64) and narrow.block_m == block_m
    assert narrow.up.parts == (8 if slices else 1)
    fine = linear_by_rule(dataclasses.replace(layer, group_size=64), rows, H100)
    assert fine.block_m == max(16, block_m)


@pytest.mark.parametrize(("outputs", "inputs", "bits", "rows", "block_m", "block_n"), [
    (12352, 2048, 4, 65, 64, 128), (4096, 2048, 4, 256, 32, 128), (4096, 2048, 4, 384, 64, 128),
    (2048, 4096, 4, 384, 32, 128), (512, 2048, 4, 500, 32, 128), (4096, 2048, 8, 100, 64, 64),
])  # fmt: skip
def test_blocks_of_many_rows_fill_the_gpu(outputs, inputs, bits, rows, block_m, block_n):
    layer = QuantizedLinear(outputs, inputs, bits, 128 if bits == 4 else 0)
    plan = choose_quantized_plan(layer, rows, H100)
    assert (plan.block_m, plan.up.block_n, plan.up.block_k) == (block_m, block_n, 128)


@pytest.mark.parametrize(("outputs", "inputs", "rows", "expected"), [
    (12352, 2048, 511, False), (12352, 2048, 512, True), (1024, 2048, 512, True),
    (512, 2048, 512, False), (512, 2048, 4095, False), (512, 2048, 4096, True),
    (65536, 2048, 512, True), (65537, 2048, 4096, False),
])  # fmt: skip
def test_weights_of_many_rows_are_widened(outputs, inputs, rows, expected):
    layer = QuantizedLinear(outputs, inputs, 4, 128)
    assert widens(layer, rows, H100) == expected
    for other in (generic_gpu((8, 0)), generic_gpu((10, 0)), None):
        assert not widens(layer, rows, other)


@pytest.mark.parametrize(("tokens", "bits", "block_m"), [
    (640, 4, 32), (1536, 4, 32), (1600, 4, 64), (65536, 4, 64), (640, 8, 32), (65536, 8, 128),
])  # fmt: skip
def test_blocks_of_experts_with_rows(tokens, bits, block_m):
    layer = QuantizedExperts(4, 128, 1024, 384, True, bits, 128 if bits == 4 else 0)
    assert choose_quantized_plan(layer, tokens, H100).block_m == block_m


@pytest.mark.parametrize(("outputs", "inputs", "bits", "group", "rows", "expected"), [
    (2048, 4096, 4, 128, 2, (8, 128, 8)), (2048, 4096, 4, 128, 9, (16, 128, 8)),
    (512, 2048, 4, 64, 8, (8, 64, 8)), (512, 2048, 4, 32, 16, (16, 64, 8)),
    (512, 1024, 4, 256, 4, (8, 128, 4)), (512, 2048, 4, 0, 4, (8, 128, 8)),
    (512, 2048, 8, 0, 4, (8, 64, 8)), (2112, 1024, 4, 128, 16, (16, 128, 8)),
    (2048, 4096, 4, 128, 17, None), (2048, 4096, 4, 128, 1, None), (2113, 2048, 4, 128, 4, None),
    (2048, 896, 4, 128, 4, None), (2048, 1152, 4, 128, 4, None),
    (512, 1536, 4, 128, 4, (8, 128, 4)), (2048, 1000, 8, 0, 4, None),
    (2048, 4096, 4, 2048, 4, None),
])  # fmt: skip
def test_slices_by_rule(outputs, inputs, bits, group, rows, expected):
    """(rows of a block, inputs of a step, slices) of a narrow layer, on Hopper alone."""
    layer = QuantizedLinear(outputs, inputs, bits, group)
    plan = choose_quantized_plan(layer, rows, H100)
    assert isinstance(plan.up, GemmTile) == (rows > 1)
    parts = getattr(plan.up, "parts", 1)
    assert ((plan.block_m, plan.up.block_k, parts) if parts > 1 else None) == expected
    if expected is not None:
        assert plan.up.warps == parts and QuantizedPlan.from_json(plan.to_json()) == plan
    for gpu in (generic_gpu((8, 0)), generic_gpu((10, 0))):
        assert choose_quantized_plan(layer, max(rows, 2), gpu).up.parts == 1


@pytest.mark.parametrize(("scheme", "rows", "outputs", "inputs"), [
    ("int4", 4, 2048, 4096), ("int4", 16, 512, 2048), ("int4 zeros", 8, 512, 2048),
    ("int8", 16, 1000, 2048),
])  # fmt: skip
def test_slices_compile_without_spills_and_copy_ahead(scheme, rows, outputs, inputs):
    launches = record_linear(SCHEMES[scheme], rows, H100, outputs, inputs=inputs)
    kernel = compiled(launches, H100)["quantized_slices_kernel"]
    # The weights and the planes of the inputs, each copied ahead.
    assert instructions(kernel.asm["cubin"]).count("LDGSTS") >= 10


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_few_rows_compile_without_spills(rows, gpu):
    for scheme in ("int4", "int8"):
        assert compiled(record_linear(SCHEMES[scheme], rows, gpu), gpu)


def registers(cubin: bytes) -> int:
    """Of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1])


def test_zero_points_finer_than_the_scales_compile_without_spills():
    for tokens in (1, 512):
        assert compiled(
            record_linear(SCHEMES["int4 zeros"], tokens, H100, zeros=torch.float32), H100
        )


INT8_SCHEMES = {
    "g32": Scheme(4, 32, True, "rtn"),
    "g64 zeros": Scheme(4, 64, False, "rtn"),
    "g128": Scheme(4, 128, True, "rtn"),
}
INT8_KERNELS = {"quantize_activations_kernel", "moe_int8_gemm_kernel", "int8_linear_kernel"}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
def test_int8_activations_compile_without_spills_for_the_tensor_cores(gpu):
    kernels = compiled(record_experts(SCHEMES["int4"], 4096, gpu, int8=True), gpu)
    kernels |= compiled(record_linear(SCHEMES["int4"], 4096, gpu, int8=True), gpu)
    assert set(kernels) == INT8_KERNELS
    for name in INT8_KERNELS - {"quantize_activations_kernel"}:
        used = {n for n in instructions(kernels[name].asm["cubin"]) if n.endswith("MMA")}
        # The tensor cores of Ampere, of Hopper, and of Blackwell from Triton 3.8.
        assert used and used <= {"IMMA", "IGMMA", "UTCIMMA"}, (name, used)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_every_bucket_of_int8_activations_compiles_without_spills(scheme, gpu):
    kind = INT8_SCHEMES[scheme]
    for tokens in (64, 256, 1024, 4096):
        for launches in (
            record_experts(kind, tokens, gpu, int8=True),
            record_linear(kind, tokens, gpu, int8=True),
            record_linear(kind, tokens, gpu, outputs=1000, zeros=torch.float32, int8=True),
        ):
            assert set(compiled(launches, gpu)) <= INT8_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: "sm_{}{}".format(*gpu.capability))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_bucket_compiles_without_spills(scheme, gpu):
    kind = SCHEMES[scheme]
    for tokens in (1, 16, 64, 256, 512, 1024, 4096):
        assert compiled(record_experts(kind, tokens, gpu), gpu)
        assert compiled(record_linear(kind, tokens, gpu), gpu)
    assert compiled(record_experts(kind, 1, gpu, torch.float16), gpu)


def instructions(cubin: bytes) -> list[str]:
    """The mnemonics of a kernel's machine code, in order."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", text, re.M)


def test_instructions_per_weight_on_sm_90():
    """A thread may issue 4.8 instructions a weight before an H100's memory is not the limit.

    Counted over the whole kernel of two steps, prologue and epilogue included: an upper bound for
    the loop. Two codes cost a shift, an and-or and a subtraction.
    """
    tile = choose_quantized_plan(QuantizedLinear(12352, 2048, 4, 128), 1, H100).down
    assert isinstance(tile, PartsTile)
    plan = QuantizedPlan(0, tile, tile)
    kernels = compiled(record_linear(SCHEMES["int4"], 1, H100, plan=plan), H100)
    listing = instructions(kernels["quantized_up_decode_kernel"].asm["cubin"])
    # One copy of the loop's body is in the code: a thread's weights of one step.
    weights = tile.parts * tile.block_n * tile.block_k // (32 * tile.warps)
    count = collections.Counter(listing)
    assert count["HFMA2"] <= weights // 2
    unpacking = sum(count[name] for name in ("LOP3", "SHF", "HFMA2"))
    assert unpacking <= 2.0 * weights
    assert len(listing) - count["NOP"] <= 5.5 * weights
    # Scales and outputs are converted, weights are not.
    converting = sum(count[n] for n in count if n.startswith(("I2F", "F2F", "PRMT")))
    assert converting <= weights // 16


def test_instructions_per_weight_of_one_row_on_sm_90():
    """As above, without tensor cores: a shift serves two codes, an and-or and an FMA one."""
    tile = VectorTile(6, 6, 1)
    plan = QuantizedPlan(0, tile, PARTS)
    kernels = compiled(record_linear(SCHEMES["int4"], 1, H100, plan=plan), H100)
    listing = instructions(kernels["quantized_vector_kernel"].asm["cubin"])
    weights = tile.steps * 2048 // 32
    count = collections.Counter(listing)
    assert count["LOP3"] + count["SHF"] <= 1.75 * weights
    assert len(listing) - count["NOP"] <= 4.3 * weights
    assert not count["BAR"] and not count["LDS"]
