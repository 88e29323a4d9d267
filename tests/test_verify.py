"""verify=True and bisect, with a rewrite that is wrong on purpose."""

from __future__ import annotations

import dataclasses
import functools

import forms
import pytest
import torch
from state_cases import CASES, run
from typer.testing import CliRunner

import inductor_moe
from inductor_moe import patterns
from inductor_moe.backend import collected
from inductor_moe.cli import app
from inductor_moe.errors import VerificationError, VerificationWarning
from inductor_moe.patterns.moe import experts
from inductor_moe.testing import graph_backend, relative_error


def wrong_replace(graph, site):
    """Runs the first expert whatever was chosen."""
    output = experts.replace_experts(graph, site)
    call = output
    while "moe_experts" not in str(call.target):
        call = call.args[0]
    with graph.inserting_before(call):
        first = graph.call_function(torch.ops.aten.mul.Tensor, (call.args[3], 0))
        first.meta["val"] = call.args[3].meta["val"]
    call.update_arg(3, first)
    return output


@pytest.fixture
def wrong(monkeypatch):
    """The rewrite of gathered bmms is wrong within the test."""
    broken = dataclasses.replace(experts.BATCHED, replace=wrong_replace)
    rewrites = tuple(broken if r is experts.BATCHED else r for r in patterns.ALL)
    monkeypatch.setattr("inductor_moe.passes.ALL", rewrites)


class TwoBlocks(torch.nn.Module):
    """One block after the other."""

    def __init__(self):
        super().__init__()
        self.first = forms.routed(torch.float32, form="batched")
        self.second = forms.routed(torch.float32, form="batched")

    def forward(self, x):
        return self.second(self.first(x))


def compiled(model, **options):
    ours = {f"inductor_moe.{key}": value for key, value in options.items()}
    return torch.compile(model, backend=graph_backend(ours), fullgraph=True)


def test_a_right_rewrite_passes_and_stays():
    model, x = forms.routed(torch.float32, form="batched"), forms.tokens(torch.float32)
    function = compiled(model, verify=True, strict=True)
    with torch.no_grad(), collected() as reports:
        for seed in range(3):
            x = forms.tokens(torch.float32, seed=seed)
            assert relative_error(function(x), model(x)) < 1e-5
    assert [report.counts()["moe_experts"] for report in reports] == [1]


def test_a_wrong_rewrite_is_undone_and_reported(wrong):
    model, x = forms.routed(torch.float32, form="batched"), forms.tokens(torch.float32)
    with torch.no_grad():
        assert relative_error(compiled(model)(x), model(x)) > 0.1
        torch._dynamo.reset()
        function = compiled(model, verify=True)
        with collected() as reports, pytest.warns(VerificationWarning, match="batched_mm"):
            first = function(x)
        assert torch.equal(first, function(x))
        assert relative_error(first, model(x)) < 1e-5
    assert reports[-1].refused
    assert not reports[-1].matched


def test_a_wrong_rewrite_raises_under_strict(wrong):
    model, x = forms.routed(torch.float32, form="batched"), forms.tokens(torch.float32)
    with torch.no_grad(), pytest.raises(VerificationError, match="relatively"):
        compiled(model, verify=True, strict=True)(x)


def test_arguments_are_written_once():
    block = forms.routed(torch.float32, form="batched")

    def step(x, state):
        state.add_(1)
        return block(x) + state

    x, state = forms.tokens(torch.float32), torch.zeros(forms.TOKENS, forms.HIDDEN)
    function = compiled(step, verify=True, strict=True)
    with torch.no_grad():
        for count in (1, 2):
            function(x, state)
            assert torch.equal(state, torch.full_like(state, count))


def bisected(model, x):
    def run(options):
        with torch.no_grad():
            return torch.compile(model, backend=graph_backend(options), fullgraph=True)(x)

    return inductor_moe.bisect(run, tolerance=1e-3)


def test_bisect_names_the_rewrite_and_the_site(wrong):
    (culprit,) = bisected(TwoBlocks(), forms.tokens(torch.float32))
    assert culprit.rewrite == "moe.experts.batched_mm"
    assert culprit.distance > 1e-2
    assert culprit.site.module == "first.experts"
    assert "first.experts" in str(culprit)


def test_a_tolerance_below_0_would_blame_every_rewrite():
    with pytest.raises(ValueError, match="bisect: tolerance is -1; it must be at least 0"):
        inductor_moe.bisect(lambda options: torch.ones(1), tolerance=-1)


def test_bisect_finds_nothing_where_all_is_right():
    assert bisected(TwoBlocks(), forms.tokens(torch.float32)) == ()


@pytest.mark.slow
def test_the_command_names_the_rewrite_and_fails(wrong, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "block.py").write_text(
        "import forms, torch\n"
        "def build():\n"
        "    block = forms.routed(torch.float32, form='batched')\n"
        "    return block, (forms.tokens(torch.float32),)\n"
    )
    result = CliRunner().invoke(app, ["bisect", f"{tmp_path / 'block.py'}:build"])
    assert result.exit_code == 1, result.output
    assert "moe.experts.batched_mm" in result.output


@pytest.mark.parametrize("name", ["plain", "new state returned", "cache shared"])
def test_states_are_updated_once(name):
    options = {"inductor_moe.verify": True, "inductor_moe.strict": True}
    backend = graph_backend(options)
    with torch.no_grad():
        run(CASES[name], functools.partial(torch.compile, backend=backend, fullgraph=True))


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_limit_counts_sites(limit):
    with torch.no_grad(), collected() as reports:
        compiled(TwoBlocks(), limit=limit)(forms.tokens(torch.float32))
    assert len(reports[0].matched) == limit
