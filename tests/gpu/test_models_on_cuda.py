"""Unmodified models on a GPU: our Triton kernels, static and dynamic, with CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import zoo

import inductor_moe
from inductor_moe.backend import collected
from inductor_moe.testing import fused_layers, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@functools.cache
def on_gpu(family, dtype, experts):
    if "num_key_value_heads" not in family.overrides:
        # PyTorch's memory-efficient attention is wrong for one expanded head (docs/limits.md).
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        family = dataclasses.replace(family, overrides={**heads, **family.overrides})
    model, exact = zoo.prepare(family.build(), dtype, experts, family.switchable)
    return model.cuda(), exact.cuda()


def kernels_of(compiled, *args, **kwargs):
    """The names of the kernels of one call."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
        compiled(*args, **kwargs)
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages()}


KINDS = {
    "grouped": (torch.bfloat16, "grouped_mm", None, "default"),
    "batched-dynamic": (torch.bfloat16, "batched_mm", True, "default"),
    "batched-cudagraph": (torch.bfloat16, "batched_mm", None, "reduce-overhead"),
    "fp32": (torch.float32, "batched_mm", None, "default"),
}
EVERY_KIND = ("qwen3_moe", "qwen3_5_moe_text", "gpt_oss", "deepseek_v3")
CASES = [
    pytest.param(family, *kind, id=f"{family.name}-{name}")
    for family in zoo.MOE
    for name, kind in KINDS.items()
    if name == "grouped" or family.name in EVERY_KIND
]


@pytest.mark.parametrize("family, dtype, experts, dynamic, mode", CASES)
def test_prefill_and_decode(family, dtype, experts, dynamic, mode):
    model, exact = on_gpu(family, dtype, experts)
    compiled = torch.compile(
        model, backend="inductor_moe", fullgraph=True, dynamic=dynamic, mode=mode
    )
    logits = {"fused": [], "eager": [], "reference": []}
    with torch.no_grad(), collected() as reports:
        for name, module in (("reference", exact), ("eager", model), ("fused", compiled)):
            for length in (16, 65, 70):
                ids = zoo.prompt(model, length, seed=length).cuda()
                logits[name].append(module(ids, use_cache=False).logits.clone())
            source = exact if name == "reference" else model
            cache = zoo.static_cache(source)
            source(zoo.prompt(model, 16, seed=1).cuda(), past_key_values=cache)
            for step in range(3):
                token = zoo.prompt(model, 1, seed=20 + step).cuda()
                logits[name].append(module(token, past_key_values=cache).logits.clone())
    assert reports
    for report in reports:
        assert report.refused == (), str(report)
        assert fused_layers(report) == family.expected()
    for fused, eager, reference in zip(*(logits[n] for n in ("fused", "eager", "reference")),
                                       strict=True):  # fmt: skip
        error, budget = relative_error(fused, reference), relative_error(eager, reference)
        assert error <= 2 * budget, f"fused {error:.2e}, eager {budget:.2e}"
    names = kernels_of(compiled, zoo.prompt(model, 16, seed=16).cuda(), use_cache=False)
    assert any("moe_" in name for name in names), names


def test_reduce_overhead_replays_a_cuda_graph():
    from torch._dynamo.utils import counters

    family = next(family for family in zoo.MOE if family.name == "qwen3_5_moe_text")
    model, _ = on_gpu(family, torch.bfloat16, "grouped_mm")
    counters.clear()
    compiled = torch.compile(model, backend="inductor_moe", mode="reduce-overhead")
    ids = zoo.prompt(model, 16, seed=5).cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for _ in range(4):
            found = compiled(ids, use_cache=False).logits.clone()
        with torch.profiler.profile() as profile:
            compiled(ids, use_cache=False)
            torch.cuda.synchronize()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert any("cudaGraphLaunch" in event.key for event in profile.key_averages())
    assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_generate_gives_eagers_greedy_tokens(name):
    from transformers import CompileConfig

    family = next(family for family in zoo.MOE if family.name == name)
    model, _ = on_gpu(family, torch.float32, "batched_mm")
    ids = zoo.prompt(model, 16, seed=9).cuda()
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    eager = model.generate(ids, **settings, cache_implementation="static", disable_compile=True)
    torch._dynamo.reset()
    with collected() as reports:
        fused = model.generate(
            ids,
            **settings,
            cache_implementation="static",
            compile_config=CompileConfig(backend="inductor_moe", fullgraph=True),
        )
    assert fused.tolist() == eager.tolist()
    assert len(reports) == 1, [str(report) for report in reports]
    assert fused_layers(reports[0]) == family.expected()


def test_explain_on_a_gpu():
    family = zoo.MOE[0]
    model, _ = on_gpu(family, torch.bfloat16, "grouped_mm")
    report = inductor_moe.explain(model, zoo.prompt(model, 16, seed=1).cuda(), use_cache=False)
    assert fused_layers(report) == family.expected()
