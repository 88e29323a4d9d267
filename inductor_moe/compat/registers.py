"""Kernels compiled for a number of registers: an option of Triton's that Inductor has no way to.

The code of a graph's kernels imports this, in Inductor's compile workers too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.runtime.triton_heuristics import CachingAutotuner


class LimitedAutotuner(CachingAutotuner):
    """An autotuner whose kernel takes at most `registers` registers a thread."""

    registers: int

    def _create_compile_options(self, *given: Any) -> dict[str, Any]:
        return {**super()._create_compile_options(*given), "maxnreg": self.registers}


def at_most(registers: int) -> Callable[[Any], Any]:
    def limit(tuner: Any) -> Any:
        if type(tuner) is CachingAutotuner:  # not one that measures or prints
            tuner.__class__ = LimitedAutotuner
            tuner.registers = registers
        return tuner

    return limit
