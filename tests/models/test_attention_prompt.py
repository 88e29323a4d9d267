"""Attention of prompts under a mask: in unmodified models, and through Inductor."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
import zoo
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.backend import collected
from inductor_moe.reference.attention import attention_prompt_reference
from inductor_moe.testing import graph_backend, relative_error

FIRST, SECOND, ROOM = 20, 17, 80
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
# The attention layers of each family.
LAYERS = {"qwen3_moe": 2, "qwen3_5_moe_text": 1}
FAMILIES = {
    family.name: dataclasses.replace(family, overrides={**family.overrides, **GROUPED})
    for family in zoo.MOE
    if family.name in LAYERS
}


@functools.cache
def prepared(name, dtype=torch.bfloat16):
    return zoo.prepare(FAMILIES[name].build(), dtype, "grouped_mm")


def two_prompts(model, run, **kwargs):
    """The logits of a prompt that fills a static cache, and of one that goes on in it."""
    cache = zoo.static_cache(model, ROOM)
    logits = []
    with torch.no_grad():
        for length, seed in ((FIRST, 3), (SECOND, 4)):
            tokens = zoo.prompt(model, length, seed)
            logits.append(run(tokens, past_key_values=cache, **kwargs).logits.clone())
    return logits


@pytest.mark.parametrize(
    "name", ["qwen3_moe", pytest.param("qwen3_5_moe_text", marks=pytest.mark.slow)]
)
def test_models(name):
    model, exact = prepared(name)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
    with collected() as reports:
        fused = two_prompts(model, compiled)
    # The second prompt, of another length, is compiled for any.
    for report, number in zip(reports, (FIRST, r"s\d+"), strict=True):
        sites = [site for site in report.matched if site.op == "attention_prompt"]
        assert len(sites) == LAYERS[name]
        for site in sites:
            assert site.rewrite == "attention.prompt" and site.module.endswith("self_attn")
            sizes = rf"B=1 Hq=6 Hkv=2 D=16 T={number} L={ROOM}; mask"
            assert re.fullmatch(sizes, site.detail), site.detail
            assert "expand" in site.before
    eager, reference = two_prompts(model, model), two_prompts(exact, exact)
    for got, plain, want in zip(fused, eager, reference, strict=True):
        assert relative_error(got, want) <= 2 * relative_error(plain, want)


def test_a_padded_batch_without_a_cache():
    model, exact = prepared("qwen3_moe")
    tokens = torch.cat([zoo.prompt(model, 40, seed) for seed in (1, 2, 3)])
    attention_mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 39)):
        attention_mask[row, :padding] = 0
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
    with torch.no_grad(), collected() as reports:
        got, plain, want = (
            run(tokens, attention_mask=attention_mask, use_cache=False).logits
            for run in (compiled, model, exact)
        )
    assert [report.counts()["attention_prompt"] for report in reports] == [2]
    kept = attention_mask.bool()
    assert relative_error(got[kept], want[kept]) <= 2 * relative_error(plain[kept], want[kept])


def test_in_fp32_nothing_changes():
    model, _ = prepared("qwen3_moe", torch.float32)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
    with collected() as reports:
        two_prompts(model, compiled)
    assert not any("attention_prompt" in report.counts() for report in reports)
    assert not any(report.refused for report in reports)


def attend(q, k, v, keep):
    k, v = (
        x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, x.shape[2], 16)
        for x in (k, v)
    )
    out = scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic):
    compiled = torch.compile(attend, backend="inductor_moe", fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), collected() as reports:
        for batch, queries, length in ((3, 19, 33), (5, 40, 50)) if dynamic else ((3, 19, 33),):
            q = torch.randn(batch, 6, queries, 16).bfloat16()
            k, v = torch.randn(2, batch, 2, length, 16).bfloat16()
            keep = torch.rand(batch, 1, queries, length) < 0.5
            keep[..., 0] = True
            found = compiled(q, k, v, keep).view(batch, queries, 6, 16).transpose(1, 2)
            exact = attention_prompt_reference(q.double(), k.double(), v.double(), keep, 0.3)
            assert relative_error(found, exact) < 5e-3
    assert [report.counts() for report in reports] == [{"attention_prompt": 1}]
