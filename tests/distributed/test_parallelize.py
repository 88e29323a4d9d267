"""`parallelize`: experts of models in memory, sharded over processes joined by gloo."""

from __future__ import annotations

import pytest
import rank_programs
import ranks


@pytest.mark.parametrize(
    "families, world, dtype, steps",
    [
        (["qwen3_5_moe_text"], 2, "bfloat16", 3),
        (["qwen3_moe", "qwen3_5_moe_text"], 2, "float32", 32),
        (["qwen3_moe", "qwen3_5_moe_text"], 4, "bfloat16", 32),
    ],
    ids=str,
)
def test_sharded_models_are_as_exact_as_whole_ones(tmp_path, families, world, dtype, steps):
    program = rank_programs.sharded_program
    arguments = {"families": families, "dtype": dtype, "steps": steps}
    found = ranks.results(ranks.run(program, world, tmp_path, limit=400, **arguments))
    rank_programs.check(found, world, collectives=True)


@pytest.mark.slow
def test_sharded_models_run_as_inductor_compiles_them(tmp_path):
    arguments = {"families": ["qwen3_5_moe_text"], "dtype": "bfloat16", "steps": 3, "real": True}
    program = rank_programs.sharded_program
    found = ranks.results(ranks.run(program, 2, tmp_path, limit=500, **arguments))
    rank_programs.check(found, 2)


# The layers whose heads are shared out.
ATTENTION = ["self_attn", "self_attn"]
HEADS = {
    "qwen3_5_moe_text": ["linear_attn", "self_attn"],
    "deepseek_v3": [],
    **dict.fromkeys(["qwen2_moe", "gpt_oss", "mixtral"], ATTENTION),
}


SHARED = ("qwen2_moe", "qwen3_5_moe_text", "deepseek_v3")


@pytest.mark.parametrize(
    "families, world, compiled",
    [
        (["qwen3_5_moe_text", "gpt_oss"], 2, False),
        pytest.param(
            ["qwen2_moe", "qwen3_5_moe_text", "gpt_oss", "mixtral", "deepseek_v3"],
            4,
            True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["eager", "compiled"],
)
def test_every_rank_keeps_its_share(tmp_path, families, world, compiled):
    program = rank_programs.shards_program
    found = ranks.results(
        ranks.run(program, world, tmp_path, limit=400, names=families, compiled=compiled)
    )
    for rank, results in enumerate(found):
        assert len(results) == 3 * len(families)
        for name, result in results.items():
            # A shared expert that every rank added would be seen here.
            assert result["error"] < 2e-6, name
            assert result["share"] == 1 / world
            assert result["saved"][0] == result["saved"][1] > 0
            assert result["modules"] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
            heads = [] if name.endswith("alone") else HEADS[name.split()[0]]
            assert [text.split(".")[-1] for text in result["heads"]] == heads
            # Groups of 16 of the 24 channels are not cut.
            cut = name.split()[0] in SHARED and not name.endswith("int4")
            assert result["shared"] == (2 if cut else 0)
            assert result["rank"] == rank
            assert result["text"].startswith(f"rank {rank} of {world} keeps its share of 2 ")
            if compiled:
                assert [layers["moe_experts"] for layers in result["layers"]] == [2], name


# What rank 0 and the others say to each case.
REFUSED = {
    "no experts": ("no experts module",) * 2,
    "two dims": ("has 2 dimensions ['ep', 'dp']",) * 2,
    "unknown dim": ("dim must be one of the mesh's [] (got 'ep')",) * 2,
    "no mesh": ("must be a DeviceMesh (got str)",) * 2,
    "meta": ("is on meta; the mesh is of cpu",) * 2,
    "loop": ("runs the experts implementation 'eager'",) * 2,
    "twice": ("sharded already",) * 2,
    "one rank differs": ("ranks 0 and 1 differ: model.layers.1.mlp.gate.weight [8, 32]",) * 2,
    "one rank has none": ("on rank 1: parallelize: the model has no experts", "no experts"),
}


@pytest.mark.parametrize(
    "world, expected",
    [
        (2, REFUSED),
        (3, {"not divisible": ("8 experts, which do not divide by 3 ranks",) * 2}),
        (2, {"late": ("not every rank arrived within 3 s",) * 2}),
    ],
    ids=["model-and-mesh", "not-divisible", "late"],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank(tmp_path, world, expected):
    program = rank_programs.refused_program
    found = ranks.results(ranks.run(program, world, tmp_path, limit=120, cases=list(expected)))
    for rank, results in enumerate(found):
        assert list(results) == list(expected)
        for case, result in results.items():
            assert expected[case][min(rank, 1)] in result["error"], (case, rank, result)
            assert result["whole"], f"{case}: the model was changed"


@pytest.mark.parametrize(
    "dies",
    [
        pytest.param(True, id="dies"),
        pytest.param(False, id="falls-behind"),
    ],
)
def test_a_rank_that_is_missing_ends_the_others_in_time(tmp_path, dies):
    program, timeout = rank_programs.dying_program, 5
    found = ranks.run(program, 4, tmp_path, 120, timeout, dies=dies, pause=3 * timeout)
    assert all(rank.code is not None for rank in found), "a rank had to be killed"
    for rank in found[:-1]:
        assert rank.code == 1
        assert "RuntimeError" in rank.error and "gloo" in rank.error, rank.error
        assert rank.seconds < found[-1].seconds + timeout
    assert found[-1].code == (9 if dies else 1)
