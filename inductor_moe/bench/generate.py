"""Prefill and decode of whole models: this backend against stock Inductor on the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from inductor_moe import lowerings
from inductor_moe.backend import collected
from inductor_moe.bench import ceilings, footprint, models, profile, results
from inductor_moe.bench.results import Row
from inductor_moe.bench.session import (
    BACKENDS,
    DECODE_EXPERTS,
    PREFILL_EXPERTS,
    Decode,
    Prefill,
    Session,
)
from inductor_moe.errors import InductorMoeError
from inductor_moe.report import Report, merge
from inductor_moe.testing import relative_error

PHASES = ("decode", "prefill")
SLACK = 2.0
FOLLOWED = 8  # tokens whose logits are compared
PREFILLS = 7
# Stock Inductor compiles transformers' rule with every chunk of every layer written out.
CHUNK, MOST_UNROLLED = 64, 128


@dataclasses.dataclass(frozen=True)
class Setup:
    """What to measure.

    model, scheme   of `models.LANGUAGE_MODELS` and `models.SCHEMES`
    prompts         tokens of the prompts
    decodes         tokens to decode after each; one run of the largest serves all
    batches         sequences at once
    against         other providers: "inductor"
    phases          of "decode" and "prefill", in that order
    layers          the first so many of them, None for all
    budget          begin nothing new after this many seconds
    check           compare logits with fp32 and give no time to what is wrong
    """

    model: str
    scheme: str
    device: str
    prompts: tuple[int, ...] = (128, 512, 2048)
    decodes: tuple[int, ...] = (128, 512)
    batches: tuple[int, ...] = (1,)
    against: tuple[str, ...] = ("inductor",)
    phases: tuple[str, ...] = PHASES
    layers: int | None = None
    budget: float = math.inf
    check: bool = True

    def __post_init__(self) -> None:
        for what, given, known in (
            ("against", self.against, [name for name in BACKENDS if name != "ours"]),
            ("phases", self.phases, PHASES),
        ):
            for name in given:
                if name not in known:
                    raise InductorMoeError(
                        f"{what}: there is no {name!r}; there are {', '.join(known)}"
                    )
        for what, numbers in (("prompt", self.prompts), ("decode", self.decodes),
                              ("batch", self.batches)):  # fmt: skip
            if not numbers or min(numbers) < (2 if what == "prompt" else 1):
                raise InductorMoeError(f"{what}: got {list(numbers)}; expected larger numbers")

    @property
    def name(self) -> str:
        layers = f" {self.layers} layers" if self.layers else ""
        return f"{self.model} {self.scheme}{layers}"


@dataclasses.dataclass(frozen=True)
class Exact:
    """Logits [1, 1 + FOLLOWED, V] of the first sequence in fp32, and eager's error against them.

    Two right computations may choose different experts where a router is all but undecided, and
    one such choice outweighs every rounding. So decode is judged by the median of its positions,
    prefill, which returns a single one, by the largest that eager has at any.
    """

    logits: Tensor
    eager_errors: list[float]


def run(
    setup: Setup,
    on_row: Callable[[results.Results], None] = lambda so_far: None,
    say: Callable[[str], None] = lambda text: None,
) -> results.Results:
    """Measure. `on_row` gets all results so far after every row, `say` what goes on."""
    deadline = time.perf_counter() + setup.budget
    lowerings.install()  # or the stock backend would call the dequantisation as it is
    with torch.no_grad():
        found = results.Results(
            gpu=torch.cuda.get_device_name() if setup.device == "cuda" else "cpu",
            versions=results.versions(),
            commit=results.commit(),
            command=shlex.join(["inductor-moe", *sys.argv[1:]]),
            ceilings=ceilings.measure(setup.device),
            rows=(),
        )
        start = time.perf_counter()
        model = models.build(setup.model, setup.scheme, setup.device, setup.layers)
        say(f"built {setup.name}: {time.perf_counter() - start:.1f} s")
        for batch in setup.batches:
            for row in _Measurement(setup, model, batch, found.ceilings, deadline, say).rows():
                found = dataclasses.replace(found, rows=(*found.rows, row))
                on_row(found)
    return found


class _Measurement:
    """All rows of one batch size."""

    def __init__(
        self,
        setup: Setup,
        model: Any,
        batch: int,
        best: ceilings.Ceilings,
        deadline: float,
        say: Callable[[str], None],
    ) -> None:
        self.setup, self.model, self.batch, self.best = setup, model, batch, best
        self.deadline, self.say = deadline, say
        longest = max(setup.prompts) + max(*setup.decodes, FOLLOWED)
        length = math.ceil(longest / 64) * 64
        self.session = Session(model, batch, length)
        self.footprint = footprint.measure(model, self.session.states(), batch, length)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(vocabulary, (batch, longest), generator=generator)
        self.ids = self.ids.to(setup.device)
        self.exact: dict[int, Exact] = {}

    def rows(self) -> Iterator[Row]:
        measure = {"decode": self._decode, "prefill": self._prefill}
        for prompt in self.setup.prompts:
            self._exact(prompt)
        free(self.setup.device)
        for phase in PHASES:
            for provider in dict.fromkeys(("ours", *self.setup.against)):
                if phase not in self.setup.phases:
                    continue
                done: set[str] = set()
                try:
                    if time.perf_counter() > self.deadline:
                        raise InductorMoeError("not begun: over the budget")
                    for row in measure[phase](provider):
                        done.add(row.label())
                        yield row
                except Exception as raised:
                    problem = getattr(raised, "inner_exception", raised)  # of a compiler's error
                    first = (str(problem).splitlines() or [""])[0]
                    for size in self._sizes(phase):
                        row = Row(phase, self.setup.name, size, provider,
                                  note=f"{type(problem).__name__}: {first}"[:200])  # fmt: skip
                        if row.label() not in done:
                            yield row
                free(self.setup.device)

    def _sizes(self, phase: str) -> list[dict[str, int]]:
        decodes = self.setup.decodes if phase == "decode" else ()
        sizes: list[dict[str, int]] = []
        # The longest first: where one graph serves all, its sizes choose the tiles.
        for prompt in sorted(self.setup.prompts, reverse=True):
            size = {"prompt": prompt, "batch": self.batch}
            sizes += [{**size, "decode": steps} for steps in decodes] or [size]
        return sizes

    def _decode(self, provider: str) -> Iterator[Row]:
        prompts = sorted(self.setup.prompts, reverse=True)
        self.session.prefill(self.ids[:, : prompts[0]])
        _restart_peak(self.setup.device)
        with collected() as reports:
            decode = Decode(self.session, provider)
        peak = _peak(self.setup.device)
        self._announce(provider, "decode", decode.compile_s, reports)
        kernels = None
        if decode.graph is not None:
            restore = self.session.save()
            with contextlib.suppress(InductorMoeError):  # not every user may profile the GPU
                kernels = len(profile.record(decode.step, self.setup.device))
            restore()
        for prompt in prompts:
            first = self.session.prefill(self.ids[:, :prompt])
            restore = self.session.save()
            error, exact = None, self._exact(prompt)
            if exact:
                self.model.set_experts_implementation(DECODE_EXPERTS)
                logits = decode.follow(self.ids[:, prompt : prompt + FOLLOWED])
                error = statistics.median(errors_of(logits[:1], exact.logits[:, 1:]))
                restore()
            self.model.set_experts_implementation(DECODE_EXPERTS)
            decode.token.copy_(first)
            _restart_peak(self.setup.device)
            times = decode.run(max(self.setup.decodes))
            finite = bool(decode.logits.isfinite().all())
            for steps in self.setup.decodes:
                filled = prompt + steps / 2
                yield self._row(
                    provider, "decode", {"prompt": prompt, "batch": self.batch, "decode": steps},
                    times[:steps], self.footprint.bytes(self.batch, 1, filled),
                    self.footprint.flops(self.batch, 1, filled), decode.compile_s, reports,
                    error, statistics.median(exact.eager_errors[1:]) if exact else None, finite,
                    kernels,
                    max(peak, _peak(self.setup.device)),
                )  # fmt: skip

    def _prefill(self, provider: str) -> Iterator[Row]:
        unrolls = provider != "ours" and self._delta_layers() > 0
        prompts = sorted(self.setup.prompts, reverse=True)
        dynamic = len(prompts) > 1 and not unrolls
        prefill = Prefill(self.session, provider, dynamic)
        known: list[Report] = []  # a graph that serves every length is reported for the longest
        for prompt in prompts:
            size = {"prompt": prompt, "batch": self.batch}
            chunks = self._delta_layers() * math.ceil(prompt / CHUNK)
            if unrolls and chunks > MOST_UNROLLED:
                note = (f"not compiled: {chunks} unrolled chunks of the delta rule, more than "
                        f"{MOST_UNROLLED}; try fewer layers")  # fmt: skip
                yield Row("prefill", self.setup.name, size, provider, note=note)
                continue
            exact, ids = self._exact(prompt), self.ids[:, :prompt]
            self.model.set_experts_implementation(PREFILL_EXPERTS)
            _restart_peak(self.setup.device)
            with collected() as reports:
                logits, compile_s = prefill(ids)
            self._announce(provider, f"prefill of {prompt}", compile_s, reports)
            known = reports or known
            error = relative_error(logits[:1], exact.logits[:, 0]) if exact else None
            times = [prefill(ids)[1] for _ in range(PREFILLS + 1)][1:]
            yield self._row(
                provider, "prefill", size, times, self.footprint.bytes(self.batch, prompt, 0),
                self.footprint.flops(self.batch, prompt, 0), compile_s,
                known,
                error, self._worst_eager(), bool(logits.isfinite().all()), None,
                _peak(self.setup.device),
            )  # fmt: skip

    def _delta_layers(self) -> int:
        return sum(kind == "recurrent_states" for kind, _ in self.session.states())

    def _row(
        self,
        provider: str,
        phase: str,
        size: dict[str, int],
        times: list[float],
        moved: float,
        computed: float,
        compile_s: float,
        reports: list[Report],
        error: float | None,
        eager_error: float | None,
        finite: bool,
        kernels: int | None,
        peak: int,
    ) -> Row:
        row = Row(
            phase, self.setup.name, size, provider, error=error, eager_error=eager_error,
            compile_s=compile_s, bytes=moved, flops=computed, kernels=kernels,
            peak_bytes=peak or None,
        )  # fmt: skip
        if provider == "ours" and not merge(reports).matched:
            return dataclasses.replace(row, note="nothing was fused")
        if not finite:
            return dataclasses.replace(row, error=math.inf, note="the logits are not finite")
        if error is not None and eager_error is not None and not error <= SLACK * eager_error:
            return dataclasses.replace(row, note="wrong")
        median = statistics.median(times) * 1e6
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [0.0, 0.0, 0.0]
        least = max(moved / self.best.read, computed / self.best.flops) * 1e6
        return dataclasses.replace(
            row, us=median, iqr_us=(quartiles[2] - quartiles[0]) * 1e6, of_ceiling=least / median
        )

    def _announce(self, provider: str, what: str, seconds: float, reports: list[Report]) -> None:
        text = f"{provider} {what}, batch {self.batch}: first call {seconds:.1f} s"
        self.say(text + (f"; {merge(reports).summary()}" if reports else ""))

    def _worst_eager(self) -> float | None:
        return max((max(exact.eager_errors) for exact in self.exact.values()), default=None)

    def _exact(self, prompt: int) -> Exact | None:
        if not self.setup.check:
            return None
        if prompt not in self.exact:
            self.exact[prompt] = exact(self.model, self.ids[:1, : prompt + FOLLOWED])
        return self.exact[prompt]


def exact(model: Any, ids: Tensor) -> Exact:
    """The logits of the last tokens, in fp32 and by eager code in the model's dtype."""
    model.set_experts_implementation(PREFILL_EXPERTS)
    settings = {"use_cache": False, "logits_to_keep": FOLLOWED + 1}
    eager = model(ids, **settings).logits
    with models.widened(model):
        wide = model(ids, **settings).logits
    return Exact(wide, errors_of(eager, wide))


def errors_of(logits: Tensor, wide: Tensor) -> list[float]:
    """The relative error of each position; both are [1, T, V]."""
    pairs = zip(logits.unbind(1), wide.unbind(1), strict=True)
    return [relative_error(found, expected) for found, expected in pairs]


def free(device: str) -> None:
    """Let go of everything compiled, and of the memory it held."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _restart_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int:
    """The most bytes allocated since `_restart_peak`; 0 where nobody counts."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
