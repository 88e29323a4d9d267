"""Check, time and sweep prompt attention over a static cache on one GPU.

    python examples/benchmarks/attention_prompt.py check
    python examples/benchmarks/attention_prompt.py time --json attention_prompt.json
    python examples/benchmarks/attention_prompt.py sweep --json sweep.json

Times are medians of replays of one CUDA graph through which copies of queries and cache are
rotated. The peers are PyTorch's attentions with the mask in the form that each takes, and those
that take a flag for a causal mask, which a model over a static cache cannot use: they mark what is
possible where the cache holds nothing but the prompt. `sweep` tries tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from attention_decode import MODELS as DECODE_MODELS
from attention_decode import hide, microseconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.attention_tiles import PromptTile, choose_prompt_tile
from inductor_moe.ops.attention_prompt import attention_prompt_aten, attention_prompt_cuda
from inductor_moe.reference.attention import attention_prompt_reference
from inductor_moe.testing import relative_error
from inductor_moe.tiles import gpu_of

# Query heads, key heads, head dim.
MODELS = {**DECODE_MODELS, "heads-of-64": (64, 8, 64)}
# Queries, positions of the cache, and how many of them were filled before.
CASES = ((2048, 2112, 0), (2048, 4160, 0), (512, 4160, 0), (8192, 8256, 0), (2048, 32768, 16384))
TILES = [
    PromptTile(*sizes)
    for sizes in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 4),
                  (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
                  (64, 128, 4, 2), (64, 128, 4, 3), (64, 32, 4, 3))
]  # fmt: skip


def causal(queries: int, length: int, before: int, device: str = "cuda") -> Tensor:
    position = before + torch.arange(queries, device=device)[:, None]
    return (torch.arange(length, device=device) <= position)[None, None]


def draw_mask(kind: str, rows: int, queries: int, length: int, device: str) -> Tensor:
    before = random.randint(0, max(0, length - queries))
    keep = causal(queries, length, before, device).expand(rows, -1, -1, -1)
    position = torch.arange(length, device=device)
    if kind == "window":
        return keep & ~causal(queries, length, before - random.randint(1, length), device)
    if kind == "padded":
        first = torch.randint(0, length, (rows, 1, 1, 1), device=device)
        return keep & (position >= first)
    if kind == "holes":
        share = torch.rand(rows, 1, -(-queries // 64), -(-length // 64), device=device)
        share = share.repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :queries, :length]
        return (share < 0.3) | (
            (share < 0.6) & (torch.rand(rows, 1, queries, length, device=device) < 0.5)
        )
    return keep


def check(budget: float, device: str = "cuda", longest: int = 5000, **options: Any) -> int:
    """Errors against fp64 on fresh inputs, at most twice those of PyTorch's own attention."""
    seed = random.randrange(2**31)
    random.seed(seed)
    torch.manual_seed(seed)
    dims = ((16, 2, 256, 256), (32, 4, 128, 128), (8, 8, 128, 128), (16, 16, 192, 128),
            (12, 4, 96, 96), (64, 8, 64, 64), (6, 2, 80, 72))  # fmt: skip
    kinds = ("causal", "window", "padded", "holes")
    start, bad, count = time.perf_counter(), 0, 0
    for heads, kv_heads, dim, value_dim in itertools.cycle(dims):
        if time.perf_counter() - start > budget:
            break
        dtype, kind = (torch.bfloat16, torch.float16)[count // 2 % 2], kinds[count % 4]
        batch = random.choice((1, 2, 3))
        queries = int(2 ** random.uniform(1, math.log2(longest / 2)))
        length = int(2 ** random.uniform(1, math.log2(longest)))
        while batch * heads * queries * length > 2**25:
            queries, length = queries // 2 + 1, length // 2 + 1
        q = torch.randn(batch, queries, heads, dim, device=device).to(dtype).transpose(1, 2)
        k = torch.randn(batch, length, kv_heads, dim, device=device).to(dtype).transpose(1, 2)
        v = torch.randn(batch, kv_heads, length, value_dim, device=device).to(dtype)
        mask = draw_mask(kind, random.choice((1, batch)), queries, length, device)
        scale = dim**-0.5
        exact = attention_prompt_reference(q.double(), k.double(), v.double(), mask, scale)
        plain = attention_prompt_aten(q, k, v, mask, scale)
        found = attention_prompt_cuda(q, k, v, mask, scale, **options)
        count += 1
        seen = mask.any(-1).expand(batch, heads, queries)
        error, allowed = (relative_error(x[seen], exact[seen]) for x in (found, plain))
        if bool((~seen).any()) and found[~seen].count_nonzero():
            error = math.inf
        if seen.any() and not error <= 2 * allowed:
            bad += 1
            print(f"WRONG {dtype} {kind} B={batch} {heads}/{kv_heads} D={dim} DV={value_dim} "
                  f"T={queries} L={length}: {error:.2e}, allowed {2 * allowed:.2e}")  # fmt: skip
    print(f"{count} cases, {bad} wrong (seed {seed})")
    return int(bad > 0 or count == 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's prompt in bf16, in as many copies as L2 cannot hold."""

    model: str
    queries: int
    length: int
    before: int

    def inputs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        heads, kv_heads, dim = MODELS[self.model]
        numbers = (heads * self.queries + 2 * kv_heads * self.length) * dim
        return [
            (
                torch.randn(1, self.queries, heads, dim, device="cuda").bfloat16().transpose(1, 2),
                *torch.randn(2, 1, kv_heads, self.length, dim, device="cuda").bfloat16(),
            )
            for _ in range(max(2, math.ceil(1e8 / (2 * numbers))))
        ]

    def flops(self) -> float:
        """Of what a causal mask shows."""
        heads, _, dim = MODELS[self.model]
        return 4 * heads * dim * self.queries * (self.before + (self.queries + 1) / 2)

    def tile(self) -> PromptTile:
        heads, _, dim = MODELS[self.model]
        return choose_prompt_tile(programs=heads, queries=self.queries, dim=dim, gpu=gpu_of(0))


def providers(case: Case, inputs: Any) -> Iterator[tuple[str, Callable[[int], Any]]]:
    keep = causal(case.queries, case.length, case.before)
    bias = hide(keep, torch.bfloat16)
    heads, kv_heads, dim = MODELS[case.model]

    def repeat(x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)

    def given(turn: int) -> tuple[Tensor, Tensor, Tensor]:
        return inputs[turn % len(inputs)]  # type: ignore[no-any-return]

    def attend(turn: int, kind: SDPBackend) -> Tensor:
        q, k, v = given(turn)
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=bias)

    def flagged(turn: int, kind: SDPBackend) -> Tensor:
        q, k, v = given(turn)
        k, v = (x[:, :, : case.queries] for x in (k, v))
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    yield "inductor_moe", lambda turn: attention_prompt_cuda(*given(turn), keep, dim**-0.5)
    yield "repeat, cudnn, mask", lambda turn: attend(turn, SDPBackend.CUDNN_ATTENTION)
    yield "repeat, efficient, mask", lambda turn: attend(turn, SDPBackend.EFFICIENT_ATTENTION)
    if case.before == 0:
        yield "flash, causal flag", lambda turn: flagged(turn, SDPBackend.FLASH_ATTENTION)
        yield "cudnn, causal flag", lambda turn: flagged(turn, SDPBackend.CUDNN_ATTENTION)


def rows_of(case: Case, runs: Any, copies: int, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {**dataclasses.asdict(case), **more}
    for name, run in runs:
        try:
            taken, spread = microseconds(run, copies, replays=15)
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            row[name] = {"error": str(error).splitlines()[0]}
            continue
        row[name] = {"microseconds": round(taken, 1), "spread": round(spread, 1),
                     "tflops": round(case.flops() / taken / 1e6, 1)}  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def measure(what: str, models: list[str], budget: float) -> list[dict[str, Any]]:
    rows, start = [], time.perf_counter()
    for sizes, model in itertools.product(CASES, models):
        case = Case(model, *sizes)
        inputs = case.inputs()
        if what == "time":
            rows.append(rows_of(case, providers(case, inputs), len(inputs)))
            continue
        keep = causal(case.queries, case.length, case.before)
        for tile in TILES:
            if time.perf_counter() - start > budget:
                print("out of time", flush=True)
                return rows

            def run(turn: int, inputs: Any = inputs, keep: Any = keep, tile: Any = tile) -> Tensor:
                given = inputs[turn % len(inputs)]
                return attention_prompt_cuda(*given, keep, given[0].shape[3] ** -0.5, tile=tile)

            chosen = tile == case.tile()
            more = {**dataclasses.asdict(tile), "chosen": chosen}
            rows.append(rows_of(case, [("inductor_moe", run)], len(inputs), **more))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "time", "sweep"))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budget", type=float, default=75, help="seconds after which to stop")
    options = parser.parse_args()
    if options.what == "check":
        return check(options.budget)
    rows = measure(options.what, options.models, options.budget)
    if options.json is not None:
        write(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
