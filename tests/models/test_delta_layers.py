"""Delta-rule layers of unmodified models: prefill at every length, decode with exact states."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import zoo

from inductor_moe.backend import collected
from inductor_moe.testing import fused_layers, graph_backend, relative_error


def each(*forms, quick):
    """Every family, in every form if there are several; those not in `quick` are slow."""
    cases = []
    for family in zoo.DELTA:
        for form in forms or (None,):
            case = (family.name, form) if forms else family.name
            cases.append(
                pytest.param(
                    family, *([DTYPES[form]] if forms else []),
                    id="-".join(filter(None, (family.name, form))),
                    marks=() if case in quick else pytest.mark.slow,
                )
            )  # fmt: skip
    return cases


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@functools.cache
def built(family):
    return family.build()


def close(found, eager, reference):
    """At most twice eager's error; the floor is the reference's own, whose rule runs in fp32."""
    error, budget = relative_error(found, reference), relative_error(eager, reference)
    assert error <= 2 * budget + 1e-6, f"fused {error:.2e}, eager {budget:.2e}"


@pytest.mark.parametrize("family", each(quick=("qwen3_5_moe_text",)))
def test_one_dynamic_graph_serves_every_length(family):
    model, exact = zoo.prepare(built(family), torch.float32, "batched_mm", family.switchable)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True, dynamic=True)
    with torch.no_grad(), collected() as reports:
        for length in (16, 70, 200, *range(2, 72)):
            ids = zoo.prompt(model, length, seed=length)
            found = compiled(ids, use_cache=False).logits
            if length in (2, 9, 16, 63, 64, 65, 70, 200):
                eager = model(ids, use_cache=False).logits
                close(found, eager, exact(ids, use_cache=False).logits)
    assert len(reports) <= 2
    for report in reports:
        assert not report.refused, str(report)
        assert fused_layers(report) == family.expected()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", each(quick=("qwen3_5_moe_text",)))
def test_prompts_over_a_cache_have_no_convolution(family, dynamic):
    """Neither the first one nor one that goes on from what the first left."""
    model, exact = zoo.prepare(built(family), torch.float32, "batched_mm", family.switchable)
    graphs = []
    compiled = torch.compile(model, backend=graph_backend(graphs=graphs), dynamic=dynamic)
    modules = {"fused": compiled, "eager": model, "exact": exact}
    caches = {name: zoo.static_cache(model if name != "exact" else exact) for name in modules}
    with torch.no_grad():
        for length in (20, 13):
            ids = zoo.prompt(model, length, seed=length)
            found = {n: m(ids, past_key_values=caches[n]).logits for n, m in modules.items()}
            close(found["fused"], found["eager"], found["exact"])
            for layer in zip(*(states(caches[n]) for n in modules), strict=True):
                for kept in zip(*layer, strict=True):
                    close(*kept)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 2 and targets.count("inductor_moe.delta_rule.default") >= 2
    assert not any("convolution" in target for target in targets)


def states(cache):
    """(convolution state, recurrent state) of every linear-attention layer."""
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [(layer.conv_states[0], layer.recurrent_states[0]) for layer in layers]


@pytest.mark.parametrize(
    "family, dtype",
    each(
        "bf16", "fp32",
        quick=(("qwen3_5_moe_text", "bf16"), ("kimi_linear", "bf16"), ("olmo_hybrid", "fp32")),
    ),
)  # fmt: skip
def test_decode_keeps_its_states(family, dtype):
    model, exact = zoo.prepare(built(family), dtype, "batched_mm", family.switchable)
    compiled = torch.compile(model, backend=graph_backend(), fullgraph=True)
    caches = {}
    with torch.no_grad(), collected() as reports:
        for name, module in (("exact", exact), ("eager", model), ("fused", model)):
            caches[name] = zoo.static_cache(module)
            module(zoo.prompt(model, 16, seed=1), past_key_values=caches[name])
        for step in range(32):
            token = zoo.prompt(model, 1, seed=100 + step)
            reference = exact(token, past_key_values=caches["exact"]).logits
            eager = model(token, past_key_values=caches["eager"]).logits
            found = compiled(token, past_key_values=caches["fused"]).logits
            close(found, eager, reference)
            per_layer = zip(*(states(caches[n]) for n in ("fused", "eager", "exact")), strict=True)
            for layer in per_layer:
                for found_state, eager_state, exact_state in zip(*layer, strict=True):
                    close(found_state, eager_state, exact_state)
    (report,) = reports
    assert not report.refused, str(report)
    assert fused_layers(report) == family.expected()


def test_the_decode_step_writes_its_states_in_place():
    family = next(family for family in zoo.DELTA if family.name == "qwen3_5_moe_text")
    model, _ = zoo.prepare(built(family), torch.bfloat16, "batched_mm")
    graphs = []
    compiled = torch.compile(model, backend=graph_backend(graphs=graphs), fullgraph=True)
    cache = zoo.static_cache(model)
    with torch.no_grad():
        model(zoo.prompt(model, 16, seed=1), past_key_values=cache)
        compiled(zoo.prompt(model, 1, seed=2), past_key_values=cache)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("inductor_moe.delta_decode.default") == 1
    assert not any("convolution" in target or "delta_rule" in target for target in targets)
    rule = next(n for n in graphs[0].graph.nodes if "delta_decode" in str(n.target))
    mutated = {rule.args[1], rule.args[8]}
    copied = {n.args[0] for n in graphs[0].graph.nodes if "copy_" in str(n.target)}
    assert all(node.op == "placeholder" for node in mutated)
    assert not mutated & copied


def test_other_backends_still_see_the_original_functions():
    family = next(family for family in zoo.DELTA if family.name == "qwen3_5_text")
    model = built(family)
    torch.compile(model, backend="inductor_moe")  # resolves the backend, which installs capture
    seen = []

    def other(gm, example_inputs):
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    with torch.no_grad():
        torch.compile(model, backend=other, fullgraph=True)(
            zoo.prompt(model, 16, seed=1), use_cache=False
        )
    assert seen
    assert not any("inductor_moe" in target for target in seen)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_ends_of_packed_sequences_are_read_where_transformers_reads_them(name, batch):
    """Its PyTorch code takes and drops them, as the convolution before it does."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    function = getattr(qwen, name)
    generator = torch.Generator().manual_seed(batch)
    q, k, v = torch.randn(3, batch, 16, 2, 16, generator=generator)
    g, beta = -torch.rand(batch, 16, 2), torch.rand(batch, 16, 2)
    ends = torch.tensor([0, 5, 16])
    compiled = torch.compile(
        lambda: function(q, k, v, g=g, beta=beta, cu_seqlens=ends)[0],
        backend=graph_backend({"inductor_moe.strict": True}),
        fullgraph=True,
    )
    with torch.no_grad():
        found = compiled()
    torch.testing.assert_close(found, function(q, k, v, g=g, beta=beta)[0], rtol=1e-4, atol=1e-5)


def test_ends_of_packed_sequences_are_read_where_fla_is_called():
    from inductor_moe.capture.delta_rule import _reads_ends

    def wrapper(implementation):
        return lambda *args, **kwargs: implementation(*args, **kwargs)

    assert _reads_ends(wrapper(lambda q, k, v, g, beta, cu_seqlens=None: None))
    assert not _reads_ends(wrapper(lambda query, key, value, g, beta, **kwargs: None))


def test_capture_can_be_taken_back():
    from inductor_moe.capture import delta_rule

    family = next(family for family in zoo.DELTA if family.name == "qwen3_5_text")
    model, ids = built(family), zoo.prompt(built(family), 16, seed=1)
    counts = []
    try:
        for change in (delta_rule.install, delta_rule.uninstall, delta_rule.install):
            change()
            torch._dynamo.reset()
            with torch.no_grad(), collected() as reports:
                torch.compile(model, backend=graph_backend())(ids, use_cache=False)
            counts.append(reports[0].counts().get("delta_rule", 0))
    finally:
        delta_rule.install()
    assert counts == [1, 0, 1]


def test_capture_for_export_ends_with_its_block():
    import inductor_moe

    family = next(family for family in zoo.DELTA if family.name == "qwen3_5_text")
    model, ids = built(family), zoo.prompt(built(family), 16, seed=1)
    names = vars(sys.modules[type(model).__module__])
    before = names["torch_chunk_gated_delta_rule"]

    def exported():
        with torch.no_grad():
            program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        return [str(node.target) for node in program.graph.nodes]

    with pytest.raises(RuntimeError, match="inside"), inductor_moe.capture_for_export():
        assert names["torch_chunk_gated_delta_rule"] is not before
        raise RuntimeError("inside")
    assert names["torch_chunk_gated_delta_rule"] is before
    with inductor_moe.capture_for_export():
        assert exported().count("inductor_moe.delta_rule.default") == 1
    assert not any("inductor_moe" in target for target in exported())
