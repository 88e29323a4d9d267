"""Run cases with providers. A time counts only after the output agreed with float64."""

from __future__ import annotations

import copy
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from inductor_moe.backend import collected
from inductor_moe.bench import ceilings, delta, moe, providers, results, timing
from inductor_moe.bench.case import Case, Op, outcome, relative_error
from inductor_moe.bench.results import Row
from inductor_moe.bench.shapes import model_named
from inductor_moe.errors import InductorMoeError

OPS: dict[str, Op] = {
    op.name: op for op in (moe.BLOCK, moe.EXPERTS, delta.PREFILL, delta.PROMPTS, delta.DECODE)
}
SLACK, FLOOR = 2.0, 1e-5


def ops_named(names: Sequence[str]) -> list[Op]:
    """The ops of these names, all of them for none. Raises InductorMoeError for an unknown one."""
    for name in names:
        if name not in OPS:
            raise InductorMoeError(f"op: no op {name!r}; there are {', '.join(OPS)}")
    return [OPS[name] for name in names or OPS]


def run(
    ops: Sequence[str] = (),
    models: Sequence[str] = ("qwen3.5-35b-a3b",),
    against: Sequence[str] = ("inductor",),
    sizes: Sequence[int] = (),
    device: str | None = None,
    on_row: Callable[[results.Results], None] = lambda so_far: None,
) -> results.Results:
    """Time ops of models with this backend and the providers in `against`.

    ops      names in `OPS`; none means all
    models   names in `shapes.MODELS`
    sizes    tokens or batch; none means each op's own list
    device   "cuda", or "cpu" for a try without a GPU; None takes a GPU if there is one
    on_row   called after every row with all results so far

    Raises InductorMoeError for an unknown name.
    """
    chosen = ops_named(ops)
    for name in models:
        model_named(name)
    for name in against:
        if name not in providers.PROVIDERS:
            known = ", ".join(providers.PROVIDERS)
            raise InductorMoeError(f"against: no provider {name!r}; there are {known}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        found = results.Results(
            gpu=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            versions=results.versions(),
            commit=results.commit(),
            command=shlex.join(["inductor-moe", *sys.argv[1:]]),
            ceilings=ceilings.measure(device),
            rows=(),
        )
        for model in models:
            for op in chosen:
                for case in op.cases(model, device, list(sizes or op.sizes)):
                    for row in measure(case, ["ours", *against], found.ceilings):
                        found = dataclasses.replace(found, rows=(*found.rows, row))
                        on_row(found)
    return found


def measure(case: Case, names: Sequence[str], best: ceilings.Ceilings) -> Iterator[Row]:
    """A row for every provider, in order; one that is wrong or fails gets no time but a note."""
    sample = copy.deepcopy(case.inputs[0])  # timing moves the states of the inputs on
    expected = case.expected(sample)
    eager_error = relative_error(outcome(case.pieces or case.call, sample, case.rows), expected)
    least = max(case.bytes / best.read, case.flops / best.flops) * 1e6
    for name in dict.fromkeys(names):
        common: dict[str, Any] = {
            "op": case.op, "model": case.model, "size": case.size, "provider": name,
            "bytes": case.bytes, "flops": case.flops, "eager_error": eager_error,
        }  # fmt: skip
        why = providers.absence(name, case)
        if why:
            yield Row(**common, note=why)
            continue
        try:
            start = time.perf_counter()
            with collected() as reports:
                call = providers.callable_of(name, case)
                found = outcome(call, sample, case.rows)
            seconds = time.perf_counter() - start
            error = relative_error(found, expected)
            wrong = not error <= max(SLACK * eager_error, FLOOR)
            if wrong or (name == "ours" and not any(report.matched for report in reports)):
                note = "wrong" if wrong else "nothing was fused"
                yield Row(**common, error=error, compile_s=seconds, note=note)
                continue
            note = providers.UNCAPTURED.get(name, "")
            us, iqr = timing.microseconds(call, case.inputs, captured=not note)
        except Exception as problem:
            first = (str(problem).splitlines() or [""])[0]
            yield Row(**common, note=f"{type(problem).__name__}: {first}"[:200])
            continue
        yield Row(
            **common, us=us, iqr_us=iqr, error=error, compile_s=seconds, of_ceiling=least / us,
            note=note,
        )  # fmt: skip
