"""Every family of transformers with expert or delta-rule layers; tests/support_table.py shows all.

A few families run by default, -m slow runs the rest.
"""

from __future__ import annotations

import contextlib

import families
import pytest
import support_cases
import torch

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
    if not result.expected or family.name in families.WHY_LEFT:
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
