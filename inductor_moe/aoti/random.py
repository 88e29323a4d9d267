"""The random numbers of sampling, the same in every runner."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def uniforms(seed: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] fp32 in [0, 1) from splitmix64.

    Entry i in row order is the top 24 bits of the output i + 1 of the generator seeded with `seed`
    (modulo 2**64).
    Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state, values = seed & _MASK, []
    for _ in range(rows * columns):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        values.append(((mixed ^ (mixed >> 31)) >> 40) * 2.0**-24)
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns)
