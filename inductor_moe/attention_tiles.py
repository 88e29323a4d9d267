"""The tile of `attention_decode`: how a cache is cut among the programs of a GPU."""

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
