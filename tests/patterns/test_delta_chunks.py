"""Unrolled chunks of the delta rule become one op; what differs in one step does not."""

from __future__ import annotations

import chunk_forms
import pytest
import torch
from rewriting import check_fused, check_untouched

from inductor_moe.reference.delta_rule import delta_rule_recurrent


@pytest.mark.parametrize("inverse", ["solve", "rows"])
@pytest.mark.parametrize("tokens", [8, 16, 21])
def test_chunks_become_the_op(tokens, inverse):
    site = check_fused(chunk_forms.chunk_rule(8, inverse), chunk_forms.inputs(tokens))
    assert f"{-(-tokens // 8)} chunks of 8" in site.detail
    assert "l2 norm inside" in site.detail


@pytest.mark.parametrize("tokens", [16, 21])
def test_chunks_without_decay_become_the_op(tokens):
    site = check_fused(chunk_forms.chunk_rule(8, decay=False), chunk_forms.inputs(tokens))
    assert "no decay" in site.detail


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize(
    ("tokens", "form"),
    [(10, "recurrent"), (10, "chunk"), pytest.param(70, "chunk", marks=pytest.mark.slow)],
)
def test_the_functions_of_transformers_become_the_op(family, tokens, form):
    if family == "qwen3_next":
        from transformers.models.qwen3_next import modeling_qwen3_next as modeling

        function = getattr(modeling, f"torch_{form}_gated_delta_rule")
    else:
        from transformers.models.kimi_linear import modeling_kimi_linear as modeling

        function = getattr(modeling, f"{form}_kimi_delta_attention")

    def rule(q, k, v, g, b, state):
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return function(q, k, v, g=g, beta=b.sigmoid(), initial_state=state, **options)

    def oracle(q, k, v, g, b, state):
        scale = q.shape[-1] ** -0.5
        return delta_rule_recurrent(q, k, v, g, b.sigmoid(), state, scale, 1e-6)

    check_fused(
        rule, chunk_forms.inputs(tokens, per_channel=family == "kimi_linear"), oracle=oracle
    )


NEAR_MISSES = {
    "a token sees the next": {"future": lambda x: x.triu(2)},
    "a token does not see itself": {"future": lambda x: x.triu(0)},
    "the solve leaves out the last neighbour": {"lower": lambda x: x.tril(-2)},
    "no solve": {"lower": lambda x: 0 * x},
    "the solve with the other sign": {"lower": lambda x: -x.tril(-1)},
    "no decay within a chunk": {"within": lambda x, d: x * (d > 0)},
    "no decay from the chunk's start": {"start": lambda t: torch.ones_like(t)},
    "the start decays too much": {"start": lambda t: (2 * t).exp()},
    "memory added": {"new": lambda w, r, s: w + r @ s},
    "memory ignored": {"new": lambda w, r, s: w + 0 * (r @ s)},
    "memory bounded": {"new": lambda w, r, s: (w - r @ s).clamp(-20, 20)},
    "the chunk's first decay for all": {"whole": lambda t: t[..., 0]},
    "the first chunk's keys again": {"end": lambda i: 0},
    "chunks in reverse": {"outputs": lambda x: x[::-1]},
    "a chunk twice": {"outputs": lambda x: [x[0], *x[:-1]]},
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone(name):
    check_untouched(chunk_forms.chunk_rule(8, **NEAR_MISSES[name]), chunk_forms.inputs(21))
