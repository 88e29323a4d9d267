"""The search for tiles: it finds the best plan, keeps it, and goes on where it stopped."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from inductor_moe import tiles
from inductor_moe.bench import candidates, timing, tune
from inductor_moe.bench.shapes import MODELS
from inductor_moe.cli import app
from inductor_moe.errors import InductorMoeError
from inductor_moe.tiles import Experts, Plan

LAYER = Experts(8, 256, 2048, 512, True, 2)
GPU = "Some GPU 9000"


def every_plan(layer, tokens):
    """All that the search can reach by changing one side after the other."""
    for start in candidates.starts(layer, tokens):
        for up in candidates.candidates(layer, start, "up"):
            yield from candidates.candidates(layer, up, "down")


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_the_search_finds_the_best_where_the_sides_are_independent(tokens):
    def cost(plan: Plan) -> float:
        up, down = (hash((side, plan.block_m, getattr(plan, side))) for side in ("up", "down"))
        return 1.0 + up % 1009 + down % 1013

    best, plan, tried = tune.search(LAYER, tokens, cost)
    reachable = list(every_plan(LAYER, tokens))
    assert best == cost(plan) and tried <= len(reachable) + 200
    assert best <= min(map(cost, reachable))


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.moe])
def test_there_is_something_to_try_at_every_size(name):
    layer = tune.layer_of(MODELS[name].moe)
    for tokens in (*tune.TOKENS, 1 << 20):
        blocks = [plan.block_m for plan in candidates.starts(layer, tokens)]
        assert blocks and (128 in blocks) == (3 * tokens * layer.top_k >= 128 * layer.experts)


def test_a_layer_without_a_plan_that_runs_is_an_error():
    with pytest.raises(InductorMoeError, match="no tile runs"):
        tune.search(LAYER, 4, lambda plan: math.inf)


def test_wrong_numbers_are_never_timed(monkeypatch):
    class Inputs:
        routings = ((None, None),)

        def run(self, plan, ids, share):
            return torch.ones(4) if plan.up.block_n < 100 else torch.ones(4) * 1.1

    monkeypatch.setattr(tune, "microseconds", lambda call, inputs, give_up: (5.0, 0.0))
    meter = tune.Meter(LAYER, 1, Inputs(), GENERIC)
    right, wrong = (Plan(16, tiles.GemmTile(n, 64, 8, 4, 3), TILE) for n in (64, 128))
    assert meter(right) == 5.0 and meter.wrong == 0
    assert meter(wrong) == math.inf and meter.wrong == 1


def test_a_hopeless_call_is_timed_in_less_detail():
    calls = []
    taken, spread = timing.microseconds(calls.append, [(1,)], give_up=0.0)
    assert taken > 0 and spread == 0 and len(calls) == timing.WARM_UPS
    timing.microseconds(calls.append, [(1,)])
    assert len(calls) == 2 * timing.WARM_UPS + timing.REPLAYS


GENERIC = tiles.generic_gpu((9, 0))
TILE = tiles.GemmTile(64, 64, 8, 4, 3)


def test_a_table_is_written_read_first_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("INDUCTOR_MOE_CONFIGS", str(tmp_path))
    path = tmp_path / tiles.table_name(GPU)
    tiles.load_table.cache_clear()
    assert tiles.load_table(GPU) is None
    plan = Plan(16, TILE, TILE)
    table = tune.Table.open(path, GPU)
    assert not table.has(LAYER, 16)
    table.add("qwen3.5-35b-a3b", LAYER, 16, plan, 12.34)
    table.add("qwen3.5-35b-a3b", LAYER, 4, plan, 1.0)
    table.write()
    again = tune.Table.open(path, GPU)
    assert again.has(LAYER, 16) and again.has(LAYER, 4) and not again.has(LAYER, 8)
    assert list(json.loads(path.read_text())["layers"][0]["plans"]) == ["4", "16"]
    tiles.load_table.cache_clear()
    gpu = tiles.Gpu(GPU, (9, 0), 132, 232448)
    assert tiles.choose_plan(LAYER, 20, gpu) == plan
    tiles.load_table.cache_clear()


def test_a_users_layer_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("INDUCTOR_MOE_CONFIGS", str(tmp_path))
    name = "NVIDIA H100 80GB HBM3"
    tiles.load_table.cache_clear()
    shipped = tiles.load_table(name)
    table = tune.Table.open(tmp_path / tiles.table_name(name), name)
    plan = Plan(16, TILE, TILE)
    table.add("qwen3.5-35b-a3b", LAYER, 1, plan, 1.0)
    table.write()
    tiles.load_table.cache_clear()
    merged = tiles.load_table(name)
    assert merged[LAYER] == {1: plan} != shipped[LAYER]
    assert {k: v for k, v in merged.items() if k != LAYER} == {
        k: v for k, v in shipped.items() if k != LAYER
    }
    tiles.load_table.cache_clear()


def test_a_broken_table_is_named(tmp_path):
    file = tmp_path / "gpu.json"
    for text in ("no", "{}", '{"layers": [{"layer": {}}]}'):
        file.write_text(text)
        with pytest.raises(InductorMoeError, match=r"gpu\.json: not a table"):
            tiles.read_table(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu():
    outcome = CliRunner().invoke(app, ["tune"])
    assert outcome.exit_code == 2 and "needs a CUDA GPU" in outcome.output


def test_the_shipped_table_holds_layers_of_the_registry():
    layers = {tune.layer_of(model.moe) for model in MODELS.values() if model.moe}
    table = tiles.load_table("NVIDIA H100 80GB HBM3")
    assert table and set(table) <= layers
