"""Weights quantised elsewhere, on a GPU: `python examples/benchmarks/repack_check.py`.

The tiles of torch's own int4 product are read back and compared with the codes that went in; what
it multiplies by them is compared with ours. Linear layers and experts whose zero points are finer
than their scales run compiled, against fp64.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inductor_moe
from inductor_moe.quant.torchao import untile
from inductor_moe.testing import relative_error

LIMIT, GROUP = 3e-3, 64


def random(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and offsets in units of the weight."""
    groups = (*shape[:-1], shape[-1] // GROUP)
    codes = torch.randint(0, 16, shape, device="cuda")
    scales = (torch.rand(groups, device="cuda") / 50 + 1e-3).bfloat16()
    return codes, scales, (torch.randn(groups, device="cuda") / 20).bfloat16()


def exact(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    wide = (value.double().repeat_interleave(GROUP, -1) for value in (scales, offsets))
    scale, offset = wide
    return (codes.double() - 8) * scale + offset


def zeros_of(scales: Tensor, offsets: Tensor) -> Tensor:
    return (8 - offsets.double() / scales.double()).float()


def check_tiles() -> list[tuple[str, float, float]]:
    found = []
    for outputs, inputs in ((64, 1024), (1032, 2048)):
        codes, scales, offsets = random(outputs, inputs)
        nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
        tiles = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
        differ = float((untile(tiles) != codes).sum())
        found.append((f"codes of {outputs} x {inputs} tiles that differ", differ, 0.0))
        both = torch.stack([scales.mT, offsets.mT], -1).contiguous()
        x = torch.randn(4, inputs, device="cuda", dtype=torch.bfloat16)
        theirs = torch.ops.aten._weight_int4pack_mm(x, tiles, GROUP, both)
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        zeros = zeros_of(scales, offsets)
        inductor_moe.replace_weight(
            linear, "weight", untile(tiles), scales, zeros, group_size=GROUP
        )
        reference = x.double() @ exact(codes, scales, offsets).T
        # bf16 arithmetic inside theirs, so its own error is the measure.
        bound = max(2 * relative_error(theirs, reference), LIMIT)
        compiled = torch.compile(linear, backend="inductor_moe", dynamic=False)
        name = f"product with {outputs} x {inputs} tiles (theirs {bound / 2:.1e})"
        found.append((name, relative_error(compiled(x), reference), bound))
    return found


class Layers(nn.Module):
    """Two linear layers on one input, merged when decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = []
        for name, outputs in (("first", 512), ("second", 264)):
            linear = nn.Linear(2048, outputs, bias=False, device="meta")
            weight = random(outputs, 2048)
            codes, scales, offsets = weight
            inductor_moe.replace_weight(
                linear, "weight", codes, scales, zeros_of(scales, offsets), group_size=GROUP
            )
            setattr(self, name, linear)
            self.weights.append(exact(*weight))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def check_linears() -> list[tuple[str, float, float]]:
    layers, found = Layers(), []
    for tokens in (1, 3, 33, 600):
        torch._dynamo.reset()
        compiled = torch.compile(layers, backend="inductor_moe", dynamic=False)
        x = torch.randn(tokens, 2048, device="cuda").bfloat16() + 1
        for output, weight in zip(compiled(x), layers.weights, strict=True):
            error = relative_error(output, x.double() @ weight.T)
            found.append((f"linear {weight.shape[0]}, {tokens} tokens", error, LIMIT))
        counts = inductor_moe.reports()[-1].counts()
        fused = sum(counts.get(op, 0) for op in ("quantized_linear", "merged_linear"))
        found.append((f"sites missing, {tokens} tokens", float(fused == 0), 0.0))
    return found


class Experts(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = F.silu(torch.einsum("tkih,th->tki", self.up[ids], x))
        return (torch.einsum("tkhi,tki->tkh", self.down[ids], h) * weights[..., None]).sum(1)


def check_experts() -> list[tuple[str, float, float]]:
    experts, plain, found = Experts(), Experts(), []
    for name, shape in (("up", (8, 256, 512)), ("down", (8, 512, 256))):
        weight = random(*shape)
        codes, scales, offsets = weight
        inductor_moe.replace_weight(
            experts, name, codes, scales, zeros_of(scales, offsets), group_size=GROUP
        )
        setattr(plain, name, exact(*weight))
    for tokens in (1, 5, 200):
        torch._dynamo.reset()
        compiled = torch.compile(experts, backend="inductor_moe", dynamic=False)
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        ids = torch.stack([torch.randperm(8, device="cuda")[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2, device="cuda").bfloat16()
        reference = plain(x.double(), ids, weights.double())
        # h and the output are rounded to bf16.
        error = relative_error(compiled(x, ids, weights), reference)
        found.append((f"experts, {tokens} tokens", error, 1.7 * LIMIT))
        fused = inductor_moe.reports()[-1].counts().get("moe_experts", 0)
        found.append((f"expert sites missing, {tokens} tokens", float(fused != 1), 0.0))
    return found


@torch.no_grad()
def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("repack_check.py needs a CUDA GPU")
    bad = 0
    for name, error, limit in (*check_tiles(), *check_linears(), *check_experts()):
        bad += not error <= limit
        print(f"{'ok ' if error <= limit else 'BAD'} {name}: {error:.2e} <= {limit:.2e}")
    print(f"repack_check: {bad} bad")
    return bad


if __name__ == "__main__":
    sys.exit(main())
