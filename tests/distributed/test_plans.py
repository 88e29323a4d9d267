"""Models under transformers' own expert-parallel plan, in processes joined by gloo."""

from __future__ import annotations

import pytest
import rank_programs
import ranks

FAMILIES = ["qwen3_moe", "qwen3_5_moe_text"]


def check(found, world, slack=2.0):
    """Every layer is fused on every rank, and all are as exact as one process without us."""
    for results in found:
        for name, result in results.items():
            assert result["refused"] == [], name
            assert all(layers == result["expected"] for layers in result["layers"]), result
            for fused, eager in zip(result["errors"], result["eager"], strict=True):
                assert fused <= slack * eager, f"{name}: fused {fused:.2e}, eager {eager:.2e}"
            assert result["experts"][0][0] == 8 // world
            assert result["sum"] == found[0][name]["sum"], f"{name}: the ranks differ"


@pytest.mark.parametrize(
    "families, world, dtype, steps",
    [
        (FAMILIES[1:], 2, "bfloat16", 3),
        pytest.param(FAMILIES, 2, "float32", 32, marks=pytest.mark.slow),
        pytest.param(FAMILIES, 4, "bfloat16", 32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_models_compile_under_transformers_own_plan(tmp_path, families, world, dtype, steps):
    found = ranks.results(
        ranks.run(
            rank_programs.plan_program,
            world,
            tmp_path,
            limit=300,
            families=families,
            dtype=dtype,
            steps=steps,
        )
    )
    check(found, world)
    for results in found:
        for result in results.values():
            layers = result["expected"]["moe_experts"]
            assert len(result["graphs"]) == 2
            for graph in result["graphs"]:
                assert graph == {"reduced": layers, "waited": layers, "masked": layers}


@pytest.mark.slow
def test_plans_run_as_inductor_compiles_them(tmp_path):
    program = rank_programs.plan_program
    arguments = {"families": FAMILIES, "dtype": "bfloat16", "steps": 3, "real": True}
    check(ranks.results(ranks.run(program, 2, tmp_path, limit=500, **arguments)), 2)
