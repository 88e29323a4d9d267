"""The delta rule of prompts on a GPU: of one, and of several, by wider programs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import inductor_moe  # noqa: F401
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.reference.delta_rule import delta_rule_recurrent
from inductor_moe.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

HEADS, VALUE_HEADS, WIDTH = 16, 32, 128


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def inputs(tokens, gate, batch=1, dtype=torch.bfloat16):
    channels = (WIDTH,) if gate == "channel" else ()
    return [
        *(normal(batch, tokens, n, WIDTH, dtype=dtype) for n in (HEADS, HEADS, VALUE_HEADS)),
        -0.1 * normal(batch, tokens, VALUE_HEADS, *channels, dtype=torch.float32).abs(),
        normal(batch, tokens, VALUE_HEADS, dtype=torch.float32).sigmoid(),
        normal(batch, VALUE_HEADS, WIDTH, WIDTH, dtype=torch.float32),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("tokens, batch", [(65, 1), (130, 3), (1100, 4), (2113, 1), (70, 9)])
def test_prompts(tokens, batch, gate, dtype):
    given = inputs(tokens, gate, batch, dtype)
    expected = delta_rule_recurrent(*(x.double() for x in given), WIDTH**-0.5, 1e-6)
    found = delta_rule(*given, WIDTH**-0.5, 1e-6)
    for got, exact in zip(found, expected, strict=True):
        assert relative_error(got, exact) <= (6e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_sequences_side_by_side(gate):
    given = inputs(700, gate)
    bounds = [0, 64, 64, 65, 500, 700]
    given[5] = normal(5, VALUE_HEADS, WIDTH, WIDTH, dtype=torch.float32)
    out, final = delta_rule(*given, WIDTH**-0.5, 1e-6, torch.tensor(bounds, device="cuda"))
    for n, (start, end) in enumerate(pairwise(bounds)):
        piece = [x[:, start:end].double() for x in given[:5]]
        state = given[5][n : n + 1].double()
        expected = delta_rule_recurrent(*piece, state, WIDTH**-0.5, 1e-6)
        assert relative_error(final[n : n + 1], expected[1]) <= 6e-3
        if end > start:
            assert relative_error(out[:, start:end], expected[0]) <= 6e-3


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("gate", ["head", "channel"])
@torch.no_grad()
def test_launches_placed_early_change_no_bit(gate, batch):
    def layer(*given):
        q, k, v, g, beta, state = (x * 1.5 for x in given)
        out, final = delta_rule(q, k, v, g, beta.sigmoid(), state, WIDTH**-0.5, 1e-6)
        return out * 0.5, final

    first = inputs(513, gate, batch)
    calls = []
    for dependent in (False, True):
        torch.compiler.reset()
        options = {"inductor_moe.dependent_launch": dependent}
        calls.append(torch.compile(layer, backend="inductor_moe", options=options, dynamic=False))
        calls[-1](*first)
        # As `torch.compiler.reset` drops compiled code, each is replayed from a graph.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = calls[-1](*first)
        calls[-1] = (graph, kept)
    for _ in range(20):
        for x, fresh in zip(first, inputs(513, gate, batch), strict=True):
            x.copy_(fresh)
        for graph, _ in calls:
            graph.replay()
        (_, plain), (_, early) = calls
        for got, same in zip(early, plain, strict=True):
            assert got.isfinite().all() and torch.equal(got, same)
