"""Our inline assembly on numpy, so that Triton's interpreter runs what a GPU runs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import triton.language as tl
from kernels import ptx_lanes
from triton.runtime.interpreter import TensorHandle

FLOATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
STORED = {
    tl.bfloat16: np.uint16, tl.float16: np.float16, tl.int8: np.int8, tl.float32: np.float32,
}  # fmt: skip


def run(assembly: str, words: np.ndarray, outputs: int = 1) -> np.ndarray:
    """Execute `assembly` on words [W] uint32 and return its outputs, [W, outputs].

    They are $0 and on, and the words are the operand after them.
    """
    registers: dict[str, np.ndarray] = {f"${outputs}": words}
    body = assembly.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, (line.strip() for line in body.split(";"))):
        if statement.startswith(".reg"):
            continue
        operation, _, rest = statement.partition(" ")
        target, *operands = (part.strip() for part in rest.split(","))
        values = [
            registers[o] if o in registers else np.full_like(words, int(o, 0)) for o in operands
        ]
        registers[target] = _execute(operation, values)
    return np.stack([registers[f"${i}"] for i in range(outputs)], -1)


def _execute(operation: str, values: list[np.ndarray]) -> np.ndarray:
    if operation == "mov.b32":
        return values[0]
    if operation == "shr.u32":
        return values[0] >> values[1]
    if operation == "shl.b32":
        return values[0] << values[1]
    if operation == "lop3.b32":
        a, b, c, table = values
        return _lop3(a, b, c, int(table.flat[0]))
    matched = re.fullmatch(r"(fma\.rn|sub)\.(bf16x2|f16x2)", operation)
    assert matched, f"{operation} has no emulation"
    dtype = FLOATS[matched[2]]
    wide = [_halves(value, dtype).double() for value in values]
    exact = wide[0] * wide[1] + wide[2] if matched[1] == "fma.rn" else wide[0] - wide[1]
    bits = exact.to(dtype).view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0]


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any function of three bits: bit 4a + 2b + c of the table."""
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            terms = [v if row & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def _halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return torch.from_numpy(halves.view(np.int16).copy()).view(dtype)


def inline_asm_elementwise(
    asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any, **_: Any
) -> tl.tensor:
    """Stands for tl.inline_asm_elementwise: one input register, and one or two of outputs."""
    unwrap = lambda value: getattr(value, "value", value)  # noqa: E731
    if not unwrap(is_pure):
        return ptx_lanes.inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack)
    data = np.ascontiguousarray(args[0].handle.data)
    *outputs, last = unwrap(constraints).split(",")
    assert set(outputs) == {"=r"} and last == "r" and len(args) == 1
    assert unwrap(pack) * data.itemsize == 4
    words = data.reshape(-1).view(np.uint32)
    kind = unwrap(dtype)
    found = run(unwrap(asm), words, len(outputs)).astype(np.uint32)
    stored = found.view(STORED[kind]).reshape(data.shape)
    return tl.tensor(TensorHandle(stored, kind), tl.block_type(kind, list(data.shape)))
