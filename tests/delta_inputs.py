"""Arguments of the delta-rule ops, of the shapes and dtypes that models give them."""

from __future__ import annotations

import torch


def decode_inputs(batch=4, width=128, heads=2, value_heads=4):
    """The arguments of `delta_decode` up to the scale, uninitialised."""
    channels = (2 * heads + value_heads) * width
    half = {"dtype": torch.bfloat16}
    return (
        torch.empty(batch, channels, **half),
        torch.empty(batch, channels, 4, **half),
        torch.empty(channels, 4, **half),
        None,
        torch.empty(batch, value_heads, **half),
        torch.empty(batch, value_heads, **half),
        torch.empty(value_heads),
        torch.empty(value_heads),
        torch.empty(batch, value_heads, width, width),
        torch.empty(batch, value_heads, width, **half),
        torch.empty(width),
        None,
        width**-0.5,
    )
