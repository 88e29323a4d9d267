"""Programmatic dependent launch: a kernel's programs are placed while the one before it ends.

What a compiled graph launches is launched so on GPUs that can (sm_90 and later), with DEPENDENT
set in its copy of the source (`compat.launches`). Anywhere else these functions are empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

DEPENDENT = tl.constexpr(False)


@triton.jit
def wait_for_inputs():
    """Wait until all that earlier kernels wrote is there.

    Every launched kernel calls it before it writes anything, and before it reads what the kernel
    before it may have written. As each waits before the next one's programs are placed, a kernel's
    inputs are complete however many kernels ago they were written, and all but those of the last
    one before it waits.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def place_next():
    """Let programs of the next kernel be placed from now on, not when this kernel's have ended.

    After `wait_for_inputs`, where a measurement says so: in kernels of few, short programs, and
    before kernels that ask for their weights early. Elsewhere it costs more than it saves: the
    next kernel's programs crowd on the multiprocessors that have room first.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_lines(pointers):
    """Ask for the lines that a tensor of pointers points to, before `wait_for_inputs`.

    They are brought to L2, where the writes of all kernels meet: what is there is never old.
    """
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
