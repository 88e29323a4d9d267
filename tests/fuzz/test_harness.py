"""What the fuzzer's comparison forgives, values that bf16 rounds either way, and how it counts."""

from __future__ import annotations

import collections

import harness
import torch
from harness import without_ties


def neighbours():
    original = torch.randn(400).bfloat16()
    return original.float(), (original.view(torch.int16) + 1).view(torch.bfloat16).float()


def test_few_neighbours_are_ties():
    original, other = neighbours()
    found = torch.where(torch.arange(400) < 4, other, original)
    assert torch.equal(without_ties(found, original), original)


def test_many_neighbours_are_not():
    original, other = neighbours()
    found = torch.where(torch.arange(400) < 5, other, original)
    assert torch.equal(without_ties(found, original), found)


def test_values_that_were_not_rounded_are_not():
    original, other = neighbours()
    found = original.clone()
    found[0] = (original[0] + other[0]) / 2 * (1 + 1e-6)
    assert torch.equal(without_ties(found, original), found)


def test_values_further_off_are_not():
    original, _ = neighbours()
    found = original.clone()
    found[0] *= 1.0625
    assert torch.equal(without_ties(found, original), found)


def test_summary_of_counts(monkeypatch):
    monkeypatch.setattr(harness, "COUNTS", collections.Counter())
    right, wrong = harness.Outcome((), 0.0, 1.0), harness.Outcome((), 2.0, 1.0)
    harness.count("experts", False, True, right)
    harness.count("experts", False, False, harness.Outcome(()))
    harness.count("experts", True, True, wrong)
    assert harness.summary(harness.COUNTS) == [
        "mutated experts: 1 cases, 100.0% rewritten, 1 wrong",
        "plain experts: 2 cases, 50.0% rewritten, 0 wrong",
        "all: 3 cases, 1 wrong",
    ]
