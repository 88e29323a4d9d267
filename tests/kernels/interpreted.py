"""Run @triton.jit kernels on CPU tensors, in a process where Triton was imported normally.

TRITON_INTERPRET is read when a function is decorated, Triton's own library included, so it would
turn every kernel of the process into an interpreted one. Here calls between device functions are
interpreted only while a kernel launched through `Interpreted` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from kernels.ptx import inline_asm_elementwise
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class Interpreted:
    """wrap=Interpreted in place of wrap=torch.library.wrap_triton."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            with (
                mock.patch.object(JITFunction, "__call__", _call_interpreted),
                mock.patch.object(interpreter, "_convert_float", _convert_float),
                mock.patch.object(interpreter, "_patch_lang_tensor", _patch_lang_tensor),
                mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
                mock.patch.object(
                    interpreter.InterpreterBuilder, "create_si_to_fp", _int_to_float
                ),
                mock.patch.object(interpreter.InterpreterBuilder, "create_splat", _splat),
                mock.patch.object(interpreter.InterpreterBuilder, "create_exp2", _exp2),
                mock.patch.object(tl, "inline_asm_elementwise", inline_asm_elementwise),
            ):
                # A launch patches triton.language for the kernel, and restores it; Triton's own
                # device functions look in triton.language.core.
                core = interpreter._patch_lang(tl.sum.fn)
                try:
                    _interpreted(self.kernel.fn)[grid](*args, **kwargs)
                finally:
                    core.restore()

        return launch


def _call_interpreted(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    # Not InterpretedFunction.__call__, which patches triton.language once more and for good.
    return _interpreted(function.fn).rewrite()(*args, **kwargs)


@functools.cache
def _interpreted(function: Callable[..., Any]) -> InterpretedFunction[Any]:
    # Keyed by the Python function: hashing a JITFunction reads Triton's patched library.
    return InterpretedFunction(function)


# bf16 is uint16 bits in the interpreter: its dot multiplies the bits, and its rounding drops the
# carry into the exponent.
_convert_any_float = interpreter._convert_float
_any_dot = interpreter.InterpreterBuilder.create_dot


def _convert_float(value: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        bits = torch.from_numpy(value.view(np.float32).copy()).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16).reshape(value.shape)
    return _convert_any_float(value, source, target, rounding)


def _dot(builder: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
    if a.dtype == tl.bfloat16:
        a, b = _widened(a), _widened(b)
    return _any_dot(builder, a, b, d, *args)


def _widened(handle: Any) -> Any:
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


# ... and its conversion of integers to bf16 stores the integer.
_int_to_any_float = interpreter.InterpreterBuilder.create_si_to_fp


def _int_to_float(builder: Any, value: Any, target: Any) -> Any:
    if target.scalar != tl.bfloat16:
        return _int_to_any_float(builder, value, target)
    bits = torch.from_numpy(value.data.astype(np.float32)).bfloat16().view(torch.int16)
    return interpreter.TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)


# A comparison has the dtype of what it compares, and a splat of it was no mask to Triton 3.9.
_any_splat = interpreter.InterpreterBuilder.create_splat


def _splat(builder: Any, shape: Any, value: Any) -> Any:
    handle = _any_splat(builder, shape, value)
    if value.data.dtype == np.bool_:
        return interpreter.TensorHandle(handle.data.astype(np.bool_), tl.int1)
    return handle


# The GPU's exp2 has no subnormal results.
_any_exp2 = interpreter.InterpreterBuilder.create_exp2


def _exp2(builder: Any, value: Any) -> Any:
    handle = _any_exp2(builder, value)
    handle.data = np.where(handle.data < np.finfo(np.float32).tiny, 0, handle.data).astype(
        handle.data.dtype
    )
    return handle


# Triton 3.6 makes an index of an array of one element, which numpy 2.4 refuses.
_patch_any_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    _patch_any_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())
