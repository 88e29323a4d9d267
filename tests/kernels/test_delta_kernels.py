"""The delta-rule kernels under Triton's interpreter, against the recurrence in float64."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from kernels.interpreted import Interpreted

from inductor_moe.kernels import delta_chunk, delta_chunk_channel, delta_decode, delta_recurrent
from inductor_moe.kernels.delta_launch import Tile
from inductor_moe.kernels.delta_rule import delta_rule, delta_rule_padded
from inductor_moe.reference import delta_rule as reference

TOKENS = (
    1, 2, 7, 8, 9, 32, 63, 64, 65, 128,
    *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (200, 1000)),
)  # fmt: skip
GATES = ("head", "channel", "none")
HEADS, VALUE_HEADS, KEY, VALUE = 1, 2, 40, 24


@pytest.fixture(autouse=True)
def interpreted_kernels(monkeypatch):
    for module in (delta_chunk, delta_chunk_channel, delta_decode, delta_recurrent):
        monkeypatch.setattr(module, "traced", Interpreted)


@pytest.fixture(autouse=True)
def fresh_inputs():
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    plain, method = torch.empty, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(method(*a, **k)))


def inputs(tokens, gate="head", batch=1, dtype=torch.float32, key=KEY, value=VALUE, decay=2.0):
    channels = (key,) if gate == "channel" else ()
    g = -decay * torch.rand(batch, tokens, VALUE_HEADS, *channels)
    return {
        "q": torch.randn(batch, tokens, HEADS, key).to(dtype),
        "k": torch.randn(batch, tokens, HEADS, key).to(dtype),
        "v": torch.randn(batch, tokens, VALUE_HEADS, value).to(dtype),
        "g": None if gate == "none" else g,
        "beta": torch.rand(batch, tokens, VALUE_HEADS),
        "state": torch.randn(batch, VALUE_HEADS, key, value),
        "scale": key**-0.5,
        "l2norm_eps": 1e-6,
    }


def widened(arguments):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def error(got, want):
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def chunked(gate):
    channel = gate == "channel"
    return (
        delta_chunk_channel.delta_rule_chunk_channel if channel else delta_chunk.delta_rule_chunk
    )


def dispatched(**arguments):
    """The op as at head dims that go by chunks, which the narrow ones of these tests do not."""
    if arguments["q"].shape[1] <= 8:
        return delta_rule(**arguments)
    return delta_rule_padded(**{"cu_seqlens": None} | arguments)


def low_precision(arguments):
    """The rule by chunks in plain torch, every product's operands in the inputs' dtype."""
    dtype = arguments["q"].dtype
    matmul = torch.Tensor.__matmul__

    def rounded(x, y):
        return matmul(x.to(dtype).float(), y.to(dtype).float())

    torch.Tensor.__matmul__ = rounded
    try:
        return reference.delta_rule_chunk(**arguments)
    finally:
        torch.Tensor.__matmul__ = matmul


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_dispatch_is_as_exact_as_the_recurrence(tokens, gate):
    arguments = inputs(tokens, gate, batch=2)
    want = reference.delta_rule_recurrent(**widened(arguments))
    plain = reference.delta_rule_chunk(**arguments)
    for function in (delta_rule, dispatched):
        for got, exact, other in zip(function(**arguments), want, plain, strict=True):
            assert error(got, exact) <= 2 * error(other, exact) + 1e-6


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("eps", (1e-6, None))
def test_chunks_in_low_precision(dtype, gate, eps):
    arguments = inputs(130, gate, dtype=getattr(torch, dtype), key=64, value=32)
    arguments["l2norm_eps"] = eps
    if eps is None:
        for name in ("q", "k"):
            arguments[name] = F.normalize(arguments[name], dim=-1)
    want = reference.delta_rule_recurrent(**widened(arguments))
    for got, exact, other in zip(
        chunked(gate)(**arguments), want, low_precision(arguments), strict=True
    ):
        assert error(got, exact) <= 2 * error(other, exact)


def assert_as_exact(got, want, other):
    """Outputs and states at most twice as far off as another's in low precision.

    A state may be a single product in the end, whose roundings can cancel by chance in the other:
    four of them are allowed, of the key, of what is written, and of two factors before.
    """
    for name, ours, exact, theirs in zip(("out", "state"), got, want, other, strict=True):
        least = 4 * 2**-9 if name == "state" else 0.0
        assert error(ours, exact) <= max(2 * error(theirs, exact), least), name


@pytest.mark.parametrize(
    ("decay", "size"),
    [(decay, 1.0) for decay in (0.0, 0.05, 1.0, 2.0, 2.4, 6.0, 30.0)] + [(1.8, 1e-3), (1.8, 1e3)],
)
def test_decays_per_channel_on_both_sides_of_the_one_product(decay, size):
    """A chunk of 64 tokens takes one product in bf16 down to about 2.1 a token on average."""
    arguments = inputs(192, "channel", dtype=torch.bfloat16, key=32, value=16)
    arguments["q"] *= size
    arguments["k"] *= size
    arguments["g"] = -decay * (1 + 0.2 * torch.randn_like(arguments["g"])).abs()
    arguments["g"][:, 64:128] *= 0.1
    want = reference.delta_rule_recurrent(**widened(arguments))
    assert_as_exact(chunked("channel")(**arguments), want, low_precision(arguments))


@pytest.mark.parametrize("size", (1.0, 1e3))
@pytest.mark.parametrize(
    "decays",
    (
        (2.07,), (4.15,), (8.3, 0.0, 0.0, 8.3), (0.0, 8.3, 8.3, 0.0), (8.3, 0.0, 0.1, 0.1),
        (0.5, 0.5, 0.5, 0.5, 3.0, 3.0, 3.0, 3.0, 9.0, 9.0, 0.0),
    ),
)  # fmt: skip
def test_decays_per_channel_by_quarters_of_a_chunk(decays, size):
    """2.08 a token of a chunk of 64, 4.16 of half or 8.32 of a quarter of it decay to 2**-192."""
    arguments = inputs(200, "channel", dtype=torch.bfloat16, key=32, value=16)
    arguments["q"] *= size
    arguments["k"] *= size
    quarter = torch.arange(200) // 16 % len(decays)
    arguments["g"] = -torch.tensor(decays)[quarter, None, None] * torch.ones(1, 200, 2, 32)
    arguments["g"][:, :, 1, ::2] *= 0.1
    arguments["g"][:, 140::20, 1, 3] = -float("inf")
    want = reference.delta_rule_recurrent(**widened(arguments))
    assert_as_exact(chunked("channel")(**arguments), want, low_precision(arguments))


@pytest.mark.parametrize(("key", "value"), ((16, 16), (24, 96), (128, 24), (256, 16), (16, 256)))
@pytest.mark.parametrize("gate", GATES)
def test_head_dims(key, value, gate):
    arguments = inputs(66, gate, key=key, value=value)
    want = reference.delta_rule_recurrent(**widened(arguments))
    for function in (chunked(gate), delta_recurrent.delta_rule_recurrent):
        for got, exact in zip(function(**arguments), want, strict=True):
            assert error(got, exact) < 2e-6


@pytest.mark.parametrize("gate", GATES)
def test_chunks_equal_steps_and_parts_equal_the_whole(gate):
    arguments = inputs(100, gate)
    out, final = chunked(gate)(**arguments)
    steps, last = delta_recurrent.delta_rule_recurrent(**arguments)
    torch.testing.assert_close(out, steps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)
    cut = int(torch.randint(1, 100, ()))
    parts = []
    for part in (slice(0, cut), slice(cut, 100)):
        piece = arguments | {
            name: None if arguments[name] is None else arguments[name][:, part]
            for name in ("q", "k", "v", "g", "beta")
        }
        one, arguments["state"] = dispatched(**piece)
        parts.append(one)
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arguments["state"], final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_unaligned_rows_are_copied(gate):
    arguments = inputs(20, gate, key=64, value=64)
    shifted = dict(arguments)
    for name in ("q", "k", "v"):
        flat = torch.zeros(arguments[name].numel() + 1)
        flat[1:] = arguments[name].flatten()
        shifted[name] = flat[1:].view(arguments[name].shape)
    for got, want in zip(dispatched(**shifted), dispatched(**arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", (3, 70))
def test_batch_of_one_equals_a_row(tokens):
    arguments = inputs(tokens, batch=3)
    out, final = dispatched(**arguments)
    row = {name: x[1:2] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    one, last = dispatched(**row)
    assert torch.equal(one[0], out[1])
    assert torch.equal(last[0], final[1])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("path", ("chunk", "steps"))
def test_packed_sequences(gate, path):
    ends = [0, 5, 5, 70, 134, 150, 150]
    arguments = inputs(ends[-1], gate)
    arguments["state"] = torch.randn(len(ends) - 1, VALUE_HEADS, KEY, VALUE)
    function = chunked(gate) if path == "chunk" else delta_recurrent.delta_rule_recurrent
    out, final = function(**arguments, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    wide = widened(arguments)
    for n, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            assert torch.equal(final[n], arguments["state"][n])
            continue
        piece = wide | {
            name: None if wide[name] is None else wide[name][:, start:end]
            for name in ("q", "k", "v", "g", "beta")
        }
        piece["state"] = wide["state"][n : n + 1]
        want, last = reference.delta_rule_recurrent(**piece)
        assert error(out[:, start:end], want) < 2e-6
        assert error(final[n : n + 1], last) < 2e-6


def test_packed_sequences_of_mild_and_strong_decays():
    ends = [0, 5, 75, 215]
    arguments = inputs(ends[-1], "channel", dtype=torch.bfloat16, key=32, value=16)
    arguments["state"] = torch.randn(len(ends) - 1, VALUE_HEADS, 32, 16)
    arguments["g"] *= torch.tensor([0.5, 3.0, 6.0])[torch.arange(ends[-1]) // 32 % 3, None, None]
    function = chunked("channel")
    out, final = function(**arguments, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    outs, finals = [], []
    for n, (start, end) in enumerate(pairwise(ends)):
        piece = arguments | {
            name: arguments[name][:, start:end] for name in ("q", "k", "v", "g", "beta")
        }
        piece["state"] = arguments["state"][n : n + 1]
        want = reference.delta_rule_recurrent(**widened(piece))
        found = (out[:, start:end], final[n : n + 1])
        for kept, *three in zip((outs, finals), found, want, low_precision(piece), strict=True):
            kept.append(three)
    # Of all pieces together: the roundings of a few tokens may all but cancel in one of the two.
    for pieces in (outs, finals):
        got, exact, other = (
            torch.cat([x.double().flatten() for x in each]) for each in zip(*pieces, strict=True)
        )
        assert error(got, exact) <= 2 * error(other, exact)
        for piece in pieces:
            assert error(piece[0], piece[1]) <= 4 * error(piece[2], piece[1])


@pytest.mark.parametrize("tokens", (5, 80))
@pytest.mark.parametrize("gate", ("head", "channel"))
@pytest.mark.parametrize("decay", (0.0, 300.0, float("inf")))
@pytest.mark.parametrize("strength", (0.0, 1.0, 2.0))
def test_extremes_are_finite_and_right(tokens, gate, decay, strength):
    arguments = inputs(tokens, gate)
    g = arguments["g"]
    arguments["g"] = torch.where(torch.rand_like(g) < 0.5, torch.full_like(g, -decay), g)
    arguments["k"][:, ::3] = 0
    arguments["beta"] = torch.full_like(arguments["beta"], strength)
    want_out, want_final = reference.delta_rule_recurrent(**widened(arguments))
    out, final = dispatched(**arguments)
    assert error(out, want_out) < 1e-3
    assert error(final, want_final) < 1e-3


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", (3, 70))
def test_padded_and_transposed_strides(gate, tokens):
    arguments = inputs(tokens, gate, batch=2)
    strided = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            strided[name] = F.pad(x, (0, 4), value=float("nan"))[..., :-4]
    strided["v"] = arguments["v"].transpose(1, 2).contiguous().transpose(1, 2)
    for got, want in zip(dispatched(**strided), dispatched(**arguments), strict=True):
        assert torch.equal(got, want)


def test_state_absent_or_bf16():
    arguments = inputs(70)
    out, _ = dispatched(**arguments | {"state": None})
    zeros, _ = dispatched(**arguments | {"state": torch.zeros_like(arguments["state"])})
    assert torch.equal(out, zeros)
    short = arguments["state"].bfloat16()
    before = short.clone()
    _, final = dispatched(**arguments | {"state": short})
    assert final.dtype == torch.bfloat16
    assert torch.equal(short, before)


def decode_inputs(batch=2, rows=None, per_channel=False, length=4, width=4, key=32, value=32):
    rows = rows or batch
    channels = 2 * HEADS * key + VALUE_HEADS * value
    gates = (VALUE_HEADS, key) if per_channel else (VALUE_HEADS,)
    return {
        "qkv": torch.randn(batch, channels),
        "conv_state": torch.randn(rows, channels, length),
        "conv_weight": torch.randn(channels, width),
        "conv_bias": torch.randn(channels),
        "a": -torch.rand(batch, *gates),
        "b": torch.rand(batch, VALUE_HEADS),
        "A_log": torch.rand(VALUE_HEADS),
        "dt_bias": torch.randn(gates),
        "recurrent_state": torch.randn(rows, VALUE_HEADS, key, value),
        "z": torch.randn(batch, VALUE_HEADS, value),
        "norm_weight": torch.randn(value),
        "slots": None,
        "scale": key**-0.5,
    }


OPTIONS = {
    "l2norm_eps": 1e-6,
    "norm_eps": 1e-6,
    "norm_activation": "silu",
    "gate": "softplus",
    "gate_lower_bound": -5.0,
    "beta_scale": 2.0,
}


def check_decode(given, tile=None, **changed):
    options = OPTIONS | changed

    def copied(values):
        return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in values.items()}

    wide, plain = copied(widened(given)), copied(given)
    unnormed = copied(widened(given)) | {"z": None, "norm_weight": None}
    squares = reference.delta_decode(**unnormed, **options).square().sum(-1)
    want = reference.delta_decode(**wide, **options)
    eager = reference.delta_decode(**plain, **options)
    out = delta_decode.delta_decode(**given, **options, tile=tile)
    # the norm of a head whose values nearly cancel amplifies every rounding before it
    squares = squares[squares > 0]
    normed = given["norm_weight"] is not None and len(squares) > 0
    amplified = float((squares.mean() / squares).mean().sqrt()) if normed else 1.0
    assert error(out, want) <= max(2e-6 * amplified, 2 * error(eager, want))
    assert torch.equal(given["conv_state"].double(), wide["conv_state"])
    assert error(given["recurrent_state"], wide["recurrent_state"]) < 2e-6


@pytest.mark.parametrize("columns", (16, 32, 64))
@pytest.mark.parametrize("gate", ("softplus", "sigmoid", "given"))
@pytest.mark.parametrize("per_channel", (False, True))
def test_decode_by_blocks_heads_and_groups(columns, gate, per_channel):
    scale = 1.0 if gate == "given" else 2.0
    given = decode_inputs(per_channel=per_channel)
    check_decode(given, Tile(32, columns, 4), gate=gate, beta_scale=scale)


@pytest.mark.parametrize(("length", "width"), ((3, 4), (4, 4), (6, 3), (2, 2)))
def test_decode_convolution_widths(length, width):
    check_decode(decode_inputs(length=length, width=width))
    given = decode_inputs(length=length, width=width) | {"conv_bias": None}
    check_decode(given, Tile(32, 64, 4))


@pytest.mark.parametrize("columns", (16, 64))
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_decode_shifts_packed_states(columns, dtype):
    given = decode_inputs()
    before = given["conv_state"].to(getattr(torch, dtype))
    for name in ("qkv", "conv_state", "conv_weight", "conv_bias", "z"):
        given[name] = given[name].to(getattr(torch, dtype))
    delta_decode.delta_decode(**given, **OPTIONS, tile=Tile(32, columns, 4))
    assert torch.equal(given["conv_state"][..., :-1], before[..., 1:])
    assert torch.equal(given["conv_state"][..., -1], given["qkv"])


@pytest.mark.parametrize("columns", (16, 64))
@pytest.mark.parametrize("norm", ("sigmoid", "plain", "none"))
def test_decode_norms(norm, columns):
    given = decode_inputs()
    if norm != "sigmoid":
        given["z"] = None
    if norm == "none":
        given["norm_weight"] = None
    check_decode(given, Tile(32, columns, 4), norm_activation="sigmoid")


@pytest.mark.parametrize(("key", "value"), ((40, 24), (128, 128), (24, 256)))
def test_decode_head_dims(key, value):
    check_decode(decode_inputs(key=key, value=value))


@pytest.mark.parametrize("columns", (16, 32, 64))
def test_decode_slots(columns):
    given = decode_inputs(batch=3, rows=5) | {"slots": torch.tensor([4, -1, 0])}
    untouched = given["recurrent_state"][1:4].clone()
    check_decode(given, Tile(32, columns, 4))
    assert torch.equal(given["recurrent_state"][1:4], untouched)


def test_decode_padded_strides_over_32_steps():
    given = decode_inputs()
    for name in ("recurrent_state", "conv_state", "z", "qkv", "conv_weight"):
        given[name] = F.pad(given[name], (0, 4))[..., :-4]
    for _ in range(32):
        for name in ("qkv", "z"):
            given[name].normal_()
        check_decode(given)
