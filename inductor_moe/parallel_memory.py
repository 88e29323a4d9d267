"""Memory that the GPUs of one host share, for sums of small tensors."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from inductor_moe import compat
from inductor_moe.ops.all_reduce import PROGRAMS, SharedMemory, set_shared_memory, shared_by
from inductor_moe.parallel_store import meet

BOOT = Path("/proc/sys/kernel/random/boot_id")
MAX_RANKS = 8  # with more, that each sends to each costs more than it saves


def share_memory(group: dist.ProcessGroup, device: torch.device, timeout: float) -> str | None:
    """Give the ranks of a group memory for sums of small tensors, if their GPUs can share it.

    device   this rank's
    timeout  seconds to wait for the other ranks here; sums wait as long as the group's collectives
    returns  None, or why the group has no such memory, the same text on every rank

    Collective. A group that has such memory keeps it.
    """
    if shared_by(group) is not None:  # graphs may hold its addresses
        return None
    told = meet(group, json.dumps(_place(device)), timeout)
    reason = _obstacle([json.loads(text) for text in told])
    steps = _Steps(group, device)
    for step in (steps.allocate, steps.write, steps.check) if reason is None else ():
        said = ""
        try:
            step()
        except RuntimeError as error:
            said = (str(error) or type(error).__name__).splitlines()[0]
        # All go on together, or none does.
        failed = [(rank, text) for rank, text in enumerate(meet(group, said, timeout)) if text]
        if failed:
            reason = "rank {} cannot share memory: {}".format(*failed[0])
            break
    set_shared_memory(str(group.group_name), steps.memory() if reason is None else reason)
    return reason


def _place(device: torch.device) -> dict[str, str]:
    """Where a rank is, as far as it matters here."""
    if device.type != "cuda":
        return {"problem": f"it computes on {device.type}"}
    if importlib.util.find_spec("triton") is None:
        return {"problem": "it has no Triton"}
    if torch.cuda.get_device_capability(device) < (8, 0):
        return {"problem": "its GPU has a compute capability below 8.0"}
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    return {
        "host": f"{socket.gethostname()} {boot}",
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
    }


def _obstacle(places: list[dict[str, str]]) -> str | None:
    """Why ranks at these places cannot share memory; None if they may."""
    for rank, place in enumerate(places):
        if "problem" in place:
            return f"rank {rank} cannot share memory: {place['problem']}"
    if len(places) == 1:
        return "there is one rank"
    if len(places) > MAX_RANKS:
        return f"there are {len(places)} ranks, more than {MAX_RANKS}"
    if len({place["host"] for place in places}) > 1:
        return "the ranks are on several hosts"
    if len({place["gpu"] for place in places}) < len(places):
        return "several ranks share a GPU"
    return None


class _Steps:
    """From nothing to zeroed memory of which it is known that every rank reaches every other's."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.parts: list[torch.Tensor] = []
        self.held: object = None

    def allocate(self) -> None:
        size = SharedMemory.size(self.ranks)
        self.parts, self.held = compat.symmetric_memory(size, self.device, self.group)

    def write(self) -> None:
        for part in self.parts:
            part[self.rank] = self.rank + 1
        torch.cuda.synchronize(self.device)

    def check(self) -> None:
        own = self.parts[self.rank]
        found = own[: self.ranks].tolist()
        if found != list(range(1, self.ranks + 1)):
            raise RuntimeError(f"what the ranks wrote there is {found}")
        own.zero_()
        torch.cuda.synchronize(self.device)

    def memory(self) -> SharedMemory:
        addresses = [part.data_ptr() for part in self.parts]
        return SharedMemory(
            self.rank,
            self.ranks,
            torch.tensor(addresses, dtype=torch.int64, device=self.device),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=self.device),
            compat.timeout_of(self.group, self.device),
            self.group,
            (self.parts, self.held),
        )
