"""What Inductor makes of merged linear layers and of what reads their outputs on a GPU."""

from __future__ import annotations

import os
import re

import pytest
import torch
from kernels.generated import Drawn, source

from inductor_moe.ops.merged_linear import merged_linear
from inductor_moe.ops.norm_rope import norm_rope

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"
)
HEADS, DIM, INPUTS = (4, 1, 1), 128, 256


@pytest.mark.parametrize(("tokens", "kernel"), [(1, "merged_linear"), (4, "merged_rows")])
def test_outputs_are_read_where_they_lie(tokens, kernel):
    """Two launches: no copy between the layers and what reads their rows head by head."""
    drawn = Drawn(2, 8, 4)
    widths = [heads * DIM for heads in HEADS]
    tensors = [
        drawn.tensor(tokens, INPUTS), drawn.tensor(DIM),
        *(drawn.tensor(n, INPUTS // 4, dtype=torch.int16) for n in widths),
        *(drawn.tensor(n, INPUTS // 128) for n in widths),
    ]  # fmt: skip

    def run(x, table, *weights):
        out = merged_linear(x, weights[:3], weights[3:], [], 128, [])
        q, k, v = (
            part.view(tokens, -1).view(tokens, -1, DIM)
            for part in out.split([tokens * n for n in widths])
        )
        return *norm_rope(q, k, table, table, 1e-6, 0.0, table, table), v

    code = source(drawn, run, tensors, package=False)
    launched = re.findall(r"(\w+?)_\d+\.run\((.*)\)", code)
    assert [name for name, _ in launched] == [f"{kernel}_kernel", "norm_rope_kernel"]
    arguments = launched[1][1]
    assert arguments.count("reinterpret_tensor(buf0, ") == 2
    # What the views begin with is known to be aligned.
    _, meta = code.split("def norm_rope_kernel")[0].rsplit("triton_meta=", 1)
    assert "(0,): [['tt.divisibility', 16]], (1,): [['tt.divisibility', 16]]" in meta
