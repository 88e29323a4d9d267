"""How long one full-size Qwen3.5 delta-rule layer takes to compile for prefill, as JSON.

    python examples/benchmarks/compile_time.py [--device cuda] [--tokens 2048]
    python examples/benchmarks/compile_time.py check        # small sizes; results agree

Each backend compiles in a process of its own with empty caches, after one for warming up, so that
neither waits for the disk. `compile_s` is the first call less the second, `torch_compile_s` the
call of torch.compile before them, `phases_s` what PyTorch counts for parts of the first call, some
inside others. The layer is transformers' own code, on random weights. Past --limit seconds stock
Inductor is stopped, and `compile_s` and the ratio are what they are at least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BACKENDS = ("inductor_moe", "inductor")
FULL = {
    "hidden_size": 2048, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
PHASES = (
    "bytecode_tracing", "create_aot_dispatcher_function", "fx_codegen_and_compile",
    "GraphLowering.run", "GraphLowering.codegen", "PyCodeCache.load_by_key_path",
    "async_compile.precompile", "async_compile.wait", "CachingAutotuner.benchmark_all_configs",
)  # fmt: skip
SMALL = FULL | {
    "hidden_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


def layer(sizes: dict[str, int], device: str) -> Any:
    """One Qwen3.5-MoE GatedDeltaNet in bf16."""
    import torch
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as configuration
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    torch.manual_seed(0)
    config = configuration.Qwen3_5MoeTextConfig(**sizes)
    return modeling.Qwen3_5MoeGatedDeltaNet(config, 0).to(device, torch.bfloat16).eval()


def measure(backend: str, device: str, tokens: int, small: bool) -> dict[str, Any]:
    """Compile and run in this process."""
    import torch

    sizes = SMALL if small else FULL
    module = layer(sizes, device)
    torch.manual_seed(1)
    x = torch.randn(1, tokens, sizes["hidden_size"]).to(device, torch.bfloat16)
    start = time.perf_counter()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    named = time.perf_counter() - start
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            out = compiled(x)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        difference = (out.double() - module(x).double()).norm() / out.double().norm()
    from torch._dynamo.utils import compilation_time_metrics  # not before torch.compile is timed

    return {
        "backend": backend,
        "finished": True,
        "compile_s": round(seconds[0] - seconds[1], 2),
        "torch_compile_s": round(named, 2),
        "phases_s": {
            phase: round(sum(compilation_time_metrics[phase]), 2)
            for phase in PHASES
            if phase in compilation_time_metrics
        },
        "run_s": round(seconds[1], 4),
        "relative_difference_to_eager": float(difference),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
    }


def in_subprocess(backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        command = [sys.executable, __file__, arguments.mode, "--measure", backend]
        command += ["--device", arguments.device, "--tokens", str(arguments.tokens)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=arguments.limit
            )
        except subprocess.TimeoutExpired:
            return {"backend": backend, "compile_s": arguments.limit, "finished": False}
    if done.returncode:
        raise SystemExit(f"{backend} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("time", "check"), default="time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--limit", type=float, help="seconds for each backend; no limit if none")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--measure", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode == "check":
        arguments.tokens = min(arguments.tokens, 130)
    if arguments.measure:
        small = arguments.mode == "check"
        print(json.dumps(measure(arguments.measure, arguments.device, arguments.tokens, small)))
        return
    warming_up = argparse.Namespace(**(vars(arguments) | {"mode": "check", "tokens": 130}))
    in_subprocess(BACKENDS[0], warming_up)
    rows = [in_subprocess(backend, arguments) for backend in BACKENDS]
    ours, stock = rows
    if not ours["finished"]:
        raise SystemExit(f"inductor_moe did not finish in {arguments.limit} s")
    ratio = round(stock["compile_s"] / ours["compile_s"], 2)
    found = {"tokens": arguments.tokens, "rows": rows, "stock_over_ours": ratio}
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if arguments.mode == "check":
        if not stock["finished"]:
            raise SystemExit(f"inductor did not finish in {arguments.limit} s")
        worst = max(row["relative_difference_to_eager"] for row in rows)
        assert worst < 0.02, f"a compiled layer differs from eager by {worst:.3f}; limit 0.02"


if __name__ == "__main__":
    main()
