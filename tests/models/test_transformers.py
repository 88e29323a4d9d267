"""Unmodified transformers models: every MoE layer is rewritten and the numbers hold."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo

from inductor_moe.backend import collected
from inductor_moe.testing import capture, fused_layers, graph_backend, relative_error

PROMPT, LONGER = 16, 70
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERTS = {"grouped": "grouped_mm", "batched": "batched_mm"}
SHAPES = {"static": None, "dynamic": True}
# A few families in a form or two; -m slow runs every family in every form.
QUICK = {
    "bf16-grouped-static": ("qwen3_moe", "llama4_text"),
    "fp32-batched-dynamic": ("qwen3_5_moe_text", "gpt_oss"),
}


def quick(family, form):
    return family.name in QUICK.get(form, ())


CASES = [
    pytest.param(
        family,
        DTYPES[dtype],
        EXPERTS[experts],
        SHAPES[shapes],
        id=f"{family.name}-{dtype}-{experts}-{shapes}",
        marks=[] if quick(family, f"{dtype}-{experts}-{shapes}") else pytest.mark.slow,
    )
    for family in zoo.MOE
    for dtype in DTYPES
    for experts in EXPERTS
    for shapes in SHAPES
    if family.switchable or experts == "grouped"
]


@functools.cache
def built(family):
    return family.build()


def assert_as_exact_as_eager(fused, eager, reference, slack=2.0):
    """The fused error against fp64 is at most `slack` times eager's in the same dtype."""
    fused_error = relative_error(fused, reference)
    eager_error = relative_error(eager, reference)
    assert fused_error <= slack * eager_error, f"fused {fused_error:.2e}, eager {eager_error:.2e}"


def assert_every_layer_matched(report, family):
    assert report.graphs == 1
    assert report.refused == (), str(report)
    assert fused_layers(report) == family.expected(), str(report)
    for site in report.matched:
        assert site.module.startswith("model.layers."), site.module


@pytest.mark.parametrize("family, dtype, experts, dynamic", CASES)
def test_prefill(family, dtype, experts, dynamic):
    model, exact = zoo.prepare(built(family), dtype, experts, family.switchable)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), collected() as reports:
        for length in (PROMPT, LONGER):
            ids = zoo.prompt(model, length, seed=length)
            reference = exact(ids, use_cache=False).logits
            eager = model(ids, use_cache=False).logits
            fused = compiled(ids, use_cache=False).logits
            assert_as_exact_as_eager(fused, eager, reference)
    assert len(reports) == (1 if dynamic else 2)
    for report in reports:
        assert_every_layer_matched(report, family)


@pytest.mark.parametrize("family, dtype, experts, dynamic", CASES)
def test_decode_with_a_static_cache(family, dtype, experts, dynamic):
    model, exact = zoo.prepare(built(family), dtype, experts, family.switchable)
    ids, following = zoo.prompt(model, PROMPT, seed=3), zoo.prompt(model, 1, seed=4)
    logits = {}
    for name, module in (("reference", exact), ("eager", model), ("fused", model)):
        cache = zoo.static_cache(module)
        with torch.no_grad():
            module(ids, past_key_values=cache)
            if name == "fused":
                result, report = capture(module, following, dynamic=dynamic, past_key_values=cache)
            else:
                result = module(following, past_key_values=cache)
        logits[name] = result.logits
    assert_every_layer_matched(report, family)
    assert_as_exact_as_eager(logits["fused"], logits["eager"], logits["reference"])
