"""All-to-all exchange: each rank routes a slice of the tokens and sends them to their experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inductor_moe import compat
from inductor_moe.errors import ParallelError

EXCHANGES = ("all-reduce", "all-to-all", "auto")
FEWEST = 1024  # tokens from which "auto" may choose all-to-all: a layer then outlasts its latency

# Blocks of transformers that take and return [B, S, H] and do nothing but route, run the experts
# and add a shared one: all of it token by token, so it can run on a slice.
BLOCKS = frozenset(
    f"{family}SparseMoeBlock"
    for family in ("Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3_5Moe", "Qwen3_5MoeText")
)


class Exchange:
    """How the tokens of a model get to their experts and back, on this rank.

    name    of the group of ranks
    scheme  of `EXCHANGES`
    first   of "auto": from how many tokens on it is all-to-all
    sliced  while a block runs on this rank's slice
    """

    def __init__(self, group: dist.ProcessGroup, scheme: str, first: int) -> None:
        self.name, self.scheme, self.first = str(group.group_name), scheme, first
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sliced = False

    def slices(self, tokens: int) -> bool:
        """Whether so many tokens are shared out. In a package, which cannot wait, "auto" never."""
        if self.scheme == "auto":
            return not compat.exporting() and tokens >= self.first
        return self.scheme == "all-to-all"

    def own(self, x: Tensor) -> Tensor:
        """This rank's slice [N, ...] of x [T, ...]: N = ceil(T / ranks), the last filled up."""
        missing = -x.shape[0] % self.ranks
        if not isinstance(missing, int) or missing:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        size = x.shape[0] // self.ranks
        return x[self.rank * size : (self.rank + 1) * size]

    def whole(self, own: Tensor, tokens: int) -> Tensor:
        """The slices [N, H] of all ranks as [T, H]."""
        return compat.all_gather(own, self.ranks, self.name)[:tokens]

    def dispatch(
        self, inner: Callable[..., Tensor], count: int, x: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """The experts' result [N, H] for this rank's tokens.

        A token is sent once to each rank that has one of its experts, with the ids and weights of
        those; that rank adds up what its experts make of it and sends one row back.

        inner    the experts of this rank: (x [., H], ids [., K], weights [., K]) -> [., H], where
                 ids from `count` on are skipped
        x        [N, H]
        ids      [N, K] of all experts; those beyond are skipped
        weights  [N, K]
        """
        tokens, ranks = x.shape[0], self.ranks
        here = torch.arange(ranks, device=ids.device)[:, None, None]
        local = ids[None] - here * count  # [R, N, K]
        others = (local < 0) | (local >= count)
        goes = (~others).any(2)  # [R, N]
        # The tokens that go to a rank, in order, before those that do not.
        order = torch.argsort((~goes).to(torch.int32), dim=1, stable=True)
        place = goes.cumsum(1) - 1
        sizes = goes.sum(1)
        arriving = compat.all_to_all(sizes, self.name)

        local = local.masked_fill(others, count)
        shares = torch.where(others, torch.zeros_like(weights)[None], weights[None])
        turn = order[:, :, None].expand(-1, -1, ids.shape[1])
        sent = (x[order], local.gather(1, turn), shares.gather(1, turn))
        arrived = exchange_rows(sent, sizes, arriving, count, self.name)
        flat = (part.flatten(0, 1) for part in arrived)
        done = inner(*flat).view(ranks, tokens, -1)
        (back,) = exchange_rows((done,), arriving, sizes, 0, self.name)
        at = place.clamp_min(0)[:, :, None].expand(-1, -1, back.shape[2])
        wide = torch.promote_types(back.dtype, torch.float32)
        terms = back.gather(1, at).to(wide).masked_fill(~goes[:, :, None], 0.0)
        return terms.sum(0).to(back.dtype)


def exchange_rows(
    rows: tuple[Tensor, ...], sizes: Tensor, arriving: Tensor, fill: int, group_name: str
) -> list[Tensor]:
    """Send rows to the other ranks: block r of each tensor goes to rank r.

    rows      each [R, N, W], any dtype
    sizes     [R] integers: how many leading rows of each block are to be sent
    arriving  [R]: how many come from each rank
    fill      what integer tensors hold where nothing arrived; others hold 0
    returns   tensors like `rows`: block r came from rank r

    Exactly these rows are sent, for which the host waits until it knows how many they are. While
    a CUDA graph is captured, which must not wait, all N rows of each block are.
    """
    found: list[Tensor] = _exchange(list(rows), sizes, arriving, fill, group_name)
    return found


@torch.library.custom_op("inductor_moe::exchange_rows", mutates_args=())
def _exchange(
    rows: list[Tensor], sizes: Tensor, arriving: Tensor, fill: int, group_name: str
) -> list[Tensor]:
    group = compat.process_group_named(group_name)
    found = []
    if sizes.is_cuda and torch.cuda.is_current_stream_capturing():
        for part in rows:
            out = torch.empty_like(part, memory_format=torch.contiguous_format)
            dist.all_to_all_single(_bytes(out), _bytes(part.contiguous()), group=group)
            found.append(out)
        return found
    leaving, coming = torch.stack([sizes, arriving]).tolist()
    for part in rows:
        packed = torch.cat([block[:size] for block, size in zip(part, leaving, strict=True)])
        landed = part.new_empty(sum(coming), *part.shape[2:])
        dist.all_to_all_single(_bytes(landed), _bytes(packed), coming, leaving, group=group)
        value = 0 if part.is_floating_point() else fill
        out = torch.full_like(part, value, memory_format=torch.contiguous_format)
        for block, some in zip(out, landed.split(coming), strict=True):
            block[: len(some)] = some
        found.append(out)
    return found


@_exchange.register_fake
def _(
    rows: list[Tensor], sizes: Tensor, arriving: Tensor, fill: int, group_name: str
) -> list[Tensor]:
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in rows]


def _bytes(rows: Tensor) -> Tensor:
    """Rows of any dtype as rows of bytes, which every backend sends."""
    return rows.view(torch.uint8)


def all_to_all_from(ranks: int, top_k: int, tokens: int | None) -> int:
    """From how many tokens on "auto" is all-to-all; `tokens` if that is given.

    A sum over ranks moves 2 (R - 1) / R rows a token and rank; all-to-all moves a token to those
    of the ranks that its experts are on, back, and to all. Where that is no less, it never is.
    """
    if tokens is not None:
        return tokens
    others = (ranks - 1) * (1 - (1 - 1 / ranks) ** top_k)
    less = 2 * others / ranks + (ranks - 1) / ranks < 2 * (ranks - 1) / ranks
    return FEWEST if less else 1 << 62


def spread(
    experts: Any,
    block: nn.Module | None,
    exchange: Exchange,
    localise: Callable[..., tuple[Any, ...]],
    add: Callable[..., Tensor],
) -> None:
    """Have an experts module of this rank's experts work with an exchange.

    block     the module around it if that can run on a slice of the tokens
    localise  renumbers (module, (x, ids, weights)) where every rank has all tokens
    add       sums (module, args, output) over the ranks
    """
    inner = experts.forward

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if exchange.sliced:
            return exchange.dispatch(inner, experts.num_experts, x, ids, weights)
        if exchange.slices(x.shape[0]):
            own = (exchange.own(part) for part in (x, ids, weights))
            mine = exchange.dispatch(inner, experts.num_experts, *own)
            return exchange.whole(mine, x.shape[0])
        return add(experts, (), inner(*localise(experts, (x, ids, weights))))

    experts.forward = forward
    if block is not None:
        _slice(block, exchange)


def _slice(block: nn.Module, exchange: Exchange) -> None:
    inner: Callable[[Tensor], Any] = block.forward

    def forward(hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not exchange.slices(flat.shape[0]):
            out: Tensor = inner(hidden_states)
            return out
        exchange.sliced = True
        try:
            out = inner(exchange.own(flat)[None])
        finally:
            exchange.sliced = False
        if not isinstance(out, Tensor):
            raise ParallelError(
                f"parallelize: {type(block).__name__} returned a {type(out).__name__}; it must "
                "return a tensor"
            )
        return exchange.whole(out[0], flat.shape[0]).view(hidden_states.shape)

    block.forward = forward
