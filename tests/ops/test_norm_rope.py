"""Norm and rotary embedding as one op: schema, checks, kernel, and where it is put in place."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.interpreted import Interpreted
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.backend import collected
from inductor_moe.ops.norm_rope import (
    norm_rope,
    norm_rope_cache,
    norm_rope_cache_cuda,
    norm_rope_cache_plain,
    norm_rope_cuda,
    norm_rope_plain,
)
from inductor_moe.testing import capture, relative_error


def arguments(dim, rotated, norm, dtype, batch=2, tables=()):
    """q is strided, as half of a wider projection; the angles are rows of a table."""
    q = torch.randn(batch, 6, 2 * dim)[..., :dim].to(dtype)
    k = torch.randn(batch, 2, dim).to(dtype)
    weights = [torch.randn(dim).to(dtype) if norm else None for _ in range(2)]
    angles = torch.rand(*tables, rotated) * 6
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return q, k, *weights, 1e-5, 1.0, table[..., 0], table[..., 1]


def by_hand(q, k, q_weight, k_weight, eps, offset, cos, sin):
    """Pair by pair, in fp64."""
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x.double()
        if weight is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)
        out = x.clone()
        c, s = (table.double().expand(len(x), -1)[:, None] for table in (cos, sin))
        half = cos.shape[-1] // 2
        for i in range(half):
            a, b, j = x[..., i], x[..., i + half], i + half
            out[..., i] = a * c[..., i] - b * s[..., i]
            out[..., j] = b * c[..., j] + a * s[..., j]
        results.append(out)
    return results


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 6e-3), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("dim, rotated", [(64, 64), (80, 20), (256, 64), (16, 2)])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tables", [(), (2,)], ids=["one table", "one a row"])
def test_kernel(monkeypatch, tables, norm, dim, rotated, dtype, limit):
    torch.manual_seed(dim + rotated)
    given = arguments(dim, rotated, norm, dtype, tables=tables)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(math.nan)
    )
    found = norm_rope_cuda(*given, wrap=Interpreted)
    monkeypatch.undo()
    for result in (found, norm_rope_plain(*given)):
        for output, expected in zip(result, by_hand(*given), strict=True):
            assert output.dtype == dtype
            assert relative_error(output, expected) <= limit


@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(norm):
    for tables in ((), (2,)):
        given = arguments(32, 8, norm, torch.float32, tables=tables)
        torch.library.opcheck(norm_rope, given)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.ones(6, 32), r"q has dtype torch.float32 and shape \[6, 32\]"),
        (1, torch.ones(2, 2, 30), r"k is torch.float32 \[2, 2, 30\]"),
        (2, None, "must both be given"),
        (3, torch.ones(31), r"k_weight has shape \[31\]"),
        (6, torch.ones(7), r"cos and sin have shapes \[7\] and \[8\]"),
        (6, torch.ones(2, 8), r"cos and sin have shapes \[2, 8\] and \[8\]"),
        ((6, 7), torch.ones(3, 8), r"must be alike and \[R\] or \[2, R\]"),
        ((6, 7), torch.ones(1, 2, 8), r"must be alike and \[R\] or \[2, R\]"),
    ],
)
def test_a_bad_argument_is_named(place, value, message):
    given = list(arguments(32, 8, True, torch.float32))
    for index in place if isinstance(place, tuple) else (place,):
        given[index] = value
    with pytest.raises(ValueError, match=message):
        norm_rope(*given)


def cached(dim, value_dim, position, dtype=torch.float32, length=5):
    """The arguments of norm_rope_cache, values and caches strided, and of norm_rope."""
    given = arguments(dim, dim // 2, True, dtype)
    v = torch.randn(2, 2, 2 * value_dim).to(dtype)[..., ::2]
    keys = torch.randn(2, length, 2, dim).to(dtype).transpose(1, 2)
    values = torch.randn(2, 2, value_dim, length).to(dtype).transpose(2, 3)
    return [*given[:2], v, *given[2:], keys, values, torch.tensor([position])], given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (80, 24), (16, 100)])
@pytest.mark.parametrize("position", [0, 3, 4, -1, -5])
def test_keys_and_values_are_stored(position, dim, value_dim, dtype):
    given, plain = cached(dim, value_dim, position, dtype)
    kept = torch.arange(5) != position % 5
    limit = 6e-3 if dtype == torch.bfloat16 else 1e-6
    q, k = by_hand(*plain)
    for run in (
        lambda *a: norm_rope_cache_cuda(*a, wrap=Interpreted), norm_rope_cache_plain,
        norm_rope_cache,
    ):  # fmt: skip
        mine = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        assert relative_error(run(*mine), q) <= limit
        for before, after, stored in zip(given[9:11], mine[9:11], (k, given[2]), strict=True):
            assert torch.equal(after[:, :, kept], before[:, :, kept])
            assert relative_error(after[:, :, position], stored) <= limit


@pytest.mark.parametrize("position", [5, -6, 1 << 40])
def test_nothing_is_stored_outside_the_cache(position):
    given, _ = cached(16, 16, position)
    wide = [torch.zeros(2, 2, 15, 16) for _ in range(2)]
    given[9:11] = [x[:, :, 5:10] for x in wide]
    norm_rope_cache_cuda(*given, wrap=Interpreted)
    assert not any(x.count_nonzero() for x in wide)
    with pytest.raises((IndexError, RuntimeError)):
        norm_rope_cache(*given)


def test_opcheck_with_a_cache():
    torch.library.opcheck(norm_rope_cache, tuple(cached(16, 24, 3)[0]))


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.ones(6, 16), r"q has dtype torch.float32 and shape \[6, 16\]"),
        (2, torch.ones(2, 3, 24), r"v is torch.float32 \[2, 3, 24\]; .*\[2, 2, DV\]"),
        (9, torch.ones(2, 2, 5, 24), r"k_cache is .*; it must be torch.float32 \[2, 2, L, 16\]"),
        (10, torch.ones(2, 2, 6, 24), r"v_cache is .*\[2, 2, 6, 24\]; .* L that of k_cache"),
        (10, torch.ones(2, 2, 5, 24).half(), r"v_cache is torch.float16"),
        (11, torch.ones(2, dtype=torch.int64), r"position is torch.int64 \[2\]"),
        (11, torch.ones(1), r"position is torch.float32 \[1\]; it must be one integer"),
    ],
)
def test_a_bad_argument_of_the_cache_is_named(place, value, message):
    given, _ = cached(16, 24, 3)
    given[place] = value
    with pytest.raises(ValueError, match=message):
        norm_rope_cache(*given)


def turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """A decode step of attention on a static cache, as transformers writes it."""

    def __init__(self, dim=16, part=None, normed=True, change=None):
        super().__init__()
        torch.manual_seed(8)
        self.dim, self.part, self.normed, self.change = dim, part or dim, normed, change
        self.q_weight, self.k_weight = (nn.Parameter(torch.randn(dim) / 4) for _ in range(2))

    def norm(self, x, weight):
        if not self.normed:
            return x
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + weight.float())).type_as(x)

    def rotate(self, x, cos, sin):
        if self.part == self.dim:
            return turned(x, cos, sin)
        rotated, rest = x[..., : self.part], x[..., self.part :]
        return torch.cat([turned(rotated, cos, sin), rest], -1)

    def forward(self, q, k, v, keys, values, position, cos, sin):
        cos, sin = cos[:, None], sin[:, None]
        q = self.norm(q, self.q_weight).transpose(1, 2)
        k = self.norm(k, self.k_weight).transpose(1, 2)
        if self.change == "angles":
            q, k = self.rotate(q, cos, sin), self.rotate(k, sin, cos)
        elif self.change == "one eps":
            q = self.rotate(q, cos, sin)
            k = self.rotate(k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-3), cos, sin)
        elif self.change == "sign":
            first, second = q.chunk(2, -1)
            q = q * cos + torch.cat([second, -first], -1) * sin
            k = self.rotate(k, cos, sin)
        elif self.change == "neighbours":
            q = q * cos + torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2) * sin
            k = self.rotate(k, cos, sin)
        elif self.change == "scaled":
            q, k = self.rotate(q, cos, sin) * 2, self.rotate(k, cos, sin)
        else:
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        self.store(keys, values, k, v.transpose(1, 2), position)
        keep = (torch.arange(keys.shape[2]) <= position)[None, None, None]
        heads = q.shape[1] // keys.shape[1]
        k, v = (x.repeat_interleave(heads, 1) for x in (keys, values))
        return scaled_dot_product_attention(q, k, v, attn_mask=keep)

    def store(self, keys, values, k, v, position):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)


class Cached(Attention):
    """Stores in ways for which the caches stay with Inductor."""

    def store(self, keys, values, k, v, position):
        if self.change == "two positions":
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position - 1, v)
        elif self.change == "read before":
            keys.index_copy_(2, position, k + keys[:, :, :1])
            values.index_copy_(2, position, v)
        elif self.change == "values read elsewhere":
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v + values.mean())
        elif self.change == "added":
            keys.index_copy_(2, position, k)
            values.index_add_(2, position, v)
        else:
            assert self.change == "keys used elsewhere"
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v + k)


def inputs(dim, part, dtype, batch, tables=1):
    q = torch.randn(batch, 1, 4, 2 * dim)[..., :dim]
    k, v = torch.randn(2, batch, 1, 2, dim)
    keys, values = torch.randn(2, batch, 2, 12, dim)
    angles = torch.rand(tables, 1, part) * 6
    tensors = [x.to(dtype) for x in (q, k, v, keys, values)]
    return [*tensors, torch.tensor([5]), angles.cos().to(dtype), angles.sin().to(dtype)]


def compared(module, given):
    """The report of the compiled module, whose outputs and cache were right."""

    def run(function, dtype=None):
        mine = [x.clone() if dtype is None or not x.is_floating_point() else x.to(dtype)
                for x in given]  # fmt: skip
        return [function(*mine), mine[3], mine[4]]

    eager = run(module)
    dtype = module.q_weight.dtype
    exact = run(module.double(), torch.float64)
    module.to(dtype)
    reports = []

    def compiled(*mine):
        found, report = capture(module, *mine)
        reports.append(report)
        return found

    for output, value, reference in zip(run(compiled), eager, exact, strict=True):
        limit = 2 * relative_error(value, reference) + 1e-6
        assert relative_error(output, reference) <= limit
    return reports[0]


FORMS = {
    "whole, normed": {},
    "part, normed": {"part": 8},
    "whole": {"normed": False},
    "part": {"part": 4, "normed": False},
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch, tables", [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_what_is_put_in_place(options, batch, tables, dtype):
    module = Attention(**options).to(dtype)
    report = compared(module, inputs(16, options.get("part", 16), dtype, batch, tables))
    assert report.counts() == {"attention_decode": 1, "norm_rope": 1}
    (site,) = (site for site in report.matched if site.op == "norm_rope")
    norm = ", norm" if options.get("normed", True) else ""
    assert site.detail == f"B={batch} Hq=4 Hkv=2 D=16 R={options.get('part', 16)}{norm}; cache"


@torch.no_grad()
def test_steps_compiled_by_inductor():
    module = Attention()
    compiled = torch.compile(module, backend="inductor_moe", fullgraph=True)
    given = inputs(16, 16, torch.float32, 2)
    mine = [x.clone() for x in given]
    with collected() as reports:
        for position in (0, 5, 1, 11):
            for place in (0, 1, 2):
                given[place] = mine[place] = torch.randn_like(given[place])
            given[5] = mine[5] = torch.tensor([position])
            assert relative_error(compiled(*mine), module(*given)) < 1e-5
            for found, expected in zip(mine[3:5], given[3:5], strict=True):
                assert relative_error(found, expected) < 1e-5
    assert any(site.detail.endswith("; cache") for site in reports[0].matched)


CHANGES = (
    "two positions", "read before", "values read elsewhere", "added", "keys used elsewhere",
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_other_caches_are_left_alone(change, batch):
    report = compared(Cached(change=change), inputs(16, 16, torch.float32, batch))
    assert report.counts()["attention_decode"] == 1
    assert not any("; cache" in site.detail for site in report.matched)


@torch.no_grad()
@pytest.mark.parametrize("change", ["angles", "one eps", "sign", "neighbours", "scaled"])
def test_near_miss_is_left_alone(change):
    module = Attention(normed=change != "one eps", change=change)
    report = compared(module, inputs(16, 16, torch.float32, 2))
    assert report.counts() == {"attention_decode": 1}
