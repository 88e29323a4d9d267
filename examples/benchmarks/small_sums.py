"""Sums of small tensors over ranks: ours, NCCL's and PyTorch's one-shot, in CUDA graphs.

    python3 examples/benchmarks/small_sums.py --json FILE

First the results are compared, to the bit, with sums in fp32 in the order of the ranks: eagerly,
and in a thousand replays of two graphs by ranks that fall behind at random. Then each way is timed
as one of a hundred calls of a graph. At last a rank dies, and the others must end in an error.
Needs a GPU for each rank.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inductor_moe.bench.results import versions
from inductor_moe.ops import all_reduce as ops
from inductor_moe.parallel_memory import share_memory

SIZES = (4096, 8192, 16384, 65536, 262144)  # bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CALLS, REPEATS, TIMEOUT = 100, 40, 5.0


def data(count: int, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(count, generator=generator, device=device).to(dtype)


def expected(count: int, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    """What the sum of all ranks' data must be, to the bit."""
    ranks = dist.get_world_size()
    total = torch.zeros(count, device=device)
    for rank in range(ranks):
        total += data(count, dtype, seed * ranks + rank, device).float()
    return total.to(dtype)


class Rank:
    """One rank's part of everything. Each method is called by all."""

    def __init__(self, rank: int, ranks: int, folder: str, timeout: float) -> None:
        self.rank, self.ranks = rank, ranks
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl", init_method=f"file://{folder}/group", rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout), device_id=self.device,
        )  # fmt: skip
        self.group: Any = dist.group.WORLD
        self.name = str(self.group.group_name)
        self.reason = share_memory(self.group, self.device, 60)

    def mine(self, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        return data(count, dtype, seed * self.ranks + self.rank, self.device)

    def check_eager(self) -> dict[str, Any]:
        """Words that differ, and the largest error against fp64 of what fp32 sums are."""
        wrong, worst, seed = 0, 0.0, 0
        for dtype in DTYPES:
            for count in (2, 100, 2048, 2880, 4096, 65536, 131072 // (dtype.itemsize // 2)):
                seed += 1
                found = ops.all_reduce(self.mine(count, dtype, seed), self.name)
                wrong += int((found != expected(count, dtype, seed, self.device)).sum())
                exact = torch.zeros(count, device=self.device, dtype=torch.float64)
                for rank in range(self.ranks):
                    exact += data(count, dtype, seed * self.ranks + rank, self.device).double()
                if dtype == torch.float32:
                    error = float((found.double() - exact).norm() / exact.norm())
                    worst = max(worst, error)
        return {"wrong": wrong, "fp32_error": worst}

    def check_replays(self, replays: int) -> dict[str, Any]:
        """Two graphs of sums of several sizes, in turn, with ranks that pause at random."""
        counts = {"long": (2048, 65536, 2880, 131072), "short": (2048, 2048, 100)}
        graphs, inputs, outputs = {}, {}, {}
        for kind, sizes in counts.items():
            inputs[kind] = [self.mine(n, torch.bfloat16, 0) for n in sizes]
            graphs[kind], outputs[kind] = captured(
                lambda given=inputs[kind]: [ops.all_reduce(x, self.name) for x in given]
            )
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        generator = torch.Generator().manual_seed(self.rank)
        start = time.perf_counter()
        for replay in range(replays):
            kind = "long" if replay % 7 == 0 else "short"
            for place, x in enumerate(inputs[kind]):
                x.copy_(self.mine(len(x), torch.bfloat16, replay * 8 + place))
            if torch.rand((), generator=generator) < 0.5:
                torch.cuda._sleep(int(torch.randint(500_000, (), generator=generator)))
            graphs[kind].replay()
            for place, out in enumerate(outputs[kind]):
                right = expected(len(out), torch.bfloat16, replay * 8 + place, self.device)
                wrong += (out != right).sum()
            if replay % 50 == 0:  # beside the graphs
                x = self.mine(300, torch.float32, replay)
                right = expected(300, torch.float32, replay, self.device)
                wrong += (ops.all_reduce(x, self.name) != right).sum()
        return {"wrong": int(wrong), "seconds": time.perf_counter() - start}

    def time_all(self) -> list[dict[str, Any]]:
        rows = []
        for size in SIZES:
            x = self.mine(size // 2, torch.bfloat16, 1)
            for name, call in self.ways(x).items():
                try:
                    row = {"bytes": size, "way": name, **self.timed(call)}
                except RuntimeError as error:
                    row = {"bytes": size, "way": name, "error": str(error)[:300]}
                rows.append(row)
        return rows

    def ways(self, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
        from torch.distributed import _symmetric_memory as symmetric

        shared = symmetric.empty(x.numel(), dtype=x.dtype, device=self.device)
        symmetric.rendezvous(shared, self.name)
        shared.copy_(x)

        def ours(fewest: int) -> Callable[[], Any]:
            def call() -> Any:
                before, ops.FEWEST = ops.FEWEST, fewest
                try:
                    return ops.all_reduce(x, self.name)
                finally:
                    ops.FEWEST = before

            return call

        reduced = x.clone()
        found: dict[str, Callable[[], Any]] = {"ours": ours(ops.FEWEST)}
        if x.nbytes <= 8192:
            found |= {f"ours, {n} words a program": ours(n) for n in (32, 64, 256, 512, 1024)}
        found["nccl"] = lambda: dist.all_reduce(reduced)
        found["one-shot"] = lambda: torch.ops.symm_mem.one_shot_all_reduce(
            shared, "sum", self.name
        )
        found["copy and one-shot"] = lambda: (
            shared.copy_(x),
            torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self.name),
        )
        found["empty kernel"] = lambda: reduced[:1].zero_()
        return found

    def timed(self, call: Callable[[], Any]) -> dict[str, float]:
        """Microseconds of a call, one of a hundred in a graph."""
        graph, _ = captured(lambda: [call() for _ in range(CALLS)])
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / CALLS)
        low, _, high = statistics.quantiles(times, n=4)
        return {"us": statistics.median(times), "iqr_us": high - low}


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph, result


def work(rank: int, ranks: int, folder: str, replays: int) -> None:
    """A rank's process: all but the death of one."""
    found: dict[str, Any] = {}
    here = Path(folder) / f"{rank}.json"
    one = Rank(rank, ranks, folder, 60)
    found["reason"] = one.reason
    if one.reason is None:
        steps = {
            "eager": one.check_eager,
            "replays": lambda: one.check_replays(replays),
            "times": one.time_all,
        }
        for name, step in steps.items():
            found[name] = step()
            here.write_text(json.dumps(found))
            print(f"rank {rank}: {name} done", flush=True)
    here.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # graphs that hold collectives may outlive the group, which then waits


def die(rank: int, ranks: int, folder: str, late: bool) -> None:
    """The last rank leaves, or comes `late`, within a replayed graph of the others."""
    one = Rank(rank, ranks, folder, TIMEOUT)
    x = one.mine(2048, torch.bfloat16, 1)
    graph, _ = captured(lambda: [ops.all_reduce(x, one.name) for _ in range(4)])
    graph.replay()
    torch.cuda.synchronize()
    if rank == ranks - 1:
        if late:
            time.sleep(3 * TIMEOUT)
        os._exit(0)
    start, said = time.perf_counter(), ""
    try:
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    found = {"seconds": time.perf_counter() - start, "error": said}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def run(target: Callable[..., None], ranks: int, limit: float, *arguments: Any) -> list[Any]:
    """What each rank's process wrote; None for one that wrote nothing."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=target, args=(rank, ranks, folder, *arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + limit
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "ranks": given.ranks, "versions": versions(),
        "timeout": TIMEOUT,
    }  # fmt: skip
    found["found"] = run(work, given.ranks, 180, given.replays)
    given.json.write_text(json.dumps(found, indent=1) + "\n")
    found["dies"] = run(die, given.ranks, 60, False)[:-1]
    found["late"] = run(die, given.ranks, 60, True)[:-1]
    given.json.write_text(json.dumps(found, indent=1) + "\n")
    first = found["found"][0] or {}
    for each in found["found"]:
        shown = each and {key: each.get(key) for key in ("reason", "eager", "replays")}
        print(shown)
    for row in first.get("times", ()):
        took = f"{row['us']:.2f} +- {row['iqr_us']:.2f} us" if "us" in row else row["error"]
        print(f"{row['bytes']:>7} bytes  {row['way']:<26} {took}")
    print("dies:", found["dies"], "late:", found["late"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
