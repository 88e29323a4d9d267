"""MoE layers: the whole block, and its routed experts alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inductor_moe.bench.case import Case, Op, draws, outcome, randn
from inductor_moe.bench.shapes import Moe, model_named, moe_block

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
CHECKED_ROWS = 16
DECISIVE = 3e-2


class _Widened:
    """Expert weights [E, ..] of which only the experts asked for become float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index].double()


def exact_experts(experts: Any) -> Any:
    """The experts in float64, by transformers' own loop over the experts that are hit."""
    exact = copy.copy(experts)
    exact.__dict__ = dict(experts.__dict__)
    exact._parameters = {}
    for name, weight in experts.named_parameters(recurse=False):
        exact.__dict__[name] = _Widened(weight)
    exact.config = copy.copy(experts.config)
    exact.config._experts_implementation = "eager"
    return exact


def exact_block(block: Any) -> Any:
    """The block in float64; its experts' weights are widened one expert at a time."""
    exact = copy.deepcopy(block, {id(block.experts): None}).double()
    exact.experts = exact_experts(block.experts)
    return exact


def first_output(module: nn.Module) -> Callable[..., Tensor]:
    """The hidden states alone, [tokens, hidden], of a block that may also return its routing."""

    def call(*arguments: Tensor) -> Tensor:
        output = module(*arguments)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden.flatten(0, -2)

    return call


def decisive_rows(block: Callable[..., Tensor], exact: Callable[..., Tensor], x: Tensor) -> Tensor:
    """x [1, rows, hidden], each row whose routing hangs on rounding replaced by a safe one.

    A near-tie in a router flips between two right computations and outweighs every rounding error.
    A row counts as safe when its output in bf16 stays within 3e-2 of float64's under small changes
    of the row.
    """
    wanted, safe = x.shape[1], []
    for _ in range(8):
        steady = torch.ones(wanted, dtype=torch.bool, device=x.device)
        for _ in range(3):
            near = x + (x.float().abs() * 2**-7 * torch.randn_like(x.float())).to(x.dtype)
            want = exact(x.double())
            off = (block(near).double() - want).norm(dim=-1) / want.norm(dim=-1)
            steady &= off < DECISIVE
        safe += list(x[0, steady])
        if len(safe) >= wanted:
            return torch.stack(safe[:wanted])[None]
        x = torch.randn_like(x)
    return torch.stack((safe * wanted)[:wanted])[None] if safe else x


def touched(shape: Moe, tokens: int) -> float:
    """Experts that at least one of `tokens` uniformly routed tokens goes to, on average."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def experts_read(experts: Any, call: Callable[..., Any], inputs: list[Tensor]) -> float:
    """How many distinct experts a call routes its tokens to, mean over inputs."""
    counts: list[int] = []

    def count(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = (*arguments, *named.values())
        (ids,) = (a for a in given if isinstance(a, Tensor) and not a.is_floating_point())
        counts.append(ids.unique().numel())

    hook = experts.register_forward_pre_hook(count, with_kwargs=True)
    for x in inputs:
        call(x)
    hook.remove()
    return sum(counts) / len(counts)


def block_cases(model: str, device: str, sizes: list[int]) -> Iterator[Case]:
    shape = model_named(model).moe
    if shape is None:
        return
    block = moe_block(shape, device)
    call, exact = first_output(block), first_output(exact_block(block))
    dense = shape.experts * shape.hidden + 3 * shape.hidden * shape.shared
    for tokens in sizes:
        about = 2 * touched(shape, tokens) * shape.expert_parameters()
        rows = min(tokens, CHECKED_ROWS)
        inputs = [
            randn(1, tokens, shape.hidden, device=device) for _ in range(draws(about, device))
        ]
        inputs[0][:, :rows] = decisive_rows(call, exact, inputs[0][:, :rows].clone())
        weights = experts_read(block.experts, call, inputs) * shape.expert_parameters()
        moved = 2 * (weights + dense + 2 * tokens * shape.hidden)

        def expected(arguments: tuple[Tensor], rows: int = rows) -> list[Tensor]:
            return outcome(exact, (arguments[0][:, :rows].double(),), None)

        yield Case(
            op="moe-block", model=model, size={"tokens": tokens},
            call=call, inputs=[(x,) for x in inputs], expected=expected, rows=rows,
            bytes=moved,
            flops=2 * tokens * (shape.top_k * shape.expert_parameters() + dense),
        )  # fmt: skip


def liger_experts(experts: Any) -> Callable[..., Tensor]:
    """Liger's fused experts on the same weights."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def call(x: Tensor, ids: Tensor, share: Tensor) -> Tensor:
        weights = (experts.gate_up_proj, experts.down_proj)
        return LigerFusedMoEFunction.apply(x, *weights, ids.int(), share)  # type: ignore[no-any-return]

    return call


def liger_serves(experts: Any) -> bool:
    """Whether the experts are what Liger's function computes: silu, no bias, rows of outputs."""
    up, down = experts.gate_up_proj, experts.down_proj
    plain = not any("bias" in name for name, _ in experts.named_parameters())
    silu = experts.config.hidden_act in ("silu", "swish")
    return plain and silu and up.shape[1:] == (2 * down.shape[2], down.shape[1])


def experts_cases(model: str, device: str, sizes: list[int]) -> Iterator[Case]:
    shape = model_named(model).moe
    if shape is None:
        return
    experts: Any = moe_block(shape, device).experts
    exact = exact_experts(experts)
    for tokens in sizes:
        about = 2 * touched(shape, tokens) * shape.expert_parameters()
        rows = min(tokens, CHECKED_ROWS)
        inputs = []
        for _ in range(draws(about, device)):
            scores = torch.rand(tokens, shape.experts, device=device)
            top, ids = scores.topk(shape.top_k)
            share = (top / top.sum(-1, keepdim=True)).bfloat16()
            inputs.append((randn(tokens, shape.hidden, device=device), ids, share))
        read = sum(ids.unique().numel() for _, ids, _ in inputs) / len(inputs)
        moved = 2 * (read * shape.expert_parameters() + 2 * tokens * shape.hidden)

        def expected(arguments: tuple[Tensor, ...], rows: int = rows) -> list[Tensor]:
            x, ids, share = (argument[:rows] for argument in arguments)
            return outcome(exact, (x.double(), ids, share.double()), None)

        yield Case(
            op="moe-experts", model=model, size={"tokens": tokens}, call=experts, inputs=inputs,
            expected=expected, rows=rows, bytes=moved,
            flops=2 * tokens * shape.top_k * shape.expert_parameters(),
            peers={"liger": lambda: liger_experts(experts)} if liger_serves(experts) else {},
        )  # fmt: skip


BLOCK = Op("moe-block", "tokens", TOKENS, block_cases)
EXPERTS = Op("moe-experts", "tokens", TOKENS, experts_cases)
