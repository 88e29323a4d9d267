"""A grammar of expert blocks: every step has several spellings, and a mutation changes one step.

A spelling says the same as all others; a mutation may change what is computed, or not. Either
way, what a rewrite makes of a block must compute what the block computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN, EXPERTS = 16, 5


@dataclasses.dataclass(frozen=True)
class Block:
    """The choices of one block. Each field's first option is the plainest."""

    form: str = "batched"
    tokens: int = 7
    top_k: int = 2
    inner: int = 8
    router: str = "softmax"
    normalise: str = "no"
    gate: str = "chunked"
    halves: str = "chunk"
    activation: str = "silu"
    operand_order: bool = False
    transposed: bool = False
    bias: bool = False
    weigh: str = "rows"
    repeat: str = "repeat_interleave"
    gather: str = "index"
    division: str = "//"
    unsort: str = "index_put"
    total: str = "view sum"
    masks: bool = False
    sentinels: bool = False
    apart: bool = False
    mutation: str | None = None


OPTIONS: dict[str, tuple[Any, ...]] = {
    "form": ("batched", "grouped", "einsum"),
    "tokens": (7, 1, 2, 10),
    "top_k": (2, 1, 3),
    "inner": (8, 12),
    "router": ("softmax", "sigmoid", "softmax after", "bias", "scaled"),
    "normalise": ("no", "sum", "clamped sum"),
    "gate": ("chunked", "interleaved", "none"),
    "halves": ("chunk", "split", "slices", "view unbind", "view select"),
    "activation": (
        "silu", "silu product", "silu quotient", "gelu", "gelu spelled", "gelu tanh", "relu",
        "relu2", "clamped", "limited", "unnamed",
    ),
    "operand_order": (False, True),
    "transposed": (False, True),
    "bias": (False, True),
    "weigh": ("rows", "combined", "input"),
    "repeat": ("repeat_interleave", "expand", "gather", "index_select"),
    "gather": ("index", "index_select"),
    "division": ("//", "div floor", "div trunc", "floor_divide"),
    "unsort": ("index_put", "argsort", "scatter"),
    "total": ("view sum", "sum dim -2", "unflatten sum"),
    "masks": (False, True),
    "sentinels": (False, True),
    "apart": (False, True),
}  # fmt: skip

MUTATIONS = (
    # constants
    "sum divisor", "histogram range", "histogram low", "activation constant", "sentinel limit",
    "fill value", "scale rows", "limit", "scale weights of one slot", "offset input",
    # dims, axes, order
    "sum over tokens", "token of unsorted", "descending", "unsort by order", "halves offset",
    "roll rows", "flip experts' rows", "softmax over tokens", "other order of slots",
    # ids
    "down ids", "bias ids", "up ids", "last expert skipped",
    # functions
    "swapped halves", "other activation", "square weights", "weights twice", "no weights",
    "weights per feature", "row mean", "norm between", "mix rows", "residual between",
    "cast to bf16", "cast to int", "abs of rows", "max of slots", "second gate",
    # users and aliasing
    "extra user of up", "extra user of h", "extra user of out", "extra user of rows",
    "extra user of ids", "in place up", "in place out", "in place input", "in place weights",
    "alias of input", "view of up written", "mean of slots",
)  # fmt: skip


def experts_weights(block: Block) -> dict[str, Tensor]:
    """Inputs of a block in fp64, the same for equal sizes."""
    generator = torch.Generator().manual_seed(block.tokens * 100 + block.inner)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = block.inner * (1 if block.gate == "none" else 2)
    up, down = random(EXPERTS, width, HIDDEN) / 3, random(EXPERTS, HIDDEN, block.inner) / 2
    if block.transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    # Well separated scores: no rounding may change a choice.
    ranks = torch.stack(
        [torch.randperm(EXPERTS, generator=generator) for _ in range(block.tokens)]
    )
    return {
        "x": random(block.tokens, HIDDEN),
        "logits": ranks.double() * 0.7 - 1.5 + random(block.tokens, EXPERTS) * 0.05,
        "up": up,
        "down": down,
        "up_bias": random(EXPERTS, width),
        "down_bias": random(EXPERTS, HIDDEN),
    }


class Steps:
    """One block, run step by step; `mutated(name)` tells whether a step is the changed one."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.extra: list[Tensor] = []

    def mutated(self, name: str) -> bool:
        return self.block.mutation == name

    def keep(self, name: str, value: Tensor) -> None:
        if self.mutated(f"extra user of {name}"):
            self.extra.append(value * 2)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
        dim = 0 if self.mutated("softmax over tokens") else -1
        if block.router == "softmax after":
            scores, ids = torch.topk(logits, block.top_k, dim=-1)
            weights = scores.softmax(dim)
        elif block.router in ("sigmoid", "bias"):
            scores = logits.sigmoid()
            choice = scores + torch.linspace(0, 0.01, EXPERTS, dtype=scores.dtype)
            choice = choice if block.router == "bias" else scores
            ids = torch.topk(choice, block.top_k, dim=-1).indices
            weights = scores.gather(1, ids)
        else:
            weights, ids = torch.topk(logits.softmax(dim), block.top_k, dim=-1)
        if block.normalise == "sum":
            weights = weights / weights.sum(-1, keepdim=True)
        elif block.normalise == "clamped sum":
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
        if block.router == "scaled":
            weights = weights * 2.5
        if self.mutated("square weights"):
            weights = weights * weights
        if self.mutated("scale weights of one slot"):
            slots = torch.arange(block.top_k, dtype=weights.dtype) + 1
            weights = weights * slots
        if self.mutated("other order of slots"):
            weights = weights.flip(-1)
        return weights, ids

    def halves(self, up: Tensor) -> tuple[Tensor, Tensor]:
        block, inner = self.block, self.block.inner
        offset = 1 if self.mutated("halves offset") else 0
        if block.gate == "interleaved":
            if block.halves.startswith("view"):
                pairs = up.unflatten(-1, (inner, 2))
                both = (
                    pairs.unbind(-1)
                    if "unbind" in block.halves
                    else (pairs[..., 0], pairs[..., 1])
                )
            else:
                both = (up[..., 0::2], up[..., 1::2])
        elif offset:
            both = (up[..., offset : inner + offset], up[..., inner - offset : 2 * inner - offset])
        elif block.halves == "split":
            both = up.split(inner, dim=-1)
        elif block.halves == "slices":
            both = (up[..., :inner], up[..., inner:])
        elif block.halves.startswith("view"):
            pairs = up.unflatten(-1, (2, inner))
            both = (
                pairs.unbind(-2)
                if "unbind" in block.halves
                else (pairs[..., 0, :], pairs[..., 1, :])
            )
        else:
            both = up.chunk(2, dim=-1)
        return (both[1], both[0]) if self.mutated("swapped halves") else (both[0], both[1])

    def activate(self, gate: Tensor) -> Tensor:
        name, changed = self.block.activation, self.mutated("activation constant")
        if self.mutated("other activation"):
            return F.elu(gate)
        if name == "silu":
            return F.silu(gate * 1.01) if changed else F.silu(gate)
        if name == "silu product":
            return gate * torch.sigmoid(gate * (1.02 if changed else 1))
        if name == "silu quotient":
            return gate / ((1.01 if changed else 1.0) + torch.exp(-gate))
        if name == "gelu":
            return F.gelu(gate) * (1.001 if changed else 1)
        if name == "gelu spelled":
            return gate * (0.501 if changed else 0.5) * (1.0 + torch.erf(gate / math.sqrt(2.0)))
        if name == "gelu tanh":
            if changed:
                return 0.5 * gate * (1 + torch.tanh(0.7979 * (gate + 0.0447 * gate**3)))
            return F.gelu(gate, approximate="tanh")
        if name == "relu":
            return F.relu(gate - 0.01) if changed else F.relu(gate)
        if name == "relu2":
            return F.relu(gate) ** (2.01 if changed else 2)
        if name == "unnamed":
            return torch.tanh(gate) * (0.9 if changed else 1.0)
        return F.silu(gate)

    def between(self, up: Tensor) -> Tensor:
        block = self.block
        if self.mutated("in place up"):
            up.mul_(0.5)
        if self.mutated("view of up written"):
            up[..., 0] = 1.0
        if self.mutated("mix rows"):
            up = up + up.roll(1, 0)
        if self.mutated("roll rows"):
            up = up.roll(1, 0)
        if self.mutated("row mean"):
            up = up - up.mean(0, keepdim=True)
        if self.mutated("norm between"):
            up = up * torch.rsqrt(up.square().mean(-1, keepdim=True) + 1e-6)
        if self.mutated("cast to bf16"):
            up = up.to(torch.bfloat16).to(up.dtype)
        if self.mutated("cast to int"):
            up = (up * 4).to(torch.int32).to(up.dtype)
        if block.gate == "none":
            return self.activate(up)
        gate, other = self.halves(up)
        if block.activation == "clamped":
            limit = 1.5 if self.mutated("limit") else 2.0
            gate, other = gate.clamp(max=2.0), other.clamp(-limit, 2.0)
            alpha = 1.7 if self.mutated("activation constant") else 1.702
            return (other + 1) * (gate * torch.sigmoid(gate * alpha))
        if block.activation == "limited":
            low = -2.0 if self.mutated("limit") else -1.0
            gate, other = gate.clamp(max=1.0), other.clamp(min=low, max=1.0)
            return F.silu(gate) * other
        if self.mutated("residual between"):
            return self.activate(gate) * other + gate
        if self.mutated("second gate"):
            return self.activate(gate) * other * gate
        return other * self.activate(gate) if block.operand_order else self.activate(gate) * other

    def rows(self, x: Tensor, top_k: int) -> Tensor:
        kind, tokens = self.block.repeat, x.shape[0]
        if self.mutated("flip experts' rows"):
            x = x.flip(0)
        if kind == "repeat_interleave":
            return x.repeat_interleave(top_k, dim=0)
        if kind == "expand":
            return x[:, None].expand(tokens, top_k, HIDDEN).reshape(-1, HIDDEN)
        token = self.divide(torch.arange(tokens * top_k), top_k)
        return x.index_select(0, token) if kind == "index_select" else x[token]

    def divide(self, pair: Tensor, top_k: int) -> Tensor:
        by = top_k + 1 if self.mutated("sum divisor") else top_k
        kind = self.block.division
        if kind.startswith("div"):
            return torch.div(pair, by, rounding_mode=kind.split()[1])
        return torch.floor_divide(pair, by) if kind == "floor_divide" else pair // by

    def pick(self, weight: Tensor, ids: Tensor) -> Tensor:
        return weight.index_select(0, ids) if self.block.gather == "index_select" else weight[ids]

    def total(self, rows: Tensor, tokens: int, top_k: int) -> Tensor:
        kind = self.block.total
        if kind == "unflatten sum":
            slots = rows.unflatten(0, (tokens, top_k))
        else:
            slots = rows.view(tokens, top_k, HIDDEN)
        return self.combine(slots, -2 if kind == "sum dim -2" else 1)

    def combine(self, slots: Tensor, dim: int) -> Tensor:
        if self.mutated("sum over tokens"):
            return slots.sum(0)
        if self.mutated("max of slots"):
            return slots.amax(dim)
        if self.mutated("mean of slots"):
            return slots.mean(dim)
        return slots.sum(dim)

    def weigh(self, rows: Tensor, column: Tensor) -> Tensor:
        if self.mutated("abs of rows"):
            rows = rows.abs()
        if self.mutated("scale rows"):
            rows = rows * 1.01
        if self.mutated("no weights"):
            return rows
        if self.mutated("weights per feature"):
            return rows * (column * torch.linspace(0, 1, rows.shape[-1], dtype=rows.dtype))
        rows = column * rows if self.block.operand_order else rows * column
        return rows * column if self.mutated("weights twice") else rows

    def input_rows(self, rows: Tensor, column: Tensor) -> Tensor:
        if self.mutated("in place input"):
            rows = rows.clone().add_(1)
        if self.mutated("offset input"):
            rows = rows + 0.01
        self.keep("rows", rows)
        return rows * column if self.block.weigh == "input" else rows

    def finish_rows(self, out: Tensor, column: Tensor, at: str) -> Tensor:
        if at == "rows":
            if self.mutated("in place out"):
                out.mul_(2)
            self.keep("out", out)
        return self.weigh(out, column) if self.block.weigh == at else out

    def __call__(self, x: Tensor, logits: Tensor, **weights: Tensor) -> Any:
        self.extra = []
        routing, ids = self.route(logits)
        if self.mutated("in place weights"):
            routing = routing.clone().mul_(1.5)
        self.keep("ids", ids)
        result = getattr(self, self.block.form)(x, ids, routing, **weights)
        if self.mutated("alias of input"):
            self.extra.append(x.view(-1))
        return (result, *self.extra) if self.extra else result

    def batched(
        self, x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor,
        up_bias: Tensor, down_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        block = self.block
        tokens, top_k = ids.shape
        flat, column = ids.reshape(-1), routing.reshape(-1)[:, None]
        if self.mutated("last expert skipped"):
            flat = flat.clamp(max=EXPERTS - 2)
        rows = self.input_rows(self.rows(x, top_k), column)
        up_ids = flat.flip(0) if self.mutated("up ids") else flat
        value = self.matmul(rows, self.pick(up, up_ids))
        if block.bias:
            value = value + up_bias[flat.flip(0) if self.mutated("bias ids") else flat]
        self.keep("up", value)
        h = self.between(value)
        self.keep("h", h)
        down_ids = flat.flip(0) if self.mutated("down ids") else flat
        out = self.matmul(h, self.pick(down, down_ids))
        if block.bias:
            out = out + down_bias[flat]
        out = self.finish_rows(out, column, "rows")
        if block.weigh == "combined":
            slots = out.view(tokens, top_k, HIDDEN)
            return self.combine(self.weigh(slots, routing[..., None]), 1)
        return self.total(out, tokens, top_k)

    def matmul(self, rows: Tensor, weight: Tensor) -> Tensor:
        if self.block.transposed:
            return torch.bmm(rows[:, None], weight).squeeze(1)
        return torch.bmm(weight, rows[..., None]).squeeze(-1)

    def grouped(
        self, x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor,
        up_bias: Tensor, down_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        block = self.block
        tokens, top_k = ids.shape
        pairs = tokens * top_k
        if block.sentinels and block.masks and not block.bias:
            ids = torch.where(ids == 0, EXPERTS, ids)  # as if expert 0 were on another device
        chosen, order = torch.sort(ids.reshape(-1), descending=self.mutated("descending"))
        first = torch.arange(pairs) if self.mutated("token of unsorted") else order
        token = self.divide(first, top_k)
        rows = x.index_select(0, token) if block.repeat == "index_select" else x[token]
        flat = routing.reshape(-1)
        column = flat[order][:, None]
        high = EXPERTS - 2 if self.mutated("histogram range") else EXPERTS - 1
        low = 1 if self.mutated("histogram low") else 0
        counts = torch.histc(chosen.float(), bins=EXPERTS, min=low, max=high)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = self.input_rows(rows, column)
        value = self.mask(self.grouped_matmul(rows, up, ends), chosen)
        if block.bias:
            value = value + up_bias[chosen.flip(0) if self.mutated("bias ids") else chosen]
        self.keep("up", value)
        h = self.between(value)
        self.keep("h", h)
        out = self.mask(self.grouped_matmul(h, down, ends), chosen)
        if block.bias:
            out = out + down_bias[chosen]
        out = self.finish_rows(out, column, "rows")
        out = out[self.inverse(order)]
        if block.weigh == "combined":
            slots = out.view(tokens, top_k, HIDDEN)
            return self.combine(self.weigh(slots, routing[..., None]), 1)
        return self.total(out, tokens, top_k)

    def grouped_matmul(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        weight = weight if self.block.transposed else weight.transpose(1, 2)
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, offs=ends)

    def mask(self, rows: Tensor, chosen: Tensor) -> Tensor:
        if not self.block.masks:
            return rows
        limit = EXPERTS - 1 if self.mutated("sentinel limit") else EXPERTS
        fill = 1.0 if self.mutated("fill value") else 0.0
        return rows.masked_fill((chosen >= limit)[:, None], fill)

    def inverse(self, order: Tensor) -> Tensor:
        if self.mutated("unsort by order"):
            return order
        count = torch.arange(order.shape[0])
        if self.block.unsort == "argsort":
            return torch.argsort(order)
        if self.block.unsort == "scatter":
            return torch.zeros_like(order).scatter(0, order, count)
        inverse = torch.empty_like(order)
        inverse[order] = count
        return inverse

    def einsum(
        self, x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor,
        up_bias: Tensor, down_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        del up_bias, down_bias
        letters = ("ho", "ih") if self.block.transposed else ("oh", "hi")
        up_ids = ids.flip(0) if self.mutated("up ids") else ids
        if self.mutated("offset input"):
            x = x + 0.01
        if self.block.apart and self.block.gate == "chunked":
            dim = -1 if self.block.transposed else 1
            parts = [w[up_ids] for w in up.chunk(2, dim)]
            gate, other = (torch.einsum(f"th,tk{letters[0]}->tko", x, w) for w in parts)
            h = self.activate(gate) * other
        else:
            value = torch.einsum(f"th,tk{letters[0]}->tko", x, up[up_ids])
            self.keep("up", value)
            h = self.between(value)
        self.keep("h", h)
        down_ids = ids.flip(0) if self.mutated("down ids") else ids
        out = torch.einsum(f"tki,tk{letters[1]}->tkh", h, down[down_ids])
        self.keep("out", out)
        if self.mutated("square weights"):
            routing = routing**2
        if self.block.weigh == "combined":
            return torch.einsum("tkh,tk->th", out, routing)
        return self.combine(self.weigh(out, routing[..., None]), 1)

    def dense(
        self, x: Tensor, ids: Tensor, routing: Tensor, up: Tensor, down: Tensor,
        up_bias: Tensor, down_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            other = (expert + 1) % EXPERTS if self.mutated("down ids") else expert
            up_weight, down_weight = up[expert], down[other]
            if not self.block.transposed:
                up_weight, down_weight = up_weight.t(), down_weight.t()
            value = x @ up_weight
            if self.block.bias:
                value = value + up_bias[expert]
            self.keep("up", value)
            h = self.between(value)
            rows = h @ down_weight
            if self.block.bias:
                rows = rows + down_bias[expert]
            limit = expert + 1 if self.mutated("up ids") else expert
            column = (routing * (ids == limit)).sum(-1, keepdim=True)
            if self.mutated("last expert skipped") and expert == EXPERTS - 1:
                continue
            out = out + self.weigh(rows, column)
        return out


def function_of(block: Block) -> Callable[..., Any]:
    """The block as a function of x, logits and the weights."""
    return Steps(block)
