"""Check, time and tune the kernels on packed weights on one GPU.

    python examples/benchmarks/int4.py check     (int4_check.py has the cases)
    python examples/benchmarks/int4.py time --json int4.json
    python examples/benchmarks/int4.py tune --budget 80 --out nvidia_h100_80gb_hbm3.quant.json

Times are medians of replays of one CUDA graph through which several routings, or copies of the
weights, are rotated, so that L2 does not hold what memory should give; every helper kernel counts.
With --dependent each kernel is launched while the one before it ends, as in a compiled graph.
`tune` tries a handful of tiles for each number of tokens and writes a table for lowerings/configs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from inductor_moe.kernels import dependent
from inductor_moe.ops.quant_cuda import moe_experts_quantized_cuda, quantized_linear_cuda
from inductor_moe.quant.fit import Packed, Scheme, empty
from inductor_moe.quant_tiles import (
    PartsTile,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedPlan,
    VectorTile,
    choose_int8_plan,
    choose_quantized_plan,
)
from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.tiles import GemmTile, gpu_of

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TARGETS = {1: 14, 4: 34, 16: 95, 64: 220, 256: 300, 1024: 400, 4096: 1100}
LINEARS = {"in_proj": (12352, 1.6), "lm_head": (248320, 1.25)}
HIDDEN, INNER, EXPERTS, TOP_K, GROUP = 2048, 512, 256, 8, 128
BANDWIDTH = 3.0e6  # bytes a microsecond
ARITHMETIC, INT8_ARITHMETIC = 8e8, 1.6e9  # operations a microsecond


def random_packed(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> Packed:
    out = empty(torch.Size(shape), dtype, torch.device("cuda"), scheme)
    info = torch.iinfo(out.packed.dtype)
    out.packed.random_(info.min, info.max + 1)
    # The scales of weights of variance 1 / K, each group its own.
    scale = 1.0 / (4.6 if scheme.bits == 4 else 74.0) / shape[-1] ** 0.5
    out.scales.uniform_(0.5 * scale, 1.5 * scale)
    if out.zeros is not None:
        out.zeros.uniform_(6.0, 9.0)
    return out


class Dependent:
    """wrap=Dependent launches a kernel as compiled graphs do: see `kernels.dependent`."""

    def __init__(self, kernel: Any) -> None:
        dependent.DEPENDENT = triton.language.constexpr(True)
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self.kernel[grid], launch_pdl=True)


def exact(weight: Packed, group_size: int, inputs: int) -> torch.Tensor:
    zeros = None if weight.zeros is None else weight.zeros.double()
    scales = weight.scales.double()
    return dequantize_reference(weight.packed, scales, zeros, group_size, inputs)


@dataclasses.dataclass
class Experts:
    """One layer of routed experts and the inputs of `tokens` tokens."""

    layer: QuantizedExperts
    up: Packed
    down: Packed
    x: torch.Tensor
    ids: list[torch.Tensor]
    weights: torch.Tensor

    @staticmethod
    def draw(
        layer: QuantizedExperts, up: Packed, down: Packed, tokens: int, routings: int
    ) -> Experts:
        ids = [
            torch.rand(tokens, layer.experts, device="cuda").topk(layer.top_k).indices
            for _ in range(routings)
        ]
        x = torch.randn(tokens, layer.hidden, device="cuda").to(up.scales.dtype)
        weights = torch.rand(tokens, layer.top_k, device="cuda").to(x.dtype)
        return Experts(layer, up, down, x, ids, weights)

    def run(
        self, plan: QuantizedPlan, turn: int = 0, wrap: Any = lambda k: k, int8: bool = False
    ) -> torch.Tensor:
        group = self.layer.group_size
        return moe_experts_quantized_cuda(
            self.x, self.up.packed, self.up.scales, self.up.zeros, group,
            self.down.packed, self.down.scales, self.down.zeros, group, self.layer.inner,
            self.ids[turn % len(self.ids)], self.weights,
            activation="silu", gate="chunked", int8_activations=int8, plan=plan, wrap=wrap,
        )  # fmt: skip

    def reference(self) -> torch.Tensor:
        layer = self.layer
        return moe_experts_reference(
            self.x.double(), exact(self.up, layer.group_size, layer.hidden),
            exact(self.down, layer.group_size, layer.inner), self.ids[0], self.weights.double(),
            activation="silu", gate="chunked",
        )  # fmt: skip


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
    spread = times[3 * len(times) // 4] - times[len(times) // 4]
    return scale * times[len(times) // 2], scale * spread


def experts_floor(layer: QuantizedExperts, tokens: int, arithmetic: float = ARITHMETIC) -> float:
    """Microseconds for the weights touched at 3.0 TB/s, or the arithmetic, by default in bf16."""
    touched = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)
    weights = 3 * layer.hidden * layer.inner
    size = layer.bits / 8 + 2 / (layer.group_size or 512)
    return max(
        touched * weights * size / BANDWIDTH, 2 * tokens * layer.top_k * weights / arithmetic
    )


def experts_layer(scheme: Scheme) -> QuantizedExperts:
    return QuantizedExperts(TOP_K, EXPERTS, HIDDEN, INNER, True, scheme.bits, scheme.group_size)


def time_all(
    scheme: Scheme, path: Path | None, tokens_list: list[int], wrap: Any = lambda k: k
) -> None:
    gpu, rows = gpu_of(0), []
    layer = experts_layer(scheme)
    up = random_packed((EXPERTS, 2 * INNER, HIDDEN), scheme, torch.bfloat16)
    down = random_packed((EXPERTS, HIDDEN, INNER), scheme, torch.bfloat16)
    for tokens in tokens_list:
        turns = 12 if tokens <= 8 else 4 if tokens <= 64 else 2
        inputs = Experts.draw(layer, up, down, tokens, turns)
        plan = choose_quantized_plan(layer, tokens, gpu)
        taken, spread = microseconds(lambda turn, i=inputs, p=plan: i.run(p, turn, wrap), turns)
        rows.append(_row("experts", tokens, taken, spread, experts_floor(layer, tokens),
                         TARGETS.get(tokens)))  # fmt: skip
        if tokens >= 256 and scheme.bits == 4:
            plan = choose_int8_plan(layer, tokens, gpu)
            taken, spread = microseconds(
                lambda turn, i=inputs, p=plan: i.run(p, turn, wrap, int8=True), turns
            )
            floor = experts_floor(layer, tokens, INT8_ARITHMETIC)
            rows.append(_row("experts, int8 activations", tokens, taken, spread, floor, None))
    for name, (outputs, factor) in LINEARS.items():
        linear = QuantizedLinear(outputs, HIDDEN, scheme.bits, scheme.group_size)
        size = outputs * HIDDEN * (scheme.bits / 8 + 2 / (scheme.group_size or HIDDEN))
        copies = max(2, math.ceil(2e8 / size))
        weights = [random_packed((outputs, HIDDEN), scheme, torch.bfloat16) for _ in range(copies)]
        for tokens in (1, 16, 1024):
            x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
            plan = choose_quantized_plan(linear, tokens, gpu)

            def run(
                turn: int, x: Any = x, weights: Any = weights, plan: Any = plan, int8: bool = False
            ) -> Any:
                w = weights[turn % len(weights)]
                return quantized_linear_cuda(
                    x, w.packed, w.scales, w.zeros, None, scheme.group_size, int8,
                    plan=plan, wrap=wrap,
                )  # fmt: skip

            taken, spread = microseconds(run, copies)
            floor = max(size / BANDWIDTH, 2 * tokens * outputs * HIDDEN / ARITHMETIC)
            target = factor * floor if tokens == 1 else None
            rows.append(_row(name, tokens, taken, spread, floor, target))
            if tokens < 256 or scheme.bits != 4:
                continue
            plan = choose_int8_plan(linear, tokens, gpu)
            taken, spread = microseconds(lambda turn, r=run, p=plan: r(turn, plan=p, int8=True),
                                         copies)  # fmt: skip
            floor = max(size / BANDWIDTH, 2 * tokens * outputs * HIDDEN / INT8_ARITHMETIC)
            what = f"{name}, int8 activations"
            rows.append(_row(what, tokens, taken, spread, floor, None))
        del weights
    result = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "scheme": scheme.describe(),
        "launch": "dependent" if wrap is Dependent else "plain",
        "date": datetime.date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _row(
    what: str, tokens: int, taken: float, spread: float, floor: float, target: float | None
) -> dict[str, Any]:
    wanted = "" if target is None else f", target {target:.1f}"
    print(
        f"{what} M={tokens}: {taken:.1f} us (+-{spread:.1f}), floor {floor:.1f}{wanted}",
        flush=True,
    )
    return {"what": what, "tokens": tokens, "microseconds": round(taken, 2),
            "spread": round(spread, 2), "floor": round(floor, 2), "target": target}  # fmt: skip


def parts_tiles() -> Iterator[PartsTile]:
    for block_n, block_k, parts, warps, stages in (
        (16, 128, 8, 4, 2), (16, 128, 8, 4, 4), (8, 128, 8, 4, 3), (8, 128, 8, 2, 3),
        (32, 128, 8, 4, 3), (16, 64, 8, 4, 4), (16, 128, 4, 2, 3), (16, 128, 4, 4, 3),
        (16, 128, 2, 2, 4), (16, 128, 1, 1, 4), (32, 128, 4, 4, 3),
    ):  # fmt: skip
        yield PartsTile(block_n, block_k, parts, warps, stages)


def vector_tiles(layer: QuantizedLinear) -> Iterator[VectorTile]:
    for steps, ahead, warps in (
        (1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 1), (5, 5, 1), (6, 4, 1), (6, 6, 1), (12, 4, 1),
        (1, 1, 2), (2, 2, 2), (3, 3, 2), (4, 4, 2),
    ):  # fmt: skip
        tile = VectorTile(steps, ahead, warps)
        if tile.split(layer) is not None:
            yield tile


def gemm_tiles(block_m: int) -> Iterator[GemmTile]:
    small = ((64, 128, 4, 3), (64, 128, 4, 5), (128, 128, 4, 3), (128, 128, 8, 3), (32, 128, 4, 4),
             (64, 64, 4, 4))  # fmt: skip
    large = ((64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 4, 3), (128, 64, 8, 3),
             (128, 64, 8, 4), (128, 128, 8, 3), (128, 128, 8, 2))  # fmt: skip
    for block_n, block_k, warps, stages in small if block_m <= 32 else large:
        yield GemmTile(block_n, block_k, 8, warps, stages)


def heights(tokens: int) -> list[int]:
    """Rows of a block worth trying; 0 is the kernels for few pairs."""
    per_expert = tokens * TOP_K / EXPERTS
    found = [m for m in (16, 32, 64, 128) if per_expert / 4 <= m <= max(16, 2 * per_expert)]
    return [0, *found] if tokens * TOP_K <= 256 else found


def tiles_of(block_m: int) -> list[Any]:
    if block_m:
        return list(gemm_tiles(block_m))
    vectors = ((2, 1), (3, 1), (4, 1), (4, 4), (4, 8), (2, 8), (8, 8))
    return [*parts_tiles(), *(VectorTile(steps, steps, warps) for steps, warps in vectors)]


class CompileOnly:
    """Compiles a kernel for its arguments and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def warm(*args: Any, **kwargs: Any) -> None:
            shown = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
            self.kernel.warmup(*shown, grid=grid, **kwargs)

        return warm


def precompile(job: tuple[Scheme, int, QuantizedPlan]) -> None:
    scheme, tokens, plan = job
    meta, dtype = torch.device("meta"), torch.bfloat16
    up = empty(torch.Size([EXPERTS, 2 * INNER, HIDDEN]), dtype, meta, scheme)
    down = empty(torch.Size([EXPERTS, HIDDEN, INNER]), dtype, meta, scheme)
    x = torch.empty(tokens, HIDDEN, dtype=dtype, device=meta)
    ids = torch.empty(tokens, TOP_K, dtype=torch.int64, device=meta)
    weights = torch.empty(tokens, TOP_K, dtype=dtype, device=meta)
    inputs = Experts(experts_layer(scheme), up, down, x, [ids], weights)
    with contextlib.suppress(triton.runtime.errors.OutOfResources):
        inputs.run(plan, wrap=CompileOnly)


def compile_candidates(scheme: Scheme, tokens_list: list[int]) -> None:
    """Fill Triton's cache on all cores."""
    jobs = {
        (block_m, tile): (scheme, tokens, QuantizedPlan(block_m, tile, tile))
        for tokens in tokens_list
        for block_m in heights(tokens)
        for tile in tiles_of(block_m)
    }
    started = time.time()
    workers = min(15, multiprocessing.cpu_count())
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(precompile, list(jobs.values()), chunksize=1)
    print(f"{len(jobs)} tiles compiled in {time.time() - started:.0f} s", flush=True)


def tune(scheme: Scheme, tokens_list: list[int], budget: float, out: Path) -> None:
    """Best tiles for each number of tokens, up and down one after the other."""
    deadline = time.time() + budget
    compile_candidates(scheme, tokens_list)
    entries: list[dict[str, Any]] = []
    for outputs, _ in LINEARS.values():
        linear = QuantizedLinear(outputs, HIDDEN, scheme.bits, scheme.group_size)
        plan = tune_linear(linear, scheme, deadline)
        entries.append({"kind": "linear", "layer": dataclasses.asdict(linear),
                        "plans": {1: plan.to_json()}})  # fmt: skip
    layer = experts_layer(scheme)
    up = random_packed((EXPERTS, 2 * INNER, HIDDEN), scheme, torch.bfloat16)
    down = random_packed((EXPERTS, HIDDEN, INNER), scheme, torch.bfloat16)
    plans: dict[int, Any] = {}
    for tokens in tokens_list:
        turns = 12 if tokens <= 8 else 4 if tokens <= 64 else 1
        inputs = Experts.draw(layer, up, down, tokens, turns)

        def measure(plan: QuantizedPlan, inputs: Experts = inputs, turns: int = turns) -> float:
            if time.time() > deadline:
                return math.inf
            try:
                return microseconds(lambda turn: inputs.run(plan, turn), turns, 7)[0]
            except triton.runtime.errors.OutOfResources:
                return math.inf

        chosen = choose_quantized_plan(layer, tokens, gpu_of(0))
        best, fastest = chosen, measure(chosen)
        for block_m in heights(tokens):
            first = tiles_of(block_m)[0]
            plan = QuantizedPlan(block_m, first, first)
            if chosen.block_m == block_m:
                plan = chosen
            cost = math.inf
            for side in ("up", "down"):
                for tile in tiles_of(block_m):
                    option = dataclasses.replace(plan, **{side: tile})
                    taken = measure(option)
                    if taken < cost:
                        cost, plan = taken, option
            if cost < fastest:
                fastest, best = cost, plan
        plans[tokens] = best.to_json()
        print(
            f"experts M={tokens}: {fastest:.1f} us, floor {experts_floor(layer, tokens):.1f}: "
            f"{best}", flush=True,
        )  # fmt: skip
    entries.append({"kind": "experts", "layer": dataclasses.asdict(layer), "plans": plans})
    table = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "command": " ".join(sys.argv),
        "layers": entries,
    }  # fmt: skip
    out.write_text(json.dumps(table, indent=1) + "\n")


def tune_linear(layer: QuantizedLinear, scheme: Scheme, deadline: float) -> QuantizedPlan:
    """The best tile for one row, as `up`, and the best of those that serve a few, as `down`."""
    shape = (layer.outputs, layer.inputs)
    copies = max(2, 2 * 10**8 // (shape[0] * shape[1]))
    weights = [random_packed(shape, scheme, torch.bfloat16) for _ in range(copies)]
    x = torch.randn(1, layer.inputs, device="cuda").bfloat16()
    best, fastest = choose_quantized_plan(layer, 1, gpu_of(0)), math.inf
    for tile in (*parts_tiles(), *vector_tiles(layer)):
        if time.time() > deadline:
            break
        few = tile if isinstance(tile, PartsTile) else best.down
        plan = QuantizedPlan(0, tile, few)

        def run(turn: int, plan: QuantizedPlan = plan) -> Any:
            w = weights[turn]
            return quantized_linear_cuda(
                x, w.packed, w.scales, w.zeros, None, layer.group_size, plan=plan
            )

        try:
            taken = microseconds(run, copies, 7)[0]
        except triton.runtime.errors.OutOfResources:
            continue
        if taken < fastest:
            fastest, best = taken, plan
    print(f"linear {layer.outputs} M=1: {fastest:.1f} us: {best}", flush=True)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("check", "time", "tune"))
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--zeros", action="store_true", help="with zero points")
    parser.add_argument("--dependent", action="store_true", help="launch as compiled graphs do")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("table.quant.json"))
    parser.add_argument("--budget", type=float, default=80, help="seconds for the sweep")
    options = parser.parse_args()
    torch.manual_seed(0)
    scheme = Scheme(options.bits, GROUP if options.bits == 4 else 0, not options.zeros, "rtn")
    if options.action == "check":
        from int4_check import check

        return min(check(), 1)
    if options.action == "time":
        wrap = Dependent if options.dependent else lambda kernel: kernel
        time_all(scheme, options.json, options.tokens, wrap)
    else:
        tune(scheme, options.tokens, options.budget, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
