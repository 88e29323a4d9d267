"""Whole models: what is counted and timed, what gets no time, and both commands on a tiny one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from inductor_moe import kernels as our_kernels
from inductor_moe.bench import footprint, generate, models, profile, results, session
from inductor_moe.bench.ceilings import Ceilings
from inductor_moe.cli import app
from inductor_moe.errors import InductorMoeError
from inductor_moe.report import Site
from inductor_moe.testing import graph_backend, relative_error

SITE = Site("moe_experts", "moe.experts.grouped_mm")
TINY = generate.Setup("tiny", "int4", "cpu", (12, 70), (2, 3), (2,))


@pytest.fixture
def quick(monkeypatch):
    """Our rewrites without code generation, and eager in the place of stock Inductor."""
    monkeypatch.setitem(session.BACKENDS, "ours", graph_backend())
    monkeypatch.setitem(session.BACKENDS, "inductor", "eager")
    monkeypatch.setattr(generate.ceilings, "measure", lambda _: Ceilings(3e12, 3e12, 8e14))


@pytest.mark.slow
def test_both_providers_are_checked_and_timed(quick, tmp_path):
    written = []
    found = generate.run(TINY, lambda so_far: written.append(so_far.to_json()))
    (tmp_path / "rows.json").write_text(written[-1])
    assert results.Results.load(tmp_path / "rows.json") == found
    assert [(row.op, row.provider, *row.size.values()) for row in found.rows] == [
        *(("decode", provider, prompt, 2, steps)
          for provider in ("ours", "inductor") for prompt in (70, 12) for steps in (2, 3)),
        *(("prefill", provider, prompt, 2)
          for provider in ("ours", "inductor") for prompt in (70, 12)),
    ]  # fmt: skip
    for row in found.rows:
        assert row.note == "" and row.us > 0 and row.compile_s > 0
        assert 0 < row.error <= 2 * row.eager_error < 0.1
        tokens = row.size["prompt"] if row.op == "prefill" else 1
        assert results.throughput(row) == pytest.approx(2e6 * tokens / row.us)
    shown = CliRunner().invoke(app, ["bench", "--show", str(tmp_path / "rows.json")])
    assert shown.exit_code == 0, shown.output
    assert "decode, tiny int4" in shown.output and "prefill, tiny int4" in shown.output


@pytest.mark.parametrize("scheme", ["int4", "none"])
def test_a_deep_model_does_not_amplify_rounding(monkeypatch, scheme):
    """Or its errors would tell a wrong kernel from a right one no more."""
    tiny = models.LANGUAGE_MODELS["tiny"]
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 8
    options = {**dict(tiny.options), "num_hidden_layers": len(kinds), "layer_types": kinds}
    deep = models.LanguageModel(tiny.config, tuple(options.items()))
    monkeypatch.setitem(models.LANGUAGE_MODELS, "tiny", deep)
    model = models.build("tiny", scheme, "cpu")
    ids = torch.randint(512, (1, 24))
    with torch.no_grad():
        rounded = model(ids).logits
        with models.widened(model):
            exact = model(ids).logits
    assert exact.dtype == torch.float32
    assert relative_error(rounded, exact) < 0.03
    assert exact[0].argmax(-1).unique().numel() > 12


def only(setup, **changes):
    changes = {
        "prompts": (12,), "decodes": (2,), "batches": (1,), "against": (), "phases": ("decode",),
        **changes,
    }  # fmt: skip
    return generate.run(generate.dataclasses.replace(setup, **changes)).rows


def test_nothing_fused_gets_no_time(quick, monkeypatch):
    monkeypatch.setitem(session.BACKENDS, "ours", "eager")
    rows = only(TINY)
    assert [(row.us, row.note) for row in rows] == [(None, "nothing was fused")]


def test_wrong_logits_get_no_time(quick, monkeypatch):
    def off(self, ids):
        token, logits = self.right(ids)
        return token, logits * 1.5 if torch.compiler.is_compiling() else logits

    monkeypatch.setattr(session.Session, "right", session.Session.forward, raising=False)
    monkeypatch.setattr(session.Session, "forward", off)
    monkeypatch.setitem(session.BACKENDS, "ours", "aot_eager")
    monkeypatch.setattr(generate, "merge", lambda _: generate.Report((SITE,)))
    rows = only(TINY, phases=("decode", "prefill"))
    assert [(row.op, row.us, row.note) for row in rows] == [
        ("decode", None, "wrong"), ("prefill", None, "wrong"),
    ]  # fmt: skip
    assert all(row.error > 0.04 for row in rows)


@pytest.mark.slow
def test_a_failure_and_an_overrun_leave_notes(quick, monkeypatch):
    assert {row.note for row in only(TINY, budget=0.0, check=False)} == {
        "InductorMoeError: not begun: over the budget"
    }

    def fails(*_):
        raise RuntimeError("out of something\nand more")

    monkeypatch.setitem(session.BACKENDS, "ours", fails)
    for row in only(TINY, check=False):
        assert row.us is None and "out of something" in row.note and "and more" not in row.note


@pytest.mark.slow
def test_the_unrolled_rule_is_not_compiled_for_long_prompts(quick, monkeypatch):
    monkeypatch.setattr(generate, "MOST_UNROLLED", 1)
    monkeypatch.setitem(session.BACKENDS, "ours", "eager")
    rows = only(TINY, prompts=(12, 70), against=("inductor",), phases=("prefill",), check=False)
    assert [(row.provider, row.size["prompt"], row.us is None) for row in rows] == [
        ("ours", 70, True), ("ours", 12, True), ("inductor", 70, True), ("inductor", 12, False),
    ]  # fmt: skip
    assert rows[0].note == "nothing was fused" and "2 unrolled chunks" in rows[2].note


@pytest.mark.parametrize("scheme", models.SCHEMES)
def test_every_weight_is_counted_once(scheme):
    model = models.build("tiny", scheme, "cpu")
    with torch.no_grad():
        held = session.Session(model, 2, 64)
    counted = footprint.measure(model, held.states(), 2, 64)
    embedding = model.get_input_embeddings().weight
    rotary = {id(buffer) for buffer in model.model.rotary_emb.buffers()}
    tensors = [*model.parameters(), *(b for b in model.buffers() if id(b) not in rotary)]
    size = sum(t.numel() * t.element_size() for t in tensors) - embedding.numel() * 2
    every = counted.dense_bytes + counted.head_bytes + 8 * counted.expert_bytes
    assert every == size
    assert counted.expert_weights == 2 * 3 * 64 * 32
    assert counted.head_weights == 512 * 64
    # One layer of attention with one key head of 32, one of the delta rule with 4 heads of 16.
    assert counted.key_bytes == 2 * 32 * 2
    assert counted.state_bytes == 4 * 16 * 16 * 4 + (2 * 2 * 16 + 4 * 16) * 4 * 2
    one = counted.dense_bytes + counted.head_bytes + 2 * counted.expert_bytes
    assert counted.bytes(1, 1, 9) == pytest.approx(
        one + 10 * counted.key_bytes + 2 * counted.state_bytes
    )
    assert counted.bytes(1, 10**6, 0) - 10**6 * counted.key_bytes == pytest.approx(
        size + 2 * counted.state_bytes
    )
    weights = counted.dense_weights + counted.head_weights + 2 * counted.expert_weights
    # Two query heads of 32, their products with keys and with values, over ten positions.
    assert counted.flops(1, 1, 9) == pytest.approx(2 * weights + 10 * 2 * 4 * 32)


def test_full_sizes_are_the_published_ones(monkeypatch):
    # Of the 3.3 billion active parameters of the second, 0.3 are its embedding.
    counts = {"qwen3.5-35b-a3b": (34.7e9, 3.0e9, 40), "qwen3-30b-a3b": (30.5e9, 3.0e9, 48)}
    monkeypatch.setattr(models, "_initialise", lambda *_: None)
    monkeypatch.setattr(models, "randomize_", lambda *_: None)
    for name, (total, active, layers) in counts.items():
        model = models.build(name, "none", "meta")
        assert model.config.num_hidden_layers == layers
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=0.01)
        held = footprint.measure(model, [("keys", torch.empty(1)), ("values", torch.empty(1))],
                                 1, 1)  # fmt: skip
        used = held.dense_weights + held.head_weights + held.top_k * held.expert_weights
        assert used == pytest.approx(active, rel=0.05)
        assert all(parameter.is_meta for parameter in model.parameters())


def test_the_same_values_in_fp32_and_back():
    model = models.build("tiny", "int8", "cpu")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with models.widened(model):
            assert model.lm_head.weight.dtype == torch.float32
            wide = model(ids, use_cache=False).logits
    assert wide.dtype == torch.float32 and plain.dtype == torch.bfloat16
    assert 0 < generate.relative_error(plain, wide) < 0.05
    assert 0.01 < wide.std() < 10
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@torch.no_grad()
def test_fp32_attends_by_blocks_of_queries(monkeypatch):
    torch.manual_seed(3)
    model = models.build("tiny", "none", "cpu")
    ids = torch.randint(512, (2, 37))
    shapes = []
    attend = F.scaled_dot_product_attention

    def watched(query, *args, **options):
        shapes.append(tuple(query.shape[-2:]))
        return attend(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with models.widened(model):
        whole = model(ids, use_cache=False).logits
    monkeypatch.setattr(models, "QUERIES", 10)
    with models.widened(model):
        parts = model(ids, use_cache=False).logits
    assert [tokens for tokens, _ in shapes] == [37, 10, 10, 10, 7]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert F.scaled_dot_product_attention is watched


def test_a_profile_sums_up():
    kernels = (
        profile.Kernel("moe_up_decode_kernel", 0.0, 10.0),
        profile.Kernel("triton_per_fused_add_mean_0", 12.0, 3.0),
        profile.Kernel("quantized_linear_kernel_0", 14.0, 4.0),
        profile.Kernel("delta_decode_kernel", 20.0, 5.0),
        profile.Kernel("fmha_cutlassF_bf16_aligned", 25.0, 1.0),
        profile.Kernel("Memcpy DtoD", 27.0, 1.0),
    )
    found = profile.Profile("x", 2, kernels)
    assert found.span == 28.0
    assert found.gaps() == [2.0, 0.0, 2.0, 0.0, 1.0]
    assert {kind: len(held) for kind, held in found.classes().items()} == {
        "experts": 1, "delta rule": 1, "dense": 1, "norms, elementwise": 1, "attention": 1,
        "other": 1,
    }  # fmt: skip
    assert next(iter(found.classes())) == "experts"
    assert math.isclose(sum(k.duration for k in kernels) + sum(found.gaps()) - 1.0, found.span)


def test_every_kernel_of_ours_has_a_class():
    folder = Path(our_kernels.__file__).parent
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    names = set(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    assert len(names) > 30
    for name in names:
        assert profile.Kernel(name, 0.0, 1.0).kind != profile.OTHER, name


def test_an_up_projection_alone_is_a_linear_layer():
    names = ("quantized_up_vector_kernel", "quantized_down_vector_kernel",
             "quantized_up_decode_kernel")  # fmt: skip
    launched = tuple(profile.Kernel(name, float(i), 1.0) for i, name in enumerate(names))
    found = profile.Profile("x", 1, launched)
    assert found.kinds() == ["experts", "experts", "dense"]
    assert {kind: len(held) for kind, held in found.classes().items()} == {
        "experts": 2, "dense": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_profile_of_operators(quick, monkeypatch, tmp_path, phase):
    monkeypatch.setattr(profile, "CPU_OPTIONS", None)
    trace = tmp_path / "trace.json"
    arguments = ["profile", "--model", "tiny", "--device", "cpu", "--prompt", "20",
                 "--phase", phase, "--trace", str(trace)]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    assert f"one {profile.TITLES[phase]}" in outcome.output
    assert re.search(r"gaps .*│", outcome.output) and "aten::mul" in outcome.output
    assert "traceEvents" in trace.read_text()


@pytest.mark.slow
def test_commands_compile_a_tiny_model(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["bench", "generate", "--model", "tiny", "--device", "cpu", "--prompt", "20,70",
                 "--decode", "4", "--json", str(file)]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert len(results.Results.load(file).rows) == 8
    outcome = CliRunner().invoke(app, ["profile", "--model", "tiny", "--device", "cpu"])
    assert outcome.exit_code == 0 and "cpp_fused" in outcome.output, outcome.output


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--model", "gpt-5"], "no model 'gpt-5'"),
        (["--quant", "int3"], "no scheme 'int3'"),
        (["--against", "vllm"], "there is no 'vllm'"),
        (["--phases", "train"], "there is no 'train'"),
        (["--prompt", "1"], "expected larger numbers"),
        (["--decode", "x"], "decode: expected positive integers"),
        (["--model", "tiny", "--layers", "1"], "expected 2 to 2"),
        (["--device", "tpu"], "expected cuda or cpu"),
    ],
)
def test_bad_input_is_one_line(arguments, text):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    outcome = CliRunner().invoke(app, ["bench", "generate", *device, *arguments])
    assert outcome.exit_code == 2
    assert text in outcome.output


def test_profile_of_an_unknown_provider():
    outcome = CliRunner().invoke(app, ["profile", "--provider", "vllm", "--device", "cpu"])
    assert outcome.exit_code == 2 and "there is no 'vllm'" in outcome.output
    outcome = CliRunner().invoke(app, ["profile", "--phase", "train", "--device", "cpu"])
    assert outcome.exit_code == 2 and "phase: there is no 'train'" in outcome.output
    with pytest.raises(InductorMoeError, match="no model"):
        models.build("gpt-5", "int4", "cpu")
