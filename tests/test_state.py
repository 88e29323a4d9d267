"""States that are updated in place: compared with eager's after every step."""

from __future__ import annotations

import functools

import pytest
import torch
from state_cases import CASES, FIRST, STATE_SHAPE, rows, run, states

from inductor_moe.backend import collected
from inductor_moe.testing import graph_backend, relative_error


@pytest.mark.parametrize("name", CASES)
def test_states_in_the_graph(name):
    check(name, graph_backend())


# By way of Inductor's generated code; the others take their turn with the slow tests.
QUICK = ("two models", "cache shared", "experts around a write")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_states_in_generated_code(name):
    check(name, "inductor_moe")


def check(name, backend):
    case = CASES[name]
    with torch.no_grad(), collected() as reports:
        run(case, functools.partial(torch.compile, backend=backend, fullgraph=True))
    found = [site.rewrite for report in reports for site in report.matched]
    assert sorted(found) == sorted(case.rewrites), [str(report) for report in reports]


def old_state_sliced(x, history, conv_state, state):
    history[0:] = state[0:]
    return FIRST(x, conv_state, state)


@pytest.mark.slow
def test_a_copy_that_inductor_drops_is_no_more_wrong():
    """Before 2.15 Inductor reads `state` after its update here: pytorch/pytorch#198131."""
    inputs = [*rows(0), torch.randn(STATE_SHAPE), *states()]
    results = []
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for backend in ("inductor", "inductor_moe", "inductor"):
            torch._dynamo.reset()
            x, *updated = (value.clone() for value in inputs)
            out = torch.compile(old_state_sliced, backend=backend, fullgraph=True)(x, *updated)
            results.append([out, *updated])
    for found in results[1:]:
        for left, right in zip(found, results[0], strict=True):
            assert relative_error(left, right) < 2e-6
