"""Hand-written delta rules become the op in every spelling."""

from __future__ import annotations

import delta_forms
import pytest
from rewriting import check_fused


@pytest.mark.parametrize("spelling", list(delta_forms.spellings(100)), ids=str)
def test_a_spelling_becomes_the_op(spelling):
    check_fused(delta_forms.delta_rule(spelling), delta_forms.inputs(spelling))
