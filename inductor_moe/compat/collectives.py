"""Collectives as functions of tensors, alike in eager, traced and exported code, and stores."""

from __future__ import annotations

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
