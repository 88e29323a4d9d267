"""Models with a shared expert: folded into the routed experts for one token, not for a prompt."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
import zoo

import inductor_moe
from inductor_moe.testing import capture, relative_error

FAMILIES = {f.name: f for f in zoo.MOE if f.name in (
    "qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3", "glm4_moe"
)}  # fmt: skip
QUICK = [("qwen3_5_moe_text", "int4"), ("qwen2_moe", "bf16"), ("deepseek_v3", "bf16"),
         ("glm4_moe", "int4")]  # fmt: skip
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in ((name, kind) for name in FAMILIES for kind in ("bf16", "int4"))
]


@functools.cache
def built(name):
    return FAMILIES[name].build()


def rewrites(report):
    return [site.rewrite for site in report.matched if site.op == "moe_experts"]


@pytest.mark.parametrize("name, kind", CASES)
def test_shared_experts(name, kind):
    model, _ = zoo.prepare(built(name), torch.bfloat16, "batched_mm")
    plain = copy.deepcopy(model)
    if kind == "int4":
        done = inductor_moe.quantize_(model, "int4", group_size=16, verbose=False)
        with torch.no_grad():
            for weight in done.quantized:
                path, _, leaf = weight.rpartition(".")
                plain.get_parameter(weight).copy_(getattr(model.get_submodule(path), leaf))
    exact = copy.deepcopy(plain).double()
    prompt, token = zoo.prompt(model, 16, seed=3), zoo.prompt(model, 1, seed=4)
    logits, graphs = {}, []
    for which, module in (("exact", exact), ("eager", plain), ("fused", model)):
        cache = zoo.static_cache(module)
        with torch.no_grad():
            module(prompt, past_key_values=cache)
            step = functools.partial(module, past_key_values=cache)
            if which == "fused":
                result, report = capture(step, token, graphs=graphs)
            else:
                result = step(token)
        logits[which] = result.logits
    layers = FAMILIES[name].moe_layers
    assert rewrites(report) == ["moe.shared_expert"] * layers, str(report)
    assert report.refused == ()
    own = re.compile(r"self\.shared_experts?\(")
    left = [n for n in graphs[0].graph.nodes if own.search(n.meta.get("stack_trace") or "")]
    assert not any("mm" in str(n.target) or "linear" in str(n.target) for n in left), left
    error, budget = (relative_error(logits[w], logits["exact"]) for w in ("fused", "eager"))
    assert error <= 2 * budget


def test_a_prompt_keeps_its_shared_experts_apart():
    model, exact = zoo.prepare(built("deepseek_v3"), torch.bfloat16, "grouped_mm")
    ids = zoo.prompt(model, 16, seed=5)
    with torch.no_grad():
        reference, eager = (m(ids, use_cache=False).logits for m in (exact, model))
        fused, report = capture(model, ids, use_cache=False)
    assert rewrites(report) == ["moe.experts.grouped_mm"] * 2
    assert relative_error(fused.logits, reference) <= 2 * relative_error(eager, reference)
