"""The whole Qwen3.5 MoE block (router, experts, shared expert): ours against stock Inductor.

Both compile transformers' unmodified module in this process. Each time is the median of 30 replays
of one CUDA graph through which several inputs rotate, so that every call reads its weights from
memory; every kernel is counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from typing import Any

import torch

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
ROTATED, REPLAYS = 8, 30


def build() -> torch.nn.Module:
    """One MoE block of Qwen3.5-35B-A3B, random bf16 weights."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    config = Qwen3_5MoeTextConfig(
        hidden_size=2048, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device("cuda"):
        block = Qwen3_5MoeSparseMoeBlock(config).to(torch.bfloat16).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block


def time_graph(function: Any, inputs: list[torch.Tensor]) -> tuple[float, float]:
    """(median, interquartile range) of one call in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in inputs[:3]:
            function(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [function(x) for x in inputs]
    times = []
    for _ in range(REPLAYS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    del kept
    times = times[5:]
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), quartiles[2] - quartiles[0]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    arguments = parser.parse_args()
    block = build()
    exact = copy.deepcopy(block).double()
    exact.experts.config._experts_implementation = "batched_mm"
    rows, failed = [], False
    for tokens in arguments.tokens:
        inputs = [torch.randn(1, tokens, 2048, device="cuda", dtype=torch.bfloat16)
                  for _ in range(ROTATED)]  # fmt: skip
        sample = inputs[0][:, : min(tokens, 16)]
        reference = exact(sample.double())
        eager_error = relative_error(block(sample), reference)
        row: dict[str, Any] = {"tokens": tokens, "eager_error": eager_error}
        for name, backend in (("ours", "inductor_moe"), ("inductor", "inductor")):
            torch._dynamo.reset()
            compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
            output = compiled(inputs[0])
            error = relative_error(output[:, : sample.shape[1]], reference)
            row[f"{name}_error"] = error
            if not error <= 2 * eager_error:
                failed = True
                print(f"{name} at {tokens} tokens: error {error:.2e}, eager {eager_error:.2e}")
                continue
            row[f"{name}_us"], row[f"{name}_iqr_us"] = time_graph(compiled, inputs)
        if "ours_us" in row and "inductor_us" in row:
            row["speedup"] = row["inductor_us"] / row["ours_us"]
        rows.append(row)
        print({key: round(value, 5) for key, value in row.items()}, flush=True)
    report = {
        "benchmark": "qwen3.5-35b-a3b MoE block, bf16",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "python examples/benchmarks/moe_block.py --json FILE",
        "rows": rows,
    }
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
    return int(failed)


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
