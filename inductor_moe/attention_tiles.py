"""The tiles of `attention_decode` and `attention_prompt`: how a GPU's programs share a cache."""

from __future__ import annotations

from dataclasses import dataclass

from inductor_moe.tiles import Gpu, generic_gpu

MAX_SPLITS = 128


@dataclass(frozen=True)
class AttentionTile:
    """block_g query heads (1: no tensor cores) by block_l positions, over `splits` programs."""

    block_g: int
    block_l: int
    splits: int
    warps: int
    stages: int


def choose_attention_tile(
    *,
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    dim: int,
    itemsize: int,
    gpu: Gpu | None,
) -> AttentionTile:
    """A tile by rule: enough programs for every multiprocessor, as few partial sums as that takes.

    group  query heads for each head of the cache
    dim    the larger head dim
    """
    gpu = gpu or generic_gpu((8, 0))
    width = 1 << max(4, (dim - 1).bit_length())
    if itemsize == 4 or group == 1:
        # fp32 keeps its digits outside the tensor cores, a head at a time.
        block_g, block_l = 1, max(16, 4096 // width)
    else:
        block_g = min(64, max(16, 1 << (group - 1).bit_length()))
        block_l = 64 if width <= 128 else 32
    programs = max(1, batch * kv_heads * -(-group // block_g))
    while block_l > 32 and programs * -(-length // block_l) < gpu.multiprocessors:
        block_l //= 2
    blocks = max(1, -(-length // block_l))
    queries = block_g * (width + block_l) * itemsize
    buffers = (gpu.shared_memory - queries - 4096) // (2 * block_l * width * itemsize)
    stages = max(2, min(4, 1 + buffers))
    splits = min(blocks, -(-gpu.multiprocessors // programs), MAX_SPLITS)
    return AttentionTile(block_g, block_l, splits, 8 if block_g > 32 else 4, stages)


@dataclass(frozen=True)
class PromptTile:
    """block_m queries of a head by block_n positions at a time."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose_prompt_tile(*, programs: int, queries: int, dim: int, gpu: Gpu | None) -> PromptTile:
    """A tile by rule: sums that fit the registers, and tiles of keys that fit shared memory.

    On Hopper as measured on an H100 (512 to 8192 queries, heads of 64, 128 and 256); elsewhere
    what compiles without spills.
    programs  query heads of the batch
    dim       the larger head dim
    """
    gpu = gpu or generic_gpu((8, 0))
    width = 1 << max(4, (dim - 1).bit_length())
    major = gpu.capability[0]
    if width > 128:
        other = (64, 64, 8) if gpu.shared_memory > 131072 else (32, 32, 4)
        chosen = {9: (128, 64, 8), 10: (128, 32, 8)}.get(major, other)
    elif major == 9:
        chosen = 64, 64, 4
    elif major == 10:
        chosen = 128, 64 if width == 128 else 128, 8
    else:
        chosen = (64, 32, 4) if width == 128 else (128, 64, 8)
    block_m, block_n, warps = chosen
    if block_m == 128 and programs * -(-queries // block_m) < gpu.multiprocessors:
        block_m, block_n, warps = 64, 32, 4
    while block_m > 16 and queries <= block_m // 2:
        block_m, block_n, warps = block_m // 2, 32, 4
    while block_n > 16 and _prompt_stages(block_m, block_n, width, gpu) < 2:
        block_n //= 2
    return PromptTile(
        block_m, block_n, warps, min(3, _prompt_stages(block_m, block_n, width, gpu))
    )


def _prompt_stages(block_m: int, block_n: int, width: int, gpu: Gpu) -> int:
    """Tiles of keys and values, of two bytes a number, that fit beside the queries and scores."""
    queries = 2 * block_m * (width + block_n)
    return (gpu.shared_memory - queries - 4096) // (4 * block_n * width)
