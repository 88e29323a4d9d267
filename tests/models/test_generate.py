"""transformers' own switch: generate() with a compile config gives eager's greedy tokens."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import CompileConfig

from inductor_moe.backend import collected
from inductor_moe.testing import fused_layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_generate_on_cpu(name):
    family = next(family for family in zoo.MOE if family.name == name)
    model, _ = zoo.prepare(family.build(), torch.float32, "batched_mm")
    ids = zoo.prompt(model, 16, seed=9)
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    eager = model.generate(ids, **settings, cache_implementation="static", disable_compile=True)
    # transformers compiles for accelerators alone unless it is asked to.
    config = CompileConfig(backend="inductor_moe", fullgraph=True, mode="default")
    config._compile_all_devices = True
    with collected() as reports:
        fused = model.generate(
            ids, **settings, cache_implementation="static", compile_config=config
        )
    assert fused.tolist() == eager.tolist()
    (report,) = reports
    assert fused_layers(report) == family.expected()
