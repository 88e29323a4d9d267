"""Check and time a shared expert in the routed experts' launches, on one GPU.

    python examples/benchmarks/shared_expert.py check
    python examples/benchmarks/shared_expert.py time --json shared.json

`time` compares, in one run, the routed experts alone, the two together in their launches, and the
shared expert apart: three linear layers and two pointwise kernels. Times are medians of replays of
one CUDA graph through which routings and copies of the shared weights are rotated.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from int4 import microseconds, random_packed

from inductor_moe.ops.moe_cuda import moe_experts_cuda
from inductor_moe.ops.quant_cuda import moe_experts_quantized_cuda, quantized_linear_cuda
from inductor_moe.ops.shared import moe_experts_shared, moe_experts_shared_plain
from inductor_moe.quant.fit import Scheme

SCHEMES = {
    "bf16": None,
    "int4": Scheme(4, 128, True, "rtn"),
    "int4 zeros": Scheme(4, 64, False, "rtn"),
    "int8": Scheme(8, 0, True, "rtn"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer; `own` is the inner size of the shared expert."""

    hidden: int
    inner: int
    own: int
    experts: int
    top_k: int


SHAPES = {
    "qwen3.5-35b-a3b": Shape(2048, 512, 512, 256, 8),
    "deepseek-v2-lite": Shape(2048, 1408, 2816, 64, 6),
    "odd": Shape(200, 72, 100, 16, 3),
}


class Layer:
    """Random weights; `copies` of those of the shared expert."""

    def __init__(self, shape: Shape, scheme: Scheme | None, dtype: torch.dtype, copies: int = 1):
        self.shape, self.scheme, self.dtype = shape, scheme, dtype
        hidden, inner, own = shape.hidden, shape.inner, shape.own
        self.group = scheme.group_size if scheme else 0
        self.routed = [
            *self.weight(shape.experts, 2 * inner, hidden),
            *self.weight(shape.experts, hidden, inner),
        ]
        self.shared = [
            [*self.weight(own, hidden), *self.weight(own, hidden), *self.weight(hidden, own)]
            for _ in range(copies)
        ]

    def weight(self, *shape: int) -> list[torch.Tensor | None]:
        if self.scheme is None:
            value = torch.randn(shape, device="cuda", dtype=self.dtype)
            return [value.mul_(shape[-1] ** -0.5), None, None]
        packed = random_packed(shape, self.scheme, self.dtype)
        return [packed.packed, packed.scales, packed.zeros]

    def inputs(self, tokens: int, sentinels: bool = False) -> tuple[torch.Tensor, ...]:
        shape = self.shape
        chosen = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k).indices
        if sentinels:
            skipped = torch.rand(tokens, shape.top_k, device="cuda") < 0.2
            chosen = torch.where(skipped, shape.experts, chosen)
        return (
            torch.randn(tokens, shape.hidden, device="cuda").to(self.dtype),
            chosen,
            torch.rand(tokens, shape.top_k, device="cuda"),
            torch.randn(tokens, 1, device="cuda").to(self.dtype),
        )

    def together(self, x: Any, ids: Any, weights: Any, logits: Any, copy: int = 0) -> Any:
        return moe_experts_shared(
            x, ids, weights, logits, self.routed, self.shared[copy], self.group, "silu", "chunked"
        )

    def alone(self, x: Any, ids: Any, weights: Any) -> Any:
        up, down = self.routed[:3], self.routed[3:]
        if self.scheme is None:
            return moe_experts_cuda(x, up[0], down[0], ids, weights)
        return moe_experts_quantized_cuda(
            x, *up, self.group, *down, self.group, self.shape.inner, ids, weights
        )

    def apart(self, x: Any, ids: Any, weights: Any, logits: Any, copy: int = 0) -> Any:
        shared = self.shared[copy]
        h = multiply(self.linear(x, shared[:3]), self.linear(x, shared[3:6]))
        return join(self.alone(x, ids, weights), logits, self.linear(h, shared[6:]))

    def linear(self, rows: Any, weight: Any) -> Any:
        if self.scheme is None:
            return F.linear(rows, weight[0])
        return quantized_linear_cuda(rows, *weight, None, self.group)

    def exact(self, *inputs: torch.Tensor) -> torch.Tensor:
        def wide(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [wide(each) for each in value]
            floats = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.double() if floats else value

        # The chosen experts alone: all of them would not fit in fp64.
        x, ids, weights, logits = wide(inputs)
        known = ids < self.shape.experts
        chosen = torch.where(known, ids, 0).flatten()
        routed = wide([None if value is None else value[chosen] for value in self.routed])
        places = torch.arange(ids.numel(), device="cuda").view_as(ids)
        return moe_experts_shared_plain(
            x, torch.where(known, places, ids.numel()), weights, logits, routed,
            wide(self.shared[0]), self.group, "silu", "chunked",
        )  # fmt: skip


@torch.compile
def multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


@torch.compile
def join(y: torch.Tensor, logits: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    return y + torch.sigmoid(logits) * shared


def check() -> int:
    """Against fp64: the error of h and y rounded to the dtype; the same bits every time."""
    failed = 0
    for (name, shape), (kind, scheme) in itertools.product(SHAPES.items(), SCHEMES.items()):
        for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if scheme is None else 2]:
            layer = Layer(shape, scheme, dtype)
            bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
            for tokens in (1, 2, 3, 8, *((40,) if name == "odd" else ())):
                inputs = layer.inputs(tokens, sentinels=True)
                junk = torch.full((1 << 22,), float("nan"), device="cuda", dtype=dtype)
                del junk
                found, exact = layer.together(*inputs), layer.exact(*inputs)
                again = layer.together(*inputs)
                error = ((found.double() - exact).norm() / exact.norm()).item()
                fine = error <= bound and torch.equal(found, again)
                failed += not fine
                if not fine or tokens == 1:
                    print(
                        f"{name} {kind} {dtype} T={tokens}: {error:.1e}", "" if fine else "WRONG"
                    )
    print(f"{failed} wrong" if failed else "all right")
    return min(failed, 1)


def time_all(path: Path | None) -> None:
    rows = []
    for name, kind in itertools.product(("qwen3.5-35b-a3b", "deepseek-v2-lite"), ("bf16", "int4")):
        turns = 12
        layer = Layer(SHAPES[name], SCHEMES[kind], torch.bfloat16, copies=turns)
        for tokens in (1, 2, 4, 8):
            inputs = [layer.inputs(tokens) for _ in range(turns)]
            cases = {
                "routed alone": lambda turn, i=inputs, m=layer: m.alone(*i[turn][:3]),
                "together": lambda turn, i=inputs, m=layer: m.together(*i[turn], turn),
                "apart": lambda turn, i=inputs, m=layer: m.apart(*i[turn], turn),
            }
            for what, run in cases.items():
                taken, spread = microseconds(run, turns)
                rows.append(
                    {
                        "layer": name,
                        "weights": kind,
                        "tokens": tokens,
                        "what": what,
                        "microseconds": round(taken, 2),
                        "spread": round(spread, 2),
                    }
                )
                print(f"{name} {kind} T={tokens} {what}: {taken:.1f} us (+-{spread:.1f})")
    result = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "date": datetime.date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["check", "time"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.mode == "check":
        return check()
    time_all(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
