"""How long collectives take: a latency a step and a time a byte, in a node and between nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from inductor_moe.ops.all_reduce import MAX_BYTES
from inductor_moe.parallel_memory import MAX_RANKS


@dataclass(frozen=True)
class Link:
    """Of one GPU: bytes a second each way, and seconds of one step of a collective."""

    bandwidth: float
    latency: float


# 80 % of the 450 GB/s of NVLink 4; half of what NCCL took for one token's sum on two H200s
NVLINK = Link(360e9, 10e-6)
NETWORK = Link(40e9, 6e-6)  # 80 % of 400 Gb/s for each GPU
NODE = 8
SMALL = 2.1 / 1e6  # what a sum of 4 KB through shared memory took on two H200s


@dataclass(frozen=True)
class Links:
    """`near` joins the `node` GPUs of a node, `far` each of them with its peers in other nodes.

    small  seconds of a sum through memory that the ranks of a node share, its bytes apart; None:
           there is no such memory
    """

    near: Link = NVLINK
    far: Link = NETWORK
    node: int = NODE
    small: float | None = SMALL

    def nodes(self, ranks: int) -> int:
        return math.ceil(ranks / self.node)

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until each rank has `size` bytes, of which it had its part: 1 / ranks.

        Between nodes each GPU gathers the parts of its peers, which are then shared in the node.
        """
        near, far = min(ranks, self.node), self.nodes(ranks)
        across = _steps(far) * self.far.latency
        across += (far - 1) / far * size / near / self.far.bandwidth
        within = _steps(near) * self.near.latency
        within += (near - 1) / near * size / self.near.bandwidth
        return across + within

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of a sum of `size` bytes: a reduce-scatter, and a gather as long.

        A small one in a node goes through shared memory: to each other rank, with flags as large.
        """
        shared = 1 < ranks <= min(self.node, MAX_RANKS) and size <= MAX_BYTES
        if shared and self.small is not None:
            return self.small + 2 * (ranks - 1) * size / self.near.bandwidth
        return 2 * self.all_gather(size, ranks)

    def all_to_all(self, size: float, ranks: int) -> float:
        """Seconds until each rank has sent `size` bytes, spread evenly over all ranks.

        Both links carry their parts at once.
        """
        near, far = min(ranks, self.node), self.nodes(ranks)
        latency = _steps(near) * self.near.latency + _steps(far) * self.far.latency
        within = size * (near - 1) / ranks / self.near.bandwidth
        across = size * (ranks - near) / ranks / self.far.bandwidth
        return latency + max(within, across)


def _steps(ranks: int) -> int:
    """Of a tree over so many ranks."""
    return math.ceil(math.log2(ranks))
