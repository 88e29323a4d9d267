"""Collectives as functions of tensors, alike in eager, traced and exported code, and stores."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def process_group_named(name: str) -> Any:
    """The process group that functional collectives know by a name."""
    from torch.distributed import distributed_c10d

    resolve: Any = vars(distributed_c10d)["_resolve_process_group"]
    return resolve(name)


def name_process_group(name: str, group: Any) -> bool:
    """Have functional collectives find a group by a name too; False if it is another's."""
    try:
        return process_group_named(name) is group or name == group.group_name
    except (RuntimeError, ValueError, KeyError):
        register: Any = torch._C._distributed_c10d._register_process_group
        register(name, group)
        return True


def store_of(group: Any) -> Any:
    """The key-value store by which the ranks of a process group met."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)


def timeout_of(group: Any, device: torch.device) -> float:
    """Seconds that collectives of a process group wait for a rank."""
    options = getattr(group._get_backend(device), "options", None)
    found = getattr(options, "_timeout", None)
    return found.total_seconds() if found is not None else 600.0


def symmetric_memory(size: int, device: torch.device, group: Any) -> tuple[list[Tensor], Any]:
    """Zeroed bytes [size] of each rank of a group, all of which every rank reaches.

    returns them in the order of the ranks, and a handle that must live as long. Collective; raises
    RuntimeError where the GPUs cannot.
    """
    from torch.distributed import _symmetric_memory as symmetric

    enable = getattr(symmetric, "enable_symm_mem_for_group", None)
    if enable is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            enable(group.group_name)
    # Not symmetric.empty, whose memory may be a part of a larger block.
    memory = torch._C._distributed_c10d._SymmetricMemory
    own: Tensor = memory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    own.zero_()
    handle = memory.rendezvous(own, group.group_name)
    torch.cuda.synchronize(device)
    parts = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
    return parts, (own, handle)


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of all ranks' x."""
    return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name))


def all_gather(x: Tensor, ranks: int, group_name: str) -> Tensor:
    """All ranks' x, one after the other along dim 0."""
    return _waited(
        torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), ranks, group_name)
    )


def all_to_all(x: Tensor, group_name: str) -> Tensor:
    """One number from each rank for one number to each: x [ranks]."""
    ones = [1] * x.shape[0]
    return _waited(
        torch.ops._c10d_functional.all_to_all_single(x.contiguous(), ones, ones, group_name)
    )


def _waited(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)  # type: ignore[no-any-return]
