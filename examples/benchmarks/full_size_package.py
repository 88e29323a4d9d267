"""A full-size language model as one package: both runners, torch.compile, memory, in one run.

    python examples/benchmarks/full_size_package.py --json FILE

Random weights. After a prompt of random tokens each runner goes on greedily: the Python one in a
process of its own, the C++ one (built here), and the model under torch.compile(mode=
"reduce-overhead") with this backend, all timed from token to token. Then the package and the
compiled model are fed one stream of random tokens from empty states, because a model with random
weights soon repeats itself when it reads its own: every next token is compared, and where two
differ, the compiled model's margin between its best two is reported.

A package that is there already is used again, and `--phases` chooses what is done; the JSON is
written after each phase. Exit status 1 if the runners' tokens differ, if a next token differs
where the compiled model's margin is over --margin, if a logit is not finite, or if the loaded
package takes over 10 % more memory than its weights and states.
"""

from __future__ import annotations

import argparse
import json
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
    """The random tokens of prompt and stream, the same in every process."""
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
    given = drawn(max(prompt, steps), loaded.metadata.vocab_size)
    session.generate(given[:prompt], min(4, steps), eos_token_ids=())
    session.reset()
    tokens, first_s, times = timed(session.stream(given[:prompt], steps, eos_token_ids=()))
    session.reset()
    stream = [
        int(session.generate([token], 1, eos_token_ids=())) for token in given[:steps]
    ]  # each after a prompt of one token: a step of decode
    states = sum(state.numel() * state.element_size() for state in session._states)
    return {
        "load_s": load_s, "prefill_tokens_per_s": prompt / first_s, **per_token(times),
        "weight_bytes": sum(loaded.metadata.weight_bytes), "state_bytes": states,
        "device_bytes_loaded": held, "device_bytes_after": device_bytes() - before,
        "tokens": tokens, "stream": stream,
    }  # fmt: skip


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
def run_compiled(model: Any, given: list[int], prompt: int, steps: int) -> dict[str, Any]:
    """The compiled model's times, and its next token and margin at each token of the stream."""
    from inductor_moe.bench.session import DECODE_EXPERTS, Session

    device = model.device
    session = Session(model, 1, max(prompt + steps, len(given)) + 8)
    ids = torch.tensor([given], device=device)
    first, logits = session.prefill(ids[:, :prompt]), None
    token = first.clone()
    model.set_experts_implementation(DECODE_EXPERTS)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    torch.compiler.reset()
    step = torch.compile(
        session.forward, backend="inductor_moe", mode=mode, fullgraph=True, dynamic=False
    )
    kept = session.save()
    start = time.perf_counter()
    step(token)
    if device.type == "cuda":
        torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    kept()

    def greedy() -> Iterator[int]:
        for _ in range(steps):
            token.copy_(step(token)[0])
            yield int(token)

    times = timed(greedy())[2]
    session.cache.reset()
    best, finite = [], True
    for position in range(steps):
        token.copy_(ids[:, position : position + 1])
        logits = step(token)[1].float()
        finite = finite and bool(logits.isfinite().all())
        best.append(logits[0].topk(2))
    found = [int(top.indices[0]) for top in best]
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {
        "compile_s": compile_s, "mode": mode, "cudagraph_skips": skipped, **per_token(times),
        "first_token_eager": int(first), "stream": found, "finite": finite,
        "margins": [float(top.values[0] - top.values[1]) for top in best],
    }  # fmt: skip


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """What the phases say about each other."""
    package, cpp, compiled = (found.get(name) for name in PHASES[1:])
    told: dict[str, Any] = {}
    if package:
        told["distinct_stream_tokens"] = len(set(package["stream"]))
        told["distinct_greedy_tokens"] = len(set(package["tokens"]))
        needed = package["weight_bytes"] + package["state_bytes"]
        if package["device_bytes_loaded"]:
            told["memory_over_needed"] = package["device_bytes_loaded"] / needed - 1
    if package and cpp:
        told["cpp_tokens_equal"] = cpp.get("tokens") == package["tokens"]
    if package and compiled:
        pairs = zip(package["stream"], compiled["stream"], strict=True)
        differ = [at for at, (ours, theirs) in enumerate(pairs) if ours != theirs]
        told["differ_at"] = differ
        told["margins_there"] = [compiled["margins"][at] for at in differ]
        told["median_margin"] = statistics.median(compiled["margins"])
        told["finite"] = compiled["finite"]
        told["package_over_compiled"] = compiled["decode_ms"] / package["decode_ms"]
        told["first_token_equals_eager"] = package["tokens"][0] == compiled["first_token_eager"]
    return told


def failures(told: dict[str, Any], margin: float) -> list[str]:
    """What is not as it must be."""
    found = []
    if not told.get("cpp_tokens_equal", True):
        found.append("the C++ runner's tokens are not the Python runner's")
    if not told.get("finite", True):
        found.append("a logit is not finite")
    decided = sum(there > margin for there in told.get("margins_there", ()))
    if decided:
        found.append(f"next tokens differ at {decided} positions with a margin over {margin}")
    if told.get("memory_over_needed", 0) > 0.1:
        found.append("the package takes over 10 % more memory than weights and states")
    return found


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
    told = found.get("compared", {})
    return "\n".join([*rows, json.dumps(told)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3.5-35b-a3b", choices=models.LANGUAGE_MODELS)
    parser.add_argument("--quant", default="int4", choices=models.SCHEMES)
    parser.add_argument("--layers", type=int, help="the first so many of them")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=512, help="tokens to generate, and to feed")
    parser.add_argument("--margin", type=float, default=0.125, help="of logits that count as tied")
    parser.add_argument("--package", type=Path, help="default: a file in a temporary folder")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--wrapper-opt", default="O1", help="the compiler's level for wrappers")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--only-run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_run:
        print(json.dumps(run_package(given.package, given.prompt, given.steps)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = given.package or Path(folder) / "model.pt2"
        return measure(given, path, Path(folder) / "runner")


def measure(given: argparse.Namespace, path: Path, build: Path) -> int:
    """Every phase that was asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {
        "benchmark": "full_size_package", "model": f"{given.model} {given.quant}",
        "layers": given.layers, "prompt": given.prompt, "steps": given.steps,
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
    model: Any = None
    if not path.exists() or "compile" in given.phases:
        with announced("weights"):
            model = models.build(given.model, given.quant, device, given.layers)
    tokens = drawn(max(given.prompt, given.steps), models.config_of(given.model).vocab_size)
    if "export" in given.phases and not path.exists():
        with announced("export"):
            start = time.perf_counter()
            room = max(given.prompt + given.steps, len(tokens)) + 8
            options = {"aot_inductor.compile_wrapper_opt_level": given.wrapper_opt}
            inductor_moe.export_generation(model, path, room, sampling="greedy", options=options)
            seconds = time.perf_counter() - start
        keep("export", {"seconds": seconds, "file_bytes": path.stat().st_size})
    if "python" in given.phases:
        with announced("python"):
            command = [
                sys.executable, "-W", "ignore", __file__, "--only-run", "--package", str(path),
                "--prompt", str(given.prompt), "--steps", str(given.steps),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the Python runner failed:\n{done.stderr}")
        keep("python", json.loads(done.stdout.splitlines()[-1]))
    if building:
        with announced("cpp"):
            output, _ = building.communicate()
            if building.returncode:
                keep("cpp", {"error": output[-2000:]})
            else:
                prompt = tokens[: given.prompt]
                graph = device == "cuda"
                keep("cpp", run_cpp(build / "generate", path, prompt, given.steps, graph))
    if "compile" in given.phases:
        with announced("compile"):
            keep("compile", run_compiled(model, tokens, given.prompt, given.steps))
    print(table(found))
    wrong = failures(found["compared"], given.margin)
    print("FAILED: " + "; ".join(wrong) if wrong else "as it must be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
