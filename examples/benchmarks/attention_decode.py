"""Check, time and sweep decode attention on one GPU.

    python examples/benchmarks/attention_decode.py check
    python examples/benchmarks/attention_decode.py time --json attention.json
    python examples/benchmarks/attention_decode.py sweep --json sweep.json

Times are medians of replays of one CUDA graph through which copies of the cache are rotated, so
that L2 does not hold what memory should give. `sweep` varies the tile that the rule chooses, one
number at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.attention_tiles import AttentionTile, choose_attention_tile
from inductor_moe.ops import attention
from inductor_moe.ops.attention import attention_decode_cuda
from inductor_moe.reference.attention import attention_decode_reference
from inductor_moe.testing import relative_error
from inductor_moe.tiles import gpu_of

# Query heads, key heads, head dim.
MODELS = {"qwen3.5-35b-a3b": (16, 2, 256), "qwen3-30b-a3b": (32, 4, 128)}
BATCHES, LENGTHS = (1, 4, 16), (512, 2048, 8192, 32768)
FILLED = (1.0, 0.25)
BANDWIDTH = 3.0e6  # bytes a microsecond


def hide(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to the scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def draw_mask(kind: str, rows: int, length: int, dtype: torch.dtype, device: str) -> Any:
    if kind == "none":
        return None
    position = torch.arange(length, device=device)
    filled = torch.randint(1, length + 1, (rows, 1), device=device)
    keep = position < filled
    if kind == "window":
        keep &= position >= filled - max(1, length // 7)
    elif kind == "holes":
        keep = torch.rand(rows, length, device=device) < 0.2
        keep[:, length // 2] = True
    keep = keep[:, None, None]
    if kind == "float":
        return hide(keep, dtype) + torch.randn(keep.shape, device=device).to(dtype)
    return keep


def check(budget: float, device: str = "cuda", longest: int = 32768, **options: Any) -> int:
    """Errors against fp64 on fresh inputs, at most twice those of PyTorch's own attention.

    What the mask hides holds NaN, and so does what the kernels are to write.
    """
    seed = random.randrange(2**31)
    random.seed(seed)
    torch.manual_seed(seed)
    dims = ((16, 2, 256, 256), (32, 4, 128, 128), (8, 8, 128, 128), (16, 16, 192, 128),
            (12, 4, 96, 96), (64, 1, 64, 64), (6, 2, 80, 72))  # fmt: skip
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    kinds = ("none", "filled", "window", "holes", "float")
    empty, start, bad, count = torch.empty, time.perf_counter(), 0, 0
    for heads, kv_heads, dim, value_dim in itertools.cycle(dims):
        if time.perf_counter() - start > budget:
            break
        dtype, kind = dtypes[count % 3], kinds[count % 5]
        batch = random.choice((1, 2, 4, 16))
        length = int(2 ** random.uniform(7, math.log2(longest)))
        while batch * length * kv_heads > 2**20:
            batch = max(1, batch // 2)
            length = length if batch > 1 else length // 2
        q = torch.randn(batch, heads, dim, device=device).to(dtype)
        k = torch.randn(batch, length, kv_heads, dim, device=device).to(dtype).transpose(1, 2)
        v = torch.randn(batch, kv_heads, length, value_dim, device=device).to(dtype)
        mask = draw_mask(kind, random.choice((1, batch)), length, dtype, device)
        exact = attention_decode_reference(q.double(), k.double(), v.double(), mask, dim**-0.5)
        plain = attention.attention_decode_aten(q, k, v, mask, dim**-0.5)
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
            hidden = hidden.transpose(2, 3)
            k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan)
        with mock.patch.object(
            attention.torch, "empty", lambda *a, **o: empty(*a, **o).fill_(math.nan)
        ):
            found = attention_decode_cuda(q, k, v, mask, dim**-0.5, **options)
        error, allowed = relative_error(found, exact), relative_error(plain, exact)
        # In fp32 both are a few units in the last place, where the order of a sum decides.
        floor = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
        allowed = max(2 * allowed, floor)
        count += 1
        if not error <= allowed:
            bad += 1
            print(f"WRONG {dtype} {kind} B={batch} {heads}/{kv_heads} D={dim} DV={value_dim} "
                  f"L={length}: {error:.2e}, allowed {allowed:.2e}")  # fmt: skip
    print(f"{count} cases, {bad} wrong (seed {seed})")
    return int(bad > 0 or count == 0)


def microseconds(run: Callable[[int], Any], turns: int, replays: int = 30) -> tuple[float, float]:
    """(median, spread between the quartiles) of one call, over replays of a graph of `turns`."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            run(turn)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    scale = 1000 / turns
    return scale * times[len(times) // 2], scale * (
        times[-len(times) // 4] - times[len(times) // 4]
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's cache in bf16, in as many copies as L2 cannot hold."""

    model: str
    batch: int
    length: int

    def caches(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        heads, kv_heads, dim = MODELS[self.model]
        shape = (self.batch, kv_heads, self.length, dim)
        copies = max(2, math.ceil(1.5e8 / (4 * math.prod(shape))))
        q = torch.randn(self.batch, heads, dim, device="cuda").bfloat16()
        caches = [
            tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            for _ in range(copies)
        ]
        return q, caches  # type: ignore[return-value]

    def mask(self, filled: float) -> Tensor:
        position = torch.arange(self.length, device="cuda")
        return (position < self.length * filled)[None, None, None]

    def floor(self, filled: float) -> float:
        """Microseconds to read what the mask shows of the cache."""
        _, kv_heads, dim = MODELS[self.model]
        return 4 * self.batch * kv_heads * self.length * dim * filled / BANDWIDTH

    def tile(self) -> AttentionTile:
        heads, kv_heads, dim = MODELS[self.model]
        return choose_attention_tile(
            batch=self.batch, kv_heads=kv_heads, group=heads // kv_heads, length=self.length,
            dim=dim, itemsize=2, gpu=gpu_of(0),
        )  # fmt: skip


def providers(q: Tensor, caches: Any, keep: Tensor) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """What is timed; PyTorch's attention gets the mask in the form its kernels take."""
    group, scale = q.shape[1] // caches[0][0].shape[1], q.shape[2] ** -0.5
    bias, query = hide(keep, q.dtype), q.unsqueeze(2)

    def repeat(x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)

    def cache(turn: int) -> tuple[Tensor, Tensor]:
        return caches[turn % len(caches)]  # type: ignore[no-any-return]

    yield "inductor_moe", lambda turn: attention_decode_cuda(q, *cache(turn), keep, scale)
    yield (
        "sdpa, enable_gqa",
        lambda turn: scaled_dot_product_attention(
            query, *cache(turn), attn_mask=bias, enable_gqa=True
        ),
    )
    yield (
        "repeat and sdpa",
        lambda turn: scaled_dot_product_attention(
            query, *map(repeat, cache(turn)), attn_mask=bias
        ),
    )
    room = 1.5e8 if caches[0][0].nbytes < 1.5e8 else 0
    repeated = [tuple(map(repeat, pair)) for pair in caches[: 1 + int(room / 2 / group
                / caches[0][0].nbytes)]]  # fmt: skip
    yield (
        "sdpa, repeated before",
        lambda turn: scaled_dot_product_attention(
            query, *repeated[turn % len(repeated)], attn_mask=bias
        ),
    )


def time_all(budget: float) -> list[dict[str, Any]]:
    rows, start = [], time.perf_counter()
    for model, length, batch in itertools.product(MODELS, LENGTHS, BATCHES):
        case = Case(model, batch, length)
        q, caches = case.caches()
        for filled in FILLED:
            if time.perf_counter() - start > budget:
                print("out of time", flush=True)
                return rows
            row: dict[str, Any] = {
                **dataclasses.asdict(case),
                "filled": filled,
                "floor": round(case.floor(filled), 2),
            }
            for name, run in providers(q, caches, case.mask(filled)):
                slow = "gqa" in name or "repeat" in name
                turns = min(len(caches), 16) if slow else len(caches)
                try:
                    taken, spread = microseconds(run, turns, replays=10 if slow else 30)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    row[name] = {"error": str(error).splitlines()[0]}
                    continue
                row[name] = {"microseconds": round(taken, 2), "spread": round(spread, 2)}
            rows.append(row)
            print(json.dumps(row), flush=True)
        del caches
        torch.cuda.empty_cache()
    return rows


def variants(tile: AttentionTile, blocks: Callable[[int], int]) -> Iterator[AttentionTile]:
    """The tile itself and those that differ in one number, with splits to fit the blocks."""
    changes: list[dict[str, int]] = [
        {},
        *({"block_l": size} for size in (16, 32, 64, 128)),
        *({"stages": stages} for stages in (2, 3, 4, 5)),
        {"warps": 2}, {"warps": 8},
        *({"splits": max(1, round(tile.splits * factor))} for factor in (0.5, 2, 4)),
        {"block_l": 16, "splits": 2 * tile.splits}, {"block_l": 32, "splits": 2 * tile.splits},
    ]  # fmt: skip
    seen = set()
    for change in changes:
        found = dataclasses.replace(tile, **change)
        found = dataclasses.replace(found, splits=min(found.splits, blocks(found.block_l)))
        if found not in seen:
            seen.add(found)
            yield found


def sweep(budget: float) -> list[dict[str, Any]]:
    rows, start = [], time.perf_counter()
    cases = [
        Case(model, batch, length)
        for batch, length in ((1, 2048), (1, 32768), (16, 2048), (1, 512), (4, 8192))
        for model in MODELS
    ]
    for case in cases:
        q, caches = case.caches()
        keep = case.mask(1.0)

        def blocks(block_l: int, length: int = case.length) -> int:
            return -(-length // block_l)

        for tile in variants(case.tile(), blocks):
            if time.perf_counter() - start > budget:
                print("out of time", flush=True)
                return rows

            def run(turn: int, q: Any = q, caches: Any = caches, keep: Any = keep,
                    tile: Any = tile) -> Tensor:  # fmt: skip
                pair = caches[turn % len(caches)]
                return attention_decode_cuda(q, *pair, keep, q.shape[2] ** -0.5, tile=tile)

            try:
                taken, spread = microseconds(run, len(caches), replays=15)
            except triton.runtime.errors.OutOfResources:
                continue
            row = {
                **dataclasses.asdict(case), **dataclasses.asdict(tile),
                "chosen": tile == case.tile(), "microseconds": round(taken, 2),
                "spread": round(spread, 2), "floor": round(case.floor(1.0), 2),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
        del caches
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows, and where and with what they were measured, as JSON."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "time", "sweep"))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--budget", type=float, default=75, help="seconds after which to stop")
    options = parser.parse_args()
    if options.what == "check":
        return check(options.budget)
    rows = time_all(options.budget) if options.what == "time" else sweep(options.budget)
    if options.json is not None:
        write(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
