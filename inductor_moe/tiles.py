"""Which kernels and tiles an expert layer gets: a table per GPU, or a rule where there is none.

Nothing is measured at run time. A table is `lowerings/configs/<gpu>.json`, or the user's own
made by `inductor-moe tune`, which goes first; a layer it holds takes the entry with the nearest
number of tokens, up to four times away, any other layer the rule.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inductor_moe.errors import InductorMoeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """What tile choice needs of a GPU; shared_memory is the bytes one block may take."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class Experts:
    """One expert layer: sizes, bytes per element, and each weight's contiguous dim."""

    top_k: int
    experts: int
    hidden: int
    inner: int
    gated: bool
    itemsize: int
    up_inner: str = "k"
    down_inner: str = "k"


@dataclass(frozen=True)
class DecodeTile:
    """block_n rows of weights by block_k columns; `split` partial sums a token (down only)."""

    block_n: int
    block_k: int
    warps: int
    unroll: int = 1
    split: int = 1


@dataclass(frozen=True)
class GemmTile:
    """group_m: blocks sharing a tile of columns in L2; tail: halve blocks of half as many rows;
    parts: slices of the inputs, one for each warp, in linear layers on packed weights."""

    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int
    tail: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Plan:
    """`block_m` is 0 for the decode kernels, else the rows of a block of the grouped GEMMs."""

    block_m: int
    up: DecodeTile | GemmTile
    down: DecodeTile | GemmTile

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Plan:
        tile = GemmTile if value["block_m"] else DecodeTile
        return Plan(value["block_m"], tile(**value["up"]), tile(**value["down"]))


# Bytes of shared memory one block may take, by compute capability.
_SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
_SMALL_SHARED_MEMORY = 101376


@functools.cache
def gpu_of(index: int | None) -> Gpu | None:
    """The GPU with this index (None: the current one), or None without CUDA."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Gpu(
        properties.name,
        capability,
        properties.multi_processor_count,
        _SHARED_MEMORY.get(capability, _SMALL_SHARED_MEMORY),
    )


def generic_gpu(capability: tuple[int, int]) -> Gpu:
    """A GPU known by its compute capability alone; it has no table."""
    shared = _SHARED_MEMORY.get(capability, _SMALL_SHARED_MEMORY)
    return Gpu(f"sm_{capability[0]}{capability[1]}", capability, 108, shared)


def choose_plan(layer: Experts, tokens: int, gpu: Gpu | None) -> Plan:
    """The plan for `tokens` tokens, from the GPU's table if it holds this layer."""
    gpu = gpu or generic_gpu((8, 0))
    table = load_table(gpu.name)
    if table is None:
        _warn_no_table(gpu.name)
        return plan_by_rule(layer, tokens, gpu)
    plans = table.get(layer)
    if not plans:
        return plan_by_rule(layer, tokens, gpu)
    distance, nearest = min((abs(math.log2(max(tokens, 1) / m)), m) for m in plans)
    return plans[nearest] if distance <= 2 else plan_by_rule(layer, tokens, gpu)


def table_name(gpu_name: str) -> str:
    """The name of a GPU's file in a folder of tables."""
    return re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_") + ".json"


def shipped_folder() -> Path:
    """The package's tables: beside the installed modules, or in a source tree."""
    package = Path(__file__).parent
    installed = package / "lowerings" / "configs"
    return installed if installed.is_dir() else package.parent / "lowerings" / "configs"


def user_folder() -> Path:
    """The user's own tables: $INDUCTOR_MOE_CONFIGS, or a folder in the user's cache."""
    chosen = os.environ.get("INDUCTOR_MOE_CONFIGS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else cache / "inductor_moe" / "configs"


@functools.cache
def load_table(gpu_name: str) -> dict[Experts, dict[int, Plan]] | None:
    """layer -> tokens -> plan, or None if the GPU has no table; the user's layers go first."""
    paths = [folder / table_name(gpu_name) for folder in (shipped_folder(), user_folder())]
    tables = [read_table(path) for path in paths if path.is_file()]
    if not tables:
        return None
    return {layer: plans for table in tables for layer, plans in table.items()}


def read_table(path: Path) -> dict[Experts, dict[int, Plan]]:
    """layer -> tokens -> plan of a file. Raises InductorMoeError if it is no such file."""
    try:
        return {
            Experts(**entry["layer"]): {
                int(tokens): Plan.from_json(plan) for tokens, plan in entry["plans"].items()
            }
            for entry in json.loads(path.read_text())["layers"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InductorMoeError(
            f"{path}: not a table of tiles ({error!r}); delete it and run `inductor-moe tune`"
        ) from error


@functools.cache
def _warn_no_table(gpu_name: str) -> None:
    log.warning(
        "no tuned expert tiles for %s: the built-in rule it is. `inductor-moe tune` makes them.",
        gpu_name,
    )


def plan_by_rule(layer: Experts, tokens: int, gpu: Gpu) -> Plan:
    """Tiles from sizes alone, as the measured tables have them.

    Few rows an expert: stream weights, through the decode kernels while no expert repeats much.
    Many: blocks as tall as an expert's rows, halved at its end.
    """
    pairs = tokens * layer.top_k
    per_expert = pairs / layer.experts
    k_inner = layer.up_inner == layer.down_inner == "k"
    if pairs <= 128 and per_expert <= 1 and k_inner:
        whole_rows = layer.hidden % 2048 == 0 and layer.itemsize == 2
        rows = DecodeTile(4, 2048, 4) if whole_rows else DecodeTile(4, 1024, layer.itemsize)
        return Plan(0, rows, DecodeTile(4 if tokens == 1 else 8, 512, 4, unroll=4))
    block_m, up, down = _grouped_tiles(per_expert, layer.itemsize, k_inner)
    return Plan(
        block_m, _fit(up, block_m, layer.itemsize, gpu), _fit(down, block_m, layer.itemsize, gpu)
    )


def _grouped_tiles(
    per_expert: float, itemsize: int, k_inner: bool
) -> tuple[int, GemmTile, GemmTile]:
    """Rows of a block, and the tiles of the up and down GEMMs."""
    if itemsize == 4:
        tile = GemmTile(64, 32, 4, 4, 3)
        return (16 if per_expert <= 16 else 32), tile, tile
    if per_expert <= 12:
        if k_inner:
            return 16, GemmTile(64, 128, 8, 4, 4), GemmTile(128, 128, 8, 4, 3)
        return 16, GemmTile(256, 64, 8, 8, 3), GemmTile(128, 64, 8, 4, 4)
    if per_expert <= 24:
        block_m, tile = 32, GemmTile(128, 128, 8, 4, 3)
    elif per_expert <= 48:
        block_m, tile = 64, GemmTile(128, 128, 1, 4, 2, tail=True)
    elif per_expert <= 96:
        block_m, tile = 128, GemmTile(128, 64, 4, 8, 3, tail=True)
    else:
        block_m, tile = 128, GemmTile(256, 64, 8, 8, 4, tail=True)
    return block_m, tile, tile


def _fit(tile: GemmTile, block_m: int, itemsize: int, gpu: Gpu) -> GemmTile:
    """Fewer stages, then fewer columns, until the pipeline's buffers fit."""
    block_n, stages = tile.block_n, tile.stages
    if gpu.capability < (9, 0):
        # Without wgmma the operands live in registers: a wide tile of 128 rows spills.
        block_n = min(block_n, 128)
    while stages * (block_m + block_n) * tile.block_k * itemsize > gpu.shared_memory:
        if stages > 2:
            stages -= 1
        else:
            block_n //= 2
    return replace(tile, block_n=block_n, stages=stages)
