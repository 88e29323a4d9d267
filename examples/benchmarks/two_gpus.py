"""What more ranks make of one GPU's times: `parallelize` beside the whole model, in one run.

    python3 examples/benchmarks/two_gpus.py --json FILE

A process with the whole model on the first GPU and one process for each rank build the same random
weights, compile each phase at the same time and are measured in turn: first the one, then the
ranks together. Logits are compared with fp32. At last the layers that `bench scale` starts from
are measured on the first GPU, and its prediction stands beside the measurement. The file is
written anew after each step, so that what is there stays if time runs out. Without a GPU the ranks
are joined by gloo: `--model tiny --prompt 96 --context 64`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ranks_parts import kernels_of, predicted
from ranks_summary import gathered, table

PHASES = ("prefill", "decode64", "decode1")
CHECKED, FOLLOWED, ROWS = 64, 8, 8  # tokens of a prompt, then to decode, and sequences compared
REPEATS, STEPS = 7, 64
SLACK = 2.0
REDUCED = (1, 64, 16384)  # tokens whose all-reduce is timed


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3.5-35b-a3b")
    parser.add_argument("--quant", default="none", help="none (bf16), int4 or int8")
    parser.add_argument("--layers", type=int, help="the first so many of them")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--phases", default=",".join(PHASES), help="of " + ", ".join(PHASES))
    parser.add_argument("--prompt", type=int, default=16384, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache of a step")
    parser.add_argument("--no-heads", dest="heads", action="store_false", help="experts alone")
    parser.add_argument("--exchange", default="all-reduce", help="or all-to-all, or auto")
    parser.add_argument("--no-predict", dest="predict", action="store_false")
    parser.add_argument("--budget", type=float, default=570, help="end after so many seconds")
    parser.add_argument("--json", type=Path, required=True, help="write what is found here")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


class Gone(RuntimeError):
    """Another process failed, so what was waited for does not come."""


class Notes:
    """What a process has found, in a file of its own, and flags by which processes wait."""

    def __init__(self, folder: Path, role: str) -> None:
        self.folder, self.role, self.found = folder, role, {}
        self.start = time.perf_counter()

    def keep(self, name: str, value: Any) -> None:
        self.found[name] = value
        whole = self.folder / f"{self.role}.part"
        whole.write_text(json.dumps(self.found))
        whole.replace(self.folder / f"{self.role}.json")

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.0f} s] {self.role}: {text}", flush=True)

    def flag(self, name: str) -> None:
        (self.folder / f"{name}.{self.role}.flag").touch()

    def wait(self, name: str, roles: list[str]) -> None:
        """For other processes' flags. A missing one does not hold up its peers' measurements."""
        for role in roles:
            while not (self.folder / f"{name}.{role}.flag").exists():
                if (self.folder / f"{role}.failed").exists():
                    if role != "one":
                        raise Gone(f"{role} failed before {name}")
                    break
                time.sleep(0.02)


def work(given: argparse.Namespace) -> None:
    """One process: the whole model ("one") or a rank of it ("rank0", ...)."""
    notes = Notes(given.folder, given.role)
    try:
        import torch

        with torch.no_grad():
            _Process(given, notes).run()
    except BaseException as error:
        notes.keep("failed", f"{type(error).__name__}: {error}"[:2000])
        (given.folder / f"{given.role}.failed").touch()
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a broken group would wait for ranks that are gone


class _Process:
    def __init__(self, given: argparse.Namespace, notes: Notes) -> None:
        import torch

        self.given, self.notes = given, notes
        self.rank = None if given.role == "one" else int(given.role[4:])
        self.ranks = [f"rank{rank}" for rank in range(given.ranks)]
        self.logits: dict[str, Any] = {}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.cuda.set_device(self.rank or 0)
        else:
            torch.set_num_threads(1)

    def run(self) -> None:
        import torch

        from inductor_moe import lowerings
        from inductor_moe.bench import models

        lowerings.install()
        notes, given = self.notes, self.given
        if self.rank is None:
            notes.wait("built", self.ranks)  # the whole of it on two GPUs, before this third one
        else:
            self._join()
        build = time.perf_counter()
        self.model = models.build(given.model, given.quant, self.device, given.layers)
        whole = _bytes(self.model)
        if self.rank is not None:
            self._share()
            if self.device == "cuda":
                torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() if self.device == "cuda" else _bytes(self.model)
        notes.keep("weights", {"bytes": held, "tensors": _bytes(self.model), "whole": whole})
        notes.say(f"built, {held / 1e9:.2f} GB: {time.perf_counter() - build:.1f} s")
        notes.flag("built")
        for phase in given.phases.split(","):
            self._phase(phase)
        if self.rank is None:
            notes.wait("reduced", self.ranks)
            for phase, logits in self.logits.items():  # fp32 takes the memory that ranks had
                self._compare(phase, logits)
            if given.predict:
                found, parts = predicted(given, notes.found, self.device, STEPS, notes.say)
                notes.keep("predicted", found)
                notes.keep("parts", parts)
        else:
            self._time_reductions()
            notes.flag("reduced")
            sys.stdout.flush()
            os._exit(0)  # graphs that hold collectives may outlive the group, which then waits

    def _join(self) -> None:
        import datetime

        import torch
        import torch.distributed as dist

        here = {"device_id": torch.device("cuda", self.rank)} if self.device == "cuda" else {}
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            init_method=f"file://{self.given.folder}/group",
            rank=self.rank,
            world_size=self.given.ranks,
            timeout=datetime.timedelta(seconds=300),  # ranks may differ in how fast they compile
            **here,
        )

    def _share(self) -> None:
        import torch.distributed as dist

        import inductor_moe

        mesh = dist.init_device_mesh(self.device, (self.given.ranks,))
        self.model.set_experts_implementation("grouped_mm")
        done = inductor_moe.parallelize(
            self.model, mesh, heads=self.given.heads, exchange=self.given.exchange, timeout=120
        )
        self.notes.say(str(done))

    def _ids(self, batch: int, tokens: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(batch)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(vocabulary, (batch, tokens), generator=generator).to(self.device)

    def _phase(self, phase: str) -> None:
        """Compile beside the other processes, then measure alone, the one before the ranks."""
        import torch

        from inductor_moe.bench import generate

        self.notes.say(f"{phase} begins")
        _peak(self.device)
        prepare = self._prefill if phase == "prefill" else self._decode
        batch = 1 if phase == "prefill" else int(phase.removeprefix("decode"))
        measure, logits, compile_s, step = prepare(batch)
        self.notes.say(f"{phase}: first call {compile_s:.1f} s")
        self.notes.flag(f"{phase}-compiled")
        self.notes.wait(f"{phase}-compiled", ["one", *self.ranks])
        if self.rank is not None:
            self.notes.wait(f"{phase}-measured", ["one"])
        times = measure()
        found = {
            "us": statistics.median(times) * 1e6,
            "quartiles_us": [1e6 * q for q in statistics.quantiles(times, n=4)],
            "compile_s": compile_s, "peak_bytes": _peak(self.device),
            "sum": float(logits.double().sum()), "finite": bool(logits.isfinite().all()),
        }  # fmt: skip
        if step is not None and self.device == "cuda":
            found |= kernels_of(step, self.device, self.notes.say)
        self.notes.keep(phase, found)
        self.notes.say(f"{phase}: {found['us'] / 1e3:.3f} ms, {found.get('kernels')} kernels")
        if self.rank is None:
            self.logits[phase] = logits
        elif self.rank == 0:
            torch.save(logits.cpu(), self.given.folder / f"{phase}.pt")
        self.notes.flag(f"{phase}-measured")
        self.notes.wait(f"{phase}-measured", self.ranks)
        del measure, logits, step
        generate.free(self.device)

    def _prefill(self, _batch: int) -> Any:
        from inductor_moe.bench.session import Prefill, Session

        tokens = self.given.prompt
        session = Session(self.model, 1, tokens + 64)
        ids = self._ids(1, tokens + FOLLOWED)[:, :tokens]
        prefill = Prefill(session, "ours", dynamic=False)
        logits, compile_s = prefill(ids)
        logits = logits[:, None].clone()

        def measure() -> list[float]:
            times = []
            for _ in range(REPEATS + 1):
                self._together()
                times.append(prefill(ids)[1])
            return times[1:]

        return measure, logits, compile_s, None

    def _decode(self, batch: int) -> Any:
        import torch

        from inductor_moe.bench.session import DECODE_EXPERTS, Decode, Session

        context = self.given.context
        session = Session(self.model, batch, context + STEPS + 64)
        ids = self._ids(batch, CHECKED + FOLLOWED)
        session.prefill(ids[:, :CHECKED])
        decode = Decode(session, "ours")
        self.model.set_experts_implementation(DECODE_EXPERTS)
        logits = decode.follow(ids[:, CHECKED:])[:ROWS].clone()

        def measure() -> list[float]:
            # What keys and values are does not matter for the time, as many as there are does.
            for kind, state in session.states():
                if kind in ("keys", "values"):
                    state.normal_()
                elif kind == "position":
                    state.fill_(context)
            decode.token.copy_(ids[:, :1])
            self._together()
            times = decode.run(STEPS)
            if not bool(torch.isfinite(decode.logits).all()):
                raise RuntimeError("decode: the logits are not finite")
            return times[8:]

        return measure, logits, decode.compile_s, decode.step

    def _together(self) -> None:
        import torch

        if self.rank is not None:
            torch.distributed.barrier()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _compare(self, phase: str, logits: Any) -> None:
        """Errors of the one's and of rank 0's logits, and eager's in bf16, against fp32."""
        import torch

        from inductor_moe.bench import generate

        held = self.given.folder / f"{phase}.pt"
        batch = 1 if phase == "prefill" else int(phase.removeprefix("decode"))
        tokens = self.given.prompt if phase == "prefill" else CHECKED
        exact = generate.exact(self.model, self._ids(batch, tokens + FOLLOWED)[:ROWS])
        ranks = torch.load(held).to(self.device) if held.exists() else None
        wide = exact.logits[:, :1] if phase == "prefill" else exact.logits[:, 1:]
        # Of prefill there is one position, and a router that is undecided there changes all of it.
        judge = max if phase == "prefill" else statistics.median
        eager = judge(exact.eager_errors if phase == "prefill" else exact.eager_errors[1:])
        found = {"eager": eager, "one": judge(generate.errors_of(logits, wide))}
        if ranks is not None:
            found["ranks"] = judge(generate.errors_of(ranks, wide))
            found["between"] = judge(generate.errors_of(ranks, logits))
            found["within"] = found["ranks"] <= SLACK * eager
        self.notes.keep(f"{phase}-errors", found)
        self.notes.say(f"{phase}: errors {found}")

    def _time_reductions(self) -> None:
        """Seconds of an all-reduce of so many tokens, as one of twenty in a row."""
        import torch
        import torch.distributed as dist

        hidden = self.model.config.get_text_config(decoder=True).hidden_size
        found = {}
        for tokens in REDUCED:
            x = torch.zeros(tokens, hidden, device=self.device, dtype=torch.bfloat16)
            times = []
            for _ in range(8):
                self._together()
                start = time.perf_counter()
                for _ in range(20):
                    dist.all_reduce(x)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / 20)
            found[str(tokens)] = statistics.median(times) * 1e6
        self.notes.keep("all_reduce_us", found)


def _bytes(model: Any) -> int:
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


def _peak(device: str) -> int:
    """The most bytes allocated since the last call."""
    import torch

    if device != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def main() -> int:
    given = arguments().parse_args()
    if given.role:
        work(given)
        return 0
    end = time.perf_counter() + given.budget
    threads = max(1, min(16, (os.cpu_count() or 1) // (given.ranks + 1)))
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), **os.environ}
    roles = ["one", *(f"rank{rank}" for rank in range(given.ranks))]
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        running = {
            role: subprocess.Popen([*command, "--role", role], env=environment) for role in roles
        }
        failed_at = None
        while any(process.poll() is None for process in running.values()):
            time.sleep(0.5)
            for role, process in running.items():
                if process.poll():  # also if it was killed and could not say so
                    (given.folder / f"{role}.failed").touch()
            given.json.write_text(json.dumps(gathered(given), indent=1) + "\n")
            if failed_at is None and any(process.poll() for process in running.values()):
                failed_at = time.perf_counter()
            lost = [role for role in roles[1:] if running[role].poll()]
            late = lost and failed_at and time.perf_counter() > failed_at + 30
            if late or time.perf_counter() > end:
                why = f"{', '.join(lost)} failed" if late else "over the budget"
                print(f"ending what still runs: {why}", flush=True)
                for process in running.values():
                    process.kill()
        codes = [process.wait() for process in running.values()]
        found = gathered(given)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
