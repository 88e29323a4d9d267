"""What the processes of the distributed tests run."""

from __future__ import annotations

import torch
import zoo
from torch.distributed.device_mesh import init_device_mesh

from inductor_moe.backend import collected
from inductor_moe.testing import fused_layers, graph_backend, relative_error

PROMPT, ROOM = 16, 64
aten = torch.ops.aten


def family_of(name):
    return next(family for family in zoo.MOE if family.name == name)


def by_plan(model, world):
    """transformers' expert-parallel plan applied to a model in memory."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=world, enable_expert_parallel=True)
    return model.maybe_distribute_model(model, config, init_device_mesh("cpu", (world,)))


def generation(prefill, decode, model, prompt, tokens):
    """Logits after the prompt and after each of the tokens [1, N]."""
    cache = zoo.static_cache(model, ROOM)
    with torch.no_grad():
        found = [prefill(prompt, past_key_values=cache).logits]
        found += [
            decode(tokens[:, step : step + 1], past_key_values=cache).logits
            for step in range(tokens.shape[1])
        ]
    return found


def plan_program(rank, world, families, dtype, steps, real=False):
    """Each family under transformers' plan: grouped prefill, batched decode."""
    return {name: family_by_plan(name, world, dtype, steps, real, by_plan) for name in families}


def family_by_plan(name, world, dtype, steps, real, distribute):
    family = family_of(name)
    whole, exact = zoo.prepare(family.build(), getattr(torch, dtype), "grouped_mm")
    prompt, tokens = zoo.prompt(whole, PROMPT, seed=1), zoo.prompt(whole, steps, seed=2)
    reference = generation(exact, exact, exact, prompt, tokens)
    eager = generation(whole, whole, whole, prompt, tokens)

    local = distribute(family.build().to(getattr(torch, dtype)), world)
    graphs, reports = {}, {}
    cache, fused = zoo.static_cache(local, ROOM), []
    # As transformers does by itself when it generates.
    for phase, experts in (("prefill", "grouped_mm"), ("decode", "batched_mm")):
        local.set_experts_implementation(experts)
        torch.compiler.reset()
        graphs[phase] = []
        backend = "inductor_moe" if real else graph_backend(graphs=graphs[phase])
        compiled = torch.compile(local, backend=backend, fullgraph=True)
        inputs = [prompt] if phase == "prefill" else tokens.split(1, dim=1)
        with torch.no_grad(), collected() as reports[phase]:
            fused += [compiled(ids, past_key_values=cache).logits for ids in inputs]
    return {
        "errors": [relative_error(*pair) for pair in zip(fused, reference, strict=True)],
        "eager": [relative_error(*pair) for pair in zip(eager, reference, strict=True)],
        "sum": [float(logits.double().sum()) for logits in fused],
        "layers": [fused_layers(r) for found in reports.values() for r in found],
        "refused": [str(r) for found in reports.values() for r in found if r.refused],
        "graphs": [described(gm) for found in graphs.values() for gm in found],
        "expected": family.expected(),
        "experts": [
            list(getattr(p, "_local_tensor", p).shape)
            for n, p in local.named_parameters()
            if n.endswith("experts.down_proj")
        ],
    }


def described(gm):
    """How many collectives a graph holds, and what gives the ids of its expert ops."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in calls]
    return {
        "reduced": sum("_c10d_functional.all_reduce" in name for name in names),
        "waited": names.count("_c10d_functional.wait_tensor.default"),
        "masked": sum(
            node.args[3].target is aten.where.self
            for node in calls
            if str(node.target) == "inductor_moe.moe_experts.default"
        ),
    }
