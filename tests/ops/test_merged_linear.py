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
from inductor_moe.quant_tiles import PartsTile, VectorTile
from inductor_moe.reference.quant import dequantize_reference
from inductor_moe.testing import capture, relative_error
from inductor_moe.tiles import generic_gpu

SCHEMES = {
    "int4 g128": Scheme(4, 128, True, "rtn"),
    "int4 g32 zeros": Scheme(4, 32, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}
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


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_kernel(monkeypatch, rows, scheme):
    torch.manual_seed(len(rows[0]))
    inputs = 256 if rows[1] else 200
    weights, exact = arguments(*rows, scheme, inputs)
    padded = torch.full((2, inputs + 8), math.nan, dtype=torch.bfloat16)
    x = padded[:, :inputs].copy_(torch.randn(2, inputs))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    tile = PartsTile(16, 64, 4, 4, 2)
    found = merged_linear_cuda(x, *weights, tile=tile, wrap=Interpreted)
    assert relative_error(found, x.double() @ exact.T) <= 3e-3


@pytest.mark.parametrize("scheme", ["int4 g128", "int4 g64 zeros"])
@pytest.mark.parametrize(
    ("rows", "inputs", "tile"),
    [
        (((33, 16, 5), (3, 2)), 1024, VectorTile(3, 2, 1)),
        (((7, 2, 1, 4), ()), 512, VectorTile(1, 1, 1)),
        (((9, 3), (1,)), 4096, VectorTile(2, 1, 2)),
    ],
)
def test_kernel_of_one_row(monkeypatch, rows, inputs, tile, scheme):
    kind = Scheme(4, int(scheme.split()[1][1:]), "zeros" not in scheme, "rtn")
    weights, exact = arguments(*rows, kind, inputs)
    padded = torch.full((1, inputs + 8), math.nan, dtype=torch.bfloat16)
    x = padded[:, :inputs].copy_(torch.randn(1, inputs))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    found = merged_linear_cuda(x, *weights, tile=tile, wrap=Interpreted)
    assert relative_error(found, x.double() @ exact.T) <= 3e-3


@pytest.mark.parametrize(("tokens", "name"), [(1, "merged_vector"), (2, "merged_linear")])
def test_only_one_row_is_multiplied_without_tensor_cores(monkeypatch, tokens, name):
    weights, _ = arguments((33, 16), (2,), Scheme(4, 128, True, "rtn"), 2048)
    launched = []

    class Named:
        def __init__(self, kernel):
            launched.append(kernel.fn.__name__)

        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    where = "inductor_moe.ops.merged_linear_cuda.gpu_of"
    monkeypatch.setattr(where, lambda index: generic_gpu((9, 0)))
    merged_linear_cuda(torch.randn(tokens, 2048).bfloat16(), *weights, wrap=Named)
    assert launched == [f"{name}_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_op(dtype):
    weights, exact = arguments((16, 40), (3,), SCHEMES["int4 g32 zeros"], 96, dtype)
    x = torch.randn(3, 96, dtype=dtype)
    torch.library.opcheck(merged_linear, (x, *weights))
    limit = 3e-3 if dtype is torch.bfloat16 else 1e-6
    assert relative_error(merged_linear(x, *weights), x.double() @ exact.T) <= limit


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
    """(whether each of the outputs is right, descriptions of the merged sites)."""
    eager = function(*args)
    found, report = capture(function, *args)
    for output, expected in zip(found, eager, strict=True):
        assert output.shape == expected.shape and output.dtype == expected.dtype
        assert relative_error(output, expected.double()) <= 1e-2
    return [site.detail for site in report.matched if site.rewrite == "linear.merged"]


@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)], ids=str)
def test_layers_of_one_input_are_merged(shape):
    found = merged_by(Projections(), torch.randn(shape).bfloat16())
    assert found == ["64 -> 48 + 16 + 7 + 3; int4 g128, torch.bfloat16"]


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

    x = torch.randn(1, 64).bfloat16()
    assert merged_by(forward, x, *codes.unbind(), *scales.unbind()) == expected


def test_the_same_layer_twice():
    layers = Projections()
    found = merged_by(lambda x: (layers.key(x), layers.key(x) + 1), torch.randn(1, 64).bfloat16())
    assert found in ([], ["64 -> 16 + 16; int4 g128"])


NEAR_MISSES = {  # name -> (what is computed, width of x, rows of x)
    "two rows": (lambda m, x: m(x), 64, 2),
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
    assert merged_by(lambda x: function(layers, x), torch.randn(rows, width).bfloat16()) == []


def test_packed_weights_of_two_kinds():
    layers, other = Projections(), nn.Linear(64, 24, bias=False).bfloat16()
    inductor_moe.quantize_(other, "int8", verbose=False)
    x = torch.randn(1, 64).bfloat16()
    found = merged_by(lambda x: (other(x), layers.wide(x), layers.key(x)), x)
    assert found == ["64 -> 48 + 16; int4 g128"]


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
