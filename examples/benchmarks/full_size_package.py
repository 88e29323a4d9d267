"""A full-size language model as one package: both runners, torch.compile, memory, in one run.

    python examples/benchmarks/full_size_package.py --json FILE

Random weights. After a prompt of random tokens each runner goes on greedily: the Python one in a
process of its own, the C++ one (built here), and the model under torch.compile(mode=
"reduce-overhead") with this backend, all timed from token to token. The latter is compiled by a
process of its own while the package is made.

Then the package generates from one token, and the compiled model is fed what it generated, so that
a difference is seen wherever it is and not passed on. Eagerly, the model reads the same tokens in
bf16 and in fp32. Compared at every step are the next token and the keys and values of the last
attention layer, to which all layers before it contribute, and logits where there are any. A router
that is all but undecided makes one position differ in any two right computations, so errors are
medians over the positions of each quarter of the steps.

A package that is there already is used again, and `--phases` chooses what is done; the JSON is
written after each phase. Exit status 1 if the runners' tokens differ, if a value is not finite, if
the package or the compiled model is further from fp32 than twice eager bf16 in any quarter, or
its tokens are less likely in fp32 than rounding explains, or if the loaded package takes over
10 % more memory than its weights and states.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from package_errors import differences, error_rows, last_rows, per_position, too_far

import inductor_moe
from inductor_moe.bench import models, results

PHASES = ("export", "python", "cpp", "compile")
RUNNER = Path(__file__).parents[1] / "cpp_runner"
WARM_UP = 8  # tokens before a timing
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


@contextmanager
def announced(name: str) -> Iterator[None]:
    """Say that a phase begins, goes on and ends."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(30):
            say(f"  {name} goes on")

    say(name)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f"{name}: done")


def drawn(count: int, vocabulary: int) -> list[int]:
    """The random tokens of the prompt, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def per_token(times: list[float]) -> dict[str, float]:
    """Tokens/s and milliseconds, by the median, of the times of single tokens."""
    kept = times[WARM_UP:] or times
    middle = statistics.median(kept)
    return {"decode_tokens_per_s": 1 / middle, "decode_ms": middle * 1e3,
            "decode_ms_mean": sum(kept) / len(kept) * 1e3}  # fmt: skip


def timed(stream: Iterator[Any]) -> tuple[list[int], float, list[float]]:
    """(the tokens, seconds to the first, seconds of each other)"""
    tokens, times, last = [], [], time.perf_counter()
    for token in stream:
        tokens.append(int(token))
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return tokens, times[0], times[1:]


def device_bytes() -> int:
    """The device memory in use, by anyone; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@torch.no_grad()
def run_package(path: Path, prompt: int, steps: int) -> dict[str, Any]:
    """What a process that only loads the package finds: memory, greedy tokens, the stream's."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    before = device_bytes()
    start = time.perf_counter()
    loaded = inductor_moe.load_generation(path)
    session = loaded.session()
    held = device_bytes() - before
    load_s = time.perf_counter() - start
    given = drawn(prompt, loaded.metadata.vocab_size)
    session.generate(given, min(4, steps), eos_token_ids=())
    session.reset()
    tokens, first_s, times = timed(session.stream(given, steps, eos_token_ids=()))
    session.reset()
    stream = session.generate(given[:1], steps, eos_token_ids=())[0].tolist()
    states = {
        spec.name: state
        for spec, state in zip(loaded.metadata.states, session._states, strict=True)
    }
    layer = max(int(name.split(".")[1]) for name in states if name.endswith(".keys"))
    rows = per_position(states[f"layers.{layer}.keys"], states[f"layers.{layer}.values"], steps)
    torch.save({"first": given[0], "tokens": stream, "rows": rows}, stream_file(path))
    held_states = sum(state.numel() * state.element_size() for state in states.values())
    return {
        "load_s": load_s, "prefill_tokens_per_s": prompt / first_s, **per_token(times),
        "weight_bytes": sum(loaded.metadata.weight_bytes), "state_bytes": held_states,
        "device_bytes_loaded": held, "device_bytes_after": device_bytes() - before,
        "tokens": tokens, "stream": stream,
    }  # fmt: skip


def stream_file(path: Path) -> Path:
    """Where what the package generated from one token lies for the compiled model."""
    return path.with_suffix(".stream")


def cmake(folder: Path) -> subprocess.Popen[str]:
    """Start to build the C++ runner."""
    command = (
        f'cmake -S "{RUNNER}" -B "{folder}" -DPython3_EXECUTABLE="{sys.executable}" '
        f'-DCMAKE_BUILD_TYPE=Release && cmake --build "{folder}" --parallel'
    )
    return subprocess.Popen(command, shell=True, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def run_cpp(runner: Path, path: Path, given: list[int], steps: int, graph: bool) -> dict[str, Any]:
    """The C++ runner's tokens and tokens/s."""
    ids = path.with_suffix(".ids")
    ids.write_text(",".join(map(str, given)))
    command = [
        str(runner), "--package", str(path), "--prompt-ids", f"@{ids}", "--ignore-eos",
        "--max-new-tokens", str(steps), "--warmup", "1", "--iters", "2",
        *(["--cuda-graph"] if graph else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip()}
    found: dict[str, Any] = {
        f"{phase}_tokens_per_s": float(rate)
        for phase, rate in re.findall(r"(prefill|decode) ([\d.]+) tokens/s", done.stdout)
    }
    (row,) = re.findall(r"session 0 row 0:(.*)", done.stdout)
    return {**found, "tokens": [int(token) for token in row.split()]}


@torch.no_grad()
def run_compiled(given: argparse.Namespace) -> dict[str, Any]:
    """The compiled model's times, and how it, the package and eager bf16 differ from fp32.

    Compiles at once, and goes on when a line comes in: the package's tokens are there.
    """
    from inductor_moe.bench.session import DECODE_EXPERTS, Session

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.build(given.model, given.quant, device, given.layers)
    prompt, steps = given.prompt, given.steps
    session = Session(model, 1, prompt + steps + 8)
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    model.set_experts_implementation(DECODE_EXPERTS)
    mode = "reduce-overhead" if device == "cuda" else "default"
    step = torch.compile(
        session.forward, backend="inductor_moe", mode=mode, fullgraph=True, dynamic=False
    )
    start = time.perf_counter()
    step(token)
    if device == "cuda":
        torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    print("compiled", flush=True)
    sys.stdin.readline()
    package = torch.load(stream_file(given.package))
    tokens = drawn(prompt, model.config.get_text_config(decoder=True).vocab_size)
    first = session.prefill(torch.tensor([tokens], device=device))
    model.set_experts_implementation(DECODE_EXPERTS)
    token.copy_(first)

    def greedy() -> Iterator[int]:
        for _ in range(steps):
            token.copy_(step(token)[0])
            yield int(token)

    times = timed(greedy())[2]
    for _, state in session.states():  # a reset cache would be another graph
        state.zero_()
    fed = torch.tensor([[package["first"], *package["tokens"][:-1]]], device=device)
    logits = []
    for position in range(steps):
        token.copy_(fed[:, position : position + 1])
        logits.append(step(token)[1][0].clone())
    rows = {"package": package["rows"], "compiled": last_rows(session.cache, steps)}
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {
        "compile_s": compile_s, "mode": mode, "cudagraph_skips": skipped, **per_token(times),
        "first_token_eager": int(first),
        **differences(model, fed, torch.stack(logits), rows, package["tokens"]),
    }  # fmt: skip


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """What the phases say about each other."""
    package, cpp, compiled = (found.get(name) for name in PHASES[1:])
    told: dict[str, Any] = {}
    if package:
        told["distinct_stream_tokens"] = len(set(package["stream"]))
        needed = package["weight_bytes"] + package["state_bytes"]
        if package["device_bytes_loaded"]:
            told["memory_over_needed"] = package["device_bytes_loaded"] / needed - 1
    if package and cpp:
        told["cpp_tokens_equal"] = cpp.get("tokens") == package["tokens"]
    if compiled:
        told["next_tokens_equal"] = found["steps"] - len(compiled["differ_at"])
    if compiled and package:
        told["package_over_compiled"] = compiled["decode_ms"] / package["decode_ms"]
        told["first_token_equals_eager"] = package["tokens"][0] == compiled["first_token_eager"]
    if compiled and cpp and "decode_tokens_per_s" in cpp:
        told["cpp_over_compiled"] = compiled["decode_ms"] / 1e3 * cpp["decode_tokens_per_s"]
    return told


def failures(found: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    told, compiled, wrong = found["compared"], found.get("compile"), []
    if not told.get("cpp_tokens_equal", True):
        wrong.append("the C++ runner's tokens are not the Python runner's")
    if told.get("memory_over_needed", 0) > 0.1:
        wrong.append("the package takes over 10 % more memory than weights and states")
    if compiled:
        wrong += too_far(compiled)
    return wrong


def table(found: dict[str, Any]) -> str:
    """One row for each that decoded, and what was compared."""
    rows = ["                 prefill tok/s   decode tok/s   ms a token"]
    for name in PHASES[1:]:
        row = found.get(name)
        if row and "decode_tokens_per_s" in row:
            prefill = row.get("prefill_tokens_per_s")
            rate = row["decode_tokens_per_s"]
            first = "-" if prefill is None else f"{prefill:,.1f}"
            rows.append(f"{name:<16} {first:>13} {rate:>14,.1f} {1e3 / rate:>12.3f}")
    if "compile" in found:
        rows += error_rows(found["compile"])
    return "\n".join([*rows, json.dumps(found.get("compared", {}))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3.5-35b-a3b", choices=models.LANGUAGE_MODELS)
    parser.add_argument("--quant", default="int4", choices=models.SCHEMES)
    parser.add_argument("--layers", type=int, help="the first so many of them")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=512, help="tokens to generate, and to feed")
    parser.add_argument("--package", type=Path, help="default: a file in a temporary folder")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--wrapper-opt", default="O1", help="the compiler's level for wrappers")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--only", choices=("python", "compile"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only == "python":
        print(json.dumps(run_package(given.package, given.prompt, given.steps)))
        return 0
    if given.only == "compile":
        print(json.dumps(run_compiled(given)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        given.package = given.package or Path(folder) / "model.pt2"
        return measure(given, Path(folder) / "runner")


def alone(phase: str, given: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a phase in a process of its own."""
    layers = [] if given.layers is None else ["--layers", str(given.layers)]
    command = [
        sys.executable, "-W", "ignore", __file__, "--only", phase, "--package", str(given.package),
        "--model", given.model, "--quant", given.quant, *layers,
        "--prompt", str(given.prompt), "--steps", str(given.steps),
    ]  # fmt: skip
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    """Until a process says so, or ends."""
    assert process.stdout is not None
    while said := process.stdout.readline():
        if said.strip() == line:
            return


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate("go\n")
    if process.returncode:
        raise SystemExit(f"a process ended with exit status {process.returncode}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def export(given: argparse.Namespace, device: str) -> dict[str, Any]:
    """Make the package; seconds, in all and by phase of the compiler."""
    from torch._dynamo.utils import compilation_time_metrics

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("inductor_moe").setLevel(logging.INFO)
    model = models.build(given.model, given.quant, device, given.layers)
    start = time.perf_counter()
    options = {"aot_inductor.compile_wrapper_opt_level": given.wrapper_opt}
    inductor_moe.export_generation(
        model, given.package, given.prompt + given.steps + 8, sampling="greedy", options=options
    )
    seconds = time.perf_counter() - start
    phases = {name: round(sum(times), 1) for name, times in compilation_time_metrics.items()}
    return {
        "seconds": seconds, "file_bytes": given.package.stat().st_size,
        "compiler_s": {name: took for name, took in phases.items() if took >= 1},
    }  # fmt: skip


def measure(given: argparse.Namespace, build: Path) -> int:
    """Every phase that was asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {
        "benchmark": "full_size_package", "model": f"{given.model} {given.quant}",
        "layers": given.layers, "prompt": given.prompt, "steps": given.steps,
        "wrapper_opt": given.wrapper_opt,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": results.versions(), "commit": results.commit(), "cpus": os.cpu_count(),
    }  # fmt: skip

    def keep(name: str, value: dict[str, Any]) -> None:
        found[name] = value
        found["compared"] = compared(found)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")
        short = {k: v for k, v in value.items() if not isinstance(v, list)}
        say(f"  {name}: {json.dumps(short)}")

    building = cmake(build) if "cpp" in given.phases else None
    compiling = alone("compile", given) if "compile" in given.phases else None
    try:
        if "export" in given.phases and not given.package.exists():
            with announced("export"):
                keep("export", export(given, device))
            if device == "cuda":
                torch.cuda.empty_cache()
        if compiling:
            with announced("torch.compile"):
                wait_for_line(compiling, "compiled")  # lest it works while others are timed
        if "python" in given.phases:
            with announced("python"):
                keep("python", result_of(alone("python", given)))
        if building:
            with announced("cpp"):
                output, _ = building.communicate()
                if building.returncode:
                    keep("cpp", {"error": output[-2000:]})
                else:
                    config = models.config_of(given.model)
                    prompt = drawn(given.prompt, config.vocab_size)
                    graph = device == "cuda"
                    keep(
                        "cpp",
                        run_cpp(build / "generate", given.package, prompt, given.steps, graph),
                    )
        if compiling:
            with announced("compile"):
                keep("compile", result_of(compiling))
    finally:
        for process in (building, compiling):
            if process and process.poll() is None:
                process.kill()
    print(table(found))
    wrong = failures(found)
    print("FAILED: " + "; ".join(wrong) if wrong else "as it must be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
