"""Prompt attention: what matches, on which tensors, and what must not."""

from __future__ import annotations

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
    fused,
    on_cpu,
    op_arguments,
    repeat,
)
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe.config import Options
from inductor_moe.passes import rewrite
from inductor_moe.patterns import Refusal
from inductor_moe.patterns.attention.prompt import LEAST_QUERIES, PROMPT
from inductor_moe.testing import relative_error

T = LEAST_QUERIES + 1
BF16 = torch.bfloat16
MASKED = [name for name in FORMS if name != "flash"]


def inputs(dtype=BF16, queries=T, **options):
    return draw(queries=queries, dtype=dtype, **options)


def keep_of(rows=B, queries=T, length=L):
    keep = torch.rand(rows, 1, queries, length) < 0.6
    keep[..., 3] = True
    return keep


def arguments_of(function, *arguments):
    return op_arguments("attention_prompt", function, *arguments)


def check(function, arguments, expected):
    graph, site = fused(function, arguments)
    assert site.matched and site.op == "attention_prompt" and "scaled_dot_product" in site.before
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("inductor_moe.attention_prompt.default") == 1
    assert not any("scaled_dot_product" in target for target in targets)
    found = graph(*arguments)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 5e-3
    return site


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("scale", [None, 0.31])
def test_forms(name, scale):
    arguments = (*inputs(), keep_of())

    def function(q, k, v, keep):
        mask = additive(keep, q.dtype).expand(B, HQ, T, L)
        return FORMS[name](q, repeat(k), repeat(v), mask, scale)[0]

    site = check(function, arguments, exact(*arguments, scale))
    assert site.detail == f"B={B} Hq={HQ} Hkv={HKV} D={D} T={T} L={L}; mask"
    q, k, _, mask, _ = arguments_of(function, *arguments)
    assert q.shape[1] == HQ and k.shape[1] == HKV
    assert mask.dtype == torch.bool and mask.shape == (B, 1, T, L)


MASKS = {
    "one for all rows": (1, 1, T, L),
    "two dims": (T, L),
    "the same for every query": (B, 1, 1, L),
    "one line": (L,),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_broadcast(name):
    shape = MASKS[name]
    keep = torch.rand(shape) < 0.6
    keep[..., 3] = True

    def function(q, k, v, keep):
        mask = additive(keep, q.dtype).expand(B, HQ, T, L)
        return efficient(q, repeat(k), repeat(v), mask)[0]

    arguments = (*inputs(), keep)
    check(function, arguments, exact(*arguments))
    four = (*(1,) * (4 - len(shape)), *shape)
    assert arguments_of(function, *arguments)[3].shape == four


def test_a_padded_mask_is_read_before_its_padding():
    def function(q, k, v, keep):
        padded = torch.nn.functional.pad(additive(keep, q.dtype), (0, 11))[..., :L]
        return efficient(q, repeat(k), repeat(v), padded.expand(B, HQ, T, L))[0]

    arguments = (*inputs(), keep_of())
    check(function, arguments, exact(*arguments))


def test_a_bool_mask_as_cudnn_gets_it():
    hidden = torch.tensor(-65504.0, dtype=BF16).item()

    def function(q, k, v, keep):
        mask = torch.where(
            keep, torch.full([], 0.0, dtype=BF16), torch.full([], hidden, dtype=BF16)
        )
        return cudnn(q, repeat(k), repeat(v), mask.expand(B, HQ, T, L))[0]

    arguments = (*inputs(), keep_of())
    check(function, arguments, exact(*arguments))


def test_a_mask_turned_by_a_choice_between_bools():
    hidden = torch.tensor(-65504.0, dtype=BF16).item()

    def function(q, k, v, keep):
        seen = torch.where(keep, torch.full([], False), torch.full([], True))
        mask = torch.where(
            seen, torch.full([], 0.0, dtype=BF16), torch.full([], hidden, dtype=BF16)
        )
        return cudnn(q, repeat(k), repeat(v), mask.expand(B, HQ, T, L))[0]

    keep = keep_of()
    arguments = (*inputs(), keep)
    check(function, arguments, exact(*arguments[:3], ~keep))


def test_the_output_lies_as_the_next_layer_reads_it():
    arguments = (*inputs(), keep_of())

    def function(q, k, v, keep):
        out = on_cpu(q, repeat(k), repeat(v), additive(keep, q.dtype))[0]
        return out.transpose(1, 2).reshape(B, T, HQ * D)

    check(function, arguments, exact(*arguments).transpose(1, 2).flatten(2))
    graph, _ = fused(function, arguments)
    graph.graph.eliminate_dead_code()
    (op,) = (n for n in graph.graph.nodes if "attention_prompt" in str(n.target))
    assert op.meta["val"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dims", [{"value_dim": 24}, {"kv_heads": 1}, {"kv_heads": HQ}], ids=str)
def test_dims(dims):
    arguments = (*inputs(**dims), keep_of())
    group = HQ // dims.get("kv_heads", HKV)

    def function(q, k, v, keep):
        k, v = (repeat(x, group) if group > 1 else x for x in (k, v))
        return on_cpu(q, k, v, additive(keep, q.dtype))[0]

    check(function, arguments, exact(*arguments))


NEAR_MISSES = {
    "15 query positions": (lambda q, k, v, keep: on_cpu(
        q[:, :, :15], k, v, additive(keep, q.dtype)[:, :, :15])[0]),
    "causal by a flag": lambda q, k, v, keep: cudnn(q, k, v, None, causal=True)[0],
    "there is dropout": lambda q, k, v, keep: cudnn(
        q, k, v, additive(keep, q.dtype), dropout=0.1)[0],
    "no bool mask": lambda q, k, v, keep: on_cpu(q, k, v, None)[0],
    "not one value for each position": lambda q, k, v, keep: on_cpu(
        q, k, v, torch.cat([additive(keep, q.dtype)] * HQ, 1))[0],
    "dtype is torch.float32": lambda q, k, v, keep: on_cpu(
        q.float(), k.float(), v.float(), additive(keep))[0],
    "scale is -0.3": lambda q, k, v, keep: on_cpu(q, k, v, additive(keep, q.dtype), -0.3)[0],
    "more than the attention's output": lambda q, k, v, keep: list(
        on_cpu(q, k, v, additive(keep, q.dtype))),
}  # fmt: skip
# Masks that are no choice between 0 and -inf.
FLOATS = {
    "a bias": lambda keep, dtype: additive(keep, dtype) + 1,
    "the lowest number": lambda keep, dtype: torch.where(
        keep, torch.full([], 0.0, dtype=dtype),
        torch.full([], torch.finfo(dtype).min, dtype=dtype)),
    "the other way round": lambda keep, dtype: torch.where(
        keep, torch.full([], -INF, dtype=dtype), torch.full([], 0.0, dtype=dtype)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NEAR_MISSES, *FLOATS])
def test_near_misses(name):
    def function(q, k, v, keep):
        if name in NEAR_MISSES:
            return NEAR_MISSES[name](q, k, v, keep)
        return on_cpu(q, k, v, FLOATS[name](keep, q.dtype))[0]

    arguments = (*inputs(kv_heads=HQ), keep_of())
    traced = make_fx(function, tracing_mode="fake")(*arguments)
    (anchor,) = PROMPT.anchors(traced.graph)
    with pytest.raises(Refusal, match=name if name in NEAR_MISSES else "no bool mask"):
        PROMPT.walk(anchor)
    assert rewrite(traced.graph, Options(strict=True)) == []
    assert not any("inductor_moe" in str(node.target) for node in traced.graph.nodes)
