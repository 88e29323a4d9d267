"""The fused decode step: what is recognised around the rule, what is not; states always exact."""

from __future__ import annotations

import copy

import pytest
import torch
from decode_step import CHANNELS, HIDDEN, KEY, VALUE, VALUE_HEADS, Step
from torch.nn import functional as F

from inductor_moe.backend import collected
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.testing import capture, graph_backend, relative_error


def run(batch=2, steps=3, **knobs):
    """Three steps eagerly and through the backend; outputs and both states must agree."""
    model = Step(**knobs).eval()
    torch.manual_seed(9)
    initial = model.states(batch)
    expected, found = copy.deepcopy(initial), copy.deepcopy(initial)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
    with torch.no_grad(), collected() as reports:
        for _ in range(steps):
            x = torch.randn(batch, HIDDEN)
            wanted, got = model(x, *expected), compiled(x, *found)
            leaves = torch.utils._pytree.tree_leaves
            for left, right in zip(leaves((got, found)), leaves((wanted, expected)), strict=True):
                assert relative_error(left, right) < 2e-6
    (report,) = reports
    (site,) = report.matched
    assert not report.refused
    return site


def normalise_with(activation=F.silu, weight=lambda w: w, eps=1e-5):
    def normalise(x, w, z):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (weight(w) * wide * activation(z.float())).to(x.dtype)

    return normalise


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length, width", [(4, 4), (3, 4), (6, 3)])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_whole_step_is_fused(batch, length, width, bias):
    site = run(batch, length=length, width=width, bias=bias)
    assert site.rewrite == "delta_rule.decode"
    assert site.detail.endswith("updated in place, gates, gated norm")


def flat(decay):
    """The gates of one row that has lost its batch dim, as a product of one row on a GPU has."""
    return lambda a, A, t: decay(a.flatten(), A, t)[None, None]


def test_gates_of_one_row_are_fused_whatever_its_dims():
    site = run(1, decay=flat(Step.decay))
    assert site.detail.endswith("gates, gated norm")
    site = run(1, decay=flat(lambda a, A, t: -A.exp() * F.softplus(a * t)))
    assert "gates left to Inductor" in site.detail


def by_sums(q, k, v, g, beta, state, scale, eps):
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps) for x in (q, k))
    q, k, v, beta = q[:, 0] * scale, k[:, 0], v[:, 0], beta[:, 0]
    state = state * g[:, 0].exp()[..., None, None]
    delta = (v - (state * k[..., None]).sum(-2)) * beta[..., None]
    state = state + k[..., None] * delta[..., None, :]
    return (state * q[..., None]).sum(-2)[:, None], state


def by_products(q, k, v, g, beta, state, scale, eps):
    q, k = (x / (x.square().sum(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    state = state * g.transpose(1, 2).exp()[..., None]
    delta = beta.transpose(1, 2)[..., None] * (v.transpose(1, 2) - k @ state)
    state = state + k.transpose(-1, -2) @ delta
    return ((q / scale**-1) @ state).transpose(1, 2), state


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rule", [by_sums, by_products])
def test_a_rule_written_by_hand_becomes_the_whole_step(rule, batch):
    site = run(batch, rule=rule)
    assert site.rewrite == "delta_rule.decode"
    assert site.detail.startswith("one step")
    assert site.detail.endswith("updated in place, gates, gated norm")


@pytest.mark.parametrize("rule", [delta_rule, by_sums])
def test_no_copy_of_a_state_remains(rule):
    graphs = []
    states = torch.randn(2, CHANNELS, 4), torch.randn(2, VALUE_HEADS, KEY, VALUE)
    capture(Step(rule=rule).eval(), torch.randn(2, HIDDEN), *states, graphs=graphs)
    nodes = list(graphs[0].graph.nodes)
    assert not [node for node in nodes if "copy" in str(node.target)]
    (step,) = (node for node in nodes if "delta_decode" in str(node.target))
    shapes = [tuple(node.meta["val"].shape) for node in (step.args[1], step.args[8])]
    assert shapes == [tuple(state.shape) for state in states]
    assert step.args[1].op == step.args[8].op == "placeholder"


GATES = {
    "twice the sigmoid": {"beta": lambda b: 2 * torch.sigmoid(b)},
    "softplus spelled out": {
        "decay": lambda a, A, t: -torch.exp(A) * torch.log1p(torch.exp(a + t))
    },
    "operands swapped": {"decay": lambda a, A, t: F.softplus(t + a) * -A.exp()},
}
OTHER_GATES = {
    "decay halved": {"decay": lambda a, A, t: -0.5 * A.exp() * F.softplus(a + t)},
    "decay by sigmoid": {"decay": lambda a, A, t: -A.exp() * torch.sigmoid(a + t)},
    "decay without bias": {"decay": lambda a, A, t: -A.exp() * F.softplus(a) - 0 * t},
    "decay with roles swapped": {"decay": lambda a, A, t: -A.exp() * F.softplus(a * t)},
    "three times the sigmoid": {"beta": lambda b: 3 * torch.sigmoid(b)},
    "beta by tanh": {"beta": torch.tanh},
}


@pytest.mark.parametrize("name", GATES)
def test_a_spelling_of_the_gates_is_fused(name):
    assert "gates, gated norm" in run(**GATES[name]).detail


@pytest.mark.parametrize("name", OTHER_GATES)
def test_other_gates_stay_with_inductor(name):
    site = run(**OTHER_GATES[name])
    assert site.rewrite == "delta_rule.decode"
    assert "gates left to Inductor" in site.detail


NORMS = {
    "another eps": normalise_with(eps=3e-6),
    "sigmoid": normalise_with(activation=torch.sigmoid),
}
OTHER_NORMS = {
    "weight plus one": normalise_with(weight=lambda w: 1 + w),
    "gelu": normalise_with(activation=F.gelu),
    "norm after the gate": lambda x, w, z: F.rms_norm(x * F.silu(z), (VALUE,), w, 1e-5),
    "mean removed": lambda x, w, z: F.layer_norm(x, (VALUE,), w, None, 1e-5) * F.silu(z),
    "no gate": lambda x, w, z: F.rms_norm(x, (VALUE,), w, 1e-5) + 0 * z,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_with_another_constant_is_fused(name):
    assert run(normalise=NORMS[name]).detail.endswith("gated norm")


@pytest.mark.parametrize("batch", [1, 2])
def test_a_norm_put_back_in_its_place_is_fused(batch):
    site = run(batch, place=lambda out: out.reshape(batch, 1, VALUE_HEADS, VALUE))
    assert site.detail.endswith("gated norm")


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_another_norm_stays_with_inductor(name):
    site = run(normalise=OTHER_NORMS[name])
    assert site.rewrite == "delta_rule.decode"
    assert site.detail.endswith("norm left to Inductor")


NOT_A_STEP = {
    "gelu after the convolution": {"activation": F.gelu},
    "no activation": {"activation": lambda v: v},
    "silu twice": {"activation": lambda v: F.silu(F.silu(v))},
    "the oldest inputs are kept": {"keep": lambda v: v[:, :, :4]},
    "inputs kept in reverse": {"keep": lambda v: v[:, :, -4:].flip(-1)},
    "inputs kept scaled": {"keep": lambda v: 0.5 * v[:, :, -4:]},
    "keys before queries": {"order": lambda q, k, v: (k, q, v)},
    "state written scaled": {"write": lambda s, n: s.copy_(0.5 * n)},
    "state not written": {"write": lambda s, n: None},
    "old convolution state used later": {"extra": lambda c, s, m: c.sum()},
    "new state used later": {"extra": lambda c, s, m: s.sum()},
    "convolved rows used later": {"extra": lambda c, s, m: m.sum()},
}


@pytest.mark.parametrize("name", NOT_A_STEP)
def test_a_near_miss_keeps_the_rule_alone(name):
    site = run(**NOT_A_STEP[name])
    assert site.rewrite == "delta_rule.called"
