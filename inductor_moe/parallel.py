"""`parallelize`: experts and heads of a model in memory, each rank of a mesh keeping its share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inductor_moe.errors import ParallelError
from inductor_moe.parallel_exchange import (
    BLOCKS,
    EXCHANGES,
    Exchange,
    all_to_all_from,
    spread,
)
from inductor_moe.parallel_heads import Sum, keep_heads, layers_to_share
from inductor_moe.parallel_memory import share_memory
from inductor_moe.parallel_shared import keep_channels, shared_expert_to_cut
from inductor_moe.parallel_store import meet
from inductor_moe.report import scaled

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "inductor_moe")


@dataclasses.dataclass(frozen=True)
class Parallelization:
    """What `parallelize` did on this rank.

    modules       the experts modules that were sharded, in the model's order
    heads         the attention and delta-rule layers whose heads were, likewise
    shared        how many shared experts were
    rank, ranks   this rank's place on the mesh, and how many share the model
    bytes_before  of the parameters and buffers of all of these as they were
    bytes_after   of what this rank keeps
    """

    modules: tuple[str, ...]
    heads: tuple[str, ...]
    shared: int
    rank: int
    ranks: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.ranks} keeps its share of {len(self.modules)} experts "
            f"modules, of {self.shared} shared experts and of the heads of {len(self.heads)} "
            "layers: "
            f"{scaled(self.bytes_before)}B -> {scaled(self.bytes_after)}B"
        )


def parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    *,
    dim: str | None = None,
    heads: bool = True,
    exchange: str = "all-reduce",
    all_to_all_tokens: int | None = None,
    timeout: float = 60.0,
) -> Parallelization:
    """Shard experts and heads of a model over a mesh, in place; the rest stays replicated.

    Every rank calls this with the same whole model in memory (a few values of each tensor are
    compared). Rank r of n keeps experts r * E / n to (r + 1) * E / n - 1 of each experts module of
    transformers, packed weights of `quantize_` included. The model's code stays: a hook renumbers
    the router's choices before the experts, and one all-reduce after them sums the ranks'
    results. Routers run on every rank. Shared experts of blocks that are listed in
    `parallel_shared` are cut by their channels, and the sum is after them; others run on every
    rank, outside of the sum. With all-to-all exchange each rank instead has a slice of the tokens
    of a MoE layer, and sends each of them to the ranks of its experts.

    Where all ranks have GPUs of one host that reach one another's memory, small sums of compiled
    graphs go through memory that is set up for it here.

    The heads of attention and delta-rule layers are cut into as many parts as fit: ranks and heads
    divide by it, and key heads too or several parts keep the same one. The projection after them
    ends in one all-reduce. With more ranks than parts, some ranks keep what others have. Layers
    of kinds that are not listed in `parallel_heads` stay whole, as do those with one part.

    model        experts modules as transformers writes them: called with (hidden_states [T, H],
                 ids [T, K], weights [T, K]), the number of experts in `num_experts`
    device_mesh  of one dimension, or of several with `dim` naming the one to shard over
    heads        whether attention and delta-rule layers are sharded
    exchange     how tokens get to the experts: "all-reduce", "all-to-all", or "auto", which is
                 all-to-all from `all_to_all_tokens` tokens of a call on
    all_to_all_tokens  None: 1,024 if all-to-all then moves fewer bytes, and else never
    timeout      seconds to wait for the other ranks here, with any backend. Later collectives wait
                 as long as the process group's own timeout says
    returns      what this rank keeps

    Raises ParallelError on every rank, before anything is changed, if the experts of any rank do
    not divide by the number of ranks, if packed weights cannot be cut between heads, if the ranks'
    models differ, or if the mesh does not fit. A rank that does not arrive within `timeout` is an
    error on the others.
    """
    if exchange not in EXCHANGES:
        raise ParallelError(
            f"parallelize: exchange must be one of {', '.join(EXCHANGES)} (got {exchange!r})"
        )
    mesh = _one_dimension(device_mesh, dim)
    group, rank, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    problem, found, layers, signature = "", [], [], []
    try:
        found = _found(model, mesh.device_type, ranks)
        layers = layers_to_share(model, ranks) if heads else []
        for layer in layers:
            _check_tensors(layer.name, layer.module, mesh.device_type)
        signature = _signature(model)
    except ParallelError as error:
        problem = str(error)
    _agree(group, problem, signature, timeout)
    share_memory(group, _device(model), timeout)

    blocks = [model.get_submodule(name.rpartition(".")[0]) for name, _ in found]
    shared = [shared_expert_to_cut(block, ranks) for block in blocks]
    if exchange != "all-reduce":  # a slice of the tokens needs all of it
        shared = [None] * len(blocks)
    touched = [
        *(module for _, module in found),
        *(layer.module for layer in layers),
        *(module for module in shared if module is not None),
    ]
    before = sum(map(_bytes, touched))
    by_name = str(group.group_name)
    chosen = Exchange(group, exchange, all_to_all_from(ranks, _top_k(model), all_to_all_tokens))
    for (_, module), block, beside in zip(found, blocks, shared, strict=True):
        count = int(module.num_experts) // ranks  # type: ignore[arg-type]
        with torch.no_grad():
            _keep(module, rank * count, count)
        routing = _Local(rank * count, count)
        module.sharded_over, module.exchange = ranks, exchange  # type: ignore[assignment]
        if exchange == "all-reduce":
            module.register_forward_pre_hook(routing)
            if beside is not None:
                keep_channels(beside, rank, ranks)
            summed = module if beside is None else block
            summed.register_forward_hook(Sum(by_name))
        else:
            sliced = block if type(block).__name__ in BLOCKS else None
            spread(module, sliced, chosen, routing, Sum(by_name))
    for layer in layers:
        keep_heads(layer, rank, by_name)
    return Parallelization(
        tuple(name for name, _ in found),
        tuple(layer.name for layer in layers),
        sum(module is not None for module in shared),
        rank,
        ranks,
        before,
        sum(map(_bytes, touched)),
    )


class _Local:
    """Renumbers choices [T, K]: this rank's experts from 0, others' past the last, weight 0."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) < 3:
            raise ParallelError(
                f"parallelize: {type(module).__name__} was called with {len(args)} positional "
                "arguments; it must get (hidden_states, ids, weights)"
            )
        x, ids, weights, *rest = args
        local = ids - self.first
        others = (local < 0) | (local >= self.count)
        return (
            x,
            local.masked_fill(others, self.count),
            weights.masked_fill(others, 0.0),
            *rest,
        )


def _one_dimension(mesh: DeviceMesh, dim: str | None) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ParallelError(
            f"parallelize: device_mesh must be a DeviceMesh (got {type(mesh).__name__}); "
            "torch.distributed.init_device_mesh makes one"
        )
    names = mesh.mesh_dim_names or ()
    if dim is not None:
        if dim not in names:
            raise ParallelError(
                f"parallelize: dim must be one of the mesh's {list(names)} (got {dim!r})"
            )
        mesh = mesh[dim]
    if mesh.ndim != 1:
        raise ParallelError(
            f"parallelize: device_mesh has {mesh.ndim} dimensions {list(names)}; name the one to "
            "shard the experts over with dim="
        )
    if mesh.get_coordinate() is None:
        raise ParallelError(f"parallelize: rank {dist.get_rank()} is not on the mesh {mesh}")
    return mesh


def _device(model: nn.Module) -> torch.device:
    return next(iter((*model.parameters(), *model.buffers()))).device


def _top_k(model: Any) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return int(getattr(config, "num_experts_per_tok", None) or 8)


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold all experts of a layer and take ids and weights."""
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and isinstance(
            getattr(module, "num_experts", None), int
        ):
            yield name, module


def _found(model: nn.Module, device: str, ranks: int) -> list[tuple[str, nn.Module]]:
    """The experts modules; refuses what cannot be sharded."""
    if not isinstance(model, nn.Module):
        raise ParallelError(
            f"parallelize: model must be an nn.Module (got {type(model).__name__})"
        )
    found = list(_experts(model))
    if not found:
        raise ParallelError(
            "parallelize: the model has no experts module as transformers writes them "
            "(num_experts, weights [E, ., .], called with ids and weights)"
        )
    for name, module in found:
        experts = int(module.num_experts)  # type: ignore[arg-type]
        if hasattr(module, "sharded_over"):
            raise ParallelError(f"parallelize: {name} has been sharded already")
        if experts % ranks:
            raise ParallelError(
                f"parallelize: {name} has {experts} experts, which do not divide by {ranks} ranks"
            )
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen not in IMPLEMENTATIONS:
            raise ParallelError(
                f"parallelize: {name} runs the experts implementation {chosen!r}; call "
                f"model.set_experts_implementation with one of {', '.join(IMPLEMENTATIONS)}"
            )
        _check_tensors(name, module, device)
        for leaf, tensor in _tensors(module):
            if tensor.dim() == 0 or len(tensor) != experts:
                raise ParallelError(
                    f"parallelize: {name}.{leaf} has shape {list(tensor.shape)}; it must be "
                    f"[{experts}, ...]"
                )
    return found


def _check_tensors(name: str, module: nn.Module, device: str) -> None:
    for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != device:
            raise ParallelError(
                f"parallelize: {name}.{leaf} is on {tensor.device}; the mesh is of {device}"
            )
        if type(tensor.data) is not Tensor:
            raise ParallelError(
                f"parallelize: {name}.{leaf} is a {type(tensor.data).__name__}; it must be a "
                "plain tensor"
            )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _bytes(module: nn.Module) -> int:
    held = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _keep(module: nn.Module, first: int, count: int) -> None:
    """Keep experts first to first + count - 1 of a module, in storage of their own."""
    for name, tensor in _tensors(module):
        share = tensor.data[first : first + count].clone()
        if name in module._parameters:
            share = nn.Parameter(share, requires_grad=tensor.requires_grad)
            module._parameters[name] = share
        else:
            module._buffers[name] = share
    module.num_experts = count  # type: ignore[assignment]


def _signature(model: nn.Module) -> list[str]:
    """Name, shape, dtype and a few values of every tensor of a model."""
    return [
        f"{name} {list(tensor.shape)} {tensor.dtype} {_sample(tensor)}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


def _sample(tensor: Tensor) -> list[float]:
    if tensor.numel() == 0 or tensor.dim() == 0:
        return []
    spread = [[(size - 1) * i // 7 for i in range(8)] for size in tensor.shape]
    at = tuple(torch.tensor(places, device=tensor.device) for places in spread)
    return tensor.detach()[at].double().tolist()


def _agree(group: dist.ProcessGroup, problem: str, signature: list[str], timeout: float) -> None:
    """Raise on every rank if one has a problem, differs from the first or does not arrive.

    By the group's store, not by a collective: its waits end in time whatever the backend.
    """
    rank = dist.get_rank(group)
    first = json.loads(meet(group, json.dumps(signature), timeout)[0])
    if not problem and first != signature:
        pairs = zip(first, signature, strict=False)
        counts = f"{len(first)} and {len(signature)} tensors"
        where = next((f"{a} and {b}" for a, b in pairs if a != b), counts)
        problem = f"parallelize: the models of ranks 0 and {rank} differ: {where}"
    # Not only what each thinks: a rank that came late finds all there, when others have given up.
    for other, text in enumerate(meet(group, problem, timeout)):
        if text:
            raise ParallelError(text if other == rank else f"on rank {other}: {text}")
