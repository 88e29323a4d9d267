"""Every family of transformers with expert or delta-rule layers; tests/support_table.py shows all.

A few families run by default, -m slow runs the rest.
"""

from __future__ import annotations

import families
import pytest
import support_cases
import torch

QUICK = {"longcat_flash", "zaya"}
FORMS = [form for form in support_cases.FORMS if form.name in support_cases.FEW]
# Families that are not rewritten, or not in every form, and why.
LEFT = {
    "nllb_moe": "each expert is a module of its own, in a loop over data-dependent lists",
    "switch_transformers": "each expert is a module of its own, in a loop over lists",
}
DELTA_EXPORT = "an exported delta rule is unrolled before a rewrite can see it"


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
    if not result.expected or family.name in LEFT:
        return
    if form.path == "export" and "delta_rule" in result.expected:
        pytest.skip(DELTA_EXPORT)
    assert result.whole, result


def test_every_config_can_be_made():
    for family in families.families():
        assert family.config.to_dict()


def test_prompts_are_the_same_every_time():
    family = families.families()[0]
    call = support_cases.Call(family, torch.nn.Identity())
    assert torch.equal(call.prompt(1), call.prompt(1))
    assert not torch.equal(call.prompt(1), call.prompt(2))
