"""Expert loops that are reached by capture: transformers' hook, forwards of their own."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import zoo

import inductor_moe
from inductor_moe.backend import collected
from inductor_moe.capture import experts
from inductor_moe.testing import capture, fused_layers, graph_backend, relative_error

FAMILIES = {family.name: family for family in zoo.MOE}


@functools.cache
def built(name):
    return FAMILIES[name].build()


def eager_model(name, dtype=torch.float32):
    model = copy.deepcopy(built(name)).to(dtype)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compile_switches_eager_experts_by_the_hook(name, dtype):
    model = eager_model(name, dtype)
    ids = zoo.prompt(model, 16, seed=1)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        reference = exact(ids, use_cache=False).logits
        eager = model(ids, use_cache=False).logits
    compiled = inductor_moe.compile(model, fullgraph=True)
    (setting,) = compiled.inductor_moe_settings
    assert "set_experts_implementation" in setting
    with torch.no_grad():
        switched = model(ids, use_cache=False).logits
        found, report = capture(model, ids, use_cache=False)
    budget = 2 * relative_error(eager, reference)
    assert relative_error(switched, reference) <= budget
    assert relative_error(found.logits, reference) <= budget
    assert fused_layers(report) == FAMILIES[name].expected()
    assert not report.refused
    details = {site.detail for site in report.matched if site.op == "moe_experts"}
    assert all("captured as two ops" not in detail for detail in details), details


def test_compile_leaves_other_implementations_alone():
    model = copy.deepcopy(built("mixtral"))
    model.set_experts_implementation("batched_mm")
    compiled = inductor_moe.compile(model)
    assert compiled.inductor_moe_settings == ()
    assert model.config._experts_implementation == "batched_mm"


def test_compile_refuses_another_backend():
    with pytest.raises(TypeError, match="takes no backend"):
        inductor_moe.compile(lambda x: x, backend="eager")


def test_the_implementation_trains_by_grouped_mm():
    experts.install()
    model = copy.deepcopy(built("mixtral"))
    ids = zoo.prompt(model, 16, seed=1)
    gradients = []
    for implementation in ("grouped_mm", experts.IMPLEMENTATION):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, use_cache=False).logits.square().sum().backward()
        gradients.append(model.model.layers[0].mlp.experts.down_proj.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


class Halves(torch.nn.Module):
    """Experts called as two ops, as capture leaves them, around any function."""

    def __init__(self, function, inner=24, **steps):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.up = torch.nn.Parameter(torch.randn(6, 2 * inner, 32, generator=generator) / 6)
        self.down = torch.nn.Parameter(torch.randn(6, 32, inner, generator=generator) / 5)
        self.function, self.steps = function, steps

    def forward(self, x, ids, weights):
        up = experts.moe_up(x, self.up, ids, None, None)
        h = self.function(*up.chunk(2, dim=-1))
        down_ids = self.steps.get("down_ids", lambda v: v)(ids)
        out = experts.moe_down_combine(h, self.down, down_ids, weights, None, None)
        return (out, up.sum()) if self.steps.get("extra") else out


def run_halves(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(10, 32, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, generator=generator)
    with torch.no_grad():
        expected = module.double()(x.double(), ids, weights.double())
    module.to(dtype)
    graphs = []
    found, report = capture(module, x.to(dtype), ids, weights.to(dtype), graphs=graphs)
    ops = [
        str(node.target) for node in graphs[0].graph.nodes if "inductor_moe" in str(node.target)
    ]
    return found, expected, report, ops


def test_a_named_function_makes_one_op():
    found, expected, report, ops = run_halves(Halves(lambda g, u: torch.nn.functional.silu(g) * u))
    assert ops == ["inductor_moe.moe_experts.default"]
    assert report.counts() == {"moe_experts": 1}
    assert relative_error(found, expected) < 1e-6


NOT_ONE_OP = {
    "unnamed function": Halves(lambda g, u: torch.sin(g) * u),
    "clamped after the activation": Halves(
        lambda g, u: torch.nn.functional.silu(g).clamp(max=0.1) * u
    ),
    "other ids": Halves(
        lambda g, u: torch.nn.functional.silu(g) * u, down_ids=lambda ids: (ids + 1) % 6
    ),
    "extra user": Halves(lambda g, u: torch.nn.functional.silu(g) * u, extra=True),
}


@pytest.mark.parametrize("name", NOT_ONE_OP)
def test_anything_else_stays_two_ops(name):
    found, expected, _, ops = run_halves(copy.deepcopy(NOT_ONE_OP[name]))
    assert ops == ["inductor_moe.moe_up.default", "inductor_moe.moe_down_combine.default"]
    if isinstance(found, tuple):
        found, expected = found[0], expected[0]
    assert relative_error(found, expected) < 1e-6


def test_other_backends_run_the_original_forward():
    import families

    family = next(f for f in families.families() if f.name == "step3p7")
    model = family.build()
    ids = torch.randint(3, 96, (1, 16), generator=torch.Generator().manual_seed(1))
    experts.install()
    seen = []

    def other(gm, example_inputs):
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).last_hidden_state
        torch.compile(model, backend=other)(input_ids=ids, use_cache=False)
        torch._dynamo.reset()
        with collected() as reports:
            compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
            found = compiled(input_ids=ids, use_cache=False).last_hidden_state
    assert seen
    assert not any("inductor_moe" in target for target in seen)
    assert fused_layers(reports[0]) == {"moe_experts": 2}
    assert relative_error(found, expected) < 1e-5
