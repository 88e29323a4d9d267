"""Meetings of ranks at their process group's store, whose waits end in time with any backend."""

from __future__ import annotations

import datetime
import itertools

import torch.distributed as dist

from inductor_moe import compat
from inductor_moe.errors import ParallelError

_meetings = itertools.count()


def meet(group: dist.ProcessGroup, text: str, timeout: float) -> list[str]:
    """The texts of all ranks, in their order; every rank of the group calls this alike.

    Raises ParallelError that names the ranks that did not arrive within `timeout` seconds.
    """
    store, rank = compat.store_of(group), dist.get_rank(group)
    place = f"inductor_moe/{group.group_name}/{next(_meetings)}"
    keys = [f"{place}/{other}" for other in range(dist.get_world_size(group))]
    store.set(keys[rank], text)
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout))
    except RuntimeError as error:
        absent = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        raise ParallelError(
            f"parallelize: not every rank arrived within {timeout:g} s: rank {rank} waited "
            f"for {', '.join(absent) or 'one that came too late'}"
        ) from error
    return [store.get(key).decode() for key in keys]
