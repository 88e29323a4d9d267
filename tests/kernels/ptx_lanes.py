"""Inline assembly with memory and branches, lane by lane, for Triton's interpreter.

Loads and stores are done at the addresses given; the clock goes on by a microsecond with each
look at it.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

WORD, LONG = (1 << 32) - 1, (1 << 64) - 1


class Trap(RuntimeError):
    """A lane executed trap."""


def execute(assembly: str, operands: dict[str, int], clock: Any) -> int:
    """One lane's $0, given $1, $2, ..."""
    body = assembly.strip().removeprefix("{").removesuffix("}")
    labels: dict[str, int] = {}
    statements: list[str] = []
    for part in body.split(";"):
        label, text = re.fullmatch(r"\s*(?:(\w+):)?\s*(.*?)\s*", part, re.DOTALL).groups()
        if label:
            labels[label] = len(statements)
        if text and not text.startswith(".reg"):
            statements.append(text)
    registers: dict[str, Any] = dict(operands)
    at = 0
    while at < len(statements):
        guard, operation, rest = re.fullmatch(
            r"(?:@(!?\w+) )?([\w.]+) ?(.*)", statements[at]
        ).groups()
        at += 1
        if guard and bool(registers[guard.lstrip("!")]) == guard.startswith("!"):
            continue
        if operation == "bra":
            at = labels[rest]
        elif operation == "trap":
            raise Trap
        else:
            _step(operation, rest, registers, clock)
    return registers["$0"]


def _step(operation: str, rest: str, registers: dict[str, Any], clock: Any) -> None:
    target, *sources = re.split(r",\s*(?![^{]*})", rest)

    def value(name: str) -> int:
        if name == "%globaltimer":
            return next(clock)
        return registers[name] if name in registers else int(name, 0)

    if operation == "st.relaxed.sys.global.b64":
        _word(value(target[1:-1])).value = value(sources[0])
    elif operation == "ld.relaxed.sys.global.b64":
        registers[target] = _word(value(sources[0][1:-1])).value
    elif operation == "mov.b64" and target.startswith("{"):
        low, high = target[1:-1].split(", ")
        registers[low], registers[high] = value(sources[0]) & WORD, value(sources[0]) >> 32
    elif operation == "mov.b64":
        low, high = (value(name) & WORD for name in sources[0][1:-1].split(", "))
        registers[target] = low | high << 32
    elif operation in ("mov.b32", "mov.u64"):
        registers[target] = value(sources[0])
    elif operation == "sub.u64":
        registers[target] = (value(sources[0]) - value(sources[1])) & LONG
    else:
        compared = re.fullmatch(r"setp\.(eq|ne|gt)\.[bu](32|64)", operation)
        assert compared, f"{operation} has no emulation"
        mask = WORD if compared[2] == "32" else LONG
        a, b = (value(name) & mask for name in sources)
        registers[target] = {"eq": a == b, "ne": a != b, "gt": a > b}[compared[1]]


def _word(address: int) -> ctypes.c_uint64:
    assert address % 8 == 0, "not aligned"
    return ctypes.c_uint64.from_address(address)


def inline_asm_elementwise(
    asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any, **_: Any
) -> tl.tensor:
    """Stands for tl.inline_asm_elementwise of integers, with pack=1."""
    unwrap = lambda value: getattr(value, "value", value)  # noqa: E731
    letters = unwrap(constraints).split(",")
    assert letters[0] == "=r" and len(letters) == len(args) + 1 and unwrap(pack) == 1
    assert not unwrap(is_pure)
    given = [argument.handle.data for argument in args]
    for letter, each in zip(letters[1:], given, strict=True):
        assert each.dtype.itemsize == {"r": 4, "l": 8}[letter], (letter, each.dtype)
    lanes = np.broadcast_arrays(*given)
    clock = itertools.count(step=1000)
    found = [
        execute(unwrap(asm), {f"${i + 1}": int(v) for i, v in enumerate(lane)}, clock)
        for lane in zip(*(each.reshape(-1) for each in lanes), strict=True)
    ]
    stored = np.array(found, np.uint32).view(np.int32).reshape(lanes[0].shape)
    return tl.tensor(
        TensorHandle(stored, unwrap(dtype)), tl.block_type(unwrap(dtype), list(stored.shape))
    )
