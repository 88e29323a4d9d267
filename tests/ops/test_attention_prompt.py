"""Prompt attention: schema, checks, and its kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import Interpreted

from inductor_moe.attention_tiles import PromptTile, choose_prompt_tile
from inductor_moe.kernels.attention_prompt import WORD, attention_mask_kernel
from inductor_moe.ops.attention_prompt import attention_prompt, attention_prompt_cuda
from inductor_moe.reference.attention import attention_prompt_reference
from inductor_moe.testing import relative_error
from inductor_moe.tiles import Gpu, generic_gpu

NAN = float("nan")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(NAN if found.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(batch, heads, kv_heads, queries, length, dim, value_dim, dtype=torch.float32):
    """q, k, v, each with strides of its own."""
    q = torch.randn(batch, queries, heads, dim).to(dtype).transpose(1, 2)
    k = torch.randn(batch, length, kv_heads, dim + 3).to(dtype)[..., :dim].transpose(1, 2)
    v = torch.randn(batch, kv_heads, length + 1, value_dim).to(dtype)[:, :, 1:]
    return q, k, v


def causal(rows, queries, length):
    """The queries follow what fills the cache already, in each row another number of positions."""
    before = torch.randint(0, max(1, length - queries + 1), (rows, 1, 1))
    position = before + torch.arange(queries)[:, None]
    return torch.arange(length) <= position


def window(rows, queries, length):
    before = torch.randint(0, max(1, length - queries + 1), (rows, 1, 1))
    position = before + torch.arange(queries)[:, None]
    behind = position - torch.arange(length)
    return (behind >= 0) & (behind < max(1, length // 5))


def padded(rows, queries, length):
    first = torch.randint(0, length // 2 + 1, (rows, 1, 1))
    return causal(rows, queries, length) & (torch.arange(length) >= first)


def holes(rows, queries, length):
    """Blocks hidden, seen whole and seen in part, in any order."""
    coarse = torch.rand(rows, -(-queries // 16), -(-length // 16))
    fine = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :queries, :length]
    return (fine < 0.4) | ((fine < 0.7) & (torch.rand(rows, queries, length) < 0.5))


def filled(rows, queries, length):
    """The same positions for every query."""
    del queries
    return torch.arange(length) < torch.randint(1, length + 1, (rows, 1, 1))


def whole(rows, queries, length):
    return torch.ones(rows, queries, length, dtype=torch.bool)


def nothing(rows, queries, length):
    return torch.zeros(rows, queries, length, dtype=torch.bool)


MASKS = {f.__name__: f for f in (causal, window, padded, holes, filled, whole, nothing)}


def run(q, k, v, mask, scale, *tile):
    tile = PromptTile(*(tile or (16, 16)), 4, 2)
    return attention_prompt_cuda(q, k, v, mask, scale, tile=tile, wrap=Interpreted)


def exact(q, k, v, mask, scale):
    return attention_prompt_reference(q.double(), k.double(), v.double(), mask, scale)


SHAPES = {
    "qwen3_5": (1, 8, 1, 20, 40, 256, 256),
    "odd dims": (2, 4, 2, 37, 67, 24, 40),
    "one head of keys": (2, 5, 1, 33, 35, 16, 16),
    "no groups": (2, 3, 3, 16, 35, 20, 16),
    "longer than its cache": (2, 2, 1, 50, 16, 16, 24),
    "two queries": (3, 4, 2, 2, 90, 16, 16),
    "one position": (3, 4, 2, 17, 1, 16, 16),
}
CASES = [
    *(("odd dims", kind) for kind in MASKS),
    *((shape, kind) for shape in SHAPES for kind in ("causal", "holes") if shape != "odd dims"),
]


@pytest.mark.parametrize("rows", ["one mask", "a mask each"])
@pytest.mark.parametrize("shape, kind", CASES)
def test_kernels(shape, kind, rows):
    q, k, v = draw(*SHAPES[shape])
    rows = 1 if rows == "one mask" else q.shape[0]
    mask = MASKS[kind](rows, q.shape[2], k.shape[2])[:, None]
    expected = exact(q, k, v, mask, 0.2)
    for tile in ((16, 16), (32, 64), (16, 128)) if shape == "odd dims" else ((32, 64),):
        found = run(q, k, v, mask, 0.2, *tile)
        assert found.shape == expected.shape and found.transpose(1, 2).is_contiguous()
        if kind == "nothing":
            assert found.count_nonzero() == 0
        else:
            assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", MASKS)
def test_the_bits_of_a_mask_and_how_much_its_blocks_show(kind):
    rows, queries, length, block_m = 2, 37, 200, 16
    mask = MASKS[kind](rows, queries, length).expand(rows, queries, length)
    lines, total = -(-queries // block_m), -(-length // WORD.value)
    words = torch.full((rows, queries, total), 77)
    blocks = torch.full((rows, lines, total), 77, dtype=torch.int8)
    Interpreted(attention_mask_kernel)[(1, lines, rows)](
        mask, words, blocks, queries, length, *mask.stride(), BLOCK_M=block_m, ROWS=16, COUNT=8
    )
    wide = torch.nn.functional.pad(mask, (0, total * WORD.value - length))
    bits = wide.view(rows, queries, total, WORD.value)
    assert torch.equal(words[..., None] >> torch.arange(WORD.value) & 1, bits.long())
    for line in range(lines):
        seen = bits[:, line * block_m : (line + 1) * block_m]
        found = seen.any(3).any(1).to(torch.int8) + seen.all(3).all(1)
        assert torch.equal(blocks[:, line], found)


def test_rows_with_nothing_to_see_are_zeros():
    q, k, v = draw(2, 4, 2, 40, 40, 16, 16)
    mask = holes(2, 40, 40)[:, None]
    mask[0, :, 7] = False
    mask[1, :, 16:32] = False
    found = run(q, k, v, mask, 0.2)
    assert found[0, :, 7].count_nonzero() == 0 and found[1, :, 16:32].count_nonzero() == 0
    assert relative_error(found, exact(q, k, v, mask, 0.2)) < 1e-6
    assert relative_error(attention_prompt(q, k, v, mask, 0.2), found) < 1e-6


@pytest.mark.parametrize("block_n", [16, 64, 128])
def test_words_that_no_query_of_a_block_sees_are_not_read(block_n):
    q, k, v = draw(1, 4, 2, 32, 400, 16, 16)
    mask = (torch.arange(400) <= 160 + torch.arange(32)[:, None])[None, None]
    mask[..., :128] = False
    expected = exact(q, k, v, mask, 0.2)
    for tensor in (k, v):
        tensor[:, :, :128] = NAN
        tensor[:, :, 256:] = NAN
    assert relative_error(run(q, k, v, mask, 0.2, 16, block_n), expected) < 1e-6


def test_nan_in_what_is_seen_is_kept():
    q, k, v = draw(2, 4, 2, 40, 40, 16, 16)
    mask = causal(1, 40, 40)[None]
    q[0, 1, 3] = NAN
    k[1, 0, 5, 5] = NAN
    found = run(q, k, v, mask, 0.2)
    assert found[0, 1, 3].isnan().all() and not found[0, 1, 4:].isnan().any()
    assert found[1, :2, 5:].isnan().all() and not found[1, 2:].isnan().any()


def test_scores_far_apart():
    q, k, v = draw(1, 2, 1, 33, 70, 16, 16)
    mask = causal(1, 33, 70)[None]
    q, k = q * 30, k * 30
    assert relative_error(run(q, k, v, mask, 0.9), exact(q, k, v, mask, 0.9)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "holes"])
def test_low_precision_is_as_exact_as_eager(dtype, kind):
    q, k, v = draw(1, 4, 2, 40, 83, 64, 64, dtype)
    mask = MASKS[kind](1, 40, 83)[:, None]
    expected = exact(q, k, v, mask, 0.3)
    found = run(q, k, v, mask, 0.3)
    assert found.dtype == dtype
    eager = relative_error(attention_prompt(q, k, v, mask, 0.3), expected)
    assert relative_error(found, expected) <= 2 * eager


@pytest.mark.parametrize("queries, length", [(0, 9), (5, 0)])
def test_empty(queries, length):
    q, k, v = draw(2, 4, 2, queries, length, 16, 24)
    mask = torch.ones(1, 1, queries, length, dtype=torch.bool)
    found = run(q, k, v, mask, 0.2)
    assert found.shape == (2, 4, queries, 24) and found.count_nonzero() == 0


@pytest.mark.parametrize("kind", MASKS)
def test_the_op_on_a_cpu(kind):
    q, k, v = draw(2, 6, 2, 21, 33, 16, 24)
    mask = MASKS[kind](2, 21, 33)[:, None]
    torch.library.opcheck(attention_prompt, (q, k, v, mask, 0.2))
    found = attention_prompt(q, k, v, mask, 0.2)
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.double(), exact(q, k, v, mask, 0.2), rtol=1e-5, atol=1e-6)


BAD = {
    r"q has dtype torch\.float32 and shape \[2, 4, 16\]; it must be .* \[B, Hq, T, D\]": {
        "q": torch.ones(2, 4, 16)
    },
    "k is torch.float16 on cpu; it must be like q": {"k": torch.ones(2, 2, 5, 16).half()},
    r"v has shape \[2, 1, 5, 8\]; .* must be \[2, 2, 5\]": {"v": torch.ones(2, 1, 5, 8)},
    "q has 3 heads; they must be a multiple of the 2": {"q": torch.ones(2, 3, 7, 16)},
    "v has head dim 300; it must be between 1 and 256": {"v": torch.ones(2, 2, 5, 300)},
    r"mask has dtype torch\.float32 .*\[2 or 1, 1, 7 or 1, 5\]": {"mask": torch.ones(2, 1, 7, 5)},
    r"mask .* shape \[7, 5\]": {"mask": torch.ones(7, 5, dtype=torch.bool)},
    r"mask .* shape \[1, 4, 7, 5\]": {"mask": torch.ones(1, 4, 7, 5, dtype=torch.bool)},
    r"mask .* shape \[1, 1, 6, 5\]": {"mask": torch.ones(1, 1, 6, 5, dtype=torch.bool)},
    "mask has 3 rows; it must have 1 or 2": {"mask": torch.ones(3, 1, 7, 5, dtype=torch.bool)},
    "scale is 0.0; it must be positive": {"scale": 0.0},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_argument_is_named(message):
    arguments = {
        "q": torch.ones(2, 4, 7, 16), "k": torch.ones(2, 2, 5, 16), "v": torch.ones(2, 2, 5, 8),
        "mask": torch.ones(1, 1, 7, 5, dtype=torch.bool), "scale": 0.2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"attention_prompt: {message}"):
        attention_prompt(**{**arguments, **BAD[message]})


H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)


@pytest.mark.parametrize("gpu", [H100, generic_gpu((8, 0)), generic_gpu((8, 6)), None], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
def test_a_tile_fits_shared_memory_and_the_queries(dim, gpu):
    width = max(16, 1 << (dim - 1).bit_length())
    for programs in (1, 16, 128, 4096):
        for queries in (2, 17, 100, 512, 2048, 1 << 20):
            tile = choose_prompt_tile(programs=programs, queries=queries, dim=dim, gpu=gpu)
            keys = 4 * tile.block_n * width * tile.stages
            held = 2 * tile.block_m * (width + tile.block_n) + keys
            assert held <= (gpu.shared_memory if gpu else 166912)
            assert tile.stages >= 2 and tile.block_m >= 16 and tile.block_n >= 16
            assert tile.block_m == 16 or tile.block_m < 2 * queries
            processors = gpu.multiprocessors if gpu else 108
            assert tile.block_m <= 64 or programs * -(-queries // tile.block_m) >= processors
