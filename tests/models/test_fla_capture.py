"""FLA's functions become the op while our backend traces; stand-ins with FLA 0.6's signatures."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from inductor_moe.backend import collected
from inductor_moe.capture import delta_rule as capture
from inductor_moe.errors import FallbackWarning
from inductor_moe.reference.delta_rule import delta_rule_recurrent
from inductor_moe.testing import graph_backend, relative_error

BATCH, TOKENS, HEADS, VALUE_HEADS, KEY, VALUE = 2, 12, 2, 4, 16, 8


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
    state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None,
    cp_context=None, **kwargs,
):  # fmt: skip
    return v + 100, None


def fused_recurrent_gated_delta_rule(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None,
    output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
    A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
    state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    return v + 100, None


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False,
    return_intermediate_states=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
):  # fmt: skip
    return v + 100, None


def fused_recurrent_kda(
    q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None,
    output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None,
    state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    return v + 100, None


STAND_INS = {
    "fla.ops.gated_delta_rule.chunk": (chunk_gated_delta_rule, True),
    "fla.ops.gated_delta_rule.fused_recurrent": (fused_recurrent_gated_delta_rule, False),
    "fla.ops.kda.chunk": (chunk_kda, True),
    "fla.ops.kda.fused_recurrent": (fused_recurrent_kda, False),
}


@pytest.fixture
def fla(monkeypatch):
    """The four functions by name, as FLA 0.6 exposes them: the chunked ones opt out of compile."""
    found = {}
    for name, (function, opts_out) in STAND_INS.items():
        copied = types.FunctionType(
            function.__code__, dict(function.__globals__), function.__name__,
            function.__defaults__,
        )  # fmt: skip
        module = types.ModuleType(name)
        found[function.__name__] = torch.compiler.disable(copied) if opts_out else copied
        setattr(module, function.__name__, found[function.__name__])
        monkeypatch.setitem(sys.modules, name, module)
    capture.install()
    return found


def inputs(per_channel=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    rows = (BATCH, TOKENS)
    channels = (KEY,) if per_channel else ()
    q, k = normal(*rows, HEADS, KEY), normal(*rows, HEADS, KEY)
    v, g = normal(*rows, VALUE_HEADS, VALUE), normal(*rows, VALUE_HEADS, *channels)
    return q, k, v, -g.abs(), normal(*rows, VALUE_HEADS).sigmoid()


STATE = torch.randn(BATCH, VALUE_HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(5))
USUAL = {"initial_state": STATE, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
RATE = torch.linspace(-1, 1, VALUE_HEADS)


def run(function, *args, fullgraph=True, **kwargs):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: function(*a, **kwargs), backend=graph_backend(), fullgraph=fullgraph
    )
    with torch.no_grad(), collected() as reports:
        result = compiled(*args)
    return result, sum(report.counts().get("delta_rule", 0) for report in reports)


def check(found, arguments, state=STATE, scale=KEY**-0.5, eps=1e-6):
    (out, final), count = found
    wide = [None if x is None else x.double() for x in (*arguments, state)]
    want, want_final = delta_rule_recurrent(*wide, scale, eps)
    assert count == 1
    assert relative_error(out, want) < 1e-5
    if final is not None:
        assert final.dtype == torch.float32
        assert relative_error(final, want_final) < 1e-5
    return final


@pytest.mark.parametrize("name", [function.__name__ for function, _ in STAND_INS.values()])
def test_a_function_becomes_the_op(fla, name):
    arguments = inputs(per_channel=name.endswith("kda"))
    q, k, v, g, beta = arguments
    assert check(run(fla[name], q, k, v, g, beta=beta, **USUAL), arguments) is not None
    without = run(fla[name], q, k, v, g, beta=beta, use_qk_l2norm_in_kernel=True)
    assert check(without, arguments, state=None) is None


VARIANTS = {
    "a scale of its own": ({"scale": 0.3}, {"scale": 0.3}),
    "raw keys": ({"use_qk_l2norm_in_kernel": False}, {"eps": None}),
    "a chunk size": ({"chunk_size": 32}, {}),
    "hints": ({"cu_seqlens_cpu": None, "chunk_indices": None}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_argument_keeps_its_meaning(fla, name):
    arguments = inputs()
    if name == "raw keys":
        arguments = (arguments[0], F.normalize(arguments[1], dim=-1), *arguments[2:])
    given, expected = VARIANTS[name]
    check(run(fla["chunk_gated_delta_rule"], *arguments, **{**USUAL, **given}),
          arguments, **expected)  # fmt: skip


def test_a_state_with_values_first(fla):
    arguments = inputs()
    turned = {"initial_state": STATE.transpose(-1, -2).contiguous(), "state_v_first": True}
    (out, final), count = run(fla["chunk_gated_delta_rule"], *arguments, **{**USUAL, **turned})
    assert final.shape == (BATCH, VALUE_HEADS, VALUE, KEY)
    check(((out, final.transpose(-1, -2)), count), arguments)


@pytest.mark.parametrize("twice", [False, True])
def test_beta_through_the_sigmoid(fla, twice):
    q, k, v, g, raw = inputs()
    found = run(fla["chunk_gated_delta_rule"], q, k, v, g, raw, **USUAL,
                use_beta_sigmoid_in_kernel=True, allow_neg_eigval=twice)  # fmt: skip
    check(found, (q, k, v, g, raw.sigmoid() * (2 if twice else 1)))


@pytest.mark.parametrize(
    ("name", "lower_bound"),
    [
        ("chunk_gated_delta_rule", None),
        ("chunk_kda", None),
        ("chunk_kda", -5.0),
        ("fused_recurrent_kda", -5.0),
    ],
)
def test_the_gate_inside(fla, name, lower_bound):
    kda = name.endswith("kda")
    q, k, v, raw, beta = inputs(per_channel=kda)
    bias = torch.linspace(-1, 1, raw[0, 0].numel())
    rate = RATE.exp()[:, None] if kda else RATE.exp()
    moved = raw + bias.reshape(raw.shape[2:])
    bounded = {} if lower_bound is None else {"lower_bound": lower_bound}
    g = -rate * F.softplus(moved)
    if lower_bound is not None:
        g = lower_bound * torch.sigmoid(rate * moved)
    found = run(fla[name], q, k, v, raw, beta, **USUAL, use_gate_in_kernel=True, A_log=RATE,
                dt_bias=bias, **bounded)  # fmt: skip
    check(found, (q, k, v, g, beta))


def test_decays_and_betas_of_the_recurrent_function(fla):
    q, k, v, gk, beta = inputs(per_channel=True)
    function = fla["fused_recurrent_gated_delta_rule"]
    check(run(function, q, k, v, gk=gk, beta=beta, **USUAL), (q, k, v, gk, beta))
    check(run(function, q, k, v, beta=beta, **USUAL), (q, k, v, None, beta))
    ones = torch.ones_like(beta)
    check(run(function, q, k, v, gk=gk, **USUAL), (q, k, v, gk, ones))


def test_packed_sequences(fla):
    arguments = [x[:1] for x in inputs()]
    ends = torch.tensor([0, 5, TOKENS])
    (out, final), count = run(fla["chunk_gated_delta_rule"], *arguments, **USUAL, cu_seqlens=ends)
    assert count == 1
    for row, part in enumerate((slice(0, 5), slice(5, TOKENS))):
        wide = [x[:, part].double() for x in arguments]
        want, state = delta_rule_recurrent(*wide, STATE[row : row + 1].double(), KEY**-0.5, 1e-6)
        assert relative_error(out[:, part], want) < 1e-5
        assert relative_error(final[row : row + 1], state) < 1e-5


REFUSED = {
    "context parallelism": ("chunk_gated_delta_rule", {"cp_context": "anything"}),
    "another chunk size": ("chunk_gated_delta_rule", {"chunk_size": 128}),
    "heads first": ("chunk_gated_delta_rule", {"head_first": True}),
    "negative eigenvalues alone": ("chunk_gated_delta_rule", {"allow_neg_eigval": True}),
    "a gate without its rate": ("chunk_gated_delta_rule", {"use_gate_in_kernel": True}),
    "a bound without a gate": ("fused_recurrent_kda", {"lower_bound": -5.0}),
    "decay of values": ("fused_recurrent_gated_delta_rule", {"gv": torch.ones(1)}),
    "two decays": ("fused_recurrent_gated_delta_rule", {"gk": torch.ones(1)}),
    "states between chunks": ("chunk_kda", {"return_intermediate_states": True}),
    "something new": ("chunk_gated_delta_rule", {"something_new": 3}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_does_not_mean_is_left_to_fla(fla, name):
    function, given = REFUSED[name]
    arguments = inputs(per_channel=function.endswith("kda"))
    q, k, v, g, beta = arguments
    with pytest.warns(FallbackWarning, match=f"{function} is left to FLA"):
        (out, _), count = run(fla[function], q, k, v, g, beta=beta, fullgraph=False, **given)
    assert count == 0
    torch.testing.assert_close(out, v + 100)


def test_other_backends_and_gradients_run_fla(fla):
    arguments = inputs()
    function = fla["fused_recurrent_gated_delta_rule"]
    q, k, v, g, beta = arguments
    compiled = torch.compile(lambda: function(q, k, v, g, beta=beta)[0], backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(), v + 100)
    torch._dynamo.reset()
    ours = torch.compile(lambda: function(q, k, v, g, beta=beta)[0], backend=graph_backend())
    torch.testing.assert_close(ours(), v + 100)


def test_capture_of_fla_is_idempotent_and_can_be_taken_back(fla):
    arguments = inputs()
    function = fla["fused_recurrent_gated_delta_rule"]
    q, k, v, g, beta = arguments
    try:
        for change, expected in (
            (capture.install, 1),
            (capture.uninstall, 0),
            (capture.install, 1),
        ):
            change()
            assert run(function, q, k, v, g, beta=beta, **USUAL)[1] == expected
    finally:
        capture.install()
