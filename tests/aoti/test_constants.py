"""Constants of a method: the program's own tensors, without copies."""

from __future__ import annotations

import packages
import torch
from torch import nn

from inductor_moe import compat


class Codes(nn.Module):
    """A weight, packed weights in a buffer of a submodule, and a buffer that each call changes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(70))
        self.inner = nn.Module()
        self.inner.register_buffer("packed", torch.randint(0, 9, (50, 70), dtype=torch.int16))
        self.register_buffer("alias", self.inner.packed)
        self.register_buffer("calls", torch.zeros(50))

    def forward(self, x):
        self.calls.add_(1)
        return x @ (self.inner.packed * self.scale).T + self.alias.sum() * self.calls


def test_constants_are_not_copied():
    model, x = Codes(), torch.randn(3, 70)
    exported = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        files, constants = compat.aoti_compile(exported, packages.FAST)
    assert files
    own = {name: tensor.data_ptr() for name, tensor in exported.state_dict.items()}
    shared = {name for name, tensor in constants.items() if tensor.data_ptr() == own[name]}
    assert shared >= {"scale", "inner.packed"}
    assert constants["calls"].tolist() == [0] * 50, "compiling ran the program"
