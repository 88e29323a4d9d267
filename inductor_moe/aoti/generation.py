"""export_generation: an unmodified causal LM becomes one package with prefill and decode."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from inductor_moe import compat
from inductor_moe import report as reporting
from inductor_moe.aoti import archive, audit
from inductor_moe.aoti.packaging import check_path, fused_configs
from inductor_moe.aoti.ranks import check_sharded, rank_path
from inductor_moe.aoti.sampling import SAMPLING
from inductor_moe.aoti.steps import State, Step, read_states
from inductor_moe.backend import check_strict
from inductor_moe.capture.delta_rule import capture_for_export
from inductor_moe.errors import ExportError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger("inductor_moe")

EXAMPLE_TOKENS = 1024  # tiles are those for prompts of about this length


def export_generation(
    model: Any,
    package_path: str | os.PathLike[str],
    max_seq_len: int,
    batch_size: int = 1,
    *,
    sampling: str = "top_p",
    options: Mapping[str, Any] | None = None,
    device_mesh: DeviceMesh | None = None,
) -> str:
    """Compile a transformers causal LM into one .pt2 that generates without Python.

    model         unmodified, in eval mode, all of it on one device; Qwen3-MoE, Qwen3.5-MoE,
                  Qwen3-Next, Mixtral, gpt-oss, and others whose cache layers are static
                  attention or linear attention
    package_path  the file to write; the path is returned
    max_seq_len   tokens of a session, prompt and generated together, at least 4
    batch_size    rows of a session; they go through prefill and decode together
    sampling      "top_p": each call chooses temperature and top_p; "greedy": always the most
                  likely token, without sorting the vocabulary in each step
    options       ours (``inductor_moe.*``) and Inductor's, as for torch.compile
    device_mesh   of a model that `parallelize` sharded: the mesh. Every rank calls this and writes
                  a file of its own, model.rank0of2.pt2 for model.pt2, whose path is returned

    The methods are ``prefill`` (tokens [B, T], 2 <= T <= max_seq_len) and ``decode`` (T = 1);
    both take tokens, temperature, top_p, uniforms and the states of a session, which they update
    in place (see `inductor_moe.aoti.steps.Step`), and return the next token. The weights are in
    the file once. Attention layers with a sliding window keep max_seq_len keys. A package for a
    GPU runs on those of the same major compute capability and a minor one no lower: Inductor
    compiles for the GPU at hand, and cannot be told of another.

    Raises ExportError for a model that cannot be exported, PackageError if the package would need
    Python, StrictError under ``strict``. The reports of both methods are appended to
    inductor_moe.reports(), prefill first; how long each part took is logged at level INFO.
    """
    _check(model, max_seq_len, batch_size, sampling)
    check_path("export_generation", package_path)
    if (options or {}).get("aot_inductor.cross_target_platform"):
        raise ExportError(
            "export_generation: aot_inductor.cross_target_platform is set; packages are made on "
            "the platform and the kind of GPU that they run on"
        )
    check_sharded(model, device_mesh)
    if device_mesh is not None:
        package_path = rank_path(package_path, device_mesh)
    table = archive.WeightTable()
    files: dict[str, list[str]] = {}
    methods: dict[str, dict[str, archive.Constant]] = {}
    with torch.no_grad(), _exportable_experts(model):
        states = read_states(model, batch_size, max_seq_len)
        for method in ("prefill", "decode"):
            step = Step(model, states, feed=method == "decode", sample=sampling == "top_p")
            start = time.perf_counter()
            exported = _export(step, states, method, max_seq_len, batch_size)
            traced = time.perf_counter()
            patches, fusion, ours = fused_configs(options)
            files[method], constants = compat.aoti_compile(exported, patches)
            log.info(
                "export_generation: %s traced in %.1f s, compiled in %.1f s",
                method,
                traced - start,
                time.perf_counter() - traced,
            )
            report = reporting.merge(fusion.reports)
            reporting.record(report)
            if ours.strict:
                check_strict(report)
            audit.check_files(files[method], fusion.origins, method)
            methods[method] = _constants(model, constants, table)
            # Lest what this method needed stays in memory while the next one is compiled.
            del exported, constants, patches, fusion
    config = model.config.get_text_config(decoder=True)
    start = time.perf_counter()
    archive.write(
        package_path,
        files,
        table.storages,
        archive.Metadata(
            format=archive.FORMAT,
            torch=torch.__version__,
            model_type=str(config.model_type),
            device=model.device.type,
            compute_capability=compat.compute_capability(model.device),
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            vocab_size=int(config.vocab_size),
            eos_token_ids=_eos(model),
            states=tuple(
                archive.StateSpec(s.name, archive.dtype_name(s.dtype), s.shape) for s in states
            ),
            methods=methods,
            weight_bytes=tuple(storage.nbytes() for storage in table.storages),
            sampling=sampling,
            ranks=1 if device_mesh is None else device_mesh.size(),
            rank=0 if device_mesh is None else device_mesh.get_local_rank(),
            group="" if device_mesh is None else str(device_mesh.get_group().group_name),
        ),
    )
    log.info("export_generation: written in %.1f s", time.perf_counter() - start)
    return os.fspath(package_path)


def _check(model: Any, max_seq_len: int, batch_size: int, sampling: str) -> None:
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise ExportError(
            f"export_generation: model is a {type(model).__name__}; it must be a causal LM of "
            "transformers"
        )
    if model.training:
        raise ExportError("export_generation: model is in training mode; call model.eval()")
    for name, value, least in (("max_seq_len", max_seq_len, 4), ("batch_size", batch_size, 1)):
        if not isinstance(value, int) or value < least:
            raise ExportError(
                f"export_generation: {name} is {value!r}; it must be an integer >= {least}"
            )
    if sampling not in SAMPLING:
        raise ExportError(
            f"export_generation: sampling is {sampling!r}; it must be one of {', '.join(SAMPLING)}"
        )
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and max_seq_len > limit:
        raise ExportError(
            f"export_generation: max_seq_len is {max_seq_len}; the model's "
            f"max_position_embeddings is {limit}"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).startswith("meta"):
        raise ExportError(
            f"export_generation: the model's parameters are on {', '.join(sorted(devices))}; they "
            "must all be on one CPU or CUDA device"
        )


def _eos(model: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return ()
    return (int(found),) if isinstance(found, int) else tuple(int(token) for token in found)


@contextlib.contextmanager
def _exportable_experts(model: Any) -> Iterator[None]:
    """Have the experts traced in a form without Python control flow; put the choice back."""
    names = {
        module: module.config._experts_implementation
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_experts_implementation")
    }
    if not names or not hasattr(model, "set_experts_implementation"):
        yield
        return
    try:
        # transformers computes grouped_mm in Python for other dtypes.
        bfloat16 = model.dtype == torch.bfloat16
        with contextlib.suppress(ValueError):
            model.set_experts_implementation("grouped_mm" if bfloat16 else "batched_mm")
        yield
    finally:
        for module, name in names.items():
            module.config._experts_implementation = name


def _export(
    step: Step, states: list[State], method: str, max_seq_len: int, batch_size: int
) -> torch.export.ExportedProgram:
    decoding = method == "decode"
    device: Any = step.model.device
    tokens = 1 if decoding else min(EXAMPLE_TOKENS, max_seq_len - 1)
    arguments = (
        torch.zeros((batch_size, tokens), dtype=torch.int64, device=device),
        torch.zeros(batch_size, device=device),
        torch.ones(batch_size, device=device),
        torch.zeros((batch_size, max_seq_len + 1), device=device),
        *(state.new(device) for state in states),
    )
    dynamic: Any = None
    if not decoding:
        dim = torch.export.Dim("tokens", min=2, max=max_seq_len)
        dynamic = ({1: dim}, None, None, None, (None,) * len(states))
    with capture_for_export():
        try:
            return torch.export.export(step, arguments, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ExportError(
                f"export_generation: torch.export of {method} failed: {type(error).__name__}: "
                f"{reason[0] if reason else ''}"
            ) from error


def _constants(
    model: torch.nn.Module, constants: Mapping[str, torch.Tensor], table: archive.WeightTable
) -> dict[str, archive.Constant]:
    """The method's constants in the table; those that are the model's own share its storages."""
    own = {
        f"model.{name}": tensor.detach()
        for named in (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named
    }
    found = {}
    for name, tensor in constants.items():
        source = own.get(name)
        if source is not None and source.shape == tensor.shape and source.dtype == tensor.dtype:
            tensor = source
        found[name] = table.add(tensor)
    return found
