"""Tile choice for the kernels on packed weights: a table measured on this GPU, else a rule.

A table is `lowerings/configs/<gpu>.quant.json`, or a file of that name in the user's own folder,
made by `examples/benchmarks/int4.py tune`; a layer it holds takes the entry with the nearest
number of rows, up to four times away, a linear layer that for one row only with one row.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from inductor_moe.tiles import GemmTile, Gpu, generic_gpu, shipped_folder, table_name, user_folder


@dataclass(frozen=True)
class QuantizedExperts:
    """One expert layer on packed weights; group_size 0 is one group a row."""

    top_k: int
    experts: int
    hidden: int
    inner: int
    gated: bool
    bits: int
    group_size: int


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer on packed weights."""

    outputs: int
    inputs: int
    bits: int
    group_size: int


@dataclass(frozen=True)
class PartsTile:
    """block_n rows of weights, block_k inputs a step, `parts` (to 8) parts of the sum at once."""

    block_n: int
    block_k: int
    parts: int
    warps: int
    stages: int


@dataclass(frozen=True)
class VectorTile:
    """Programs of `warps` warps, in `steps` steps, `ahead` of which are asked for early.

    For vectors and 4 bits without tensor cores: see `inductor_moe.kernels.quant_vector`. For
    experts' up projections a step has both halves of an output; for their down projections, a
    program has all experts of a token, and asks for all steps at once.
    """

    steps: int
    ahead: int
    warps: int

    def split(self, layer: QuantizedLinear) -> tuple[int, int, int] | None:
        """(lanes, warps, loads of a lane) of a row; None if the kernel is not for the layer."""
        k, group = layer.inputs, layer.group_size
        if layer.bits != 4 or k not in (512, 1024, 2048, 4096) or group not in (64, 128, 256, 512):
            return None
        parts = max(1, k // 2048)
        lanes = min(32, k // 32)
        return (lanes, parts, k // (32 * lanes * parts)) if parts <= self.warps else None

    @staticmethod
    def down_lanes(inner: int, bits: int, group_size: int) -> int | None:
        """Lanes of a row of a down projection; None if the kernel is not for it."""
        if bits != 4 or inner not in (256, 512, 1024):
            return None
        return inner // 32 if group_size in (64, 128, 256, 512) and group_size <= inner else None


@dataclass(frozen=True)
class QuantizedPlan:
    """`block_m` is 0 for the kernels of few rows, else the rows of a block of the GEMMs.

    A linear layer takes one row by `up`, and more by `down` where block_m is 0, by `up` elsewhere.
    """

    block_m: int
    up: PartsTile | GemmTile | VectorTile
    down: PartsTile | GemmTile | VectorTile

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> QuantizedPlan:
        tile = GemmTile if value["block_m"] else PartsTile
        up, down = (
            (VectorTile if "ahead" in side else tile)(**side)
            for side in (value["up"], value["down"])
        )
        return QuantizedPlan(value["block_m"], up, down)


Layer = QuantizedExperts | QuantizedLinear
# For a few pairs of tokens and experts: a program's weights are one wave of loads.
FEW_PAIRS = PartsTile(16, 128, 8, 4, 3)
MOST_STEPS = 6  # rows whose weights find room beside the inputs, in 128 registers


WIDEST = 1 << 27  # weights, 256 MB of 16 bits


def choose_quantized_plan(layer: Layer, rows: int, gpu: Gpu | None) -> QuantizedPlan:
    """The plan for `rows` tokens, from the GPU's table if it holds this layer."""
    gpu = gpu or generic_gpu((8, 0))
    plans = dict(load_quantized_table(gpu.name).get(layer, {}))
    if rows > 1:
        plans.pop(1, None)  # it may read the weights for each row
    if plans:
        distance, nearest = min((abs(math.log2(max(rows, 1) / m)), m) for m in plans)
        if distance <= 2:
            return plans[nearest]
    if isinstance(layer, QuantizedExperts):
        return experts_by_rule(layer, rows, gpu)
    return linear_by_rule(layer, rows, gpu)


def choose_int8_plan(layer: Layer, rows: int, gpu: Gpu | None) -> QuantizedPlan:
    """The plan for `rows` tokens whose activations are int8: always GEMMs, by rule.

    A step of them is a group, whatever the tile says. The sums of a group and of all groups live
    in registers side by side, which hold no more than blocks of 64 rows.
    """
    gpu = gpu or generic_gpu((8, 0))
    shared = rows * layer.top_k / layer.experts if isinstance(layer, QuantizedExperts) else rows
    block_m, gemm = _gemm_tile(min(shared, 64), gpu)
    return QuantizedPlan(block_m, gemm, gemm)


@functools.cache
def load_quantized_table(gpu_name: str) -> dict[Layer, dict[int, QuantizedPlan]]:
    """layer -> rows -> plan; empty if the GPU has no table. The user's layers go first."""
    kinds: dict[str, Any] = {"experts": QuantizedExperts, "linear": QuantizedLinear}
    name = table_name(gpu_name).removesuffix(".json") + ".quant.json"
    paths = [folder / name for folder in (shipped_folder(), user_folder())]
    return {
        kinds[entry["kind"]](**entry["layer"]): {
            int(rows): QuantizedPlan.from_json(plan) for rows, plan in entry["plans"].items()
        }
        for path in paths
        if path.is_file()
        for entry in json.loads(path.read_text())["layers"]
    }


def step_of(block_k: int, bits: int, group_size: int) -> int:
    """The nearest number of inputs a step may have: a step never holds parts of two groups.

    With 4 bits the planes of a step of 64 are taken apart for groups of 16 or 32.
    """
    if group_size == 0:
        return block_k
    if group_size < 64:
        return 64 if bits == 4 else group_size
    return math.gcd(block_k, group_size)


def experts_by_rule(layer: QuantizedExperts, tokens: int, gpu: Gpu) -> QuantizedPlan:
    """Few pairs: a program's weights in one wave of loads. Many: blocks of an expert's rows.

    Unpacking costs about 1.5 instructions a weight and program, so blocks are taller than those
    for unpacked weights before experts repeat. Those of 4 bits on Hopper are as measured on an
    H100 (256 experts of 2048 inputs and 512, 512 to 16384 tokens).
    """
    pairs = tokens * layer.top_k
    per_expert = pairs / layer.experts
    if pairs <= 128 and per_expert <= 1:
        return QuantizedPlan(0, *vector_experts_by_rule(layer, tokens, gpu))
    block_m, gemm = _gemm_tile(per_expert, gpu)
    if gpu.capability[0] == 9 and layer.bits == 4 and per_expert > 12:
        block_m = 32 if per_expert <= 48 else 64
        gemm = _fit(GemmTile(128, 128, 8, 4, 3), block_m, gpu)
    return QuantizedPlan(block_m, gemm, gemm)


def vector_experts_by_rule(
    layer: QuantizedExperts, tokens: int, gpu: Gpu
) -> tuple[PartsTile | VectorTile, PartsTile | VectorTile]:
    """Up: as many rows for a warp as find room (measured on an H100: 1 to 16 tokens, 128 and 256
    experts of 2048 inputs; 1 and 4, 64 experts of 1024, 2048 and 4096). Down: one token (256, 512
    and 1024 inputs), in as many programs as there are multiprocessors at least."""
    up: PartsTile | VectorTile = FEW_PAIRS
    down: PartsTile | VectorTile = FEW_PAIRS
    if gpu.capability[0] != 9:
        return up, down
    rows = layer.inner * (2 if layer.gated else 1)
    steps = MOST_STEPS // (2 if layer.gated else 1)
    tile = VectorTile(steps, steps, max(1, layer.hidden // 2048))
    if tile.split(QuantizedLinear(rows, layer.hidden, layer.bits, layer.group_size)) is not None:
        up = tile
    lanes = VectorTile.down_lanes(layer.inner, layer.bits, layer.group_size)
    if tokens == 1 and lanes is not None:
        steps = 4 if layer.hidden * lanes >= 4 * 32 * gpu.multiprocessors else 2
        down = VectorTile(steps, steps, 4 if layer.inner == 512 else 8)
    return up, down


def linear_by_rule(layer: QuantizedLinear, rows: int, gpu: Gpu) -> QuantizedPlan:
    """One row: slices of K in the columns. More: a GEMM, narrow while its grid is small; its warps
    have slices of K where even that grid is.

    With one row a large layer wants many small programs in flight, a small one all of its
    multiprocessors (measured on an H100: 12288, 9216, 2048 and 1024 rows).
    """
    if rows == 1:
        parts = PartsTile(16, 128, 8, 2, 2)
        if layer.outputs <= 16 * gpu.multiprocessors:
            few = layer.inputs <= 1024
            parts = PartsTile(32, 128, 4, 4, 3) if few else PartsTile(8, 128, 8, 4, 3)
        return QuantizedPlan(0, vector_by_rule(layer, gpu) or parts, parts)
    few_or_many = slices_by_rule(layer, rows, gpu) or many_rows_by_rule(layer, rows, gpu)
    if few_or_many is not None:
        return few_or_many
    # Of less than 128 inputs for eight rows a thread has two bytes, which are not copied ahead.
    least = 8 if step_of(128, layer.bits, layer.group_size) == 128 else 16
    block_m, gemm = _linear_tile(max(rows, least), gpu)
    programs = math.ceil(layer.outputs / gemm.block_n) * math.ceil(rows / block_m)
    enough = gpu.multiprocessors * (0.5 if rows <= 64 else 2)
    if programs < enough and gemm.block_n > 64:
        gemm = replace(gemm, block_n=64, warps=4)
    return QuantizedPlan(block_m, gemm, gemm)


def many_rows_by_rule(layer: QuantizedLinear, rows: int, gpu: Gpu) -> QuantizedPlan | None:
    """More than 64 rows: blocks of 64 where those fill the GPU, else of 32; None but on Hopper
    (measured on an H100, 96 to 384 rows: 4 bits, 12352, 4096 and 512 outputs of 2048 inputs, 2048
    of 4096 and of 512; 8 bits, 4096 of 2048)."""
    if gpu.capability[0] != 9 or rows <= 64:
        return None
    block_m, tile = 64, GemmTile(64, 128, 8, 4, 3)
    if layer.bits == 4:
        tile = replace(tile, block_n=128)
        programs = math.ceil(layer.outputs / tile.block_n) * math.ceil(rows / block_m)
        block_m = 64 if programs > gpu.multiprocessors else 32
    tile = _fit(tile, block_m, gpu)
    return QuantizedPlan(block_m, tile, tile)


def widens(layer: QuantizedLinear, rows: int, gpu: Gpu | None) -> bool:
    """Whether a linear layer of this many rows first makes its weight one of 16 bits, which a
    library multiplies faster by more than that takes (measured on an H100: 12352, 9216, 4096, 1024
    and 512 outputs of 2048 inputs, 2048 of 4096 and of 512). It must not take much memory."""
    weights = layer.outputs * layer.inputs
    least = 512 if weights >= 1 << 21 else 4096
    return gpu is not None and gpu.capability[0] == 9 and rows >= least and weights <= WIDEST


def slices_by_rule(layer: QuantizedLinear, rows: int, gpu: Gpu) -> QuantizedPlan | None:
    """Slices of the inputs for the few rows of a narrow layer; None for others (measured on an
    H100, 2 to 16 rows: 2048 outputs of 4096 inputs and 512 of 2048, but not 4096 of 2048, nor 2048
    of 512)."""
    narrow = layer.outputs <= 16 * gpu.multiprocessors and layer.inputs >= 1024
    if gpu.capability[0] != 9 or rows > 16 or not narrow:
        return None
    step = step_of(128 if layer.bits == 4 else 64, layer.bits, layer.group_size)
    unit = max(step, layer.group_size)
    parts = next((parts for parts in (8, 4) if layer.inputs % (parts * unit) == 0), None)
    if parts is None:
        return None
    block_m = 8 if rows <= 8 else 16
    tile = _fit(GemmTile(16, step, 8, parts, 3, parts=parts), block_m, gpu)
    return QuantizedPlan(block_m, tile, tile)


def _linear_tile(rows: int, gpu: Gpu) -> tuple[int, GemmTile]:
    """Rows of a block, the fewest that hold them all, and the tile (measured on an H100, 12352
    outputs of 2048 inputs, 4 to 64 rows)."""
    for block_m, tile in (
        (8, GemmTile(64, 128, 8, 4, 4)),
        (16, GemmTile(64, 128, 8, 4, 4)),
        # In four warps Blackwell's would spill for int8 weights.
        (32, GemmTile(128, 128, 8, 8 if gpu.capability[0] >= 10 else 4, 4)),
        (64, GemmTile(128, 128, 8, 8, 4)),
    ):
        if rows <= block_m:
            return block_m, _fit(tile, block_m, gpu)
    return _gemm_tile(rows, gpu)


def vector_by_rule(layer: QuantizedLinear, gpu: Gpu) -> VectorTile | None:
    """One wave of warps, each with all its weights in flight; None where that is too many.

    Few steps take fewer registers, so twice the warps find room (measured on an H100: 1024 to
    12352 rows of 2048 inputs, 2048 of 512, 2048 and 4096 of 4096).
    """
    if gpu.capability[0] != 9:
        return None
    warps = max(1, layer.inputs // 2048)
    split = VectorTile(1, 1, warps).split(layer)
    if split is None:
        return None
    lanes, parts, _ = split
    steps = math.ceil(layer.outputs * parts * lanes / 32 / (16 * gpu.multiprocessors))
    if steps > MOST_STEPS:
        return None
    steps = min(steps, 2) if steps <= 4 else steps
    return VectorTile(steps, steps, warps)


def _gemm_tile(rows: float, gpu: Gpu) -> tuple[int, GemmTile]:
    """Rows of a block and the tile for about `rows` rows that share their weights."""
    if rows <= 12:
        block_m, tile = 16, GemmTile(64, 128, 8, 4, 4)
    elif rows <= 24:
        block_m, tile = 32, GemmTile(64, 128, 8, 4, 4)
    elif rows <= 64:
        block_m, tile = 64, GemmTile(128, 64, 8, 8, 3)
    else:
        block_m, tile = 128, GemmTile(128, 64, 8, 8, 3)
    if gpu.capability[0] != 9 and block_m == 128:
        # Without wgmma both operands live in registers. Blackwell's tensor memory, which holds the
        # products of all planes of 4 bits, has no room for more until Triton 3.8.
        block_m = 64
    return block_m, _fit(tile, block_m, gpu)


def _fit(tile: GemmTile, block_m: int, gpu: Gpu) -> GemmTile:
    """Fewer stages until the pipeline's buffers fit: int8 weights and 16-bit inputs."""
    stages, step = tile.stages, tile.parts * (tile.block_n + 2 * block_m) * tile.block_k
    while stages > 2 and stages * step > gpu.shared_memory:
        stages -= 1
    return replace(tile, stages=stages)
