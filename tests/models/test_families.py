"""Every family of transformers with expert or delta-rule layers; tests/support_table.py shows all.

A few families run by default, -m slow runs the rest.
"""

from __future__ import annotations

import contextlib

import families
import pytest
import routing
import support_cases
import torch
import zoo

from inductor_moe import capture_for_export
from inductor_moe.capture import experts
from inductor_moe.capture.delta_rule import applies

QUICK = {"longcat_flash", "zaya"}
FORMS = [form for form in support_cases.FORMS if form.name in support_cases.FEW]


def cases():
    for family in families.families():
        for form in FORMS:
            quick = family.name in QUICK and form.name == FORMS[0].name
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(family, form, id=f"{family.name}-{form.name}", marks=marks)


def test_the_families_are_those_of_transformers():
    found = {family.name for family in families.families()}
    assert set(families.OWN_EXPERTS) <= found
    assert {"mixtral", "qwen3_next", "kimi_linear", "olmo_hybrid"} <= found
    assert len(found) >= 60


@pytest.mark.parametrize("family, form", cases())
def test_family_is_rewritten(family, form):
    result = support_cases.run(family, form)
    assert not result.wrong, result
    assert not result.undecided or family.name in families.UNDECIDED, result
    if not result.expected or family.name in families.WHY_LEFT:
        return
    if form.path == "export" and family.name in families.NOT_EXPORTED:
        assert "data-dependent" in " ".join(result.reasons) and not result.whole
        return
    assert result.whole, result


def test_export_without_our_capture_keeps_the_family_s_own_loop():
    """Its second forward asks Dynamo for whom it traces, and here Dynamo does not trace."""
    family = next(family for family in families.families() if family.name == "step3p7")
    call = support_cases.Call(family, family.build())
    experts.install()
    names = []
    for context in (contextlib.nullcontext, capture_for_export):
        with torch.no_grad(), context():
            program = None
            try:
                program = torch.export.export(call, (call.prompt(0),), strict=False)
            except RuntimeError as error:  # a data-dependent size, as without this package
                assert "data-dependent" in str(error)
        names.append({str(node.target) for node in program.graph.nodes} if program else set())
    ours = "inductor_moe.moe_down_combine.default"
    assert ours not in names[0] and ours in names[1]
    assert not applies()


def test_every_config_can_be_made():
    for family in families.families():
        assert family.config.to_dict()


def test_prompts_are_the_same_every_time():
    family = families.families()[0]
    call = support_cases.Call(family, torch.nn.Identity())
    assert torch.equal(call.prompt(1), call.prompt(1))
    assert not torch.equal(call.prompt(1), call.prompt(2))


class Scores(torch.nn.Module):
    """Chooses two of the scores [N]."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = torch.tensor(scores, dtype=torch.float64)

    def forward(self, dim):
        return self.scores.unsqueeze(1 - dim).topk(2, dim=dim).indices


@pytest.mark.parametrize(
    "low, exact, count",
    [
        ((3, 2.01, 1, 0), (3, 2, 1, 0), 0),
        ((3, 2, 1.96, 0), (3, 2, 1.95, 0), 0),
        ((3, 2, 1.98, 0), (3, 2, 1.97, 0), 1),  # 4 * 0.01 may turn it, 0.03 are between
        ((3, 1.9, 2, 0), (3, 2, 1.99, 0), 1),
        ((3, 2, 2, 0), (3, 2, 2, 0), 0),  # a tie of equals falls alike
        ((3, -torch.inf, -torch.inf), (3.1, -torch.inf, -torch.inf), 0),
        ((3, -torch.inf, 2), (3, 2, -torch.inf), 1),
    ],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_choices_that_rounding_may_turn_are_counted(low, exact, count, dim):
    assert routing.undecided(Scores(*low), Scores(*exact), dim, slack=2.0) == count


@pytest.mark.parametrize("name, decided", [("jetmoe", True), ("zaya", False)])
def test_prompts_are_those_with_the_fewest_undecided_choices(name, decided, monkeypatch):
    monkeypatch.setattr(support_cases, "SEEDS", range(1, 7))
    family = next(family for family in families.families() if family.name == name)
    pair = zoo.prepare(
        support_cases.built(family), torch.bfloat16, "grouped_mm", family.switchable
    )
    form = next(form for form in FORMS if form.path == "export")
    seeds, count = support_cases._prompts(family, form, *pair)
    calls = [support_cases.Call(family, model) for model in pair]
    counts = [
        routing.undecided(*calls, calls[0].prompt(seed), slack=support_cases.SLACK)
        for seed in support_cases.SEEDS
    ]
    chosen = [counts[support_cases.SEEDS.index(seed)] for seed in seeds]
    assert sorted(counts)[: len(seeds)] == chosen and sum(chosen) == count
    assert (count == 0) is decided
