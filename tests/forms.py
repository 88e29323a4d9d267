"""Expert blocks written by hand, in every form that is matched, each step replaceable.

A near-miss is a form with one of its steps replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 12, 32, 24, 6, 2


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    return up * torch.relu(gate)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def limited_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=3.0)) * up.clamp(min=-3.0, max=3.0)


def spelled_silu(gate: Tensor, up: Tensor) -> Tensor:
    return up * (gate / (1.0 + torch.exp(-gate)))


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": geglu_tanh,
    "relu": reglu,
    "silu alpha 1.702 offset 1 limit 7": clamped_swiglu,
    "silu limit 3": limited_swiglu,
    "silu spelled out": spelled_silu,
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


class Experts(nn.Module):
    """Routed experts whose steps can be replaced by keyword.

    form         "batched" or "grouped"
    gate         "none", "chunked" or "interleaved"
    transposed   weights are [E, in, out] instead of [E, out, in]
    function     (gate, up) -> h, or up -> h without a gate
    """

    def __init__(
        self,
        form: str = "grouped",
        gate: str = "chunked",
        transposed: bool = False,
        bias: bool = False,
        weights_on_input: bool = False,
        function: Callable[..., Tensor] | None = None,
        mask_sentinels: bool = False,
        **steps: Any,
    ) -> None:
        super().__init__()
        self.form, self.gate, self.transposed = form, gate, transposed
        self.weights_on_input, self.mask_sentinels = weights_on_input, mask_sentinels
        self.function = function or (swiglu if gate != "none" else F.silu)
        self.steps = steps
        width = INNER if gate == "none" else 2 * INNER
        generator = torch.Generator().manual_seed(7)

        def weight(out: int, into: int) -> nn.Parameter:
            shape = (EXPERTS, into, out) if transposed else (EXPERTS, out, into)
            return nn.Parameter(torch.randn(shape, generator=generator) / into**0.5)

        self.up, self.down = weight(width, HIDDEN), weight(HIDDEN, INNER)
        self.up_bias = (
            nn.Parameter(torch.randn(EXPERTS, width, generator=generator)) if bias else None
        )
        self.down_bias = (
            nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator)) if bias else None
        )

    def step(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return self.steps.get(name, default)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return (
            self.grouped(x, ids, weights)
            if self.form == "grouped"
            else self.batched(x, ids, weights)
        )

    def between(self, up: Tensor) -> Tensor:
        if self.gate == "none":
            return self.function(up)
        if self.gate == "chunked":
            first, second = self.step("halves", lambda v: v.chunk(2, dim=-1))(up)
        else:
            first, second = self.step("halves", lambda v: (v[..., 0::2], v[..., 1::2]))(up)
        return self.function(first, second)

    def combine(self, rows: Tensor, tokens: int) -> Tensor:
        top_k = rows.shape[0] // tokens
        total = self.step("sum", lambda v: v.sum(dim=1))(rows.view(tokens, top_k, -1))
        return total.to(self.up.dtype)

    def batched(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        tokens, top_k = ids.shape
        flat = ids.reshape(-1)
        rows = self.step("repeat", lambda v, k: v.repeat_interleave(k, dim=0))(x, top_k)
        column = weights.reshape(-1)[:, None]
        if self.weights_on_input:
            rows = (rows * column).to(x.dtype)
        up = self.multiply(rows, self.up[flat])
        if self.up_bias is not None:
            up = up + self.up_bias[self.step("bias_ids", lambda v: v)(flat)]
        h = self.between(up)
        out = self.multiply(h, self.down[self.step("down_ids", lambda v: v)(flat)])
        if self.down_bias is not None:
            out = out + self.down_bias[flat]
        if not self.weights_on_input:
            out = self.step("weigh", lambda v, w: v * w)(out, column)
        result = self.combine(out, tokens)
        extra = self.step("extra", None)
        return (result, extra(up, h, out)) if extra else result

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        if self.transposed:
            return torch.bmm(rows[:, None], weight).squeeze(1)
        return torch.bmm(weight, rows[..., None]).squeeze(-1)

    def grouped(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        tokens, top_k = ids.shape
        sorted_ids, order = torch.sort(
            ids.reshape(-1), descending=self.steps.get("descending", False)
        )
        rows = x[self.step("token", lambda o, k: o // k)(order, top_k)]
        column = weights.reshape(-1)[order][:, None]
        counts = torch.histc(
            sorted_ids.float(), bins=EXPERTS, min=self.steps.get("first", 0), max=EXPERTS - 1
        )
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        if self.weights_on_input:
            rows = (rows * column).to(x.dtype)
        up = self.mask(
            torch._grouped_mm(rows, self.grouped_weight(self.up), offs=ends), sorted_ids
        )
        if self.up_bias is not None:
            up = up + self.up_bias[self.step("bias_ids", lambda v: v)(sorted_ids)]
        h = self.between(up)
        out = torch._grouped_mm(h, self.grouped_weight(self.down), offs=ends)
        out = self.mask(out, sorted_ids)
        if self.down_bias is not None:
            out = out + self.down_bias[sorted_ids]
        if not self.weights_on_input:
            out = self.step("weigh", lambda v, w: v * w)(out, column)
        inverse = torch.empty_like(order)
        inverse[order] = self.step("places", torch.arange)(order.shape[0])
        result = self.combine(out[self.step("unsort", lambda i, o: i)(inverse, order)], tokens)
        extra = self.step("extra", None)
        return (result, extra(up, h, out)) if extra else result

    def grouped_weight(self, weight: Tensor) -> Tensor:
        return weight if self.transposed else weight.transpose(-2, -1)

    def mask(self, rows: Tensor, sorted_ids: Tensor) -> Tensor:
        if not self.mask_sentinels:
            return rows
        limit = self.steps.get("sentinel", EXPERTS)
        return rows.masked_fill((sorted_ids >= limit)[:, None], self.steps.get("fill", 0.0))


class Routed(nn.Module):
    """A router before the experts, so that ids come from a top-k."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, x: Tensor) -> Any:
        weights, ids = torch.topk(self.router(x).float().softmax(-1), TOP_K, dim=-1)
        return self.experts(x, ids, weights.to(x.dtype))


def routed(dtype: torch.dtype = torch.bfloat16, **knobs: Any) -> Routed:
    torch.manual_seed(3)
    return Routed(Experts(**knobs)).to(dtype).eval()


def tokens(dtype: torch.dtype = torch.bfloat16, count: int = TOKENS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator).to(dtype)
