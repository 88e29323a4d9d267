"""One family in one form: built, run through the backend, counted and measured against fp64."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import statistics
import traceback
from typing import Any

import families
import routing
import torch
import zoo
from transformers import StaticCache

from inductor_moe import capture_for_export, compat
from inductor_moe.backend import collected
from inductor_moe.report import Report, merge
from inductor_moe.testing import fused_layers, graph_backend, relative_error

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROMPT, PROMPTS, SEEDS = 16, 3, range(1, 65)
SLACK = 2.0
BREAK = "graph break: "
FLOOR = {"bf16": 1e-3, "fp32": 1e-6}


@dataclasses.dataclass(frozen=True)
class Form:
    """path: compile or export; stage: prefill or decode; experts: the implementation's name."""

    path: str
    stage: str
    experts: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.path} {self.stage} {self.experts} {self.dtype}"


FORMS = tuple(
    Form(path, stage, experts, dtype)
    for path, stage, experts, dtype in itertools.product(
        ("compile", "export"), ("prefill", "decode"), ("grouped_mm", "batched_mm"), DTYPES
    )
    if (path, stage) != ("export", "decode")
)

# Each experts form, stage, dtype and path at least once.
FEW = (
    "compile prefill grouped_mm bf16",
    "compile prefill batched_mm fp32",
    "compile decode batched_mm bf16",
    "compile decode grouped_mm fp32",
    "export prefill grouped_mm bf16",
)


@dataclasses.dataclass
class Result:
    """What came out of one case; the errors are medians over prompts, against fp64.

    undecided  choices of experts in these prompts that a rounding may turn, see `routing`
    """

    family: str
    form: str
    expected: dict[str, int]
    matched: dict[str, int]
    error: float | None = None
    eager_error: float | None = None
    reasons: tuple[str, ...] = ()
    graphs: int = 0
    undecided: int = 0

    @property
    def whole(self) -> bool:
        if any(reason.startswith(BREAK) for reason in self.reasons):
            # One compiled frame may serve several layers, or be compiled again for another prompt.
            refused = any(not reason.startswith(BREAK) for reason in self.reasons)
            return bool(self.expected) and set(self.matched) == set(self.expected) and not refused
        return bool(self.expected) and self.matched == self.expected

    @property
    def wrong(self) -> bool:
        if self.error is None or self.eager_error is None:
            return False
        floor = FLOOR[self.form.split()[-1]]
        return not self.error <= SLACK * max(self.eager_error, floor / SLACK)


@functools.cache
def built(family: families.Family) -> torch.nn.Module:
    model = family.build()
    with torch.no_grad():
        try:
            zoo.decide_routing(model)
        except (AssertionError, AttributeError, NotImplementedError):
            model = family.build()
    return model


def run(family: families.Family, form: Form) -> Result:
    """The result of a case; what raises is a reason, not an exception."""
    model, exact = zoo.prepare(built(family), DTYPES[form.dtype], form.experts, family.switchable)
    call = Call(family, model)
    with torch.no_grad():
        expected = family.layers(model, lambda: call(call.prompt(0)))
    result = Result(family.name, form.name, expected, {})
    try:
        seeds, result.undecided = _prompts(family, form, model, exact)
        with torch.no_grad(), collected() as reports:
            measured = _measure(family, form, model, exact, seeds)
    except _Unavailable as error:
        result.expected, result.reasons = {}, (str(error),)
        return result
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        result.reasons = (f"{type(error).__name__}: {text} ({frame.name})",)
        return result
    report = merge(reports) if reports else Report()
    result.matched, result.graphs = fused_layers(report), report.graphs
    result.reasons = tuple(
        f"{site.module or site.rewrite}: {site.reason}" for site in report.refused
    )
    if result.graphs > 1 or not reports:
        result.reasons += tuple(_first_line(reason) for reason in compat.graph_breaks())
    errors, eager_errors = zip(*measured, strict=True)
    result.error, result.eager_error = statistics.median(errors), statistics.median(eager_errors)
    return result


def _first_line(reason: str) -> str:
    return BREAK + " ".join(reason.split("\n")[0].split())[:160]


class _Unavailable(Exception):
    """The family has no such form, in eager either."""


def _prompts(
    family: families.Family, form: Form, model: torch.nn.Module, exact: torch.nn.Module
) -> tuple[list[int], int]:
    """The seeds of the prompts in which rounding turns the fewest choices, and how many.

    A choice that falls otherwise than in fp64 outweighs every rounding error, in eager as well.
    """
    two_sided = family.name in families.ENCODER_DECODER
    if form.stage == "decode" and (two_sided or family.name in families.ENCODERS):
        raise _Unavailable("no decode step: the model, or this part of it, keeps no cache")
    call, reference = Call(family, model), Call(family, exact)
    found: dict[int, int] = {}
    for seed in SEEDS:
        ids = call.prompt(seed)
        if form.stage == "decode":
            ids = torch.cat([ids, call.following(seed)], dim=1)
        found[seed] = routing.undecided(call, reference, ids, slack=SLACK)
        if sum(not count for count in found.values()) == PROMPTS:
            break
    seeds = sorted(found, key=lambda seed: (found[seed], seed))[:PROMPTS]
    return seeds, sum(found[seed] for seed in seeds)


def _measure(
    family: families.Family,
    form: Form,
    model: torch.nn.Module,
    exact: torch.nn.Module,
    seeds: list[int],
) -> list[tuple[float, float]]:
    torch.compiler.reset()
    compat.clear_graph_breaks()
    if form.stage == "decode":
        return _measure_decode(family, model, exact, seeds)
    call = Call(family, model)
    if form.path == "export":
        with capture_for_export():
            program = torch.export.export(call, (call.prompt(0),), strict=False)
        compiled = torch.compile(program.module(), backend=graph_backend(), fullgraph=False)
    else:
        compiled = torch.compile(call, backend=graph_backend(), fullgraph=False)
    reference = Call(family, exact)
    # An exported program may hold sizes that it reads from data; a package keeps them, too.
    with torch._dynamo.config.patch(capture_scalar_outputs=form.path == "export"):
        return [
            _errors(compiled(ids), call(ids), reference(ids)) for ids in map(call.prompt, seeds)
        ]


class Call(torch.nn.Module):
    """A model as a function from token ids to its last tensor, without a cache."""

    def __init__(self, family: families.Family, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.two_sided = family.name in families.ENCODER_DECODER
        self.vocabulary = 96

    def prompt(self, seed: int, length: int = PROMPT) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.vocabulary, (1, length), generator=generator)

    def following(self, seed: int) -> torch.Tensor:
        """The token after the prompt, for a decode step."""
        return self.prompt(100 + seed, length=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        extra = {"decoder_input_ids": ids} if self.two_sided else {}
        return _output(self.model(input_ids=ids, use_cache=False, **extra))


def _measure_decode(
    family: families.Family, model: torch.nn.Module, exact: torch.nn.Module, seeds: list[int]
) -> list[tuple[float, float]]:
    call = Call(family, model)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=False)
    measured = []
    for seed in seeds:
        ids, following = call.prompt(seed), call.following(seed)
        cache, reference_cache = _filled(model, ids), _filled(exact, ids)
        eager = _output(model(input_ids=following, past_key_values=copy.deepcopy(cache)))
        reference = _output(exact(input_ids=following, past_key_values=reference_cache))
        found = _output(compiled(input_ids=following, past_key_values=cache))
        measured.append(_errors(found, eager, reference))
    return measured


def _filled(model: torch.nn.Module, ids: torch.Tensor) -> Any:
    """A cache that holds the prompt: a static one where the model takes it, or else its own."""
    try:
        cache: Any = StaticCache(config=model.config, max_cache_len=64)
        model(input_ids=ids, past_key_values=cache)
    except Exception:
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return cache


def _output(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _errors(
    found: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    return relative_error(found, reference), relative_error(eager, reference)
