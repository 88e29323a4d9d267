"""Linear layers of one input as one op: schema, checks, its kernel, and what is merged."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.interpreted import Interpreted
from torch import nn
from torch.nn import functional as F

import inductor_moe
from inductor_moe.ops.merged_linear import merged_linear
from inductor_moe.ops.merged_linear_cuda import merged_linear_cuda
from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.quant_tiles import PartsTile, QuantizedPlan, VectorTile
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import capture, relative_error
from inductor_moe.tiles import GemmTile, generic_gpu

SCHEMES = {
    "int4 g128": Scheme(4, 128, True, "rtn"),
    "int4 g32 zeros": Scheme(4, 32, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}
PARTS = PartsTile(16, 64, 4, 4, 2)
ROWS = {  # packed, dense
    "one of each": ((16,), (1,)),
    "odd": ((41, 16, 5), (3, 7)),
    "four of each": ((8, 16, 24, 32), (4, 4, 8, 1)),
    "packed": ((33, 16), ()),
    "dense": ((), (9, 2, 4)),
}


def arguments(packed_rows, dense_rows, scheme, inputs, dtype=torch.bfloat16):
    """(arguments of the op, the exact weights) with random weights."""
    packed = [
        quantize_weight((torch.randn(rows, inputs) / inputs**0.5).to(dtype), scheme)
        for rows in packed_rows
    ]
    dense = [(torch.randn(rows, inputs) / inputs**0.5).to(dtype) for rows in dense_rows]
    zeros = [weight.zeros for weight in packed if weight.zeros is not None]
    exact = [
        dequantize_reference(
            weight.packed, weight.scales.double(),
            None if weight.zeros is None else weight.zeros.double(), scheme.group_size, inputs,
        )
        for weight in packed
    ]  # fmt: skip
    exact += [weight.double() for weight in dense]
    lists = [w.packed for w in packed], [w.scales for w in packed], zeros
    return (*lists, scheme.group_size, dense), torch.cat(exact)


def beside_nan(tokens, inputs, dtype=torch.bfloat16):
    """Random rows [M, K] with columns of NaN beside them, which are no inputs."""
    padded = torch.full((tokens, inputs + 8), math.nan, dtype=dtype)
    return padded[:, :inputs].copy_(torch.randn(tokens, inputs))


def one_after_the_other(x, exact, weights):
    """What the op returns, in fp64."""
    packed, *_, dense = weights
    rows = [weight.shape[0] for weight in (*packed, *dense)]
    return torch.cat([(x.double() @ part.T).reshape(-1) for part in exact.split(rows)])


def interpreted(x, weights, plan):
    """What the kernel writes, over NaN."""
    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
        return merged_linear_cuda(x, *weights, plan=plan, wrap=Interpreted)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_kernel(rows, scheme):
    torch.manual_seed(len(rows[0]))
    inputs = 256 if rows[1] else 200
    weights, exact = arguments(*rows, scheme, inputs)
    x = beside_nan(1, inputs)
    plan = QuantizedPlan(0, PARTS, PARTS)
    found = interpreted(x, weights, plan)
    assert relative_error(found, one_after_the_other(x, exact, weights)) <= 3e-3


BATCHES = {  # name -> (rows of a block, tile, rows of x, dtype)
    "whole rows": (8, GemmTile(32, 64, 8, 4, 2), 2, torch.bfloat16),
    "a block and a row": (8, GemmTile(16, 128, 8, 4, 2), 9, torch.float16),
    "slices": (16, GemmTile(16, 64, 8, 4, 2, parts=4), 13, torch.bfloat16),
    "all rows in slices": (16, GemmTile(16, 128, 8, 8, 2, parts=8), 16, torch.bfloat16),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_kernel_of_several_rows(rows, scheme, batch):
    torch.manual_seed(len(rows[0]))
    block_m, tile, tokens, dtype = BATCHES[batch]
    inputs = 512 if rows[1] else 200
    weights, exact = arguments(*rows, scheme, inputs, dtype)
    x = beside_nan(tokens, inputs, dtype)
    x[tokens // 2] = 0.0
    plan = QuantizedPlan(block_m, tile, tile)
    found = interpreted(x, weights, plan)
    expected = one_after_the_other(x, exact, weights)
    # Little but the rounding of the output.
    rounding = relative_error(expected.to(dtype), expected)
    assert relative_error(found, expected) <= rounding + 3e-4


def test_dense_rows_of_odd_inputs():
    weights, exact = arguments((), (1, 17, 1, 5), SCHEMES["int8"], 75)
    x, tile = beside_nan(3, 75), GemmTile(16, 64, 8, 2, 2)
    plan = QuantizedPlan(8, tile, tile)
    found = interpreted(x, weights, plan)
    assert relative_error(found, one_after_the_other(x, exact, weights)) <= 3e-3


@pytest.mark.parametrize("scheme", ["int4 g128", "int4 g64 zeros"])
@pytest.mark.parametrize(
    ("rows", "inputs", "tile"),
    [
        (((33, 16, 5), (3, 2)), 1024, VectorTile(3, 2, 1)),
        (((7, 2, 1, 4), ()), 512, VectorTile(1, 1, 1)),
        (((9, 3), (1,)), 4096, VectorTile(2, 1, 2)),
    ],
)
def test_kernel_of_one_row(rows, inputs, tile, scheme):
    kind = Scheme(4, int(scheme.split()[1][1:]), "zeros" not in scheme, "rtn")
    weights, exact = arguments(*rows, kind, inputs)
    x, plan = beside_nan(1, inputs), QuantizedPlan(0, tile, PARTS)
    found = interpreted(x, weights, plan)
    assert relative_error(found, one_after_the_other(x, exact, weights)) <= 3e-3


@pytest.mark.parametrize(("tokens", "packed", "name", "block_m", "parts"), [
    (1, (33, 16), "merged_vector", None, 1), (1, (), "merged_linear", None, 8),
    (2, (33, 16), "merged_rows", 8, 8), (16, (33, 16), "merged_rows", 16, 8),
    (40, (33, 16), "merged_rows", 16, 8), (2, (1800, 1800), "merged_rows", 8, 1),
    (3, (), "merged_rows", 8, 8),
])  # fmt: skip
def test_the_kernel_for_a_number_of_rows(monkeypatch, tokens, packed, name, block_m, parts):
    """One row is multiplied without tensor cores, and layers narrow even together in slices."""
    weights, _ = arguments(packed, (2,), Scheme(4, 128, True, "rtn"), 2048)
    launched = []

    class Named:
        def __init__(self, kernel):
            self.name = kernel.fn.__name__

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((self.name, kwargs, grid[1:]))

    where = "inductor_moe.ops.merged_linear_cuda.gpu_of"
    monkeypatch.setattr(where, lambda index: generic_gpu((9, 0)))
    merged_linear_cuda(torch.randn(tokens, 2048).bfloat16(), *weights, wrap=Named)
    ((found, constants, times),) = launched
    assert found == f"{name}_kernel" and constants.get("BLOCK_M") == block_m
    assert constants["PARTS"] == parts
    # Weights are read once for each block of rows.
    assert times in ((), (-(-tokens // (block_m or 1)),))


def test_a_table_for_a_kernel_of_one_row_is_not_taken_for_more(monkeypatch):
    weights, exact = arguments((33, 16), (2,), SCHEMES["int4 g128"], 256)
    where = "inductor_moe.ops.merged_linear_cuda.choose_quantized_plan"
    monkeypatch.setattr(where, lambda *_: QuantizedPlan(0, PARTS, PARTS))
    for tokens in (1, 5):
        x = beside_nan(tokens, 256)
        found = interpreted(x, weights, None)
        assert relative_error(found, one_after_the_other(x, exact, weights)) <= 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_op(dtype):
    weights, exact = arguments((16, 40), (3,), SCHEMES["int4 g32 zeros"], 96, dtype)
    x = torch.randn(3, 96, dtype=dtype)
    torch.library.opcheck(merged_linear, (x, *weights))
    limit = 3e-3 if dtype is torch.bfloat16 else 1e-6
    found = merged_linear(x, *weights)
    assert found.shape == (3 * 59,)
    assert relative_error(found, one_after_the_other(x, exact, weights)) <= limit


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(96)}, r"x must be \[M, K\]"),
        ({"scales": []}, "0 scales and 1 zeros for 1 packed weights"),
        ({"dense": [torch.ones(1, 96)] * 5}, "1 packed and 5 dense weights"),
        ({"dense": [torch.ones(1, 95)]}, r"shape \[1, 95\]; it must be \[rows, 96\]"),
        ({"dense": [torch.ones(1, 96).half()]}, "float16 on cpu; it must be torch.float32"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    (packed, scales, zeros, group_size, _), _ = arguments(
        (16,), (), SCHEMES["int4 g32 zeros"], 96, torch.float32
    )
    given = {
        "x": torch.ones(1, 96), "packed": packed, "scales": scales, "zeros": zeros,
        "group_size": group_size, "dense": [],
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        merged_linear(**(given | change))


class Projections(nn.Module):
    """Layers on one input, some packed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.wide = nn.Linear(64, 48, bias=False)
        self.biased = nn.Linear(64, 32)
        self.odd = nn.Linear(64, 7, bias=False)
        self.key = nn.Linear(64, 16, bias=False)
        self.gate = nn.Linear(64, 3, bias=False)
        self.large = nn.Linear(64, 2048, bias=False)
        self.bfloat16()
        dense = ("odd", "gate", "large")
        inductor_moe.quantize_(self, "int4", skip=dense, verbose=False)

    def forward(self, x):
        return self.wide(x), self.odd(x), self.key(x), self.gate(x)


@torch.no_grad()
def merged_by(function, *args):
    """Descriptions of the merged sites; asserts that the outputs are eager's."""
    eager = function(*args)
    found, report = capture(function, *args)
    for output, expected in zip(found, eager, strict=True):
        assert output.shape == expected.shape and output.dtype == expected.dtype
        assert output.stride() == expected.stride()
        assert relative_error(output, expected.double()) <= 1e-2
    return [site.detail for site in report.matched if site.rewrite == "linear.merged"]


@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)], ids=str)
def test_layers_of_one_input_are_merged(shape):
    found = merged_by(Projections(), torch.randn(shape).bfloat16())
    assert found == ["64 -> 48 + 16 + 7 + 3; int4 g128, torch.bfloat16"]


@pytest.mark.parametrize("shape", [(2, 64), (4, 1, 64), (2, 3, 64), (16, 64)], ids=str)
def test_layers_of_a_batch_are_merged(shape):
    rows = math.prod(shape[:-1])
    found = merged_by(Projections(), torch.randn(shape).bfloat16())
    assert found == [f"{rows} rows of 64 -> 48 + 16 + 7 + 3; int4 g128, torch.bfloat16"]


def test_what_a_batch_reads_by_heads_is_no_copy():
    """Rows stay contiguous, so that a view may join them with heads."""
    layers = Projections()

    def forward(x):
        heads = layers.wide(x).view(4 * 6, 8)
        return heads.softmax(-1), layers.key(x).view(4, 2, 8).transpose(0, 1)

    assert merged_by(forward, torch.randn(4, 64).bfloat16()) == [
        "4 rows of 64 -> 48 + 16; int4 g128"
    ]


def test_rows_of_two_sizes_in_one_tensor():
    """A layer of 2 rows and one of 4 read the same tensor, and are not multiplied together."""
    layers, other = Projections(), nn.Linear(32, 16, bias=False).bfloat16()
    inductor_moe.quantize_(other, "int4", verbose=False)

    def forward(x):
        return other(x.view(4, 32)), layers.wide(x), layers.key(x)

    x = torch.randn(2, 64).bfloat16()
    assert merged_by(forward, x) == ["2 rows of 64 -> 48 + 16; int4 g128"]
    assert merged_by(lambda x: forward(x)[:2], x) == []


def test_a_group_in_the_middle_of_a_graph():
    layers = Projections()

    def forward(x):
        hidden = F.silu(x * 2)
        first = layers.wide(hidden)
        return first + 1, layers.key(hidden)[..., :1] * first, layers.key(x)

    found = merged_by(forward, torch.randn(1, 64).bfloat16())
    assert found == ["64 -> 48 + 16; int4 g128"]


SCALES = {
    "cast": (lambda scales, before: scales.bfloat16(), []),
    "of an earlier layer": (lambda scales, before: (scales * before.mean()).bfloat16(), []),
    "given": (lambda scales, before: scales, ["64 -> 32 + 32; int8"]),
}


@pytest.mark.parametrize("case", SCALES)
def test_weights_that_are_computed_after_the_first_layer(case):
    scaled, expected = SCALES[case]
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-99, 99, (2, 32, 64), dtype=torch.int8, generator=generator)
    scales = torch.rand(2, 32, 1, generator=generator) / 50
    if case == "given":
        scales = scales.bfloat16()

    def forward(x, *weights):
        first = F.linear(x, weights[0].bfloat16() * scaled(weights[2], x))
        return first, F.linear(x, weights[1].bfloat16() * scaled(weights[3], first))

    weights = *codes.unbind(), *scales.unbind()
    assert merged_by(forward, torch.randn(1, 64).bfloat16(), *weights) == expected
    expected = [f"3 rows of {site}" for site in expected]
    assert merged_by(forward, torch.randn(3, 64).bfloat16(), *weights) == expected


def test_the_same_layer_twice():
    layers = Projections()
    found = merged_by(lambda x: (layers.key(x), layers.key(x) + 1), torch.randn(1, 64).bfloat16())
    assert found in ([], ["64 -> 16 + 16; int4 g128"])


NEAR_MISSES = {  # name -> (what is computed, width of x, rows of x)
    "seventeen rows": (lambda m, x: m(x), 64, 17),
    "no rows": (lambda m, x: m(x), 64, 0),
    "dense layers of two rows": (lambda m, x: (m.odd(x), m.gate(x)), 64, 2),
    "a bias": (lambda m, x: (m.wide(x), m.biased(x)), 64, 1),
    "inputs of their own": (lambda m, x: (m.wide(x), m.key(x + 1)), 64, 1),
    "a part of the input": (lambda m, x: (m.wide(x[:, :64]), m.key(x[:, 64:])), 128, 1),
    "a computed weight": (lambda m, x: (m.key(x), F.linear(x, m.odd.weight * 2)), 64, 1),
    "a weight on the left": (lambda m, x: (m.key(x), m.gate.weight @ x.T), 64, 1),
    "a wide dense layer": (lambda m, x: (m.key(x), m.large(x)), 64, 1),
}


@pytest.mark.parametrize("function, width, rows", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_alone(function, width, rows):
    layers = Projections()
    for count in {rows, 4 if rows == 1 else rows}:
        x = torch.randn(count, width).bfloat16()
        assert merged_by(lambda x: function(layers, x), x) == []


def test_a_number_of_rows_that_may_change_is_left_alone():
    x = torch.randn(4, 64).bfloat16()
    torch._dynamo.mark_dynamic(x, 0, min=2, max=16)
    assert merged_by(Projections(), x) == []


@pytest.mark.parametrize("rows", [1, 4])
def test_packed_weights_of_two_kinds(rows):
    layers, other = Projections(), nn.Linear(64, 24, bias=False).bfloat16()
    inductor_moe.quantize_(other, "int8", verbose=False)
    x = torch.randn(rows, 64).bfloat16()
    (found,) = merged_by(lambda x: (other(x), layers.wide(x), layers.key(x)), x)
    assert found.endswith("64 -> 48 + 16; int4 g128")


def test_zero_points_of_two_dtypes():
    """The kernel picks a pointer among the weights', which must be of one type."""
    layers = [nn.Linear(64, rows, bias=False, device="meta") for rows in (48, 32, 16)]
    for layer, step in zip(layers, (0.3, 0.3, 1.0), strict=True):
        zeros = step * torch.arange(layer.out_features * 2).view(-1, 2) % 16
        inductor_moe.replace_weight(
            layer, "weight", torch.randint(0, 16, layer.weight.shape),
            torch.rand(layer.out_features, 2).bfloat16(), zeros, group_size=32,
        )  # fmt: skip
    x = torch.randn(1, 64).bfloat16()
    found = merged_by(lambda x: [layer(x) for layer in layers], x)
    assert found == ["64 -> 48 + 32; int4 g32 with zero points"]
    buffers = layers[1]._buffers, layers[2]._buffers
    values = [[b[f"weight_{kind}"] for b in buffers] for kind in ("packed", "scales", "zeros")]
    with pytest.raises(TypeError, match="zeros of different dtypes"):
        merged_linear(x, *values, 32, [])
