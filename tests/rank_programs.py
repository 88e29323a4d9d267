"""What the processes of the distributed tests run."""

from __future__ import annotations

import copy
import functools
import os
import time

import torch
import zoo
from torch.distributed.device_mesh import init_device_mesh

import inductor_moe
from inductor_moe.backend import collected
from inductor_moe.errors import ExportError, PackageError, ParallelError
from inductor_moe.reference.moe import moe_experts_reference
from inductor_moe.testing import fused_layers, graph_backend, relative_error

PROMPT, ROOM = 16, 64
# As transformers chooses by itself when it generates.
EXPERTS = {"prefill": "grouped_mm", "decode": "batched_mm"}
aten = torch.ops.aten
# Where an expert op has its ids.
IDS = {"inductor_moe.moe_experts.default": 3, "inductor_moe.moe_experts_shared.default": 1}


def family_of(name):
    return next(family for family in zoo.MOE if family.name == name)


def by_plan(model, world):
    """transformers' expert-parallel plan applied to a model in memory."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=world, enable_expert_parallel=True)
    return model.maybe_distribute_model(model, config, init_device_mesh("cpu", (world,)))


def by_parallelize(model, world, **options):
    """Our own sharding of a model in memory."""
    mesh = init_device_mesh("cpu", (world,))
    model.parallelization = inductor_moe.parallelize(model, mesh, **options)
    return model


def running(model, experts):
    """A model called with one of transformers' implementations of its experts."""

    def call(*args, **kwargs):
        model.set_experts_implementation(experts)
        return model(*args, **kwargs)

    return call


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


def sharded_program(rank, world, families, dtype, steps, real=False, **options):
    """Each family under `parallelize`: grouped prefill, batched decode."""
    shard = functools.partial(by_parallelize, **options)
    return {name: family_by_plan(name, world, dtype, steps, real, shard) for name in families}


def exchange_program(rank, world, tokens, name="qwen3_moe"):
    """Experts that exchange tokens, with choices of every kind, and a block, against fp64."""
    model = family_of(name).build()
    model.requires_grad_(False)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("batched_mm")
    by_parallelize(model, world, exchange="all-to-all")
    found = {}
    for count in tokens:
        for kind in ("any", "one rank", "one expert", "not rank 0", "some skipped", "skipped"):
            generator = torch.Generator().manual_seed(count)
            x = torch.randn(count, 32, generator=generator)
            ids = torch.stack(
                [torch.randperm(zoo.EXPERTS, generator=generator)[:2] for _ in range(count)]
            )
            share = zoo.EXPERTS // world
            if kind == "one rank":
                ids = ids % share + zoo.EXPERTS - share
            elif kind == "one expert":
                ids = torch.full_like(ids, 3)
            elif kind == "not rank 0":
                ids = ids % (zoo.EXPERTS - share) + share
            elif kind == "some skipped":
                ids[::2, 0] = zoo.EXPERTS
            elif kind == "skipped":
                ids = torch.full_like(ids, zoo.EXPERTS)
            weights = torch.rand(count, 2, generator=generator)
            mine, whole = (m.model.layers[0].mlp.experts for m in (model, exact))
            expected = moe_experts_reference(
                x.double(), whole.gate_up_proj, whole.down_proj, ids, weights.double()
            )
            with torch.no_grad():
                result = mine(x, ids, weights)
            difference = float((result - expected).norm() / expected.norm().clamp_min(1e-9))
            found[f"{count} {kind}"] = {"error": difference, "sum": float(result.double().sum())}
        with torch.no_grad():
            hidden = torch.randn(1, count, 32, generator=generator)
            got = model.model.layers[1].mlp(hidden)
            want = exact.model.layers[1].mlp(hidden.double())
        found[f"{count} block"] = {
            "error": relative_error(got, want), "sum": float(got.double().sum()),
        }  # fmt: skip
    return found


def bytes_of(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def packed_exchange_program(rank, world, names):
    """Packed models that exchange tokens over one dimension of a mesh, against whole ones."""
    found = {}
    for name in names:
        model = family_of(name).build().requires_grad_(False)
        inductor_moe.quantize_(model, "int4", group_size=16, skip=["lm_head"], verbose=False)
        whole, prompt = copy.deepcopy(model), zoo.prompt(model, 7, seed=1)
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "ep"))
        inductor_moe.parallelize(model, mesh, dim="ep", exchange="all-to-all")
        with torch.no_grad():
            pair = [m(prompt, use_cache=False).logits for m in (model, whole)]
        found[name] = relative_error(*pair)
    return found


def package_program(rank, world, place, names):
    """Packages of sharded models, exported and loaded by each rank, against eager whole ones."""
    found = {}
    for name in names:
        model = family_of(name).build().requires_grad_(False)
        prompt = zoo.prompt(model, 5, seed=1)
        tokens, expected = prompt, []
        with torch.no_grad():
            for _ in range(4):
                logits = model(tokens, use_cache=False).logits[:, -1]
                expected.append(int(logits.argmax()))
                tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], 1)
        mesh = init_device_mesh("cpu", (world,))
        path, said = f"{place}/{name}.pt2", []
        for given in (mesh, None, mesh):
            try:
                inductor_moe.export_generation(model, path, 16, device_mesh=given)
            except ExportError as error:
                said.append(str(error))
            if len(said) == 1:
                by_parallelize(model, world, exchange="all-to-all")
        model = by_parallelize(family_of(name).build().requires_grad_(False), world)
        written = inductor_moe.export_generation(
            model, path, 16, sampling="greedy", device_mesh=mesh
        )
        for arguments in ((written, None, None), (path, None, mesh)):
            try:
                generation = inductor_moe.load_generation(*arguments)
            except PackageError as error:
                said.append(str(error))
        found[name] = {
            "tokens": generation.generate(prompt, 4, eos_token_ids=()).tolist()[0],
            "expected": expected, "said": said, "written": os.path.basename(written),
        }  # fmt: skip
    return found


def loading_program(rank, world, place, names):
    """Packages in a process that did not export them."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name in names:
        prompt = zoo.prompt(family_of(name).build(), 5, seed=1)
        generation = inductor_moe.load_generation(f"{place}/{name}.pt2", device_mesh=mesh)
        found[name] = generation.generate(prompt, 4, eos_token_ids=()).tolist()[0]
    return found


def shards_program(rank, world, names, compiled=False):
    """Families sharded by `parallelize`, packed or not, run eagerly or compiled."""
    found = {}
    for name in names:
        for packed, heads in ((False, True), (True, True), (False, False)):
            model = family_of(name).build()
            if packed:
                inductor_moe.quantize_(
                    model, "int4", group_size=16, skip=["lm_head"], verbose=False
                )
            prompt = zoo.prompt(model, PROMPT, seed=1)
            experts = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
            held, in_experts = bytes_of(model), sum(map(bytes_of, experts))
            with torch.no_grad(), collected() as reports:
                whole = model(prompt, use_cache=False).logits
                mesh = init_device_mesh("cpu", (world,))
                done = inductor_moe.parallelize(model, mesh, heads=heads)
                if compiled:
                    torch.compiler.reset()  # the models share a wrapper of transformers
                    model = torch.compile(model, backend=graph_backend(), fullgraph=True)
                sharded = model(prompt, use_cache=False).logits
            kind = "int4" if packed else "fp32" if heads else "experts alone"
            found[f"{name} {kind}"] = {
                "error": relative_error(sharded, whole),
                "share": sum(map(bytes_of, experts)) / in_experts,
                "saved": [done.bytes_before - done.bytes_after, held - bytes_of(model)],
                "modules": done.modules,
                "heads": done.heads,
                "text": str(done),
                "rank": done.rank,
                "layers": [fused_layers(report) for report in reports],
            }
    return found


def refused_program(rank, world, cases):
    """What `refused` finds of each case."""
    return {case: refused(rank, world, case) for case in cases}


def refused(rank, world, case):
    """What `parallelize` says to something that it cannot take, and whether the model is whole."""
    model = family_of("qwen3_moe").build()
    mesh, options = init_device_mesh("cpu", (world,)), {"timeout": 20}
    if case == "no experts":
        model = torch.nn.Linear(4, 4)
    elif case == "two dims":
        mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "dp"))
    elif case == "unknown dim":
        options["dim"] = "ep"
    elif case == "no mesh":
        mesh = "cpu"
    elif case == "meta":
        model = model.to("meta")
    elif case == "one rank differs" and rank == 1:
        model.model.layers[1].mlp.gate.weight.data.add_(1e-3)
    elif case == "one rank has none" and rank == 1:
        model = torch.nn.Linear(4, 4)
    elif case == "twice":
        inductor_moe.parallelize(model, mesh)
    elif case == "late":
        options["timeout"] = 3
        time.sleep(8 * rank)
    elif case == "loop":
        model.set_experts_implementation("eager")
    before = [tuple(p.shape) for p in model.parameters()]
    start = time.monotonic()
    try:
        inductor_moe.parallelize(model, mesh, **options)
    except ParallelError as error:
        same = before == [tuple(p.shape) for p in model.parameters()]
        return {"error": str(error), "whole": same, "seconds": time.monotonic() - start}
    return {"error": "", "whole": False, "seconds": time.monotonic() - start}


def dying_program(rank, world, dies, pause):
    """Decodes eagerly until the last rank leaves, or falls behind."""
    model = by_parallelize(family_of("qwen3_moe").build(), world)
    prompt = zoo.prompt(model, 4, seed=1)
    with torch.no_grad():
        model(prompt, use_cache=False)
        if rank == world - 1:
            if dies:
                os._exit(9)
            time.sleep(pause)
        model(prompt, use_cache=False)
    return {}


def family_by_plan(name, world, dtype, steps, real, distribute):
    family = family_of(name)
    whole, exact = zoo.prepare(family.build(), getattr(torch, dtype), "grouped_mm")
    prompt, tokens = zoo.prompt(whole, PROMPT, seed=1), zoo.prompt(whole, steps, seed=2)
    reference = generation(exact, exact, exact, prompt, tokens)
    phases = [running(whole, experts) for experts in EXPERTS.values()]
    eager = generation(*phases, whole, prompt, tokens)

    local = distribute(family.build().to(getattr(torch, dtype)), world)
    graphs, reports = {}, {}
    cache, fused = zoo.static_cache(local, ROOM), []
    for phase, experts in EXPERTS.items():
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
        "heads": len(getattr(getattr(local, "parallelization", None), "heads", ())),
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
        "sent": names.count("inductor_moe.exchange_rows.default"),
        "gathered": names.count("_c10d_functional.all_gather_into_tensor.default"),
        "masked": sum(
            is_local(node.args[IDS[str(node.target)]]) for node in calls if str(node.target) in IDS
        ),
    }


def is_local(ids):
    """Whether a rank's ids are masked, or come from a router that numbers them itself."""
    return ids.target is aten.where.self or bool(ids.args[0].kwargs.get("own"))


def check(found, world, collectives=False, slack=2.0):
    """Every layer is fused on every rank, and all are as exact as one process without us.

    found        what each rank returned
    collectives  whether the graphs were kept, to be looked at
    """
    for results in found:
        for name, result in results.items():
            assert result["refused"] == [], name
            assert all(layers == result["expected"] for layers in result["layers"]), result
            for fused, eager in zip(result["errors"], result["eager"], strict=True):
                assert fused <= slack * eager, f"{name}: fused {fused:.2e}, eager {eager:.2e}"
            assert {shape[0] for shape in result["experts"]} == {zoo.EXPERTS // world}
            assert result["sum"] == found[0][name]["sum"], f"{name}: the ranks differ"
            if collectives:
                layers = result["expected"]["moe_experts"]
                sums = layers + result["heads"]
                seen = {"reduced": sums, "waited": sums, "masked": layers}
                assert all(graph.items() >= seen.items() for graph in result["graphs"])
                assert len(result["graphs"]) == 2
