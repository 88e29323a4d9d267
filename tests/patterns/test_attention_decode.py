"""Decode attention: what matches, on which tensors, and what must not."""

from __future__ import annotations

import operator

import pytest
import torch
from attention_forms import (
    FORMS,
    HKV,
    HQ,
    INF,
    B,
    D,
    L,
    additive,
    cudnn,
    draw,
    efficient,
    exact,
    flash,
    fused,
    on_cpu,
    op_arguments,
    repeat,
)
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe.config import Options
from inductor_moe.passes import rewrite
from inductor_moe.patterns import Refusal
from inductor_moe.patterns.attention.decode import DECODE
from inductor_moe.testing import relative_error

aten = torch.ops.aten


def keep_of(batch=B, length=L):
    keep = torch.rand(batch, 1, 1, length) < 0.6
    keep[..., 3] = True
    return keep


def arguments_of(function, *arguments):
    return op_arguments("attention_decode", function, *arguments)


def check(function, arguments, expected, tolerance=2e-6):
    graph, site = fused(function, arguments)
    assert site.matched and site.op == "attention_decode" and "scaled_dot_product" in site.before
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("inductor_moe.attention_decode.default") == 1
    assert not any("scaled_dot_product" in target for target in targets)
    found = graph(*arguments)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < tolerance
    return site


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scale", [None, 0.31])
def test_forms(name, scale):
    q, k, v = draw()
    keep = None if name == "flash" else keep_of()

    def function(q, k, v, keep):
        mask = None if keep is None else additive(keep).expand(B, HQ, 1, L)
        return FORMS[name](q, repeat(k), repeat(v), mask, scale)[0]

    site = check(function, (q, k, v, keep), exact(q, k, v, keep, scale))
    assert site.detail == f"B={B} Hq={HQ} Hkv={HKV} D={D} L={L}" + (
        "; mask" if keep is not None else ""
    )
    found = arguments_of(function, q, k, v, keep)
    assert found[1].shape == k.shape and found[2].shape == v.shape
    assert keep is None or found[3].dtype == torch.bool


def test_a_padded_mask_is_read_before_its_padding():
    q, k, v = draw()

    def function(q, k, v, keep):
        padded = torch.nn.functional.pad(additive(keep), (0, 11))[..., :L]
        return efficient(q, repeat(k), repeat(v), padded.expand(B, HQ, 1, L))[0]

    arguments = (q, k, v, keep_of())
    check(function, arguments, exact(*arguments))
    assert arguments_of(function, *arguments)[3].dtype == torch.bool


@pytest.mark.parametrize("form", [cudnn, efficient])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [-65504.0, -65536.0, -60000.0, "lowest"])
def test_a_bool_mask_as_cudnn_gets_it(form, dtype, hidden):
    arguments = (*draw(dtype=dtype), keep_of())
    if hidden == "lowest":
        hidden = torch.finfo(dtype).min
    rounded = torch.tensor(hidden, dtype=dtype).item()

    def function(q, k, v, keep):
        mask = torch.where(
            keep, torch.full([], 0.0, dtype=dtype), torch.full([], rounded, dtype=dtype)
        )
        return form(q, repeat(k), repeat(v), mask.expand(B, HQ, 1, L))[0]

    read = arguments_of(function, *arguments)[3].dtype
    handed = form is cudnn and rounded == torch.tensor(-65504.0, dtype=dtype).item()
    assert read == (torch.bool if handed or rounded == -INF else dtype)


def gated(attend, q, k, v, gate, form):
    """[B, 1, HQ * D], as models write it."""
    out = attend(q, repeat(k), repeat(v), None)[0].transpose(1, 2)
    batch = q.shape[0]
    flat = out.reshape(batch, 1, -1)
    factor = gate.reshape(batch, 1, -1).sigmoid()
    if form == "left":
        return factor * flat
    if form == "right":
        return flat * factor
    if form == "four dims":
        return (out * gate.sigmoid()).contiguous().view(batch, 1, -1)
    if form == "not a sigmoid":
        return flat * gate.reshape(batch, 1, -1).tanh()
    if form == "a factor a head":
        return (out * gate[..., :1].sigmoid()).reshape(batch, 1, -1)
    if form == "heads and channels swapped":
        return flat * gate.transpose(2, 3).reshape(batch, 1, -1).sigmoid()
    if form == "output read elsewhere":
        return flat * factor + flat
    if form == "product in fp32":
        return flat.double() * factor
    assert form == "plus"
    return flat + factor


GATED = ("left", "right", "four dims", "heads and channels swapped")
UNGATED = ("not a sigmoid", "a factor a head", "output read elsewhere", "product in fp32", "plus")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", GATED + UNGATED)
def test_gates(form, batch):
    q, k, v = draw(batch)
    gate = torch.randn(batch, 1, HQ, 2 * D)[..., D:]

    def function(q, k, v, gate):
        return gated(cudnn, q, k, v, gate, form)

    expected = gated(
        lambda q, k, v, _: (exact(q, k, v),), *(x.double() for x in (q, k, v, gate)), form
    )
    site = check(function, (q, k, v, gate), expected)
    assert site.detail.endswith("; gate") == (form in GATED)


def test_no_gate_where_the_cache_is_written_before_it():
    q, k, v = draw()
    gate = torch.randn(B, HQ, 1, D)
    graph, _ = fused(lambda q, k, v, gate: cudnn(q, k, v, None)[0] * gate.sigmoid(),
                     (q, repeat(k), repeat(v), gate))  # fmt: skip
    (attention,) = (n for n in graph.graph.nodes if "attention_decode" in str(n.target))
    assert attention.args[5] is not None
    traced = make_fx(lambda q, k, v, gate: cudnn(q, k, v, None)[0] * gate.sigmoid(),
                     tracing_mode="fake")(q, repeat(k), repeat(v), gate)  # fmt: skip
    (node,) = (n for n in traced.graph.nodes if "cudnn" in str(n.target))
    with traced.graph.inserting_after(node):
        write = traced.graph.call_function(aten.copy_.default, (node.args[1], node.args[2]))
        write.meta["val"] = node.args[1].meta["val"]
    (site,) = rewrite(traced.graph, Options(strict=True))
    assert site.matched and "gate" not in site.detail


MASKS = {
    "lowest number": lambda keep: torch.where(keep, 0.0, torch.finfo(torch.float32).min),
    "the other way round": lambda keep: torch.where(keep, -INF, 0.0),
    "a bias": lambda keep: additive(keep) + torch.arange(L) / 7,
    "one row for all": lambda keep: additive(keep[:1]),
    "two dims": lambda keep: additive(keep)[0, 0],
}


@pytest.mark.parametrize("name", MASKS)
def test_float_masks(name):
    q, k, v = draw()
    keep = keep_of()

    def function(q, k, v, keep):
        return on_cpu(q, repeat(k), repeat(v), MASKS[name](keep))[0]

    check(function, (q, k, v, keep), exact(q, k, v, MASKS[name](keep)))


HEADS = {
    # name: (how k is repeated, how v is repeated, heads of the tensors that the op reads)
    "no group": (lambda k: k.index_select(1, torch.arange(HQ) // 3), None, HQ),
    "interleaved": (lambda k: k.repeat(1, 3, 1, 1), None, HQ),
    "interleaved by a view": (
        lambda k: k[:, None].expand(B, 3, HKV, L, D).reshape(B, HQ, L, D), None, HQ,
    ),
    "repeat_interleave": (lambda k: k.repeat_interleave(3, 1), None, HKV),
    "keys alone": (repeat, lambda v: v.repeat(1, 3, 1, 1), HQ),
    "values alone": (lambda k: k.repeat(1, 3, 1, 1), repeat, HQ),
    "positions permuted": (lambda k: repeat(k.transpose(1, 2).contiguous().transpose(1, 2)),
                           None, HKV),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_repeated_in_the_order_of_the_graph(name):
    keys, values, heads = HEADS[name]
    q, k, v = draw()

    def function(q, k, v):
        return on_cpu(q, keys(k), (values or keys)(v), None)[0]

    check(function, (q, k, v), exact(q, keys(k), (values or keys)(v)))
    found = arguments_of(function, q, k, v)
    assert found[1].shape[1] == found[2].shape[1] == heads


def test_one_head_of_keys():
    q, k, v = draw(kv_heads=1)

    def function(q, k, v):
        return on_cpu(q, k.expand(B, HQ, L, D), v.expand(B, HQ, L, D), None)[0]

    check(function, (q, k, v), exact(q, k, v))
    assert arguments_of(function, q, k, v)[1].shape[1] == 1


def test_groups_that_the_attention_itself_knows():
    q, k, v = draw()
    check(lambda q, k, v: flash(q, k, v, None)[0], (q, k, v), exact(q, k, v))


def test_values_of_another_width():
    q, k, v = draw(value_dim=24)
    site = check(
        lambda q, k, v: efficient(q, repeat(k), repeat(v), None)[0], (q, k, v), exact(q, k, v)
    )
    assert f"D={D} DV=24" in site.detail


def test_a_composite_call_in_the_graph():
    q, k, v = draw()
    traced = make_fx(lambda q, k, v: cudnn(q, k, v, None)[0], tracing_mode="fake")(q, k, v)
    (node,) = (n for n in traced.graph.nodes if "cudnn" in str(n.target))
    for item in list(node.users):
        item.replace_all_uses_with(node)
        traced.graph.erase_node(item)
    node.target, node.args = aten.scaled_dot_product_attention.default, node.args[:3]
    node.kwargs = {"enable_gqa": True, "scale": 0.2}
    node.meta["val"] = node.meta["val"][0]
    kwargs, node.kwargs = node.kwargs, {"scale": 0.2}
    with pytest.raises(Refusal, match="6 query heads share 2 heads"):
        DECODE.walk(node)
    node.kwargs = kwargs
    (site,) = rewrite(traced.graph, Options(strict=True))
    traced.recompile()
    assert site.matched
    assert relative_error(traced(q, k, v), exact(q, k, v, scale=0.2)) < 2e-6


def with_log_sum_exp(q, k, v):
    found = on_cpu(q, repeat(k), repeat(v), None)
    return found[0] + found[1][..., None]


NEAR_MISSES = {
    "2 query positions": lambda q, k, v: on_cpu(
        torch.cat([q, q], 2), repeat(k), repeat(v), None)[0],
    "causal": lambda q, k, v: cudnn(q, repeat(k), repeat(v), None, causal=True)[0],
    "dropout": lambda q, k, v: cudnn(q, repeat(k), repeat(v), None, dropout=0.1)[0],
    "more than the attention's output": with_log_sum_exp,
    "not one value for each position": lambda q, k, v: on_cpu(
        q, repeat(k), repeat(v), torch.zeros(1, HQ, 1, L))[0],
    "a position": lambda q, k, v: on_cpu(
        q, repeat(k), repeat(v), torch.zeros(1, 1, 1, 1).expand(1, 1, 1, L))[0],
    "dtypes are torch.float64": lambda q, k, v: on_cpu(
        q.double(), repeat(k).double(), repeat(v).double(), None)[0],
    "heads of 272": lambda q, k, v: on_cpu(
        q.repeat(1, 1, 1, 17), repeat(k).repeat(1, 1, 1, 17), repeat(v), None)[0],
    "in several places": lambda q, k, v: list(
        operator.getitem(on_cpu(q, repeat(k), repeat(v), None), slice(0, 2))),
}  # fmt: skip
REASONS = {"a position": "not one value", "in several places": "more than the attention's output"}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    traced = make_fx(NEAR_MISSES[name], tracing_mode="fake")(*draw())
    anchors = list(DECODE.anchors(traced.graph))
    assert len(anchors) == 1
    with pytest.raises(Refusal, match=REASONS.get(name, name)):
        DECODE.walk(anchors[0])
    assert rewrite(traced.graph, Options(strict=True)) == []
    assert not any("inductor_moe" in str(node.target) for node in traced.graph.nodes)


def test_bf16_is_as_exact_as_eager():
    q, k, v = draw(dtype=torch.bfloat16, length=300, dim=64, value_dim=64)
    keep = keep_of(length=300)

    def function(q, k, v, keep):
        return on_cpu(q, repeat(k), repeat(v), additive(keep, q.dtype))[0]

    expected = exact(q, k, v, keep)
    eager = relative_error(function(q, k, v, keep), expected)
    check(function, (q, k, v, keep), expected, 2 * eager)
