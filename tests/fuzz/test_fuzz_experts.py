"""Random expert blocks: rewritten to what they compute, or not at all.

FUZZ_CASES sets the number of cases over all fuzz tests (2,000 by default): a half are mutated
expert blocks, a quarter plain ones, the last quarter delta rules. FUZZ_SEED draws other cases.
The nightly command, whose shards grow in number with the cases, is
FUZZ_CASES=20000 FUZZ_SEED=$(date +%Y%m%d) pytest -n auto tests/fuzz
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os

import expert_blocks as blocks
import harness
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
FIRST_SEED = 1000 * int(os.environ.get("FUZZ_SEED", "0"))
SHARDS = max(8, CASES // 250)
QUIET = {
    "deadline": None,
    "database": None,
    "phases": (Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
}
SPELLINGS = st.builds(
    blocks.Block,
    **{name: st.sampled_from(values) for name, values in blocks.OPTIONS.items()},
)


def shard_of(cases, shards):
    """The cases of one shard, rounded up: together no fewer than `cases`."""
    return max(1, math.ceil(cases / shards))


def check(block):
    outcome = harness.run(blocks.function_of(block), blocks.experts_weights(block))
    matched = any(name.startswith("moe.experts") for name in outcome.matched)
    harness.count("experts", bool(block.mutation), matched, outcome)
    assert not outcome.wrong, (
        f"{outcome.matched} gave a relative error of {outcome.error:.2e}, allowed is "
        f"{outcome.budget:.2e}, for {block}"
    )
    return matched


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_mutated_blocks_are_left_or_right(shard):
    @seed(FIRST_SEED + shard)
    @settings(max_examples=shard_of(CASES / 2, SHARDS), **QUIET)
    @given(SPELLINGS, st.sampled_from(blocks.MUTATIONS))
    def fuzz(block, mutation):
        check(dataclasses.replace(block, mutation=mutation))

    fuzz()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nine_of_ten_spellings_are_matched(shard):
    seen = collections.Counter()

    @seed(FIRST_SEED + 500 + shard)
    @settings(max_examples=shard_of(CASES / 4, SHARDS), **QUIET)
    @given(SPELLINGS)
    def fuzz(block):
        seen[block.form, check(block)] += 1

    fuzz()
    matched = sum(count for (_, was_matched), count in seen.items() if was_matched)
    assert matched >= 0.9 * sum(seen.values()), str(seen)


# What the fuzzer found once, each with the mistake that it would be to rewrite it.
FOUND = {
    "a cast of fp32 rows to bf16 rounds": blocks.Block(mutation="cast to bf16"),
    "the same in the grouped form": blocks.Block(form="grouped", mutation="cast to bf16"),
}
FORMERLY_LEFT = {
    "one expert a token, weighted slots": blocks.Block(top_k=1, weigh="combined"),
    "einsum, weights summed by a matmul": blocks.Block(form="einsum", weigh="combined"),
    "einsum, gate and up apart": blocks.Block(form="einsum", apart=True),
    "einsum, one token": blocks.Block(form="einsum", tokens=1, transposed=True),
    "one token, weights on the input": blocks.Block(tokens=1, top_k=3, weigh="input"),
}


@pytest.mark.parametrize("case", FOUND)
def test_found_mistakes_stay_fixed(case):
    assert not check(FOUND[case])


@pytest.mark.parametrize("case", FORMERLY_LEFT)
def test_spellings_once_left_are_matched(case):
    assert check(FORMERLY_LEFT[case])


def test_every_mutation_changes_some_block():
    """A mutation that never changes a value would test nothing."""
    silent = set(blocks.MUTATIONS)
    for form in ("batched", "grouped", "einsum"):
        for bias, masks, activation in (
            (True, True, "silu"), (False, False, "clamped"), (False, True, "limited"),
        ):  # fmt: skip
            plain = blocks.Block(
                form=form,
                bias=bias,
                masks=masks,
                sentinels=masks,
                activation=activation,
                repeat="gather",
            )
            inputs = blocks.experts_weights(plain)
            expected = blocks.function_of(plain)(**inputs)
            for mutation in list(silent):
                try:
                    found = blocks.function_of(dataclasses.replace(plain, mutation=mutation))(
                        **{name: value.clone() for name, value in inputs.items()}
                    )
                except RuntimeError:
                    continue
                if (
                    isinstance(found, tuple)
                    or found.shape != expected.shape
                    or not torch.equal(found, expected)
                ):
                    silent.discard(mutation)
    assert silent == set()
