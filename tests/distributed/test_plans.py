"""Models under transformers' own expert-parallel plan, in processes joined by gloo."""

from __future__ import annotations

import pytest
import rank_programs
import ranks

FAMILIES = ["qwen3_moe", "qwen3_5_moe_text"]


@pytest.mark.parametrize(
    "families, world, dtype, steps",
    [
        (FAMILIES[:1], 2, "bfloat16", 3),
        (FAMILIES, 2, "float32", 32),
        (FAMILIES, 4, "bfloat16", 32),
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
    rank_programs.check(found, world, collectives=True)


@pytest.mark.slow
def test_plans_run_as_inductor_compiles_them(tmp_path):
    program = rank_programs.plan_program
    arguments = {"families": FAMILIES, "dtype": "bfloat16", "steps": 3, "real": True}
    rank_programs.check(ranks.results(ranks.run(program, 2, tmp_path, limit=500, **arguments)), 2)
