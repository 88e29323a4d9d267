"""Decode steps on a GPU: kernels that begin before others end, and caches written on the way."""

from __future__ import annotations

import pytest
import torch
from ops import test_norm_rope as rotations

from inductor_moe.bench import models
from inductor_moe.bench.session import Decode, Session
from inductor_moe.ops.norm_rope import norm_rope_cache
from inductor_moe.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu(values):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in values]


@torch.no_grad()
def test_dependent_launches_change_no_bit():
    """Not one step of many reads what is not there yet: all give what plain launches give.

    Each step of a turn decodes another token, so that what the step before left is wrong for it.
    """
    model = models.build("qwen3.5-35b-a3b", "int4", "cuda", 4)
    session = Session(model, 1, 640)
    ids = torch.randint(1000, (1, 304), device="cuda")
    session.prefill(ids[:, :300])
    restore = session.save()
    found = {}
    for dependent in (False, True):
        decode = Decode(session, "ours", {"inductor_moe.dependent_launch": dependent})
        for turn in range(100 if dependent else 1):
            restore()
            logits = decode.follow(ids[:, 300:])
            if turn:
                assert torch.equal(logits, found[dependent]), turn
            found[dependent] = logits
    assert found[False].isfinite().all()
    assert torch.equal(found[False], found[True])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim, value_dim", [(256, 256), (80, 24)])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_norm_rope_cache(position, dim, value_dim, dtype):
    given, plain = rotations.cached(dim, value_dim, position, dtype)
    q, k = rotations.by_hand(*plain)
    moved = on_gpu(given)
    limit = 6e-3 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(norm_rope_cache(*moved).cpu(), q) <= limit
    kept = torch.arange(5) != position % 5
    for before, after, stored in zip(given[9:11], moved[9:11], (k, given[2]), strict=True):
        assert torch.equal(after.cpu()[:, :, kept], before[:, :, kept])
        assert relative_error(after.cpu()[:, :, position], stored) <= limit
