"""Running the rewrites on a function's graph alone, and judging what came of it."""

from __future__ import annotations

import copy

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe.config import Options
from inductor_moe.passes import rewrite
from inductor_moe.testing import relative_error


def rewritten(function, arguments):
    """The results of a function after the rewrites, the sites, and what its graph calls."""
    with torch.no_grad():
        traced = make_fx(
            functionalize(function, remove="mutations"),
            decomposition_table=select_decomp_table(),
            tracing_mode="fake",
        )(*arguments)
    sites = rewrite(traced.graph, Options(strict=True))
    traced.graph.lint()
    traced.recompile()
    targets = [str(node.target) for node in traced.graph.nodes]
    return traced(*arguments), sites, targets


def exact(function, arguments):
    """The function in fp64."""
    return function(*(x.double() for x in arguments))


def check_fused(function, arguments, oracle=None, run=rewritten):
    """One site, as exact as eager against the oracle, which is the function itself in fp64."""
    found, sites, targets = run(function, copy.deepcopy(arguments))
    matched = [site for site in sites if site.matched]
    assert len(matched) == 1, [site.reason for site in sites]
    assert sum("inductor_moe" in target for target in targets) == 1
    if "l2 norm inside" in matched[0].detail:
        left = ("aten.sum", "aten.bmm", "scatter", "cumsum", "solve")
        assert not any(word in target for word in left for target in targets), targets
    eager, reference = function(*arguments), exact(oracle or function, arguments)
    for got, plain, want in zip(found, eager, reference, strict=True):
        assert got.dtype == plain.dtype
        assert got.shape == plain.shape
        assert relative_error(got, want) <= 2 * relative_error(plain, want) + 1e-6
    return matched[0]


def check_untouched(function, arguments, run=rewritten):
    found, sites, targets = run(function, copy.deepcopy(arguments))
    assert not [site for site in sites if site.matched]
    assert not any("inductor_moe" in target for target in targets)
    for got, plain in zip(found, function(*arguments), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
