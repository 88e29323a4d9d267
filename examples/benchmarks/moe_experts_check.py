"""Check `moe_experts` on one GPU: eagerly, traced with a symbolic T, and through Inductor.

python examples/benchmarks/moe_experts_check.py
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import Any
from unittest import mock

import torch

from inductor_moe.ops import moe_cuda
from inductor_moe.ops.moe_cuda import moe_experts_cuda
from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.tiles import DecodeTile, GemmTile, Plan


def check() -> int:
    """Errors against fp64 on fresh inputs: at most twice the plain-torch reference's own.

    In fp32 both are a few units in the last place, where the order of a sum decides; four pass.
    """
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    empty = torch.empty
    small = ((1, 40, 24, 5, 3), (7, 40, 24, 5, 3), (33, 129, 65, 5, 2))
    large = ((300, 128, 192, 8, 4), (3000, 256, 128, 60, 4), (2049, 72, 40, 33, 5))
    cases = itertools.product(
        (torch.bfloat16, torch.float16, torch.float32),
        ("none", "chunked", "interleaved"),
        (0, 16, 64, 128),
    )
    bad = count = 0
    for dtype, gate, block_m in cases:
        if dtype == torch.float32 and block_m > 64:
            continue
        inner = "kn"[count % 2]
        tokens, hidden, size, experts, top_k = (small if block_m < 64 else large)[count // 2 % 3]
        rows = size if gate == "none" else 2 * size

        def weight(
            n: int, k: int, inner: str = inner, experts: int = experts, dtype: Any = dtype
        ) -> torch.Tensor:
            shape = (experts, n, k) if inner == "k" else (experts, k, n)
            value = (torch.randn(shape, device="cuda") / k**0.5).to(dtype)
            return value if inner == "k" else value.transpose(1, 2)

        floats = [
            torch.randn(tokens, hidden, device="cuda").to(dtype),
            weight(rows, hidden),
            weight(hidden, size),
            torch.rand(tokens, top_k, device="cuda").to(dtype),
            torch.randn(experts, rows, device="cuda").to(dtype),
            torch.randn(experts, hidden, device="cuda").to(dtype),
        ]
        ids = torch.randint(-1, experts + 2, (tokens, top_k), device="cuda")
        ids[0, 0] = 1

        def order(
            f: list[torch.Tensor], ids: torch.Tensor = ids, gate: str = gate
        ) -> tuple[Any, ...]:
            return (f[0], f[1], f[2], ids, f[3], f[4], f[5], "silu", gate)

        tile: Any = (
            GemmTile(64, 32, 4, 4, 2) if block_m else DecodeTile(8, 256, 4, 2, 1 + count % 2)
        )
        plan = Plan(block_m, tile, tile)
        with mock.patch.object(moe_cuda.torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k))):
            out = moe_experts_cuda(*order(floats), plan=plan)
        exact = moe_experts_reference(*order([f.double() for f in floats]))
        plain = moe_experts_reference(*order(floats))
        error, allowed = (
            ((v.double() - exact).norm() / exact.norm()).item() for v in (out, plain)
        )
        count += 1
        if not error <= max(2 * allowed, 4 * torch.finfo(torch.float32).eps):
            bad += 1
            print(
                f"seed {seed} {dtype} {gate} {inner} T={tokens} block_m={block_m}: "
                f"{error:.2e} > 2 * {allowed:.2e}"
            )
    print(f"check: {count - bad} of {count} cases agree with fp64 (seed {seed})")
    return bad


def check_traced() -> int:
    """The same function under make_fx with a symbolic number of tokens, run at other sizes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    bad = 0
    up, down = (
        torch.randn(s, device="cuda").bfloat16() / 16 for s in ((8, 384, 256), (8, 256, 192))
    )
    for block_m in (0, 16, 64):
        tile: Any = GemmTile(64, 64, 4, 4, 2) if block_m else DecodeTile(8, 256, 4)
        hint = 3000 if block_m == 64 else 24

        launch = functools.partial(
            moe_experts_cuda,
            tokens_hint=hint,
            plan=Plan(block_m, tile, tile),
            wrap=torch.library.wrap_triton,
        )

        def draw(tokens: int) -> tuple[torch.Tensor, ...]:
            x = torch.randn(tokens, 256, device="cuda").bfloat16()
            return (
                x,
                up,
                down,
                torch.randint(0, 8, (tokens, 4), device="cuda"),
                torch.rand(tokens, 4, device="cuda").bfloat16(),
            )

        graph = make_fx(_unwrapped(launch), tracing_mode="symbolic")(*draw(24))
        for name, run in (("graph", graph), ("compiled", torch.compile(graph, dynamic=True))):
            for tokens in (24, 5, 700):
                values = draw(tokens)
                exact = moe_experts_reference(*values)
                error = ((run(*values) - exact).double().norm() / exact.double().norm()).item()
                if not error < 0.02:
                    bad += 1
                    print(f"traced {name} block_m={block_m} T={tokens}: {error:.2e}")
    print(f"check: traced, {bad} bad")
    return bad


def _unwrapped(launch: Any) -> Any:
    """A plain function, whose arguments make_fx can count."""
    return lambda *values: launch(*values)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(math.nan if tensor.is_floating_point() else 2**30)


if __name__ == "__main__":
    sys.exit(min(check() + check_traced(), 1))
