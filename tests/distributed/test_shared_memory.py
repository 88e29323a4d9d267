"""Sums through memory that ranks share: how it is set up, and processes that wait in it."""

from __future__ import annotations

import pytest
import ranks
import shared_memory_programs as programs

from inductor_moe.parallel_memory import _obstacle


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_wait_for_one_another_and_have_the_same_sums(tmp_path, world):
    arguments = {"place": str(tmp_path)}
    found = ranks.results(ranks.run(programs.sum_program, world, tmp_path, 200, **arguments))
    for result in found:
        assert result["wrong"] == 0 and result["sums"] == found[0]["sums"]
        assert result["epochs"] == [5, 1, 1, 0]


FAULTS = {
    "no peer access": "rank 1 cannot share memory: no peer access",
    "another's memory": "rank 0 cannot share memory: what the ranks wrote there is [1, 0]",
    "another host": "the ranks are on several hosts",
    "problem": "rank 1 cannot share memory: none",
}


def test_all_ranks_say_why_there_is_no_shared_memory(tmp_path):
    arguments = {"place": str(tmp_path), "faults": list(FAULTS)}
    found = ranks.results(ranks.run(programs.fault_program, 2, tmp_path, 200, **arguments))
    assert found[0] == found[1]
    assert found[0].pop("") == "rank 0 cannot share memory: it computes on cpu"
    for fault, text in found[0].items():
        assert text == FAULTS[fault]


def test_compiled_sums(tmp_path):
    arguments = {"place": str(tmp_path)}
    found = ranks.results(ranks.run(programs.compiled_program, 2, tmp_path, 200, **arguments))
    for result in found:
        assert result["found"] == [[6 + 18.0] * 4] * 2
        assert result["counts"] == {"all_reduce": 2}
        assert not result["left"] and not result["notes"]


HERE = {"host": "a", "gpu": "0"}


@pytest.mark.parametrize(
    "places, said",
    [
        ([HERE, {"host": "a", "gpu": "1"}], None),
        ([{"host": "a", "gpu": str(i)} for i in range(8)], None),
        ([{"host": "a", "gpu": str(i)} for i in range(9)], "there are 9 ranks, more than 8"),
        ([HERE], "there is one rank"),
        ([HERE, {"host": "b", "gpu": "1"}], "the ranks are on several hosts"),
        ([HERE, HERE], "several ranks share a GPU"),
        ([HERE, {"problem": "it has no Triton"}], "rank 1 cannot share memory: it has no Triton"),
    ],
)
def test_where_ranks_can_share_memory(places, said):
    assert _obstacle(places) == said
