"""What does one step of the delta rule differently is no delta rule and stays as it is."""

from __future__ import annotations

import delta_forms
import pytest
import torch
from delta_forms import Spelling
from delta_steps import ALWAYS, AROUND, LOOPS, ROUNDINGS
from rewriting import check_fused, check_untouched

NEAR_MISSES = [
    pytest.param(
        Spelling(tokens=tokens, products=products, norm="none"), steps, id=f"{name}, T={tokens}"
    )
    for forms, lengths in ((ALWAYS, (1, 4)), (ROUNDINGS, (4,)), (AROUND, (4,)), (LOOPS, (4,)))
    for name, steps in forms.items()
    for tokens, products in zip(lengths, ("sum", "matmul"), strict=False)
]


@pytest.mark.parametrize(("spelling", "steps"), NEAR_MISSES)
def test_a_near_miss_is_left_alone(spelling, steps):
    check_untouched(delta_forms.delta_rule(spelling, **steps), delta_forms.inputs(spelling))


@pytest.mark.parametrize("name", AROUND)
def test_what_surrounds_a_single_step_stays(name):
    spelling = Spelling(norm="none")
    check_fused(delta_forms.delta_rule(spelling, **AROUND[name]), delta_forms.inputs(spelling))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_to_the_dtype_of_the_model_is_no_near_miss(name):
    """The op keeps digits that a bf16 model loses, as everywhere: the truth has no rounding."""
    spelling = Spelling(norm="none", dtype=torch.bfloat16)
    check_fused(
        delta_forms.delta_rule(spelling, **ROUNDINGS[name]),
        delta_forms.inputs(spelling),
        oracle=delta_forms.delta_rule(spelling),
    )
