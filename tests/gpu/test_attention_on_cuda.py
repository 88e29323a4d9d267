"""Decode attention on a GPU: every form that PyTorch chooses, compiled, with CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.backend import collected
from inductor_moe.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GROUP = 4


def repeat(x):
    batch, heads, length, dim = x.shape
    x = x[:, :, None].expand(batch, heads, GROUP, length, dim)
    return x.reshape(batch, heads * GROUP, length, dim)


def attend(q, k, v, keep, gate):
    out = scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=keep)
    return out if gate is None else out * gate.sigmoid()


BACKENDS = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, True),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, True),
    "flash": (SDPBackend.FLASH_ATTENTION, False),
}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("length", [40, 1003])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_is_fused(monkeypatch, backend, length, mode):
    # PyTorch's key for a graph does not tell the forms apart.
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", True)
    kind, masked = BACKENDS[backend]
    compiled = torch.compile(attend, backend="inductor_moe", fullgraph=True, mode=mode)
    with torch.no_grad(), sdpa_kernel(kind), collected() as reports:
        for filled in (1, length // 3, length):
            q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(2, 2, length, 64, device="cuda").bfloat16() for _ in range(2))
            keep = torch.arange(length, device="cuda")[None, None, None] < filled
            keep = keep if masked else None
            poisoned = [x.clone() for x in (k, v)]
            if masked:  # what a cache holds past its end may be anything
                for x in poisoned:
                    x[:, :, filled:] = float("nan")
            gate = None if length == 40 else torch.randn_like(q)
            found = compiled(q, *poisoned, keep, gate).clone()
            eager = attend(q, k, v, keep, gate)
            with sdpa_kernel(SDPBackend.MATH):
                wide = None if gate is None else gate.double()
                exact = attend(q.double(), k.double(), v.double(), keep, wide)
            assert found.shape == eager.shape
            assert relative_error(found, exact) <= 2 * relative_error(eager, exact)
    counts = [report.counts() for report in reports]
    assert counts == [{"attention_decode": 1}], [str(report) for report in reports]
    (site,) = reports[0].matched
    assert ("; mask" in site.detail) == masked and ("; gate" in site.detail) == (length != 40)
