"""The backend itself: options, other people's passes, caches, threads, failures, training."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import forms
import pytest
import torch

import inductor_moe
from inductor_moe import backend, passes, patterns
from inductor_moe.backend import collected
from inductor_moe.config import Options, parse
from inductor_moe.errors import (
    RewriteFailedWarning,
    StrictError,
    TrainingGraphWarning,
    UnknownOptionError,
)
from inductor_moe.testing import capture, fused_layers, graph_backend


def test_options_are_split_from_inductors():
    ours, inductor = parse({"inductor_moe.strict": True, "max_autotune": False})
    assert ours == Options(strict=True)
    assert inductor == {"max_autotune": False}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"inductor_moe.stict": True},
            "valid options: inductor_moe.dependent_launch, inductor_moe.disable, ",
        ),
        ({"inductor_moe.strict": "yes"}, "must be True or False, got 'yes'"),
        (
            {"inductor_moe.disable": "moe.expert"},
            "which is no rewrite; known: moe.experts.called, moe.experts.grouped",
        ),
        ({"inductor_moe.disable": 3}, "must be a rewrite name or a list of them, got 3"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(UnknownOptionError, match=message):
        parse(options)


def test_a_bad_option_reaches_the_user_of_compile():
    compiled = torch.compile(torch.sin, backend="inductor_moe", options={"inductor_moe.x": 1})
    with pytest.raises(Exception, match=r"unknown option 'inductor_moe\.x'; valid options"):
        compiled(torch.ones(2))


def test_an_unknown_inductor_option_is_inductors_error():
    compiled = torch.compile(torch.sin, backend="inductor_moe", options={"no_such_key": 1})
    with pytest.raises(Exception, match="no_such_key"):
        compiled(torch.ones(2))


@pytest.mark.parametrize("name", ["moe", "moe.experts", "moe.experts.grouped_mm"])
def test_a_rewrite_can_be_disabled(name):
    _, report = capture(forms.routed(), forms.tokens(), options={"inductor_moe.disable": [name]})
    assert report.sites == ()


def test_disabling_one_form_leaves_the_other():
    options = {"inductor_moe.disable": "moe.experts.batched_mm"}
    _, report = capture(forms.routed(form="grouped"), forms.tokens(), options=options)
    assert fused_layers(report) == {"moe_experts": 1}


@pytest.mark.parametrize("name", [rewrite.name for rewrite in patterns.ALL])
def test_every_rewrite_has_a_switch(monkeypatch, name):
    tried = []

    def recording(form):
        def anchors(graph):
            tried.append(form.name)
            return iter(())

        return dataclasses.replace(form, anchors=anchors)

    monkeypatch.setattr(passes, "ALL", tuple(map(recording, patterns.ALL)))
    ours, _ = parse({"inductor_moe.disable": name})
    passes.rewrite(torch.fx.Graph(), ours)
    assert sorted(tried) == sorted(r.name for r in patterns.ALL if r.name != name)


class CountingPass(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self, identity=b"counting"):
        self.calls, self.identity = 0, identity

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return self.identity


def test_a_users_own_pass_runs_too():
    own = CountingPass()
    _, report = capture(forms.routed(), forms.tokens(), options={"post_grad_custom_pre_pass": own})
    assert own.calls == 1
    assert fused_layers(report) == {"moe_experts": 1}


def test_a_users_globally_configured_pass_runs_too():
    own = CountingPass()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=own):
        _, report = capture(forms.routed(), forms.tokens())
    assert own.calls == 1
    assert fused_layers(report) == {"moe_experts": 1}


def test_the_uuid_follows_options_and_the_users_pass():
    def uuid(options=None, user_pass=None):
        return passes.FusionPass(options or Options(), user_pass).uuid()

    assert uuid() == uuid()
    assert uuid() != uuid(Options(strict=True))
    assert uuid() != uuid(user_pass=CountingPass())
    assert uuid(user_pass=CountingPass(b"a")) != uuid(user_pass=CountingPass(b"b"))
    assert uuid(user_pass=CountingPass(None)) is None
    assert uuid(user_pass=lambda graph: None) is None


def test_the_uuid_follows_our_sources(monkeypatch):
    before = passes.FusionPass(Options()).uuid()
    monkeypatch.setattr(passes, "source_hash", lambda: "another version of the sources")
    assert passes.FusionPass(Options()).uuid() != before


CACHED = """
    import json, sys, forms, torch, inductor_moe
    from torch._dynamo.utils import counters
    model = forms.routed(form="batched")
    options = json.loads(sys.argv[1])
    with torch.no_grad():
        torch.compile(model, backend="inductor_moe", options=options)(forms.tokens(count=1))
    (report,) = inductor_moe.reports()
    print(json.dumps({
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "autograd_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "cached": report.cached, "counts": report.counts(), "detail": report.matched[0].detail,
    }))
"""


def run_cached(folder, options=None, sources=()):
    path = os.pathsep.join([*map(str, sources), os.path.dirname(forms.__file__)])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CACHED)]
    result = subprocess.run(
        [*command, json.dumps(options or {})],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_second_process_hits_the_caches_and_still_has_the_report(tmp_path):
    first = run_cached(tmp_path)
    assert first["fx_hit"] == first["autograd_hit"] == 0
    assert not first["cached"]
    second = run_cached(tmp_path)
    assert second["fx_hit"] + second["autograd_hit"] >= 1
    assert second["cached"]
    assert second["counts"] == first["counts"] == {"moe_experts": 1, "moe_route": 1}
    assert second["detail"] == first["detail"]
    # A model whose source has moved is in the cache as before.
    source = Path(forms.__file__).read_text()
    (tmp_path / "forms.py").write_text(f"\n\n{source}")
    moved = run_cached(tmp_path, sources=[tmp_path])
    assert moved == {**second, "cached": True}
    changed = run_cached(tmp_path, {"inductor_moe.disable": "moe.experts.grouped_mm"})
    assert changed["fx_hit"] == changed["autograd_hit"] == 0
    assert not changed["cached"]


def test_a_report_is_found_whatever_strides_an_operator_chose():
    def key(produced, given):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(torch.relu, (x,))
        x.meta["example_value"], y.meta["example_value"] = given, produced
        graph.output(y)
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        return backend._graph_key(module, [given], passes.FusionPass(Options()), {})

    rows, columns = torch.zeros(4, 3), torch.zeros(3, 4).T
    assert key(rows, rows) == key(columns, rows)
    assert key(rows, rows) != key(rows, columns)


COMPILE_IN_THREADS = """
import threading, torch
run = lambda: torch.compile(torch.nn.Linear(4, 4), backend="eager")(torch.ones(2, 4))
threads = [threading.Thread(target=run) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_threads_compile_at_once():
    alone = subprocess.run([sys.executable, "-c", COMPILE_IN_THREADS], capture_output=True)
    if alone.returncode < 0:
        pytest.skip("Dynamo itself crashes when threads compile at once, as torch 2.11's does")
    errors = []

    def compile_one(index):
        try:
            model, x = forms.routed(form=("grouped", "batched")[index % 2]), forms.tokens(count=9)
            with torch.no_grad():
                expected = model(x)
                found = torch.compile(model, backend=graph_backend())(x)
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        except Exception as error:
            errors.append(error)

    with collected() as reports:
        threads = [threading.Thread(target=compile_one, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert [fused_layers(report) for report in reports] == [{"moe_experts": 1}] * 4


def broken(monkeypatch, **changes):
    """Every rewrite with some of its steps replaced."""
    changed = tuple(dataclasses.replace(form, **changes) for form in patterns.ALL)
    monkeypatch.setattr(passes, "ALL", changed)


def raise_late(graph, site):
    with graph.inserting_before(site.output):
        added = graph.call_function(torch.ops.aten.neg.default, (site.output,))
    site.output.replace_all_uses_with(added)
    raise RuntimeError("a bug in the replacement")


def read_too_early(graph, site):
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(first):
        added = graph.call_function(torch.ops.aten.neg.default, (site.output,))
    return added


def raise_early(node):
    raise KeyError("a bug in the walk")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"replace": raise_late}, "a bug in the replacement"),
        ({"replace": read_too_early}, "which comes after it"),
        ({"walk": raise_early}, "a bug in the walk"),
    ],
)
def test_an_exception_leaves_the_graph_as_it_was(monkeypatch, changes, text):
    broken(monkeypatch, **changes)
    model, x = forms.routed(), forms.tokens()
    graphs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewriteFailedWarning)
        result, report = capture(model, x, graphs=graphs)
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), rtol=2e-2, atol=2e-2)
    assert fused_layers(report) == {}
    assert text in report.refused[0].reason
    graphs[0].graph.lint()
    assert not any(node.target is torch.ops.aten.neg.default and not node.users
                   for node in graphs[0].graph.nodes)  # fmt: skip


def test_an_exception_is_announced(monkeypatch):
    broken(monkeypatch, walk=raise_early)
    with pytest.warns(RewriteFailedWarning, match="a bug in the walk"):
        warnings.simplefilter("always", RewriteFailedWarning)
        capture(forms.routed(), forms.tokens())


def test_strict_raises_on_an_exception(monkeypatch):
    broken(monkeypatch, walk=raise_early)
    with pytest.raises(Exception, match="failed: KeyError") as caught:
        capture(forms.routed(), forms.tokens(), options={"inductor_moe.strict": True})
    assert "StrictError" in str(caught.value)


def test_strict_raises_on_a_refusal():
    model = forms.routed(weigh=lambda v, w: v)
    with pytest.raises(Exception, match="1 sites refused: experts: no routing weights"):
        capture(model, forms.tokens(), options={"inductor_moe.strict": True})


def test_strict_raises_without_sites():
    with pytest.raises(Exception, match=r"no sites.*inductor_moe\.explain"):
        capture(torch.sin, torch.ones(2), options={"inductor_moe.strict": True})


def test_strict_accepts_a_fused_graph():
    _, report = capture(forms.routed(), forms.tokens(), options={"inductor_moe.strict": True})
    assert fused_layers(report) == {"moe_experts": 1}


def test_a_training_graph_is_left_to_inductor():
    model, x = forms.routed(torch.float32, form="batched"), forms.tokens(torch.float32)
    compiled = torch.compile(model, backend="inductor_moe")
    with collected() as reports, pytest.warns(TrainingGraphWarning, match=r"torch\.no_grad\(\)"):
        compiled(x).sum().backward()
    assert model.experts.up.grad is not None
    assert reports[0].sites == ()
    assert "gradients" in reports[0].notes[0]


def test_a_training_graph_is_an_error_under_strict():
    model = forms.routed(torch.float32, form="batched")
    compiled = torch.compile(model, backend="inductor_moe", options={"inductor_moe.strict": True})
    with pytest.raises(Exception, match="traced with gradients"):
        compiled(forms.tokens(torch.float32))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_and_code_generation_on_cpu(mode):
    model, x = forms.routed(form="batched"), forms.tokens(count=1)
    with torch.no_grad(), collected() as reports:
        expected = model(x)
        found = torch.compile(model, backend="inductor_moe", mode=mode, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert fused_layers(reports[0]) == {"moe_experts": 1}


@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_one_dynamic_graph_serves_every_length(form):
    model = forms.routed(form=form)
    compiled = torch.compile(model, backend="inductor_moe", dynamic=True, fullgraph=True)
    with torch.no_grad(), collected() as reports:
        for count in (12, 2, 33, 70):
            x = forms.tokens(count=count, seed=count)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    assert len(reports) == 1


def test_explain_names_what_is_no_model():
    with pytest.raises(TypeError, match="explain: model is a NoneType; it must be a module"):
        inductor_moe.explain(None)


def test_explain_lists_sites_and_breaks():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = forms.routed()

        def forward(self, x):
            y = self.inner(x)
            torch._dynamo.graph_break()
            return self.inner(y)

    report = inductor_moe.explain(Broken(), forms.tokens())
    assert report.graphs == 2
    assert fused_layers(report) == {"moe_experts": 2}
    assert len(report.breaks) == 1
    assert inductor_moe.Report.from_json(report.to_json()) == report


def test_strict_error_is_ours():
    assert issubclass(StrictError, inductor_moe.errors.InductorMoeError)
