"""Ranks that share memory, as files in the place of GPUs' memory and the interpreter in theirs."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from kernels.interpreted import Interpreted

from inductor_moe import compat, parallel_memory
from inductor_moe.ops import all_reduce as ops
from inductor_moe.parallel_memory import share_memory
from inductor_moe.patterns import all_reduce as patterns
from inductor_moe.testing import capture

FOREVER = 1e8  # seconds: the interpreter's clock goes by looks at it
CPU = torch.device("cpu")


class Stage:
    """share_memory on CPUs. `fault`: what goes wrong, on the last rank."""

    def __init__(self, rank, world, folder, fault=""):
        self.rank, self.world, self.folder = rank, world, Path(folder)
        self.fault = fault if rank == world - 1 else ""

    def memory(self, size, device, group):
        if self.fault == "no peer access":
            raise RuntimeError("no peer access\nand more lines")
        kind = "others" if self.fault == "another's memory" else "slots"
        names = [str(self.folder / f"{kind}{rank}") for rank in range(self.world)]
        parts = [torch.from_file(n, shared=True, size=size, dtype=torch.uint8) for n in names]
        return parts, None

    def place(self, device):
        host = "b" if self.fault == "another host" else "a"
        if self.fault == "problem":
            return {"problem": "none"}
        return {"host": host, "gpu": str(self.rank)}

    def share(self):
        with (
            mock.patch.object(compat, "symmetric_memory", self.memory),
            mock.patch.object(compat, "timeout_of", lambda *_: FOREVER),
            mock.patch.object(parallel_memory, "_place", self.place),
            mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        ):
            return share_memory(dist.group.WORLD, CPU, 30)


def sum_program(rank, world, place):
    """Sums of several sizes by ranks that wait for one another in their slots."""
    assert Stage(rank, world, place).share() is None
    assert Stage(rank, world, place).share() is None  # keeps what it has
    memory = ops.shared_by(dist.group.WORLD)
    wrong, sums = 0, []
    for call, count in enumerate((256, 30, 520, 256, 8)):
        inputs = [
            torch.randn(count, generator=torch.Generator().manual_seed(9 * call + r)).bfloat16()
            for r in range(world)
        ]
        found = ops.all_reduce_cuda(inputs[rank], memory, wrap=Interpreted)
        total = torch.zeros(count)
        for x in inputs:
            total += x.float()
        wrong += int((found != total.bfloat16()).sum())
        sums.append(float(found.double().sum()))
    return {"wrong": wrong, "sums": sums, "epochs": memory.epochs[:4].tolist()}


def fault_program(rank, world, place, faults):
    """What share_memory says to each fault, and to a group on CPUs."""
    found = {"": share_memory(dist.group.WORLD, CPU, 30)}
    for fault in faults:
        own = Path(place) / fault
        own.mkdir(exist_ok=True)
        found[fault] = Stage(rank, world, own, fault).share()
        assert ops.shared_by(dist.group.WORLD) is None
        x = torch.ones(4)
        assert found[fault] in ops.why_not(x, dist.group.WORLD.group_name)
    return found


def compiled_program(rank, world, place):
    """A compiled function whose sums are our op, which leaves tensors on a CPU to gloo."""
    Stage(rank, world, place).share()
    name = dist.group.WORLD.group_name

    def function(x):
        return compat.all_reduce(x * 2, name) + compat.all_reduce(x[:, :3].float(), name).sum()

    x = torch.full((2, 4), rank + 1.0, dtype=torch.bfloat16)
    graphs = []
    with mock.patch.object(patterns, "DEVICES", ("cpu",)):
        found, report = capture(function, x, graphs=graphs)
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    return {
        "found": found.float().tolist(), "counts": report.counts(), "notes": report.notes,
        "left": [call for call in calls if "c10d" in call],
    }  # fmt: skip
