"""Decode attention: schema, checks, and its kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import Interpreted

from inductor_moe.attention_tiles import MAX_SPLITS, AttentionTile, choose_attention_tile
from inductor_moe.ops.attention import attention_decode, attention_decode_cuda
from inductor_moe.reference.attention import attention_decode_reference
from inductor_moe.testing import relative_error
from inductor_moe.tiles import Gpu, generic_gpu

NAN, INF = float("nan"), float("inf")


def draw(batch, heads, kv_heads, length, dim, value_dim, dtype=torch.float32):
    """q, k, v; k and v with strides of their own."""
    q = torch.randn(batch, heads, dim).to(dtype)
    k = torch.randn(batch, length, kv_heads, dim + 3).to(dtype)[..., :dim].transpose(1, 2)
    v = torch.randn(batch, kv_heads, length + 1, value_dim).to(dtype)[:, :, 1:]
    return q, k, v


def make_mask(kind, rows, length):
    """[rows, 1, 1, L]: no position after a random one, with a hole, or some of them at random."""
    if kind == "none":
        return None
    position = torch.arange(length)
    filled = torch.randint(1, length + 1, (rows, 1))
    keep = position < filled
    if kind == "window":
        keep &= position >= filled - max(1, length // 5)
    elif kind == "random":
        keep = torch.rand(rows, length) < 0.3
        keep[:, length // 2] = True
    mask = torch.where(keep, torch.randn(rows, length), -INF) if kind == "float" else keep
    return mask[:, None, None]


def poisoned(tensor, mask):
    """NaN in every position that the mask hides."""
    if mask is None:
        return tensor
    hidden = ~mask if mask.dtype == torch.bool else mask == -INF
    return torch.where(hidden.transpose(2, 3), NAN, tensor)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))


def run(q, k, v, mask, scale, *tile, gate=None):
    return attention_decode_cuda(
        q, k, v, mask, scale, gate, tile=AttentionTile(*tile, 4, 2), wrap=Interpreted
    )


def exact(q, k, v, mask, scale, gate=None):
    gate = None if gate is None else gate.double()
    return attention_decode_reference(q.double(), k.double(), v.double(), mask, scale, gate)


SHAPES = {
    "qwen3_5": (1, 16, 2, 40, 256, 256),
    "odd dims": (2, 6, 2, 67, 24, 40),
    "one head of keys": (2, 9, 1, 33, 16, 16),
    "no groups": (2, 3, 3, 35, 20, 16),
    "wide group": (1, 70, 1, 20, 16, 24),
    "one position": (3, 4, 2, 1, 16, 16),
}
MASKS = ("none", "filled", "window", "random", "float")
CASES = [
    *(("odd dims", kind, splits) for kind in MASKS for splits in (1, 3)),
    *((shape, "filled", splits) for shape in SHAPES for splits in (1, 2) if shape != "odd dims"),
]


@pytest.mark.parametrize("shape, kind, splits", CASES)
def test_kernels(shape, kind, splits):
    batch, heads, kv_heads, length, *_ = SHAPES[shape]
    q, k, v = draw(*SHAPES[shape])
    for block_g in {1 if heads <= 9 else 16, min(64, max(16, heads // kv_heads))}:
        mask = make_mask(kind, batch if splits > 1 else 1, length)
        found = run(q, poisoned(k, mask), poisoned(v, mask), mask, 0.2, block_g, 16, splits)
        assert relative_error(found, exact(q, k, v, mask, 0.2)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_g", [1, 16])
def test_low_precision_is_as_exact_as_eager(dtype, block_g):
    q, k, v = draw(2, 8, 2, 83, 64, 64, dtype)
    mask = make_mask("float", 2, 83).to(dtype)
    expected = exact(q, k, v, mask, 0.3)
    found = run(q, k, v, mask, 0.3, block_g, 16, 2)
    assert found.dtype == dtype
    eager = relative_error(attention_decode(q, k, v, mask, 0.3), expected)
    assert relative_error(found, expected) <= 2 * eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_g, splits", [(1, 1), (1, 3), (16, 1), (16, 3)])
def test_a_gate(splits, block_g, dtype):
    q, k, v = draw(3, 6, 2, 40, 16, 24, dtype)
    gate = torch.randn(24, 3, 6, 2).to(dtype)[..., 1].permute(1, 2, 0)
    mask = make_mask("random", 3, 40)
    expected = exact(q, k, v, mask, 0.2, gate)
    found = run(q, k, v, mask, 0.2, block_g, 16, splits, gate=gate)
    eager = relative_error(attention_decode(q, k, v, mask, 0.2, gate), expected)
    assert relative_error(found, expected) <= (1e-6 if dtype == torch.float32 else 2 * eager)
    assert eager <= (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("block_g, splits", [(1, 3), (16, 1), (16, 3)])
def test_rows_with_nothing_to_see(splits, block_g):
    q, k, v = draw(3, 4, 2, 40, 16, 16)
    keep = make_mask("random", 3, 40)
    keep[1] = False
    for mask in (keep, torch.where(keep, 0.0, -INF)):
        found = run(q, k, v, mask, 0.2, block_g, 16, splits)
        assert found[1].count_nonzero() == 0
        assert relative_error(found, exact(q, k, v, mask, 0.2)) < 1e-6
        assert relative_error(attention_decode(q, k, v, mask, 0.2), found) < 1e-6
    lowest = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    found = run(q, k, v, lowest, 0.2, block_g, 16, splits)
    assert relative_error(found, exact(q, k, v, lowest, 0.2)) < 1e-6
    assert found[1].count_nonzero()


@pytest.mark.parametrize("block_g, splits", [(1, 3), (16, 1), (16, 3)])
def test_nan_in_what_is_seen_is_kept(splits, block_g):
    q, k, v = draw(2, 4, 2, 40, 16, 16)
    q[0, 1, 3] = NAN
    k[1, 0, 2, 5] = NAN
    found = run(q, k, v, None, 0.2, block_g, 16, splits)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, :2] = True
    assert torch.equal(found.isnan(), bad[..., None].expand_as(found))


@pytest.mark.parametrize("kind", ["none", "filled", "float"])
def test_the_op_on_a_cpu(kind):
    q, k, v = draw(2, 6, 2, 21, 16, 24)
    mask = make_mask(kind, 2, 21)
    for gate in (None, torch.randn(2, 6, 24)):
        torch.library.opcheck(attention_decode, (q, k, v, mask, 0.2, gate))
        found = attention_decode(q, k, v, mask, 0.2, gate)
        assert relative_error(found, exact(q, k, v, mask, 0.2, gate)) < 1e-6


BAD = {
    r"q has dtype torch\.int64": {"q": torch.ones(2, 4, 16, dtype=torch.int64)},
    r"k has .* shape \[2, 2, 5\]; it must be a float tensor \[B, Hkv, L, D\]": {
        "k": torch.ones(2, 2, 5)
    },
    "v is torch.float16 on cpu; it must be like q": {"v": torch.ones(2, 2, 5, 8).half()},
    r"k has shape \[2, 2, 5, 8\]; .* must be \[2, Hkv, L, 16\]": {"k": torch.ones(2, 2, 5, 8)},
    r"v has shape \[2, 1, 5, 8\]; .* must be \[2, 2, 5\]": {"v": torch.ones(2, 1, 5, 8)},
    "q has 3 heads; they must be a multiple of the 2": {"q": torch.ones(2, 3, 16)},
    "v has head dim 300; it must be between 1 and 256": {"v": torch.ones(2, 2, 5, 300)},
    r"mask has dtype torch\.int64": {"mask": torch.ones(2, 1, 1, 5, dtype=torch.int64)},
    r"mask .* shape \[2, 4, 1, 5\]; it must be .* \[2 or 1, 1, 1, 5\]": {
        "mask": torch.ones(2, 4, 1, 5)
    },
    "mask has 3 rows; it must have 1 or 2": {"mask": torch.ones(3, 1, 1, 5)},
    r"gate is torch.float32 \[2, 1, 8\] on cpu; it must be torch.float32 \[2, 4, 8\]": {
        "gate": torch.ones(2, 1, 8)
    },
    "gate is torch.float16": {"gate": torch.ones(2, 4, 8).half()},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_argument_is_named(message):
    arguments = {
        "q": torch.ones(2, 4, 16), "k": torch.ones(2, 2, 5, 16), "v": torch.ones(2, 2, 5, 8),
        "mask": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        attention_decode(**{**arguments, **BAD[message]}, scale=0.2)


H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)


@pytest.mark.parametrize("gpu", [H100, generic_gpu((8, 6)), None], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("length", [0, 1, 100, 2048, 1 << 20])
@pytest.mark.parametrize("batch, kv_heads, group", [(1, 1, 1), (1, 2, 8), (16, 4, 8), (300, 8, 4)])
def test_a_tile_leaves_no_multiprocessor_without_work(
    batch, kv_heads, group, length, itemsize, gpu
):
    tile = choose_attention_tile(
        batch=batch, kv_heads=kv_heads, group=group, length=length, dim=200, itemsize=itemsize,
        gpu=gpu,
    )  # fmt: skip
    processors = gpu.multiprocessors if gpu else 108
    programs = batch * kv_heads * -(-group // tile.block_g) * tile.splits
    blocks = -(-length // tile.block_l)
    assert 1 <= tile.splits <= min(MAX_SPLITS, max(1, blocks))
    assert programs >= processors or tile.splits in (blocks, MAX_SPLITS, max(1, blocks))
    assert tile.splits == 1 or programs < 2 * processors
    assert (tile.block_g == 1) == (group == 1 or itemsize == 4)
