"""Running a function in several processes joined by gloo, never for longer than a limit."""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import os
import time
import traceback
import uuid
from pathlib import Path

PRELOADED = [
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "inductor_moe.passes",
]


@dataclasses.dataclass(frozen=True)
class Rank:
    """How one process ended: its exit code (None if it had to be killed), result and traceback."""

    code: int | None
    result: dict | None
    error: str
    seconds: float


def run(function, world: int, folder: Path, limit: float, timeout: float = 60, **arguments):
    """`function(rank, world, **arguments)` in `world` processes; how each of them ended.

    function  of an importable module; what it returns must fit into JSON
    limit     seconds after which what still runs is killed
    timeout   seconds that a collective waits for the other ranks
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = folder / uuid.uuid4().hex
    folder.mkdir()
    processes = [
        context.Process(
            target=_start, args=(function, rank, world, folder, timeout, arguments), daemon=True
        )
        for rank in range(world)
    ]
    start = time.monotonic()
    ended = [0.0] * world
    for process in processes:
        process.start()
    try:
        while any(p.is_alive() for p in processes) and time.monotonic() < start + limit:
            time.sleep(0.05)
            for rank, process in enumerate(processes):
                ended[rank] = ended[rank] or (
                    0.0 if process.is_alive() else time.monotonic() - start
                )
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [Rank(codes[rank], *_left(folder, rank), ended[rank] or limit) for rank in range(world)]


def results(ranks):
    """The result of every rank, which all must have ended well."""
    for number, rank in enumerate(ranks):
        assert rank.code == 0 and rank.result is not None, f"rank {number}: {rank.error or rank}"
    return [rank.result for rank in ranks]


def _left(folder, rank):
    result, error = folder / f"{rank}.json", folder / f"{rank}.txt"
    return (
        json.loads(result.read_text()) if result.exists() else None,
        error.read_text() if error.exists() else "",
    )


def _start(function, rank, world, folder, timeout, arguments):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(rank, world, **arguments)
        (folder / f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        # The group may be broken; taking it down could wait for ranks that are gone.
        os._exit(1)
    dist.destroy_process_group()
