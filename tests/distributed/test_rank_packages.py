"""`export_generation` of sharded models: one package for each rank, which gloo joins."""

from __future__ import annotations

import pytest
import rank_programs
import ranks

SAID = (
    "device_mesh has 2 ranks, but the model is sharded over none; call parallelize first",
    "the model is sharded over 2 ranks; pass the mesh as device_mesh=",
    "all-to-all exchange waits for counts in Python",
    "is for rank {} of 2; start that many processes",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_packages_of_ranks_generate_what_the_whole_model_does(tmp_path, name):
    arguments = {"place": str(tmp_path), "names": [name]}
    program = rank_programs.package_program
    found = ranks.results(ranks.run(program, 2, tmp_path, limit=500, **arguments))
    for rank, results in enumerate(found):
        result = results[name]
        assert result["tokens"] == result["expected"]
        assert result["written"] == f"{name}.rank{rank}of2.pt2"
        for text, expected in zip(result["said"], SAID, strict=True):
            assert expected.format(rank) in text
    loaded = ranks.results(
        ranks.run(rank_programs.loading_program, 2, tmp_path, limit=200, **arguments)
    )
    assert [result[name] for result in loaded] == [found[0][name]["expected"]] * 2
