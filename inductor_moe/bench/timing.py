"""How long a call takes on the device it runs on."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UPS, REPLAYS = 5, 30


def microseconds(
    call: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    give_up: float = math.inf,
    captured: bool = True,
) -> tuple[float, float]:
    """(median, interquartile range) of one call, over rotating inputs.

    On a GPU one CUDA graph holds a call for every entry of `inputs`, and is replayed 30 times, so
    every kernel is counted and no host time. Give it enough inputs that what a call reads is no
    longer in the cache when its turn comes again. Elsewhere it is wall-clock time, as it is of a
    call that cannot be `captured`: one that waits for the GPU.

    A call that takes longer than give_up even at the best of the warm-ups is not timed further:
    that best is returned, without a range.
    """
    on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs[0])
    once = _graphed(call, inputs) if on_gpu and captured else _plain(call, inputs, on_gpu)
    fastest = min(once() for _ in range(WARM_UPS))
    if fastest > give_up:
        return fastest, 0.0
    times = [once() for _ in range(REPLAYS)]
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), quartiles[2] - quartiles[0]


def _plain(
    call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], on_gpu: bool
) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        for arguments in inputs:
            call(*arguments)
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6 / len(inputs)

    return once


def _graphed(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in (*inputs, *inputs):
            call(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call(*arguments) for arguments in inputs]
    del kept  # held until here, so that no call reuses the memory of another's output
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / len(inputs)

    return once
