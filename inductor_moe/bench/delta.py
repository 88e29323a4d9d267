"""Delta-rule layers: the rule over a prompt, and the whole step of one token."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_moe.bench.case import Case, Op, draws, outcome, randn
from inductor_moe.bench.shapes import Delta, delta_layer, model_named, transformers_class
from inductor_moe.reference import delta_rule as reference

LENGTHS = (512, 2048, 4096, 8192, 32768)
BATCHES = (1, 8, 32, 128, 256)
PROMPT, TOGETHER = 2048, (1, 8)
LONGEST_UNROLLED = 2048


class Prefill(nn.Module):
    """The gates, l2norm and the rule over a prompt, as transformers' layers call it."""

    def __init__(self, shape: Delta, device: str) -> None:
        super().__init__()
        self.shape = shape
        # as transformers' layers of these gates draw them
        least, dt = 0.0, torch.ones(shape.value_heads, device=device)
        if shape.gate == "channel":
            size = (shape.value_heads, shape.key)
            least, dt = 1.0, torch.empty(size, device=device).uniform_(*map(math.log, (1e-3, 0.1)))
            dt = dt.exp() + torch.log(-torch.expm1(-dt.exp()))
        rate = torch.empty(shape.value_heads, device=device).uniform_(least, 16)
        self.A_log, self.dt_bias = nn.Parameter(rate.log()), nn.Parameter(dt)
        family, rule = {
            "head": ("qwen3_5", "torch_chunk_gated_delta_rule"),
            "channel": ("kimi_linear", "chunk_kimi_delta_attention"),
        }[shape.gate]
        self.rule = transformers_class(f"{family}.{rule}")

    def channels(self) -> int:
        return self.shape.key if self.shape.gate == "channel" else 1

    def gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.A_log.to(torch.promote_types(a.dtype, torch.float32)).exp()
        rate = rate[:, None] if self.shape.gate == "channel" else rate
        return -rate * F.softplus(a.to(rate.dtype) + self.dt_bias), b.sigmoid()

    def spread(self, x: Tensor) -> Tensor:
        repeats = self.shape.value_heads // self.shape.heads
        return x.repeat_interleave(repeats, dim=2) if repeats > 1 else x

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, rule: Any = None
    ) -> tuple[Tensor, Tensor]:
        g, beta = self.gates(a, b)
        out, state = (rule or self.rule)(
            self.spread(q), self.spread(k), v, g=g, beta=beta, initial_state=None,
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out, state

    def by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same, head by head: a channel's decay takes [T, 64, K] floats of every head."""
        g, beta = self.gates(a, b)
        heads = [
            self.rule(
                *(x[:, :, i : i + 1] for x in (self.spread(q), self.spread(k), v)),
                g=g[:, :, i : i + 1], beta=beta[:, :, i : i + 1], initial_state=None,
                output_final_state=True, use_qk_l2norm_in_kernel=True,
            )
            for i in range(v.shape[2])
        ]  # fmt: skip
        return torch.cat([out for out, _ in heads], 2), torch.cat([end for _, end in heads], 1)

    def exact(self, arguments: tuple[Tensor, ...]) -> list[Tensor]:
        q, k, v, a, b = (argument.double() for argument in arguments)
        wide = copy.deepcopy(self).double()
        g, beta = wide.gates(a, b)
        out, state = reference.delta_rule_recurrent(
            q, k, v, g, beta, None, self.shape.key**-0.5, 1e-6
        )
        return [out, state]


def fla_prefill(layer: Prefill) -> Callable[..., Any]:
    """The same with FLA's rule; the gates compiled by stock Inductor around it."""
    if layer.shape.gate == "channel":
        from fla.ops.kda import chunk_kda as rule
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule
    gates = torch.compile(layer.gates, dynamic=False)
    spread = torch.compile(lambda q, k: (layer.spread(q), layer.spread(k)), dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
        g, beta = gates(a, b)
        q, k = spread(q, k)
        return rule(q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return call


def prefill_cases(model: str, device: str, sizes: list[int]) -> Iterator[Case]:
    for tokens in sizes:
        yield from prompts_case("delta-prefill", model, device, 1, tokens)


def together_cases(model: str, device: str, sizes: list[int]) -> Iterator[Case]:
    """Several prompts of 2048 tokens."""
    for batch in sizes:
        yield from prompts_case("delta-prompts", model, device, batch, PROMPT)


def prompts_case(op: str, model: str, device: str, batch: int, tokens: int) -> Iterator[Case]:
    shape = model_named(model).delta
    if shape is None:
        return
    layer = Prefill(shape, device).requires_grad_(False)
    wide = layer.channels()
    values = shape.value_heads * shape.value
    state = 4 * shape.value_heads * shape.key * shape.value
    moved = batch * (
        state
        + 2 * tokens * (2 * shape.heads * shape.key + 2 * values + shape.value_heads * (wide + 1))
    )

    def drawn(*width: int) -> Tensor:
        return randn(batch, tokens, *width, device=device)

    gate = (shape.value_heads, wide) if shape.gate == "channel" else (shape.value_heads,)
    inputs = [
        (
            drawn(shape.heads, shape.key), drawn(shape.heads, shape.key),
            drawn(shape.value_heads, shape.value), drawn(*gate), drawn(shape.value_heads),
        )
        for _ in range(min(8, draws(moved, device)))
    ]  # fmt: skip
    unrolled = "unrolls its loop over chunks: minutes of compilation"
    yield Case(
        op=op, model=model,
        size={"tokens": tokens} if op == "delta-prefill" else {"batch": batch},
        call=layer, inputs=inputs, expected=layer.exact, bytes=moved,
        flops=6 * batch * tokens * values * shape.key,
        pieces=layer.by_heads if shape.gate == "channel" else None,
        peers={"fla": lambda: fla_prefill(layer)},
        absent={"inductor": unrolled} if tokens > LONGEST_UNROLLED else {},
    )  # fmt: skip


class _Part(nn.Module):
    """A projection whose result is given: a stretch of the layer's input, dense as a GEMM's."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0] * x.shape[1]
        given = x.flatten()[rows * self.start : rows * (self.start + self.width)]
        return given.view(*x.shape[:2], self.width)


def decode_layer(shape: Delta, device: str) -> tuple[nn.Module, Any, int]:
    """transformers' layer without its projections, its config, and the width of its input.

    What is left is everything from the convolution's update to the gated norm.
    """
    layer, config = delta_layer(shape, device)
    start = 0
    for name in ("qkv", "z", "b", "a"):
        width = getattr(layer, f"in_proj_{name}").out_features
        setattr(layer, f"in_proj_{name}", _Part(start, width))
        start += width
    layer.out_proj = nn.Identity()
    return layer, config, start


def decode_cases(model: str, device: str, sizes: list[int]) -> Iterator[Case]:
    from transformers import StaticCache

    shape = model_named(model).delta
    if shape is None or shape.gate != "head":
        return
    layer, config, width = decode_layer(shape, device)
    exact = copy.deepcopy(layer).double()

    def expected(arguments: tuple[Any, ...]) -> list[Tensor]:
        x, cache = copy.deepcopy(arguments)
        (held,) = cache.layers
        for states in (held.conv_states, held.recurrent_states):
            states.update({i: state.double() for i, state in states.items()})
        return outcome(exact, (x.double(), cache), None)

    for batch in sizes:
        state = 4 * shape.value_heads * shape.key * shape.value
        values = shape.value_heads * shape.value
        channels = 2 * shape.heads * shape.key + values
        moved = batch * (2 * state + 2 * (width + values + 2 * shape.taps * channels))
        inputs = []
        for _ in range(draws(moved, device)):
            cache = StaticCache(config=config, max_cache_len=16)
            layer(randn(batch, 1, width, device=device), cache)
            (held,) = cache.layers
            for states in (held.conv_states, held.recurrent_states):
                for tensor in states.values():
                    tensor.normal_(0, 0.5)
            inputs.append((randn(batch, 1, width, device=device), cache))
        yield Case(
            op="delta-decode", model=model, size={"batch": batch}, call=layer, inputs=inputs,
            expected=expected, bytes=moved, flops=6 * batch * values * shape.key,
        )  # fmt: skip


PREFILL = Op("delta-prefill", "tokens", LENGTHS, prefill_cases)
PROMPTS = Op("delta-prompts", "batch", TOGETHER, together_cases)
DECODE = Op("delta-decode", "batch", BATCHES, decode_cases)
