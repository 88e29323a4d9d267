"""Attention on a GPU: every form that PyTorch chooses, compiled, with CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.backend import collected
from inductor_moe.ops.attention_prompt import attention_prompt
from inductor_moe.reference.attention import attention_prompt_reference
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


def causal(queries, length, before):
    position = before + torch.arange(queries, device="cuda")[:, None]
    return (torch.arange(length, device="cuda") <= position)[None, None]


PROMPTS = {
    # name: (B, Hq, Hkv, T, L, D, DV)
    "qwen3_5": (1, 16, 2, 600, 1030, 256, 256),
    "qwen3_5, short": (2, 16, 2, 33, 300, 256, 256),
    "qwen3": (2, 32, 4, 511, 515, 128, 128),
    "gpt_oss": (1, 64, 8, 257, 700, 64, 64),
    "deepseek_v3": (1, 16, 16, 140, 333, 192, 128),
    "odd dims": (3, 12, 4, 130, 200, 96, 80),
    "longer than its cache": (1, 4, 2, 300, 64, 128, 128),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "window", "holes", "padded"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, kind, dtype):
    batch, heads, kv_heads, queries, length, dim, value_dim = PROMPTS[name]
    before = max(0, length - queries) // 2
    q = torch.randn(batch, queries, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    k = torch.randn(batch, length, kv_heads, dim, device="cuda").to(dtype).transpose(1, 2)
    v = torch.randn(batch, kv_heads, length, value_dim, device="cuda").to(dtype)
    keep = causal(queries, length, before)
    position = torch.arange(length, device="cuda")
    if kind == "window":
        keep = keep & ~causal(queries, length, before - 100)
    elif kind == "holes":
        keep = torch.rand(batch, 1, queries, length, device="cuda") < 0.1
        keep[..., 128:192] = True
    elif kind == "padded":
        first = torch.randint(0, length // 2, (batch, 1, 1, 1), device="cuda")
        keep = keep & (position >= first)
    expected = attention_prompt_reference(q.double(), k.double(), v.double(), keep, dim**-0.5)
    if kind == "causal":
        # No query sees these, whatever the block it is in.
        for x in (k, v):
            x[:, :, -(-(before + queries) // 128) * 128 :] = float("nan")
    found = attention_prompt(q, k, v, keep, dim**-0.5)
    assert found.transpose(1, 2).is_contiguous()
    assert relative_error(found, expected) <= (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
@pytest.mark.parametrize("queries, length", [(40, 40), (200, 1003), (257, 520)])
def test_prompts_of_every_form_are_fused(monkeypatch, queries, length, backend, mode):
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", True)
    compiled = torch.compile(attend, backend="inductor_moe", fullgraph=True, mode=mode)
    kind, _ = BACKENDS[backend]
    with torch.no_grad(), sdpa_kernel(kind), collected() as reports:
        for before in (0, (length - queries) // 3, length - queries):
            q = torch.randn(2, queries, 8, 64, device="cuda").bfloat16().transpose(1, 2)
            k, v = (torch.randn(2, 2, length, 64, device="cuda").bfloat16() for _ in range(2))
            keep = causal(queries, length, before)
            found = compiled(q, k, v, keep, None).clone()
            eager = attend(q, k, v, keep, None)
            with sdpa_kernel(SDPBackend.MATH):
                exact = attend(q.double(), k.double(), v.double(), keep, None)
            assert relative_error(found, exact) <= 2 * relative_error(eager, exact)
    counts = [report.counts() for report in reports]
    assert counts == [{"attention_prompt": 1}], [str(report) for report in reports]
