"""Attention of a decode step: in unmodified models, and through Inductor."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import zoo
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.backend import collected
from inductor_moe.reference.attention import attention_decode_reference
from inductor_moe.testing import capture, graph_backend, relative_error

PROMPT, STEPS, ROOM = 11, 8, 40
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
# The attention layers of each family.
LAYERS = {"qwen3_moe": 2, "qwen3_5_moe_text": 1}
FAMILIES = {
    family.name: dataclasses.replace(family, overrides={**family.overrides, **GROUPED})
    for family in zoo.MOE
    if family.name in LAYERS
}


@functools.cache
def prepared(name, dtype):
    return zoo.prepare(FAMILIES[name].build(), dtype, "grouped_mm")


def decoded(model, step, tokens):
    """The logits of STEPS tokens after a prompt, the tokens given or chosen greedily."""
    cache = zoo.static_cache(model, ROOM)
    logits = []
    with torch.no_grad():
        found = model(zoo.prompt(model, PROMPT, seed=3), past_key_values=cache).logits
        for turn in range(STEPS):
            token = found[:, -1:].argmax(-1) if tokens is None else tokens[turn]
            found = step(token, past_key_values=cache).logits
            logits.append(found.clone())
    return logits


CASES = {
    "qwen3_moe": (torch.bfloat16, []),
    "qwen3_5_moe_text": (torch.float32, []),
    "qwen3_moe in fp32": (torch.float32, pytest.mark.slow),
    "qwen3_5_moe_text in bf16": (torch.bfloat16, pytest.mark.slow),
}


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(case.split()[0], dtype, id=case, marks=mark)
        for case, (dtype, mark) in CASES.items()
    ],
)
def test_models(name, dtype):
    model, exact = prepared(name, dtype)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
    with collected() as reports:
        fused = decoded(model, compiled, None)
    eager = decoded(model, model, None)
    (report,) = reports
    assert report.counts()["attention_decode"] == LAYERS[name]
    assert report.counts()["norm_rope"] == LAYERS[name]
    for site in report.matched:
        if site.op == "attention_decode":
            assert site.module.endswith("self_attn")
            gate = "; gate" if name == "qwen3_5_moe_text" else ""
            assert site.detail == f"B=1 Hq=6 Hkv=2 D=16 L={ROOM}; mask{gate}"
            assert "expand" in site.before
    chosen = [logits.argmax(-1) for logits in eager]
    assert [logits.argmax(-1) for logits in fused] == chosen
    first = zoo.prompt(model, 1, seed=5)
    tokens = [first, *chosen[1:]]
    fused, eager, reference = (
        decoded(m, step, tokens) for m, step in ((model, compiled), (model, model), (exact, exact))
    )
    error, budget = (relative_error(torch.cat(x), torch.cat(reference)) for x in (fused, eager))
    assert error <= 2 * budget


def test_prefill_stays_as_it_is():
    model, _ = prepared("qwen3_moe", torch.float32)
    cache = zoo.static_cache(model, ROOM)
    _, report = capture(model, zoo.prompt(model, PROMPT, seed=1), past_key_values=cache)
    assert "attention_decode" not in report.counts() and not report.refused


def attend(q, k, v, keep, gate):
    k, v = (
        x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, x.shape[2], 16)
        for x in (k, v)
    )
    out = scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)
    out = out.transpose(1, 2).reshape(q.shape[0], 1, -1)
    return out * gate.reshape(q.shape[0], 1, -1).sigmoid()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic):
    compiled = torch.compile(attend, backend="inductor_moe", fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), collected() as reports:
        for batch, length in ((3, 33), (5, 50)) if dynamic else ((3, 33),):
            q = torch.randn(batch, 6, 1, 16)
            k, v = torch.randn(2, batch, 2, length, 16)
            keep = torch.rand(batch, 1, 1, length) < 0.5
            keep[..., 0] = True
            gate = torch.randn(batch, 1, 6, 40)[..., 16:32]
            found = compiled(q, k, v, keep, gate)
            exact = attention_decode_reference(
                q.squeeze(2).double(), k.double(), v.double(), keep, 0.3, gate.squeeze(1).double()
            )
            assert relative_error(found.view(batch, 6, 16), exact) < 1e-6
    assert [report.counts() for report in reports] == [{"attention_decode": 1}]
    assert all(site.detail.endswith("; gate") for site in reports[0].matched)
