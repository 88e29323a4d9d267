"""Time and tune `moe_experts` on one GPU.

    python examples/benchmarks/moe_experts.py time --layers qwen3_5
    python examples/benchmarks/moe_experts.py compile --layers qwen3_5
    python examples/benchmarks/moe_experts.py tune --layers qwen3_5 --out table.json

`compile` fills Triton's cache with `tune`'s candidates, on all cores. `tune` writes the table that
`inductor_moe.tiles` reads, lowerings/configs/<gpu>.json. Times are the experts alone, every helper
kernel counted, in one CUDA graph with several routings rotated through it; the median of its
replays.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from inductor_moe.ops.moe_cuda import moe_experts_cuda
from inductor_moe.tiles import (
    DecodeTile,
    Experts,
    GemmTile,
    Plan,
    choose_plan,
    gpu_of,
)

LAYERS = {
    "qwen3_5": Experts(8, 256, 2048, 512, True, 2),
    "qwen3_30b": Experts(8, 128, 2048, 768, True, 2),
    "mixtral": Experts(2, 8, 4096, 14336, True, 2),
    "deepseek_v3": Experts(8, 256, 7168, 2048, True, 2),
    "gpt_oss": Experts(4, 32, 2880, 2880, True, 2, "n", "n"),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 2, 8, 32)


@dataclass
class Inputs:
    x: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor
    ids: list[torch.Tensor]
    weights: torch.Tensor

    def run(self, plan: Plan, routing: int = 0, wrap: Any = lambda k: k) -> torch.Tensor:
        return moe_experts_cuda(
            self.x, self.w_up, self.w_down, self.ids[routing], self.weights,
            activation="silu", gate="chunked", plan=plan, wrap=wrap,
        )  # fmt: skip


def weights_of(layer: Experts, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    def draw(rows: int, columns: int, inner: str) -> torch.Tensor:
        shape = (layer.experts, rows, columns) if inner == "k" else (layer.experts, columns, rows)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if device != "meta":
            weight.normal_(0, 0.02)
        return weight if inner == "k" else weight.transpose(1, 2)

    up = draw(2 * layer.inner, layer.hidden, layer.up_inner)
    return up, draw(layer.hidden, layer.inner, layer.down_inner)


def inputs_of(
    layer: Experts, tokens: int, up: torch.Tensor, down: torch.Tensor, routings: int
) -> Inputs:
    device = up.device
    x = torch.randn(tokens, layer.hidden, device=device).bfloat16()
    ids = [
        torch.rand(tokens, layer.experts, device=device).topk(layer.top_k).indices
        for _ in range(routings)
    ]
    return Inputs(x, up, down, ids, torch.rand(tokens, layer.top_k, device=device).bfloat16())


def microseconds(inputs: Inputs, plan: Plan, replays: int) -> float:
    """Median time of one call, replaying a graph that walks through every routing."""
    inputs.run(plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for routing in range(len(inputs.ids)):
            inputs.run(plan, routing)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return 1000 * times[len(times) // 2] / len(inputs.ids)


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
    small = ((64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 4, 5), (128, 128, 4, 3),
             (128, 128, 8, 3), (256, 64, 4, 3), (256, 64, 8, 3))  # fmt: skip
    large = ((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 4, 2),
             (128, 128, 8, 2), (256, 64, 8, 3), (256, 64, 8, 4), (256, 64, 4, 2), (256, 64, 4, 3),
             (256, 128, 8, 2))  # fmt: skip
    for block_n, block_k, warps, stages in small if block_m <= 32 else large:
        if block_m * block_n <= 8192 * warps:
            yield GemmTile(block_n, block_k, 8, warps, stages)
            if block_m >= 64:
                yield GemmTile(block_n, block_k, 8, warps, stages, tail=True)


def block_rows(layer: Experts, tokens: int) -> list[int]:
    """Rows of a block worth trying: near the rows an expert gets."""
    per_expert = tokens * layer.top_k / layer.experts
    return [m for m in (16, 32, 64, 128) if per_expert / 8 < m <= max(16, 3 * per_expert)]


def starts(layer: Experts, tokens: int) -> Iterator[Plan]:
    if tokens * layer.top_k <= 128 and tokens * layer.top_k / layer.experts <= 2:
        yield Plan(0, DecodeTile(4, 1024, 2), DecodeTile(4, 512, 4, unroll=4))
    for block_m in block_rows(layer, tokens):
        tile = GemmTile(128, 64, 8, 4 if block_m < 128 else 8, 3)
        yield Plan(block_m, tile, tile)


def candidates(layer: Experts, start: Plan, side: str) -> Iterator[Plan]:
    if start.block_m:
        tiles: Any = gemm_tiles(start.block_m)
    elif side == "up":
        tiles = decode_tiles(False, layer.up_inner, layer.hidden)
    else:
        tiles = decode_tiles(True, layer.down_inner, layer.inner)
    for tile in tiles:
        yield replace(start, **{side: tile})
        if side == "down" and not start.block_m and layer.down_inner != "k":
            yield replace(start, down=replace(tile, split=layer.top_k))


class CompileOnly:
    """Compiles a kernel for its arguments and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def warm(*args: Any, **kwargs: Any) -> None:
            shown = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
            self.kernel.warmup(*shown, grid=grid, **kwargs)

        return warm


def precompile(job: tuple[Experts, int, Plan]) -> str | None:
    layer, tokens, plan = job
    up, down = weights_of(layer, "meta")
    try:
        inputs_of(layer, tokens, up, down, 1).run(plan, wrap=CompileOnly)
    except Exception as error:
        return f"{plan}: {error!r}"[:300]
    return None


def precompile_jobs(layers: list[Experts]) -> list[tuple[Experts, int, Plan]]:
    jobs = {}
    for layer, tokens in itertools.product(layers, TOKENS):
        for start in starts(layer, tokens):
            for side in ("up", "down"):
                for plan in candidates(layer, start, side):
                    jobs.setdefault(
                        (layer, side, plan.block_m, getattr(plan, side)), (layer, tokens, plan)
                    )
    return list(jobs.values())


def breakdown(inputs: Inputs, plan: Plan) -> str:
    """Time of each kernel of one call, alone and after a warm-up, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            inputs.run(plan)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.name.startswith("moe_")]
    last = kernels[-len(kernels) // 3 :]
    return ", ".join(f"{e.name[4:-7]} {e.device_time:.1f}" for e in last)


def routings(tokens: int) -> int:
    """Enough different routings that their experts do not all fit in L2."""
    return 12 if tokens <= 8 else 4 if tokens <= 64 else 1


def floor(layer: Experts, tokens: int) -> float:
    """Microseconds for the weights touched at 3.0 TB/s, or the arithmetic at 800 TFLOP/s."""
    touched = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)
    one_expert = 3 * layer.hidden * layer.inner
    return max(2 * touched * one_expert / 3e6, 2 * tokens * layer.top_k * one_expert / 8e8)


def tune_layer(
    layer: Experts, sizes: list[int], deadline: float
) -> tuple[dict[int, Plan], dict[int, float]]:
    up, down = weights_of(layer, "cuda")
    plans: dict[int, Plan] = {}
    times: dict[int, float] = {}
    for tokens in sizes:
        if time.time() > deadline:
            break
        inputs = inputs_of(layer, tokens, up, down, routings(tokens))
        replays = max(5, min(20, int(20000 / (floor(layer, tokens) * len(inputs.ids)))))

        def measure(plan: Plan, inputs: Inputs = inputs, replays: int = replays) -> float:
            try:
                return microseconds(inputs, plan, replays)
            except triton.runtime.errors.OutOfResources:
                return math.inf

        best: tuple[float, Plan | None] = (math.inf, None)
        for start in starts(layer, tokens):
            plan, cost = start, math.inf
            for side in ("up", "down"):
                for option in candidates(layer, plan, side):
                    taken = measure(option)
                    if taken < cost:
                        cost, plan = taken, option
            if plan.block_m >= 64:
                for side, group in itertools.product(("up", "down"), (1, 4, 16, 32)):
                    option = replace(plan, **{side: replace(getattr(plan, side), group_m=group)})
                    taken = measure(option)
                    if taken < cost:
                        cost, plan = taken, option
            print(f"    M={tokens} block_m={plan.block_m} {cost:.1f} us {plan.up} {plan.down}")
            best = min(best, (cost, plan), key=lambda pair: pair[0])
        assert best[1] is not None
        plans[tokens], times[tokens] = best[1], microseconds(inputs, best[1], 30)
        print("   ", breakdown(inputs, best[1]))
        print(
            f"  M={tokens}: {times[tokens]:.1f} us, floor {floor(layer, tokens):.1f}", flush=True
        )
    return plans, times


def compile_all(names: list[str]) -> None:
    """Fill Triton's cache with every candidate, on all cores."""
    started = time.time()
    jobs = precompile_jobs([LAYERS[name] for name in names])
    with multiprocessing.get_context("spawn").Pool(min(15, multiprocessing.cpu_count())) as pool:
        failures = [f for f in pool.imap_unordered(precompile, jobs, chunksize=2) if f]
    print(
        f"{len(jobs)} candidates compiled in {time.time() - started:.0f} s; failed: {failures[:3]}"
    )


def tune(names: list[str], sizes: list[int], out: Path, budget: float) -> None:
    started = time.time()
    gpu = gpu_of(0)
    assert gpu is not None
    known = {}
    if out.is_file():
        known = {entry["name"]: entry for entry in json.loads(out.read_text())["layers"]}
    table: dict[str, Any] = {
        "gpu": gpu.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": [],
    }
    for position, name in enumerate(names):
        left = budget - (time.time() - started)
        share = left * (0.6 if position == 0 and len(names) > 1 else 1 / (len(names) - position))
        print(f"{name}: {share:.0f} s")
        plans, times = tune_layer(LAYERS[name], sizes, time.time() + share)
        old = known.get(name, {"plans": {}, "microseconds": {}})
        merged = old["plans"] | {str(m): plan.to_json() for m, plan in plans.items()}
        took = old["microseconds"] | {str(m): round(t, 1) for m, t in times.items()}
        known[name] = {
            "name": name,
            "date": datetime.date.today().isoformat(),
            "command": "python " + " ".join(sys.argv),
            "layer": dataclasses.asdict(LAYERS[name]),
            "plans": {m: merged[m] for m in sorted(merged, key=int)},
            "microseconds": {m: took[m] for m in sorted(took, key=int)},
        }
        table["layers"] = list(known.values())
        out.write_text(json.dumps(table, indent=1) + "\n")
        torch.cuda.empty_cache()


def time_plans(names: list[str], sizes: list[int]) -> None:
    """The plans `inductor_moe.tiles` chooses, whole and kernel by kernel."""
    for name in names:
        layer = LAYERS[name]
        up, down = weights_of(layer, "cuda")
        for tokens in sizes:
            inputs = inputs_of(layer, tokens, up, down, routings(tokens))
            plan = choose_plan(layer, tokens, gpu_of(0))
            taken = microseconds(inputs, plan, 30)
            print(f"{name} M={tokens}: {taken:.1f} us, floor {floor(layer, tokens):.1f}")
            print(f"  {breakdown(inputs, plan)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("compile", "tune", "time"))
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["qwen3_5"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path("table.json"))
    parser.add_argument("--budget", type=float, default=120, help="seconds for the whole sweep")
    options = parser.parse_args()
    if options.action == "compile":
        compile_all(options.layers)
        return 0
    if options.action == "time":
        time_plans(options.layers, options.tokens)
        return 0
    tune(options.layers, options.tokens, options.out, options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
