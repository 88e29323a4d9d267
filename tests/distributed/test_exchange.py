"""`parallelize` with all-to-all exchange: tokens go to the ranks of their experts and back."""

from __future__ import annotations

import pytest
import rank_programs
import ranks

from inductor_moe.parallel_exchange import FEWEST, all_to_all_from


@pytest.mark.parametrize("world", [2, 4])
def test_every_choice_is_computed_wherever_its_expert_is(tmp_path, world):
    # 1 and 3: ranks without a token of their own, and counts that do not divide.
    arguments = {"tokens": [1, 3, 16, 33]}
    program = rank_programs.exchange_program
    found = ranks.results(ranks.run(program, world, tmp_path, limit=200, **arguments))
    assert len(found[0]) == 4 * 7
    for results in found:
        for case, result in results.items():
            assert result["error"] < 2e-6, (case, result)
            assert result["sum"] == found[0][case]["sum"], f"{case}: the ranks differ"
            if case.endswith(" skipped") and "some" not in case:
                assert result["sum"] == 0, case


@pytest.mark.parametrize(
    "families, world, dtype, steps, exchange, first",
    [
        (["qwen3_5_moe_text"], 2, "bfloat16", 2, "auto", 8),
        (["qwen3_moe", "qwen3_5_moe_text"], 2, "float32", 32, "all-to-all", None),
        (["qwen3_moe", "qwen3_5_moe_text"], 4, "bfloat16", 32, "all-to-all", None),
    ],
    ids=str,
)  # fmt: skip
def test_exchanging_models_are_as_exact_as_whole_ones(
    tmp_path, families, world, dtype, steps, exchange, first
):
    arguments = {"families": families, "dtype": dtype, "steps": steps}
    options = {"exchange": exchange, "all_to_all_tokens": first}
    program = rank_programs.sharded_program
    found = ranks.results(ranks.run(program, world, tmp_path, limit=500, **arguments, **options))
    rank_programs.check(found, world)
    for results in found:
        for name, result in results.items():
            prefill, decode = result["graphs"]
            layers = result["expected"]["moe_experts"]
            # Out with the tokens and back, and all slices to all; heads are summed in any case.
            sliced = {"sent": 2 * layers, "gathered": layers, "reduced": result["heads"]}
            summed = {"sent": 0, "gathered": 0, "reduced": layers + result["heads"]}
            assert prefill.items() >= sliced.items(), name
            assert decode.items() >= (summed if exchange == "auto" else sliced).items(), name


def test_packed_models_exchange_over_a_dimension_of_a_mesh(tmp_path):
    names = ["qwen3_5_moe_text", "gpt_oss"]  # a block on slices, and experts alone
    program = rank_programs.packed_exchange_program
    found = ranks.results(ranks.run(program, 2, tmp_path, limit=200, names=names))
    for results in found:
        assert list(results) == names
        assert max(results.values()) < 2e-6, results


@pytest.mark.slow
def test_exchanging_models_run_as_inductor_compiles_them(tmp_path):
    arguments = {"families": ["qwen3_5_moe_text"], "dtype": "bfloat16", "steps": 3, "real": True}
    program = rank_programs.sharded_program
    found = ranks.results(
        ranks.run(program, 2, tmp_path, limit=500, exchange="all-to-all", **arguments)
    )
    rank_programs.check(found, 2)


def test_auto_exchanges_where_that_moves_less():
    assert all_to_all_from(2, 8, None) > 1 << 40
    assert all_to_all_from(8, 8, None) > 1 << 40
    assert all_to_all_from(16, 8, None) == FEWEST
    assert all_to_all_from(4, 1, None) == FEWEST
    assert all_to_all_from(2, 8, 100) == 100
