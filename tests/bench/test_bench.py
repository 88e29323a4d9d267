"""The benchmark command: what it times is right, what is wrong gets no time."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from inductor_moe.bench import case, delta, moe, providers, results, run, shapes
from inductor_moe.bench.ceilings import Ceilings
from inductor_moe.cli import app
from inductor_moe.errors import InductorMoeError
from inductor_moe.reference.moe import moe_experts_reference

BEST = Ceilings(3e12, 3e12, 8e14)


def only(cases):
    (found,) = cases
    return found


def test_a_block_is_checked_timed_and_written(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["bench", "moe-block", "--model", "tiny", "--sizes", "5", "--against", "eager",
                 "--device", "cpu", "--json", str(file)]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    found = results.Results.load(file)
    assert [(row.provider, row.size) for row in found.rows] == [
        ("ours", {"tokens": 5}), ("eager", {"tokens": 5}),
    ]  # fmt: skip
    for row in found.rows:
        assert row.us > 0 and row.bytes > 0 and row.flops > 0
        assert 0 < row.error <= 2 * row.eager_error
    shown = CliRunner().invoke(app, ["bench", "--show", str(file)])
    assert shown.exit_code == 0 and "moe-block" in shown.output
    picture = tmp_path / "roof.svg"
    drawn = CliRunner().invoke(app, ["bench", "--show", str(file), "--plot", str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert "<svg" in picture.read_text()


@torch.no_grad()
@pytest.mark.parametrize(
    "name, size", [("delta-decode", 3), ("delta-prefill", 70), ("delta-prompts", 2)]
)
def test_eager_agrees_with_the_reference(name, size, monkeypatch):
    monkeypatch.setattr(delta, "PROMPT", 70)
    chosen = only(run.OPS[name].cases("tiny", "cpu", [size]))
    row = only(run.measure(chosen, ["eager"], BEST))
    assert row.us > 0 and row.error < 2e-2


@torch.no_grad()
def test_experts_of_liger(monkeypatch):
    """A module in Liger's place, with its function's arguments and layouts."""
    chosen = only(run.OPS["moe-experts"].cases("tiny", "cpu", [5]))
    row = only(run.measure(chosen, ["liger"], BEST))
    assert row.us is None and row.note == "not installed"

    def fused(x, up, down, ids, share):
        assert ids.dtype == torch.int32
        return moe_experts_reference(x, up, down, ids.long(), share, None, None, "silu", "chunked")

    for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.fused_moe"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.LigerFusedMoEFunction = types.SimpleNamespace(apply=fused)
        monkeypatch.setitem(sys.modules, name, module)
    row = only(run.measure(chosen, ["liger"], BEST))
    assert row.us > 0 and row.error <= 2 * row.eager_error
    assert row.note == "no CUDA graph: it waits for the routing on the host"
    chosen.call.down_bias = torch.nn.Parameter(torch.zeros(1))
    assert not moe.liger_serves(chosen.call)


@torch.no_grad()
@pytest.mark.parametrize("name", list(run.OPS))
def test_a_wrong_provider_gets_no_time(name, monkeypatch):
    chosen = only(run.OPS[name].cases("tiny", "cpu", [3]))

    def slightly_off(*arguments):
        output = chosen.call(*arguments)
        return torch.utils._pytree.tree_map(lambda t: t * 1.05, output)

    monkeypatch.setattr(providers, "callable_of", lambda *_: slightly_off)
    row = only(run.measure(chosen, ["inductor"], BEST))
    assert row.us is None and row.note == "wrong" and row.error > 0.04


@torch.no_grad()
def test_bytes_are_those_of_the_experts_that_are_read():
    shape = shapes.MODELS["tiny"].moe
    chosen = only(moe.experts_cases("tiny", "cpu", [1]))
    assert chosen.bytes == 2 * (2 * shape.expert_parameters() + 2 * shape.hidden)
    block = shapes.moe_block(shape, "cpu")
    inputs = [torch.randn(1, rows, shape.hidden).bfloat16() for rows in (1, 400)]
    assert moe.experts_read(block.experts, moe.first_output(block), inputs) == (2 + 8) / 2
    assert not block.experts._forward_pre_hooks


@torch.no_grad()
def test_a_rule_per_channel_is_the_same_head_by_head():
    shape = dataclasses.replace(shapes.MODELS["tiny"].delta, value_heads=2, gate="channel")
    layer = delta.Prefill(shape, "cpu").requires_grad_(False)
    inputs = [torch.randn(2, 70, 2, *width) for width in ((16,), (16,), (16,), (16,), ())]
    for whole, pieces in zip(layer(*inputs), layer.by_heads(*inputs), strict=True):
        torch.testing.assert_close(pieces, whole)


def test_results_of_one_gpu_are_merged():
    row = results.Row("moe-block", "tiny", {"tokens": 1}, "ours", us=1.0)
    other = dataclasses.replace(row, op="moe-experts", model="mixtral-8x7b")
    first, second = (
        results.Results("A GPU", {}, "", "", Ceilings(*best), (each,))
        for best, each in (((1.0, 4.0, 2.0), row), ((3.0, 2.0, 2.0), other))
    )
    both = results.merged([first, second], (), ())
    assert both.rows == (row, other) and both.ceilings == Ceilings(3.0, 4.0, 2.0)
    assert results.merged([first, second], ("moe-experts",), ()).rows == (other,)
    with pytest.raises(InductorMoeError, match="no row"):
        results.merged([first, second], ("moe-experts",), ("tiny",))
    with pytest.raises(InductorMoeError, match="one GPU, got A GPU, B"):
        results.merged([first, dataclasses.replace(second, gpu="B")], (), ())


@torch.no_grad()
def test_ours_without_a_fused_layer_gets_no_time(monkeypatch):
    chosen = only(moe.experts_cases("tiny", "cpu", [3]))
    monkeypatch.setattr(providers, "callable_of", lambda *_: chosen.call)
    row = only(run.measure(chosen, ["ours"], BEST))
    assert row.us is None and row.note == "nothing was fused"


@torch.no_grad()
def test_a_decode_that_forgets_its_state_is_wrong(monkeypatch):
    chosen = only(delta.decode_cases("tiny", "cpu", [2]))

    def forgetful(x, cache):
        held = [state.clone() for state in case.states_of(cache)]
        output = chosen.call(x, cache)
        for state, old in zip(case.states_of(cache), held, strict=True):
            state.copy_(old)
        return output

    monkeypatch.setattr(providers, "callable_of", lambda *_: forgetful)
    assert only(run.measure(chosen, ["eager"], BEST)).note == "wrong"


def test_a_failing_provider_leaves_a_note(monkeypatch):
    chosen = only(moe.experts_cases("tiny", "cpu", [3]))

    def fails(*_):
        raise RuntimeError("out of something\nand more")

    monkeypatch.setattr(providers, "callable_of", fails)
    row = only(run.measure(chosen, ["eager"], BEST))
    assert row.us is None and row.note == "RuntimeError: out of something"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nonsense"], "no op 'nonsense'"),
        (["moe-block", "--model", "gpt-5"], "no model 'gpt-5'"),
        (["moe-block", "--against", "vllm"], "no provider 'vllm'"),
        (["moe-block", "--sizes", "4,-1"], "sizes: expected positive integers"),
    ],
)
def test_bad_input_is_one_line(arguments, text):
    outcome = CliRunner().invoke(app, ["bench", *arguments])
    assert outcome.exit_code == 2
    assert text in outcome.output


def test_a_foreign_file_is_refused(tmp_path):
    file = tmp_path / "x.json"
    for text in ("{}", "[]", "no", json.dumps({"format": 99, "rows": [], "ceilings": {}})):
        file.write_text(text)
        with pytest.raises(InductorMoeError, match=r"x\.json"):
            results.Results.load(file)


def test_every_model_builds_its_layers():
    for name, model in shapes.MODELS.items():
        if model.moe:
            block = shapes.moe_block(model.moe, "meta")
            assert sum(p.numel() for p in block.experts.parameters()) >= (
                model.moe.experts * model.moe.expert_parameters()
            ), name
        if model.delta and model.delta.gate == "head":
            _, _, width = delta.decode_layer(dataclasses.replace(model.delta), "meta")
            assert width == sum(
                (2 * model.delta.heads * model.delta.key,
                 2 * model.delta.value_heads * model.delta.value, 2 * model.delta.value_heads)
            )  # fmt: skip
