"""Find the fastest tiles of expert layers on this GPU and write the table `tiles` reads."""

from __future__ import annotations

import datetime
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inductor_moe.bench import candidates
from inductor_moe.bench.case import draws
from inductor_moe.bench.moe import touched
from inductor_moe.bench.shapes import Moe, model_named
from inductor_moe.bench.timing import microseconds
from inductor_moe.errors import InductorMoeError
from inductor_moe.tiles import (
    Experts,
    Gpu,
    Plan,
    gpu_of,
    plan_by_rule,
    read_table,
    table_name,
    user_folder,
)

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DIFFERENCE = 1e-2
HOPELESS = 1.25


@dataclass(frozen=True)
class Progress:
    """What `tune` has just found: the layer's best plan at this many tokens."""

    model: str
    tokens: int
    us: float
    plan: Plan
    tried: int
    wrong: int


def layer_of(shape: Moe) -> Experts:
    """What `tiles` knows of a model's experts in bf16; gpt-oss keeps its weights transposed."""
    inner = "n" if shape.config.startswith("gpt_oss") else "k"
    return Experts(shape.top_k, shape.experts, shape.hidden, shape.inner, True, 2, inner, inner)


def search(
    layer: Experts, tokens: int, measure: Callable[[Plan], float]
) -> tuple[float, Plan, int]:
    """(best time, its plan, plans tried). `measure` gives inf for a plan that does not run.

    One side at a time, from a start of each kind; then the order of the blocks.
    """
    best: tuple[float, Plan | None] = (math.inf, None)
    tried = 0
    for start in candidates.starts(layer, tokens):
        plan, cost = start, math.inf
        options: Iterator[Plan]
        for round_ in (*candidates.SIDES, "order"):
            if round_ == "order":
                options = candidates.groupings(plan)
            else:
                options = candidates.candidates(layer, plan, round_)
            for option in options:
                taken, tried = measure(option), tried + 1
                if taken < cost:
                    cost, plan = taken, option
        best = min(best, (cost, plan), key=lambda pair: pair[0])
    if best[1] is None or best[0] == math.inf:
        raise InductorMoeError(f"tune: no tile runs for {layer} at {tokens} tokens")
    return best[0], best[1], tried


@dataclass(frozen=True)
class Inputs:
    """Expert weights in the layout of a layer, and several routings of `tokens` tokens."""

    x: Tensor
    up: Tensor
    down: Tensor
    routings: list[tuple[Tensor, Tensor]]

    def run(
        self, plan: Plan, ids: Tensor, share: Tensor, wrap: Any = lambda kernel: kernel
    ) -> Any:
        from inductor_moe.ops.moe_cuda import moe_experts_cuda

        return moe_experts_cuda(
            self.x, self.up, self.down, ids, share,
            activation="silu", gate="chunked", plan=plan, wrap=wrap,
        )  # fmt: skip


def weights_of(layer: Experts, device: str) -> tuple[Tensor, Tensor]:
    def draw(rows: int, columns: int, inner: str) -> Tensor:
        shape = (layer.experts, rows, columns) if inner == "k" else (layer.experts, columns, rows)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if device != "meta":
            weight.normal_(0, 0.02)
        return weight if inner == "k" else weight.transpose(1, 2)

    up = draw(2 * layer.inner, layer.hidden, layer.up_inner)
    return up, draw(layer.hidden, layer.inner, layer.down_inner)


def inputs_of(layer: Experts, tokens: int, up: Tensor, down: Tensor, routings: int) -> Inputs:
    device = up.device
    x = torch.randn(tokens, layer.hidden, device=device).bfloat16()
    drawn = []
    for _ in range(routings):
        top, ids = torch.rand(tokens, layer.experts, device=device).topk(layer.top_k)
        drawn.append((ids, (top / top.sum(-1, keepdim=True)).bfloat16()))
    return Inputs(x, up, down, drawn)


class Meter:
    """Times plans on the GPU; a plan whose numbers differ from the built-in rule's is wrong.

    One that is clearly behind the best so far is timed in less detail.
    """

    def __init__(self, layer: Experts, tokens: int, inputs: Inputs, gpu: Gpu) -> None:
        self.inputs, self.wrong, self.best = inputs, 0, math.inf
        rule = plan_by_rule(layer, tokens, gpu)
        self.expected = inputs.run(rule, *inputs.routings[0])

    def __call__(self, plan: Plan) -> float:
        import triton

        try:
            found = self.inputs.run(plan, *self.inputs.routings[0])
            off = (found.float() - self.expected.float()).norm() / self.expected.float().norm()
            if not off <= DIFFERENCE:
                self.wrong += 1
                return math.inf
            taken, _ = microseconds(
                lambda ids, share: self.inputs.run(plan, ids, share),
                self.inputs.routings,
                give_up=HOPELESS * self.best,
            )
            self.best = min(self.best, taken)
            return taken
        except triton.runtime.errors.OutOfResources:
            return math.inf


class _CompileOnly:
    """Compiles a kernel for its arguments and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def warm(*args: Any, **kwargs: Any) -> None:
            shown = [a.dtype if isinstance(a, Tensor) else a for a in args]
            self.kernel.warmup(*shown, grid=grid, **kwargs)

        return warm


def _precompile(job: tuple[Experts, int, Plan]) -> None:
    layer, tokens, plan = job
    inputs = inputs_of(layer, tokens, *weights_of(layer, "meta"), routings=1)
    try:
        inputs.run(plan, *inputs.routings[0], wrap=_CompileOnly)
    except Exception:  # the meter meets it again, where it counts
        return


def precompile(layer: Experts, sizes: Sequence[int]) -> None:
    """Fill Triton's cache with every candidate, on all cores."""
    jobs = {
        (side, plan.block_m, getattr(plan, side)): (layer, tokens, plan)
        for tokens in sizes
        for start in candidates.starts(layer, tokens)
        for side in candidates.SIDES
        for plan in candidates.candidates(layer, start, side)
    }
    workers = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_precompile, jobs.values(), chunksize=2):
            pass


def tune(
    models: Sequence[str],
    sizes: Sequence[int] = TOKENS,
    folder: Path | None = None,
    budget: float = math.inf,
    again: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Search tiles for the experts of models and write them after every size; the table's path.

    models  names in `shapes.MODELS`
    sizes   numbers of tokens; each is a row of the table
    folder  where the table goes; None is the user's own folder, which `tiles` reads first
    budget  seconds after which no new size is begun
    again   repeat sizes that the table already has; without it an interrupted run goes on

    Raises InductorMoeError without a CUDA GPU, for an unknown model, or one without experts.
    """
    shapes = {name: model_named(name).moe for name in models}
    gpu = gpu_of(None)
    if gpu is None:
        raise InductorMoeError("tune: needs a CUDA GPU; torch.cuda.is_available() is False")
    path = (folder or user_folder()) / table_name(gpu.name)
    table = Table.open(path, gpu.name)
    deadline = time.monotonic() + budget
    for model, shape in shapes.items():
        if shape is None:
            raise InductorMoeError(f"model: {model} has no experts to tune")
        layer = layer_of(shape)
        missing = [m for m in sizes if again or not table.has(layer, m)]
        if not missing or time.monotonic() > deadline:
            continue
        precompile(layer, missing)
        up, down = weights_of(layer, "cuda")
        for tokens in missing:
            if time.monotonic() > deadline:
                break
            moved = 2 * touched(shape, tokens) * shape.expert_parameters()
            inputs = inputs_of(layer, tokens, up, down, draws(moved, "cuda"))
            meter = Meter(layer, tokens, inputs, gpu)
            us, plan, tried = search(layer, tokens, meter)
            table.add(model, layer, tokens, plan, us)
            table.write()
            on_progress(Progress(model, tokens, us, plan, tried, meter.wrong))
        del up, down
        torch.cuda.empty_cache()
    return path


@dataclass
class Table:
    """A GPU's file of tiles."""

    path: Path
    content: dict[str, Any]

    @staticmethod
    def open(path: Path, gpu: str) -> Table:
        """The table in a file, or an empty one. Raises InductorMoeError for another file."""
        import triton

        versions = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
        if path.is_file():
            read_table(path)
        held = json.loads(path.read_text()) if path.is_file() else {"layers": []}
        return Table(path, {**versions, "layers": held["layers"]})

    def entry(self, layer: Experts) -> dict[str, Any] | None:
        wanted = asdict(layer)
        return next((e for e in self.content["layers"] if e["layer"] == wanted), None)

    def has(self, layer: Experts, tokens: int) -> bool:
        entry = self.entry(layer)
        return entry is not None and str(tokens) in entry["plans"]

    def add(self, name: str, layer: Experts, tokens: int, plan: Plan, us: float) -> None:
        entry = self.entry(layer)
        if entry is None:
            entry = {"name": name, "layer": asdict(layer), "plans": {}, "microseconds": {}}
            self.content["layers"].append(entry)
        entry["date"] = datetime.date.today().isoformat()
        entry["command"] = f"inductor-moe tune --model {name}"
        for key, value in (("plans", plan.to_json()), ("microseconds", round(us, 1))):
            rows = {**entry[key], str(tokens): value}
            entry[key] = {m: rows[m] for m in sorted(rows, key=int)}

    def write(self) -> None:
        """Replace the file at once: an interrupted run leaves the last whole table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.path)
