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
    """Wait until all that earlier kernels wrote is there; then let the next kernel be placed.

    Every launched kernel calls it before it reads or writes anything. As each waits before it lets
    the next begin, a kernel's inputs are complete however many kernels ago they were written.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointer, elements):
    """Ask for `elements` contiguous elements to be brought to L2, from 16 bytes to 16 bytes.

    For weights, before `wait_for_inputs`: L2 is where kernels' writes meet, so what is there is
    never old, and a kernel that still writes to them is no hazard.
    """
    if DEPENDENT:
        size = elements * (pointer.dtype.element_ty.primitive_bitwidth // 8)
        tl.inline_asm_elementwise(
            """{
            .reg .pred first, some;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            setp.gt.and.s32 some, $2, 0, first;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointer.to(tl.int64) & -16, size & -16],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_lines(pointers):
    """Ask for the lines of L2 that a tensor of pointers points to; as `prefetch`."""
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
