"""The main job on a model built here: transformers' Qwen3.5-MoE from a config, random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inductor_moe.backend import collected
from inductor_moe.errors import InductorMoeError
from inductor_moe.report import Report, merge
from inductor_moe.testing import relative_error

SLACK = 2.0  # the error budget: this many times eager's error against fp64
FEWEST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 5, 50, 10.0
OURS, STOCK, EAGER = "inductor_moe", "inductor", "eager"
PHASES = ("prefill", "decode")

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
}
# A layer of the 35B-A3B model is the config's default; only the vocabulary is cut.
FULL = {"vocab_size": 32768}
LAYER_BYTES = 1.7e9  # one full-size layer in bf16; its fp64 copy takes four times that

Stage = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is built and run.

    layers  of them, the last is full attention and the others are Gated DeltaNet
    prompt  tokens of the prefill
    steps   tokens decoded one by one after it
    """

    device: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    layers: int
    prompt: int
    steps: int
    experts: str = "grouped_mm"
    mode: str | None = None

    def describe(self) -> str:
        """One line for a person."""
        size = "full layer size" if self.sizes is FULL else "small"
        return (
            f"Qwen3.5-MoE, {size}, {self.layers} layers, {str(self.dtype).removeprefix('torch.')} "
            f"on {self.device}, experts {self.experts}; prefill {self.prompt} tokens, "
            f"decode {self.steps}"
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """What one way of running the model gave: per phase, error against fp64 and seconds."""

    error: dict[str, float]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    setup: Setup
    runs: dict[str, Run]
    report: Report
    problems: tuple[str, ...]


def choose(
    device: str | None = None,
    layers: int | None = None,
    experts: str = "grouped_mm",
    mode: str | None = None,
) -> Setup:
    """Full layer size on a GPU with room for it, small otherwise.

    Raises InductorMoeError if the device or the mode does not exist.
    """
    try:
        torch.compile(lambda: None, mode=mode)  # checks the mode; compiles when called
    except RuntimeError as error:
        raise InductorMoeError(f"mode: {error}") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise InductorMoeError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InductorMoeError(
            f"device {device!r} was asked for, but torch {torch.__version__} sees no GPU; "
            "run `inductor-moe doctor`, or use --device cpu"
        )
    small = Setup(device, torch.float32, SMALL, layers or 2, 16, 6, experts, mode)
    if not device.startswith("cuda"):
        return small
    free, _ = torch.cuda.mem_get_info(device)
    room = int((free - 4 * LAYER_BYTES - 2e9) / LAYER_BYTES)
    if room < 1:
        return dataclasses.replace(small, dtype=torch.bfloat16)
    return Setup(device, torch.bfloat16, FULL, min(layers or 4, room), 256, 16, experts, mode)


def run(setup: Setup, stage: Stage) -> Result:
    """Build, run eagerly, in fp64, with Inductor and with our backend; compare.

    `stage(text)` is entered around each part of the work, for progress. A CPU runs on one thread:
    layers this small gain nothing from more, and wait for them.
    """
    with _one_thread_on_cpu(setup.device):
        return _run(setup, stage)


def _run(setup: Setup, stage: Stage) -> Result:
    with stage("build the model"):
        model = build(setup)
    generation = Generation(model, setup)
    ways: dict[str, Callable[..., Any]] = {EAGER: model}
    for backend in (STOCK, OURS):
        # Static, or the second to compile would get dynamic shapes from what the first saw.
        ways[backend] = torch.compile(
            model, backend=backend, mode=setup.mode, fullgraph=True, dynamic=False
        )
    with torch.no_grad():
        with stage("run it in fp64"), in_fp64(model, setup.experts):
            exact = Generation(model, setup).all(model)
        errors: dict[str, dict[str, float]] = {}
        reports: list[Report] = []
        for way, call in ways.items():
            verb = "run it eagerly" if way == EAGER else f"compile it with {way}"
            with stage(verb), collected() as found:
                logits = generation.all(call)
            errors[way] = {phase: relative_error(logits[phase], exact[phase]) for phase in PHASES}
            reports += found
        with stage("time them in turns"):
            seconds = generation.times(ways)
    runs = {way: Run(errors[way], seconds[way]) for way in ways}
    return Result(setup, runs, merge(reports), judge(setup, runs, reports))


@contextlib.contextmanager
def _one_thread_on_cpu(device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(setup: Setup) -> Any:
    """The model, with random weights from a fixed seed."""
    try:
        import transformers
        from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig
    except ImportError as error:
        raise InductorMoeError(
            f"the demo needs transformers 5 or later ({error}); pip install 'inductor-moe[demo]'"
        ) from error
    transformers.logging.set_verbosity_error()
    kinds = ["linear_attention"] * (setup.layers - 1) + ["full_attention"]
    config = Qwen3_5MoeTextConfig(**setup.sizes, num_hidden_layers=setup.layers, layer_types=kinds)
    torch.manual_seed(0)
    with torch.device(setup.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    model.set_experts_implementation(setup.experts)
    model.eval()
    return model


class Generation:
    """A prompt, then given tokens one at a time, through a static cache."""

    def __init__(self, model: Any, setup: Setup) -> None:
        from transformers import StaticCache

        generator = torch.Generator().manual_seed(1)
        size = (1, setup.prompt + setup.steps)
        ids = torch.randint(setup.sizes["vocab_size"], size, generator=generator)
        ids = ids.to(setup.device)
        self.prompt, self.following = ids[:, : setup.prompt], ids[:, setup.prompt :]
        self.cache = StaticCache(config=model.config, max_cache_len=size[1])
        with torch.no_grad():  # allocates the cache outside every graph
            model(self.prompt, past_key_values=self.cache)

    def prefill(self, call: Callable[..., Any]) -> tuple[torch.Tensor, float]:
        """Logits of the prompt, and seconds."""
        self.cache.reset()
        return self._timed(call, self.prompt)

    def decode(self, call: Callable[..., Any]) -> tuple[torch.Tensor, list[float]]:
        """Logits of each following token, after a prefill, and seconds of each."""
        steps = [self._timed(call, token) for token in torch.split(self.following, 1, dim=1)]
        return torch.cat([logits for logits, _ in steps], 1), [seconds for _, seconds in steps]

    def all(self, call: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """Logits per phase."""
        return dict(zip(PHASES, (self.prefill(call)[0], self.decode(call)[0]), strict=True))

    def times(self, ways: dict[str, Callable[..., Any]]) -> dict[str, dict[str, float]]:
        """Median seconds per phase of each way, all run once a round so that noise hits all."""
        found: dict[str, dict[str, list[float]]] = {way: {p: [] for p in PHASES} for way in ways}
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > ROUNDS_SECONDS:
                break
            for way, call in ways.items():
                found[way]["prefill"].append(self.prefill(call)[1])
                found[way]["decode"] += self.decode(call)[1]
        return {
            way: {phase: statistics.median(values) for phase, values in phases.items()}
            for way, phases in found.items()
        }

    def _timed(self, call: Callable[..., Any], ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        _wait(ids.device)
        start = time.perf_counter()
        logits = call(ids, past_key_values=self.cache).logits
        _wait(ids.device)
        # A CUDA graph's output is overwritten by its next replay.
        return logits.clone(), time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def in_fp64(model: Any, experts: str) -> Iterator[None]:
    """Run the model's own weights in fp64, one layer at a time, so that one copy fits.

    The experts run as a Python loop meanwhile (grouped GEMMs have no fp64); `experts` is what
    they go back to.
    """
    with contextlib.ExitStack() as undo:
        model.set_experts_implementation("eager")
        undo.callback(model.set_experts_implementation, experts)
        for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
            undo.callback(_widen(part))
        restore: dict[torch.nn.Module, Callable[[], None]] = {}

        def enter(layer: torch.nn.Module, _: Any) -> None:
            restore[layer] = _widen(layer)

        def leave(layer: torch.nn.Module, *_: Any) -> None:
            restore.pop(layer)()

        for layer in model.model.layers:
            undo.callback(layer.register_forward_pre_hook(enter).remove)
            undo.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield


def _widen(module: torch.nn.Module) -> Callable[[], None]:
    """Turn a module's parameters to fp64; the callable returned puts the old ones back."""
    before = {parameter: parameter.data for parameter in module.parameters()}
    for parameter in before:
        parameter.data = parameter.data.double()

    def restore() -> None:
        for parameter, data in before.items():
            parameter.data = data

    return restore


def judge(setup: Setup, runs: dict[str, Run], reports: list[Report]) -> tuple[str, ...]:
    """What is wrong: layers left alone, errors over budget."""
    problems = []
    for report in reports:
        fused = report.counts().get("moe_experts", 0)
        if fused != setup.layers:
            problems.append(f"{fused} of {setup.layers} MoE layers were fused in a graph")
    if not reports:
        problems.append("the backend compiled nothing")
    for phase in PHASES:
        budget = SLACK * runs[EAGER].error[phase]
        for backend in (OURS, STOCK):
            error = runs[backend].error[phase]
            if not error <= budget:
                problems.append(
                    f"{phase} with {backend} is {error:.2e} from fp64; the budget is "
                    f"{budget:.2e}, {SLACK:g} times eager's error"
                )
    return tuple(problems)
