"""`delta_rule` and `delta_decode` on the CPU: contract, mathematics, transformers."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from inductor_moe import compat
from inductor_moe.ops import delta_rule as ops
from inductor_moe.ops.delta_rule import delta_decode, delta_rule
from inductor_moe.reference import delta_rule as reference

ALL_TOKENS = (1, 2, 7, 8, 9, 32, 63, 64, 65, 128, 200, 256, 1000)


def lengths(*default, least=1):
    """Every length of ALL_TOKENS from `least` on; those not in `default` are slow."""
    return [
        pytest.param(tokens, marks=() if tokens in default else pytest.mark.slow)
        for tokens in ALL_TOKENS
        if tokens >= least
    ]


TOKENS = lengths(1, 2, 7, 8, 9, 32, 63, 64, 65, 128, 200)
GATES = ("head", "channel", "none")
BATCH, HEADS, VALUE_HEADS, KEY, VALUE = 2, 2, 4, 40, 24
SCALE = KEY**-0.5


@pytest.fixture(autouse=True)
def fresh_inputs():
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty)


def inputs(tokens, gate="head", batch=BATCH, dtype=torch.float32, decay=2.0, heads=HEADS):
    q = torch.randn(batch, tokens, heads, KEY).to(dtype)
    k = torch.randn(batch, tokens, heads, KEY).to(dtype)
    v = torch.randn(batch, tokens, VALUE_HEADS, VALUE).to(dtype)
    channels = (KEY,) if gate == "channel" else ()
    g = -decay * torch.rand(batch, tokens, VALUE_HEADS, *channels)
    beta = torch.rand(batch, tokens, VALUE_HEADS)
    state = torch.randn(batch, VALUE_HEADS, KEY, VALUE)
    return q, k, v, None if gate == "none" else g, beta, state


def double(*tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def oracle(q, k, v, g, beta, state, eps=1e-6):
    return reference.delta_rule_recurrent(*double(q, k, v, g, beta, state), SCALE, eps)


def error(got, want):
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_as_exact_as_the_recurrence(tokens, gate):
    arguments = inputs(tokens, gate)
    out, final = delta_rule(*arguments, SCALE, 1e-6)
    want_out, want_final = oracle(*arguments)
    plain_out, plain_final = reference.delta_rule_recurrent(*arguments, SCALE, 1e-6)
    # fp32 sums of the same length in another order: allow 2x, and a floor of a few ulps
    assert error(out, want_out) <= 2 * error(plain_out, want_out) + 1e-6
    assert error(final, want_final) <= 2 * error(plain_final, want_final) + 1e-6


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", lengths(2, 9, 65, 200, least=2))
def test_whole_equals_two_parts_with_the_state_carried(tokens, gate):
    q, k, v, g, beta, state = inputs(tokens, gate)
    out, final = delta_rule(q, k, v, g, beta, state, SCALE, 1e-6)
    cut = int(torch.randint(1, tokens, ()))
    parts = []
    for part in (slice(0, cut), slice(cut, tokens)):
        gates = None if g is None else g[:, part]
        one, state = delta_rule(
            q[:, part], k[:, part], v[:, part], gates, beta[:, part], state, SCALE, 1e-6
        )
        parts.append(one)
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", lengths(1, 8, 65))
def test_batch_of_one_equals_a_row(tokens):
    arguments = inputs(tokens)
    out, final = delta_rule(*arguments, SCALE, 1e-6)
    one, state = delta_rule(*(x[1:] for x in arguments), SCALE, 1e-6)
    torch.testing.assert_close(one[0], out[1])
    torch.testing.assert_close(state[0], final[1])


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_equal_separate_ones(gate):
    ends = [0, 5, 5, 70, 71, 136]
    q, k, v, g, beta, _ = inputs(ends[-1], gate, batch=1)
    state = torch.randn(len(ends) - 1, VALUE_HEADS, KEY, VALUE)
    out, final = delta_rule(q, k, v, g, beta, state, SCALE, 1e-6, torch.tensor(ends))
    for n, (start, end) in enumerate(pairwise(ends)):
        part = slice(start, end)
        if start == end:
            assert torch.equal(final[n], state[n])
            continue
        gates = None if g is None else g[:, part]
        one, last = delta_rule(
            q[:, part], k[:, part], v[:, part], gates, beta[:, part], state[n : n + 1], SCALE, 1e-6
        )
        torch.testing.assert_close(out[:, part], one)
        torch.testing.assert_close(final[n : n + 1], last)


@pytest.mark.parametrize("tokens", (1, 5, 80))
@pytest.mark.parametrize("gate", ("head", "channel"))
@pytest.mark.parametrize("decay", (0.0, 300.0, float("inf")))
@pytest.mark.parametrize("strength", (0.0, 1.0, 2.0))
def test_extremes_are_finite_and_right(tokens, gate, decay, strength):
    q, k, v, g, beta, state = inputs(tokens, gate)
    g = torch.where(torch.rand_like(g) < 0.5, torch.full_like(g, -decay), g)
    k[:, ::3] = 0
    beta = torch.full_like(beta, strength)
    out, final = delta_rule(q, k, v, g, beta, state, SCALE, 1e-6)
    want_out, want_final = oracle(q, k, v, g, beta, state)
    # the running sums of a chunk keep 24 bits of up to 64 * 107
    assert error(out, want_out) < 1e-3
    assert error(final, want_final) < 1e-3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("tokens", (1, 5, 65))
def test_low_precision_inputs(tokens, dtype):
    arguments = inputs(tokens, dtype=dtype)
    out, final = delta_rule(*arguments, SCALE, 1e-6)
    assert out.dtype == dtype
    assert final.dtype == torch.float32
    want_out, want_final = oracle(*arguments)
    assert error(out, want_out) <= 2 * error(want_out.to(dtype), want_out)
    assert error(final, want_final) < 1e-5


def test_state_keeps_its_dtype_and_is_not_written():
    q, k, v, g, beta, state = inputs(3)
    state = state.bfloat16()
    before = state.clone()
    _, final = delta_rule(q, k, v, g, beta, state, SCALE)
    assert final.dtype == torch.bfloat16
    assert torch.equal(state, before)
    without, _ = delta_rule(q, k, v, g, beta, None, SCALE)
    zeros, _ = delta_rule(q, k, v, g, beta, torch.zeros_like(state), SCALE)
    torch.testing.assert_close(without, zeros)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("given", [False, True], ids=["no-state", "state"])
def test_no_tokens_leave_a_state_of_its_own(given, compiled):
    q, k, v, g, beta, state = inputs(0)
    run = torch.compile(delta_rule, backend="inductor_moe") if compiled else delta_rule
    with torch.no_grad():
        out, final = run(q, k, v, g, beta, state if given else None, SCALE, 1e-6)
    assert out.shape == v.shape and out.dtype == v.dtype
    torch.testing.assert_close(final, state if given else torch.zeros_like(state))
    assert final.data_ptr() != state.data_ptr()


def test_a_gpu_without_kernels_is_served_by_pytorch(monkeypatch):
    monkeypatch.setattr(compat, "runs_triton_kernels", lambda device: False)
    arguments = (*inputs(9), SCALE, 1e-6)
    found = ops._delta_rule_cuda(*arguments)
    torch.testing.assert_close(found, delta_rule(*arguments))


@pytest.mark.parametrize(
    "hip, capability, reason",
    [
        ("6.4", (9, 4), "there are no kernels for AMD GPUs"),
        (None, (7, 5), "the GPU has compute capability 7.5, below 8.0"),
        (None, (8, 0), None),
    ],
)
def test_gpus_with_kernels(hip, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert compat.no_kernels_reason(torch.device("cuda")) == reason


def test_padded_strides():
    arguments = inputs(20)
    padded = [F.pad(x, (0, 3))[..., :-3] for x in arguments]
    assert not padded[0].is_contiguous()
    for got, want in zip(
        delta_rule(*padded, SCALE, 1e-6), delta_rule(*arguments, SCALE, 1e-6), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tokens", (1, 9, 70))
def test_agrees_with_transformers(tokens):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    pairs = {
        "head": (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule),
        "channel": (kimi.chunk_kimi_delta_attention, kimi.recurrent_kimi_delta_attention),
    }
    for gate, functions in pairs.items():
        q, k, v, g, beta, state = inputs(tokens, gate)
        out, final = delta_rule(q, k, v, g, beta, state, SCALE, 1e-6)
        query, key = (x.repeat_interleave(VALUE_HEADS // HEADS, 2) for x in (q, k))
        for function in functions:
            want_out, want_final = function(
                query,
                key,
                v,
                g=g,
                beta=beta,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            torch.testing.assert_close(out, want_out, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(final, want_final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", (1, 3, 20))
def test_delta_rule_opcheck(tokens, gate):
    opcheck(torch.ops.inductor_moe.delta_rule.default, (*inputs(tokens, gate), SCALE, 1e-6))


def test_delta_rule_opcheck_without_state_and_packed():
    q, k, v, g, beta, _ = inputs(12, batch=1)
    op = torch.ops.inductor_moe.delta_rule.default
    opcheck(op, (q, k, v, g, beta, None, SCALE))
    opcheck(op, (q, k, v, g, beta, None, SCALE, None, torch.tensor([0, 4, 12])))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda a: a | {"k": a["k"][:, :-1]}),
        ("v", lambda a: a | {"v": a["v"][:, :, :3], "beta": a["beta"][:, :, :3]}),
        ("beta", lambda a: a | {"beta": a["beta"][..., None]}),
        ("g", lambda a: a | {"g": a["g"][..., :1]}),
        ("state", lambda a: a | {"state": a["state"].transpose(2, 3)}),
        ("v", lambda a: a | {"v": a["v"].bfloat16()}),
        ("cu_seqlens", lambda a: a | {"cu_seqlens": torch.tensor([0, 4])}),
    ],
)
def test_delta_rule_names_the_wrong_argument(name, change):
    names = ("q", "k", "v", "g", "beta", "state")
    arguments = change(dict(zip(names, inputs(4), strict=True)))
    with pytest.raises(ValueError, match=rf"^delta_rule: {name} "):
        delta_rule(scale=SCALE, **arguments)


def decode_inputs(batch=3, rows=None, per_channel=False, length=4, width=4, dtype=torch.float32):
    rows = rows or batch
    channels = 2 * HEADS * KEY + VALUE_HEADS * VALUE
    gates = (VALUE_HEADS, KEY) if per_channel else (VALUE_HEADS,)
    return {
        "qkv": torch.randn(batch, channels).to(dtype),
        "conv_state": torch.randn(rows, channels, length).to(dtype),
        "conv_weight": torch.randn(channels, width).to(dtype),
        "conv_bias": torch.randn(channels).to(dtype),
        "a": torch.randn(batch, *gates),
        "b": torch.randn(batch, VALUE_HEADS).to(dtype),
        "A_log": torch.rand(VALUE_HEADS),
        "dt_bias": torch.randn(gates),
        "recurrent_state": torch.randn(rows, VALUE_HEADS, KEY, VALUE),
        "z": torch.randn(batch, VALUE_HEADS, VALUE).to(dtype),
        "norm_weight": torch.randn(VALUE),
        "slots": None,
        "scale": SCALE,
    }


def test_decode_equals_the_layers_of_transformers():
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    given = decode_inputs()
    conv_state, state = given["conv_state"].clone(), given["recurrent_state"].clone()
    mixed = qwen.causal_conv1d_update(
        given["qkv"][..., None], conv_state, given["conv_weight"], given["conv_bias"], "silu"
    ).transpose(1, 2)
    q, k, v = mixed.split([HEADS * KEY, HEADS * KEY, VALUE_HEADS * VALUE], -1)
    q, k = (x.unflatten(-1, (-1, KEY)).repeat_interleave(2, 2) for x in (q, k))
    g = -given["A_log"].exp() * F.softplus(given["a"] + given["dt_bias"])
    core, state = qwen.torch_recurrent_gated_delta_rule(
        q,
        k,
        v.unflatten(-1, (-1, VALUE)),
        g=g[:, None],
        beta=given["b"].sigmoid()[:, None],
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    norm = qwen.Qwen3NextRMSNormGated(VALUE, eps=1e-6)
    norm.weight.data.copy_(given["norm_weight"])
    want = norm(core[:, 0], given["z"]).detach()
    out = delta_decode(**given)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given["conv_state"], conv_state)
    torch.testing.assert_close(given["recurrent_state"], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ("softplus", "sigmoid", "given"))
@pytest.mark.parametrize("per_channel", (False, True))
def test_decode_for_32_steps_keeps_both_states(gate, per_channel):
    given = decode_inputs(per_channel=per_channel, length=3)
    wide = dict(zip(given, double_values(given), strict=True))
    for _ in range(32):
        for name in ("qkv", "a", "b", "z"):
            given[name] = torch.randn_like(given[name])
        if gate == "given":
            given["a"] = -given["a"].abs()
        for name in ("qkv", "a", "b", "z"):
            wide[name] = given[name].double()
        rest = {"gate": gate, "gate_lower_bound": -5.0, "norm_activation": "sigmoid"}
        out = delta_decode(**given, **rest, beta_scale=2.0 if gate != "given" else 1.0)
        want = delta_decode(**wide, **rest, beta_scale=2.0 if gate != "given" else 1.0)
        if gate == "given":
            given["b"].clamp_(0, 1)
        assert error(out, want) < 1e-4
        assert torch.equal(given["conv_state"].double(), wide["conv_state"])
        assert error(given["recurrent_state"], wide["recurrent_state"]) < 1e-4


def test_decode_rounds_a_token_where_it_is_stored_not_where_it_is_convolved():
    given = decode_inputs()
    given["conv_state"] = given["conv_state"].bfloat16()
    wide = dict(zip(given, double_values(given), strict=True))
    assert error(delta_decode(**given), delta_decode(**wide)) < 1e-5
    torch.testing.assert_close(given["conv_state"], wide["conv_state"].bfloat16(), rtol=0, atol=0)


def double_values(given):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in given.values()]


def test_decode_slots_choose_rows_and_skip_padding():
    given = decode_inputs(batch=3, rows=6)
    slots = torch.tensor([4, -1, 0])
    before = {name: given[name].clone() for name in ("conv_state", "recurrent_state")}
    out = delta_decode(**given | {"slots": slots})
    assert (out[1] == 0).all()
    for row, slot in ((0, 4), (2, 0)):
        one = {name: given[name][row : row + 1] for name in ("qkv", "a", "b", "z")} | {
            name: state[slot : slot + 1].clone() for name, state in before.items()
        }
        torch.testing.assert_close(delta_decode(**given | one)[0], out[row])
        for name in before:
            torch.testing.assert_close(given[name][slot], one[name][0])
    for slot in (1, 2, 3, 5):
        for name, state in before.items():
            assert torch.equal(given[name][slot], state[slot])


@pytest.mark.parametrize("norm", ("gated", "plain", "none"))
def test_delta_decode_opcheck(norm):
    given = decode_inputs()
    if norm != "gated":
        given["z"] = None
    if norm == "none":
        given["norm_weight"] = None
    opcheck(torch.ops.inductor_moe.delta_decode.default, tuple(given.values()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", lambda a: a | {"qkv": a["qkv"][:, 1:]}),
        ("conv_state", lambda a: a | {"conv_state": a["conv_state"][..., :2]}),
        ("conv_weight", lambda a: a | {"conv_weight": a["conv_weight"][1:]}),
        ("A_log", lambda a: a | {"A_log": None}),
        ("dt_bias", lambda a: a | {"dt_bias": a["dt_bias"][1:]}),
        ("z", lambda a: a | {"norm_weight": None}),
        ("slots", lambda a: a | {"slots": torch.zeros(3)}),
        ("gate", lambda a: a | {"gate": "exp"}),
        ("norm_activation", lambda a: a | {"norm_activation": "relu"}),
    ],
)
def test_delta_decode_names_the_wrong_argument(name, change):
    with pytest.raises(ValueError, match=rf"^delta_decode: {name} "):
        delta_decode(**change(decode_inputs()))
