"""Random delta rules: rewritten to what they compute, or not at all.

A quarter of FUZZ_CASES (2,000 by default), two thirds of it mutated; see test_fuzz_experts.py.
"""

from __future__ import annotations

import collections

import delta_forms
import delta_steps
import harness
import pytest
import torch
from delta_forms import Spelling
from hypothesis import given, reject, seed, settings
from hypothesis import strategies as st
from test_fuzz_experts import CASES, FIRST_SEED, QUIET, shard_of

SHARDS = max(4, CASES // 500)
# The harness runs every case in fp32 and in fp64; a cast is a mutation.
FIXED = {"dtype", "state_dtype"}
SPELLINGS = st.builds(
    Spelling,
    **{
        name: st.sampled_from(values)
        for name, values in delta_forms.CHOICES.items()
        if name not in FIXED
    },
)
NAMES = ("q", "k", "v", "g", "b", "state")


def case(spelling, *mutations):
    steps = delta_steps.mutated(spelling, *mutations)
    values = (x.double() for x in delta_forms.inputs(spelling))
    return delta_forms.delta_rule(spelling, **steps), dict(zip(NAMES, values, strict=True))


def run(spelling, *mutations):
    rule, inputs = case(spelling, *mutations)
    outcome = harness.run(rule, inputs)
    matched = any("delta_rule" in site.op for site in outcome.sites if site.matched)
    harness.count("delta rules", bool(mutations), matched, outcome)
    assert not outcome.wrong, (
        f"{outcome.matched} gave a relative error of {outcome.error:.2e}, allowed is "
        f"{outcome.budget:.2e}, for {spelling} with {mutations}"
    )
    return matched


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_mutated_rules_are_left_or_right(shard):
    mutations = st.lists(
        st.sampled_from(sorted(delta_steps.MUTATIONS)), min_size=1, max_size=2, unique=True
    )

    @seed(FIRST_SEED + shard)
    @settings(max_examples=shard_of(CASES / 6, SHARDS), **QUIET)
    @given(SPELLINGS, mutations)
    def fuzz(spelling, mutations):
        rule, inputs = case(spelling, *mutations)
        try:
            rule(**inputs)
            rule(**{name: value.float() for name, value in inputs.items()})
        except RuntimeError:  # no keys for a turned state's values, or two dtypes in a product
            reject()
        run(spelling, *mutations)

    fuzz()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nine_of_ten_spellings_are_matched(shard):
    seen = collections.Counter()

    @seed(FIRST_SEED + 500 + shard)
    @settings(max_examples=shard_of(CASES / 12, SHARDS), **QUIET)
    @given(SPELLINGS)
    def fuzz(spelling):
        seen[run(spelling)] += 1

    fuzz()
    assert seen[True] >= 0.9 * sum(seen.values()), str(seen)


# A step spelled otherwise, or a bound that these inputs do not reach.
NEUTRAL = {
    "computed in float64",
    "decay in place",
    "decay of one",
    "decay with a floor",
    "error bounded",
    "error negated twice",
    "state bounded",
    "state bounded in the middle",
    "state transposed twice",
    "state written over",
    "write by subtraction",
    "write in place",
}


def test_every_other_mutation_changes_what_is_computed():
    silent = set()
    for name in delta_steps.MUTATIONS:
        spelling = Spelling(tokens=4, norm="none")
        rule, inputs = case(spelling, name)
        found, plain = rule(**inputs), case(spelling)[0](**inputs)
        if len(found) == len(plain) and all(map(torch.equal, found, plain)):
            silent.add(name)
    assert silent <= NEUTRAL
