"""The serial kernel that holds states of the delta rule in registers, and when it is taken."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernels.test_delta_kernels import (
    GATES,
    VALUE_HEADS,
    assert_as_exact,
    chunked,
    fresh_inputs,  # noqa: F401
    inputs,
    interpreted_kernels,  # noqa: F401
    low_precision,
    poisoned_buffers,  # noqa: F401
    widened,
)

from inductor_moe.kernels import delta_chunk, delta_launch
from inductor_moe.kernels.delta_launch import Tile
from inductor_moe.reference import delta_rule as reference


def held(key, values, gate):
    """The tile of the serial kernel that holds the state in registers."""
    return Tile(max(16, key), values, values // 16, 2 if gate == "channel" else 3)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("tokens", "key", "values", "state"),
    ((130, 64, 64, True), (64, 128, 128, False), (1, 64, 64, True)),
)
def test_a_held_state(tokens, key, values, state, gate, dtype):
    arguments = inputs(tokens, gate, batch=2, dtype=getattr(torch, dtype), key=key, value=128)
    if not state:
        arguments["state"] = None
    want = reference.delta_rule_recurrent(**widened(arguments))
    got = chunked(gate)(**arguments, scan=held(key, values, gate))
    assert_as_exact(got, want, low_precision(arguments))


@pytest.mark.parametrize("gate", ("head", "channel"))
def test_held_states_of_several_sequences(gate):
    arguments = inputs(150, gate, dtype=torch.bfloat16, key=64, value=64)
    bounds = torch.tensor([0, 70, 70, 71, 150])
    arguments["state"] = torch.randn(4, VALUE_HEADS, 64, 64)
    tile = held(64, 64, gate)
    out, final = chunked(gate)(**arguments, cu_seqlens=bounds, scan=tile)
    for n, (start, end) in enumerate(pairwise(bounds.tolist())):
        piece = {
            name: x[:, start:end] if name in ("q", "k", "v", "g", "beta") else x
            for name, x in arguments.items()
        }
        piece["state"] = arguments["state"][n : n + 1]
        if start == end:
            assert torch.equal(final[n], arguments["state"][n])
            continue
        whole, last = chunked(gate)(**piece, scan=tile)
        assert torch.equal(out[:, start:end], whole)
        assert torch.equal(final[n : n + 1], last)


@pytest.mark.parametrize(
    ("capability", "dtype", "key", "value", "states", "block"),
    (
        (90, torch.bfloat16, 128, 128, 32, 32),
        (90, torch.bfloat16, 128, 128, 64, 64),
        (90, torch.float16, 128, 128, 256, 128),
        (90, torch.bfloat16, 64, 64, 256, 64),
        (90, torch.bfloat16, 128, 96, 256, 32),
        (90, torch.bfloat16, 256, 128, 256, 32),
        (90, torch.float32, 128, 128, 256, 16),
        (80, torch.bfloat16, 128, 128, 256, 32),
        (100, torch.bfloat16, 128, 128, 256, 32),
    ),
)
def test_the_value_channels_of_a_program(
    monkeypatch, capability, dtype, key, value, states, block
):
    known = delta_launch.Limits(capability, 227 * 1024, 132)
    monkeypatch.setattr(delta_chunk, "limits", lambda _: known)
    tile = delta_chunk.scan_tile(key, value, dtype, torch.device("cuda"), states)
    assert tile.value == block


def test_the_value_channels_of_a_program_for_any_number_of_states(monkeypatch):
    known = delta_launch.Limits(90, 227 * 1024, 132)
    monkeypatch.setattr(delta_chunk, "limits", lambda _: known)
    states = object()  # as a symbol, it is no int
    tile = delta_chunk.scan_tile(128, 128, torch.bfloat16, torch.device("cuda"), states)
    assert tile.value == delta_chunk.HELD
