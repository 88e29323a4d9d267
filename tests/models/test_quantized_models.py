"""Quantised transformers models: every expert block and linear layer runs on packed weights."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import zoo

import inductor_moe
from inductor_moe.backend import collected
from inductor_moe.testing import capture, fused_layers, relative_error

FAMILIES = {f.name: f for f in zoo.MOE
            if f.name in ("qwen3_5_moe_text", "qwen3_moe", "mixtral", "gpt_oss")}  # fmt: skip
SCHEMES = {
    "int4 rtn": ("int4", {"group_size": 32}),
    "int4 hqq": ("int4", {"group_size": 16, "method": "hqq"}),
    "int8": ("int8", {}),
}
CASES = [
    ("qwen3_5_moe_text", "int4 rtn", "grouped_mm"),
    ("qwen3_moe", "int4 hqq", "grouped_mm"),
    ("mixtral", "int4 rtn", "batched_mm"),
    ("gpt_oss", "int4 rtn", "grouped_mm"),
    pytest.param("gpt_oss", "int8", "batched_mm", marks=pytest.mark.slow),
    pytest.param("qwen3_5_moe_text", "int4 hqq", "batched_mm", marks=pytest.mark.slow),
    pytest.param("mixtral", "int8", "grouped_mm", marks=pytest.mark.slow),
]


@functools.cache
def built(name):
    return FAMILIES[name].build()


def quantised(name, scheme, experts, dtype=torch.bfloat16):
    """The packed model, what was packed, and a plain model with the same weights unpacked."""
    model, _ = zoo.prepare(built(name), dtype, experts)
    plain = copy.deepcopy(model)
    dtype, options = SCHEMES[scheme]
    result = inductor_moe.quantize_(model, dtype, verbose=False, **options)
    with torch.no_grad():
        for name in result.quantized:
            path, _, leaf = name.rpartition(".")
            plain.get_parameter(name).copy_(getattr(model.get_submodule(path), leaf))
    return model, result, plain


def expected(name, result):
    experts = [weight for weight in result.quantized if ".experts." in weight]
    assert len(experts) == 2 * FAMILIES[name].moe_layers
    linears = len(result.quantized) - len(experts)
    return {**FAMILIES[name].expected(), "quantized_linear": linears}


def assert_same_tokens(fused, eager, reference):
    """The next tokens agree wherever rounding alone cannot decide between two of them."""
    first, second = reference.topk(2, dim=-1).values.unbind(-1)
    clear = first - second > 2 * (eager - reference).abs().amax(-1)
    assert clear.float().mean() > 0.6
    assert torch.equal(fused.argmax(-1)[clear], eager.argmax(-1)[clear])


@pytest.mark.parametrize("name, scheme, experts", CASES)
def test_experts_and_linears_are_matched(name, scheme, experts):
    model, result, plain = quantised(name, scheme, experts)
    exact = copy.deepcopy(plain).double()
    exact.set_experts_implementation("batched_mm")
    graphs = []
    ids = zoo.prompt(model, 16, seed=5)
    with torch.no_grad():
        reference, eager = (m(ids, use_cache=False).logits for m in (exact, plain))
        fused, report = capture(model, ids, use_cache=False, graphs=graphs)
    assert report.refused == (), str(report)
    assert fused_layers(report) == expected(name, result)
    assert {
        "int4" in site.detail or "int8" in site.detail
        for site in report.matched
        if site.op in ("moe_experts", "quantized_linear")
    } == {True}
    left = [n for n in graphs[0].graph.nodes if "inductor_moe.dequantize" in str(n.target)]
    assert left == []
    error, budget = relative_error(fused.logits, reference), relative_error(eager, reference)
    assert error <= 2 * budget
    assert_same_tokens(fused.logits, eager, reference)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",
        *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n != "gpt_oss"),
    ],
)
def test_decoding_gives_the_tokens_of_the_same_weights_unpacked(name):
    model, _, plain = quantised(name, "int4 rtn", "batched_mm", torch.float32)
    tokens = {}
    for kind, module in (("plain", plain), ("packed", model)):
        cache = zoo.static_cache(module)
        with torch.no_grad():
            module(zoo.prompt(module, 16, seed=3), past_key_values=cache)
            token, tokens[kind] = zoo.prompt(module, 1, seed=4), []
            step = functools.partial(module, past_key_values=cache)
            if kind == "packed":
                graphs = []
                (first, report) = capture(step, token, graphs=graphs)
                fused, layers = fused_layers(report), FAMILIES[name].expected()
                assert {op: fused[op] for op in layers} == layers
                # Linear layers may be merged, or be part of a layer.
                targets = [str(node.target) for node in graphs[0].graph.nodes]
                assert not any("inductor_moe.dequantize" in target for target in targets)
                tokens[kind].append(first.logits.argmax(-1).item())
            else:
                tokens[kind].append(step(token).logits.argmax(-1).item())
    assert tokens["packed"] == tokens["plain"]


def test_a_batch_reads_the_projections_of_one_input_at_once():
    model, _, plain = quantised("qwen3_5_moe_text", "int4 rtn", "batched_mm")
    exact = copy.deepcopy(plain).double()
    logits = {}
    for kind, module in (("exact", exact), ("plain", plain), ("packed", model)):
        prompts, tokens = (
            torch.cat([zoo.prompt(module, length, seed=seed) for seed in range(4)])
            for length in (9, 1)
        )
        step = functools.partial(module, past_key_values=zoo.static_cache(module))
        with torch.no_grad():
            step(prompts)
            if kind == "packed":
                found, report = capture(step, tokens)
            else:
                found = step(tokens)
        logits[kind] = found.logits
    assert [site.detail for site in report.matched if site.rewrite == "linear.merged"] == [
        "4 rows of 32 -> 128 + 64 + 4 + 4; int4 g32, torch.bfloat16",
        "4 rows of 32 -> 64 + 16 + 16; int4 g32",
    ]
    error, budget = (relative_error(logits[k], logits["exact"]) for k in ("packed", "plain"))
    assert error <= 2 * budget


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_code_on_cpu(dynamic):
    model, _, plain = quantised("qwen3_moe", "int4 rtn", "grouped_mm")
    exact = copy.deepcopy(plain).double()
    exact.set_experts_implementation("batched_mm")
    layer, exact_layer, plain_layer = (m.model.layers[0].mlp for m in (model, exact, plain))
    compiled = torch.compile(layer, backend="inductor_moe", fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), collected() as reports:
        for tokens in (3, 40):
            x = torch.randn(1, tokens, 32).bfloat16()
            reference = exact_layer(x.double())
            error = relative_error(compiled(x), reference)
            assert error <= 2 * relative_error(plain_layer(x), reference)
    assert all(report.counts()["moe_experts"] == 1 for report in reports)
