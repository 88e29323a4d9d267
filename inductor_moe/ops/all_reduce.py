"""`inductor_moe::all_reduce`: a sum over ranks through memory that their GPUs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inductor_moe import compat
from inductor_moe.ops.dispatch import KERNEL_DTYPES

PROGRAMS, ROOM = 64, 1024  # programs of a launch at most, 32-bit words of each
MAX_BYTES = 4 * PROGRAMS * ROOM
FEWEST = 128  # words of a program

_shared: dict[str, SharedMemory] = {}
_absent: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """What a rank needs to exchange small tensors with those of its group.

    slots    [R] int64, addresses of the ranks' slots as this rank's GPU reaches them
    epochs   [PROGRAMS] int32
    timeout  seconds to wait for another rank within a launch
    group    the process group
    held     what must live as long
    """

    rank: int
    ranks: int
    slots: Tensor
    epochs: Tensor
    timeout: float
    group: Any = None
    held: Any = None

    @staticmethod
    def size(ranks: int) -> int:
        """Bytes of a rank's slots."""
        return 8 * PROGRAMS * 2 * ranks * ROOM


def set_shared_memory(group_name: str, memory: SharedMemory | str) -> None:
    """Have `all_reduce` over a group use this memory, or say why there is none."""
    _shared.pop(group_name, None)
    _absent.pop(group_name, None)
    if isinstance(memory, str):
        _absent[group_name] = memory
    else:
        _shared[group_name] = memory


def shared_by(group: Any) -> SharedMemory | None:
    """The memory that a process group shares."""
    memory = _shared.get(str(group.group_name))
    # Another group may have had the name before.
    return memory if memory is not None and memory.group is group else None


def shared_groups() -> tuple[str, ...]:
    """The names of the groups that have shared memory."""
    return tuple(sorted(_shared))


def _is_current(group_name: str) -> bool:
    """Whether memory that was set for a name is of the process group that has it now."""
    memory = _shared.get(group_name)
    if memory is None or memory.group is None:
        return memory is not None
    try:
        return compat.process_group_named(group_name) is memory.group
    except (RuntimeError, ValueError, KeyError):
        return False


def why_not(x: Tensor, group_name: str) -> str | None:
    """Why a sum of tensors like x is left to the group's own backend; None if it need not be."""
    if not _is_current(group_name):
        return _absent.get(
            group_name, "its ranks share no memory; inductor_moe.parallelize sets it up"
        )
    if x.dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {x.dtype}"
    count = x.numel()
    if not isinstance(count, int):
        return "its size is symbolic"
    size = count * x.element_size()
    if size > MAX_BYTES:
        return f"{size} bytes are more than {MAX_BYTES}"
    if size % 4 or not size:
        return f"{size} bytes are no whole number of 32-bit words"
    return None


@torch.library.custom_op("inductor_moe::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of all ranks' x, added up in fp32 in their order: the same to the bit on each.

    x           any shape, contiguous
    group_name  of the process group, as functional collectives know it
    returns     a new tensor like x

    On a GPU, for bf16, fp16 or fp32 of at most 256 KiB, ranks that share memory need one launch,
    which CUDA graphs may hold. A rank that does not come within the group's time-out ends the
    launch, and with it the process's CUDA context, in an error. Everything else is the group's own
    all-reduce.
    """
    if x.is_cuda and why_not(x, group_name) is None:
        return all_reduce_cuda(as_words(x), _shared[group_name])
    found = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, group=compat.process_group_named(group_name))
    return found


@all_reduce.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_words(x: Tensor) -> Tensor:
    """x contiguous from a 32-bit boundary on.

    Where x lies must not decide who adds up: on another rank it may lie otherwise.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 4 == 0 else x.clone()


def all_reduce_cuda(
    x: Tensor, memory: SharedMemory, *, wrap: Callable[[Any], Any] = lambda kernel: kernel
) -> Tensor:
    """`all_reduce` as one Triton launch; x is contiguous and passes `why_not`."""
    from inductor_moe.kernels.all_reduce import all_reduce_kernel

    out = torch.empty_like(x)
    words = x.numel() * x.element_size() // 4
    # A word a thread, so that no thread waits for one word after another of a rank.
    block = FEWEST
    while block * PROGRAMS < words:
        block *= 2
    wrap(all_reduce_kernel)[(-(-words // block),)](
        x, out, memory.slots, memory.epochs, words, round(memory.timeout * 1e9),
        RANK=memory.rank, RANKS=memory.ranks, ROOM=ROOM, BLOCK=block, num_warps=block // 32,
    )  # fmt: skip
    return out
