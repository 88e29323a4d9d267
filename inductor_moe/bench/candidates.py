"""The tiles worth trying for an expert layer at a number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from inductor_moe.tiles import DecodeTile, Experts, GemmTile, Plan

SIDES = ("up", "down")
_SMALL = (
    (64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 4, 5), (128, 128, 4, 3),
    (128, 128, 8, 3), (256, 64, 4, 3), (256, 64, 8, 3),
)  # fmt: skip
_LARGE = (
    (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 4, 2),
    (128, 128, 8, 2), (256, 64, 8, 3), (256, 64, 8, 4), (256, 64, 4, 2), (256, 64, 4, 3),
    (256, 128, 8, 2),
)  # fmt: skip


def starts(layer: Experts, tokens: int) -> Iterator[Plan]:
    """A plan of each kind that may win: the decode kernels, and blocks of several heights."""
    pairs = tokens * layer.top_k
    if pairs <= 128 and pairs <= 2 * layer.experts:
        yield Plan(0, DecodeTile(4, 1024, 2), DecodeTile(4, 512, 4, unroll=4))
    per_expert = min(pairs / layer.experts, 512)  # beyond, blocks of 128 rows are all that counts
    for block_m in (16, 32, 64, 128):
        if per_expert / 8 < block_m <= max(16, 3 * per_expert):
            tile = GemmTile(128, 64, 8, 4 if block_m < 128 else 8, 3)
            yield Plan(block_m, tile, tile)


def candidates(layer: Experts, start: Plan, side: str) -> Iterator[Plan]:
    """`start` with other tiles for one side, "up" or "down"."""
    tiles: Iterator[DecodeTile] | Iterator[GemmTile]
    if start.block_m:
        tiles = gemm_tiles(start.block_m)
    elif side == "up":
        tiles = decode_tiles(False, layer.up_inner, layer.hidden)
    else:
        tiles = decode_tiles(True, layer.down_inner, layer.inner)
    for tile in tiles:
        yield _with(start, side, tile)
        if isinstance(tile, DecodeTile) and side == "down" and layer.down_inner != "k":
            yield replace(start, down=replace(tile, split=layer.top_k))


def _with(plan: Plan, side: str, tile: DecodeTile | GemmTile) -> Plan:
    return replace(plan, up=tile) if side == "up" else replace(plan, down=tile)


def groupings(plan: Plan) -> Iterator[Plan]:
    """`plan` with other orders of its blocks, where there are enough of them to matter."""
    if plan.block_m < 64:
        return
    for side, group in itertools.product(SIDES, (1, 4, 16, 32)):
        yield _with(plan, side, replace(getattr(plan, side), group_m=group))


def decode_tiles(down: bool, inner: str, k_dim: int) -> Iterator[DecodeTile]:
    blocks = (
        ((2, 4, 8, 16), (256, 512, 1024, 2048)) if inner == "k" else ((16, 32, 64), (64, 128, 256))
    )
    for block_n, block_k, warps in itertools.product(*blocks, (2, 4, 8)):
        per_thread = block_n * block_k / (32 * warps)
        if (block_k < 2 * k_dim or block_k == 256) and 16 <= per_thread <= 64:
            for unroll in (1, 4) if down or k_dim > block_k else (1,):
                if per_thread * unroll <= 128:
                    yield DecodeTile(block_n, block_k, warps, unroll)


def gemm_tiles(block_m: int) -> Iterator[GemmTile]:
    for block_n, block_k, warps, stages in _SMALL if block_m <= 32 else _LARGE:
        if block_m * block_n <= 8192 * warps:
            yield GemmTile(block_n, block_k, 8, warps, stages)
            if block_m >= 64:
                yield GemmTile(block_n, block_k, 8, warps, stages, tail=True)
