"""Every private PyTorch API the package touches, by feature detection (torch 2.11 to 2.15)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from inductor_moe.errors import FallbackWarning

GraphPass = Callable[[fx.Graph], None]


def compile_fx(
    gm: fx.GraphModule,
    example_inputs: Any,
    config_patches: Mapping[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Inductor's own compile of a Dynamo graph, with config patches."""
    from torch._inductor import compile_fx as module

    options: dict[str, Any] = {"config_patches": dict(config_patches)}
    if inner_compile is not None:
        options["inner_compile"] = inner_compile
    with keep_matmuls(gm.graph):
        compiled: Any = module.compile_fx(gm, example_inputs, **options)
    return compiled  # type: ignore[no-any-return]


def aoti_compile_and_package(
    exported_program: Any, package_path: Any, config_patches: Mapping[str, Any]
) -> str:
    """PyTorch's packaging, with config patches."""
    import torch._inductor as module

    path = None if package_path is None else os.fspath(package_path)
    with keep_matmuls(exported_program.graph):
        return module.aoti_compile_and_package(
            exported_program, package_path=path, inductor_configs=dict(config_patches)
        )


def aoti_compile(
    exported_program: Any, config_patches: Mapping[str, Any]
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """AOTInductor's files for a package, without the constants, and the constants by name."""
    import torch._inductor as module

    arguments, keywords = exported_program.example_inputs
    patches = {
        **config_patches,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    with keep_matmuls(exported_program.graph):
        found: Any = module.aot_compile(
            exported_program.module(check_guards=False), arguments, keywords, options=patches
        )
    files = [item for item in found if isinstance(item, str) and item]
    constants: dict[str, torch.Tensor] = {}
    for item in found:
        if isinstance(item, str):
            continue
        for name, (tensor, properties) in item.items():
            constants[name] = torch.as_strided(
                tensor, tuple(properties.shape), tuple(properties.stride), properties.offset
            )
    return files, constants


def write_pt2(path: Path, files: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Write a PT2 archive: compiled files by method, and records of text or of a storage."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    with PT2ArchiveWriter(str(path)) as writer:
        for method, paths in files.items():
            for file in paths:
                name = f"data/aotinductor/{method}/{os.path.basename(file)}"
                writer.write_file(name, file)
        for name, content in records.items():
            if isinstance(content, str):
                writer.write_string(name, content)
            else:
                storage = content.cpu()
                writer.archive_file.write_record(name, storage, storage.nbytes())


def pt2_reader(path: Path) -> Any:
    """A reader of a PT2 archive: get_all_records, get_record, get_record_offset."""
    return torch._C.PyTorchFileReader(str(path))


def load_method(path: Path, name: str, device_index: int) -> Any:
    """AOTInductor's loader of one method of a package.

    Single-threaded, because the loader's own events cannot be captured in a CUDA graph.
    """
    aoti: Any = torch._C._aoti
    return aoti.AOTIModelPackageLoader(str(path), name, True, 1, device_index)


def op_overload_type() -> Any:
    """The class of the ops in a graph."""
    return torch._ops.OpOverload


def is_python_op(name: str) -> bool:
    """Whether this process knows Python kernels of an op ("namespace::name")."""
    from torch._library.custom_ops import OPDEFS

    if name in OPDEFS:
        return True
    prefix = name.replace("::", "/") + "/"
    keys = ("CPU", "CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    implemented: Any = getattr(torch.library, "_impls", ())
    return any(key.startswith(prefix) and key.endswith(keys) for key in implemented)


def compute_capability(device: torch.device) -> str:
    """ "9.0" and the like for a GPU, "" for another device."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def inductor_config(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's validated config patches for a mode and options, as torch.compile makes them."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    return dict(wrapper(mode, dict(options), None).config)


def current_config(name: str) -> Any:
    """A value of torch._inductor.config."""
    from torch._inductor import config

    return getattr(config, name)


def reset_cudagraphs() -> None:
    """Drop CUDA graph trees, as torch._dynamo.reset does for Inductor."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


_kept = threading.local()


@contextlib.contextmanager
def keep_matmuls(graph: fx.Graph) -> Iterator[None]:
    """Within the block, in this thread, coordinate descent tuning leaves matmuls that we match.

    That setting (part of mode="max-autotune") makes Inductor decompose a product with a vector
    into a multiplication and a sum before any graph pass runs: a bmm, which hides the experts'
    gathered matmuls, and an mm, kept only where the graph has packed weights. A decomposition
    table of our own would say so directly, but it bypasses Inductor's caches.
    """
    aten = torch.ops.aten
    _wrap_decompositions()
    before = getattr(_kept, "ops", ())
    packed = any("inductor_moe.dequantize" in str(node.target) for node in graph.nodes)
    linear = (aten.mm.default, aten.addmm.default) if packed else ()
    _kept.ops = (*before, aten.bmm.default, *linear)
    try:
        yield
    finally:
        _kept.ops = before


@functools.cache
def _wrap_decompositions() -> None:
    from torch._inductor import decomposition

    aten = torch.ops.aten
    for op in (aten.bmm.default, aten.mm.default, aten.addmm.default):
        original = decomposition.decompositions.get(op)
        if original is not None:
            decomposition.decompositions[op] = _unless_kept(op, original)
    merged: Any = getattr(decomposition, "fast_random_decomps", None)
    if hasattr(merged, "cache_clear"):
        merged.cache_clear()


def _unless_kept(op: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's decomposition, without coordinate descent tuning where the op is kept."""
    from torch._inductor import config

    @functools.wraps(original)
    def decompose(*args: Any, **kwargs: Any) -> Any:
        if op not in getattr(_kept, "ops", ()):
            return original(*args, **kwargs)
        with config.patch(coordinate_descent_tuning=False):
            return original(*args, **kwargs)

    return decompose


@functools.cache
def graph_pass_base() -> type:
    """The base class whose uuid() lets Inductor cache graphs that a custom pass changed."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def graph_passes(value: Any) -> tuple[GraphPass, ...]:
    """A custom-pass setting (None, a callable, or a sequence from torch 2.13) as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def run_post_grad_passes(gm: fx.GraphModule) -> None:
    """Inductor's post-grad passes, ours among them, without code generation."""
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.virtualized import V

    fake_mode = graph_fake_mode(gm.graph)
    with V.set_fake_mode(fake_mode):
        post_grad_passes(gm, is_inference=True)


def graph_fake_mode(graph: fx.Graph) -> Any:
    """The fake mode of the values in a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if hasattr(value, "fake_mode"):
                return value.fake_mode
    return FakeTensorMode()


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute on real tensors although a compile with its fake mode is going on."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a compiled callable as taking one list of inputs."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]

    return make_boxed_func(function)  # type: ignore[no-any-return]


def statically_true(condition: Any) -> bool:
    """Whether a condition over SymInts holds for every value, without adding a guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def is_symbolic(value: Any) -> bool:
    """Whether a size is symbolic."""
    return isinstance(value, torch.SymInt)


def turn_on_dynamo_setting(name: str) -> bool:
    """Set a boolean of Dynamo's config to True for the process; False if it was already."""
    from torch._dynamo import config

    if getattr(config, name):
        return False
    setattr(config, name, True)
    return True


def allow_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo compile for any size of this dim from the first call on, if it can."""
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, dim)


def upper_bound(size: Any) -> int | None:
    """The largest value a size can have, None if it has no bound."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(bound) if bound.is_Integer and int(bound) < 2**40 else None


def packaging() -> bool:
    """Whether the graph that is being lowered is for an AOTInductor package."""
    from torch._inductor.virtualized import V

    return bool(getattr(V.graph, "aot_mode", False))


def clear_graph_breaks() -> None:
    """Forget the graph breaks seen so far."""
    from torch._dynamo.utils import counters

    counters["graph_break"].clear()
    counters["unimplemented"].clear()


def graph_breaks() -> tuple[str, ...]:
    """The reasons of the graph breaks since they were last cleared.

    A break inside a loop makes Dynamo skip the function as a whole and is counted elsewhere.
    """
    from torch._dynamo.utils import counters

    skipped = [why for why in counters["unimplemented"] if "frame skipped" in str(why)]
    return tuple(str(reason) for reason in (*counters["graph_break"], *skipped))


@contextlib.contextmanager
def no_caches() -> Iterator[None]:
    """Compile without the FX graph cache and the AOTAutograd cache."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    with (
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def cache_folder() -> Path:
    """Where Inductor keeps its caches; reports are kept beside them."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def caches_enabled() -> bool:
    """Whether a compile may come from a cache, so that its report must be kept on disk."""
    from torch._inductor import config

    return bool(config.fx_graph_cache) and not config.force_disable_caches


@functools.cache
def runs_triton_kernels(device: torch.device) -> bool:
    """Whether our kernels run on a device: CUDA, sm_80 or later, Triton installed. Warns once."""
    if device.type == "cpu":
        return False
    reason = _no_triton_reason(device)
    if reason is not None:
        warnings.warn(
            f"inductor_moe: {reason}; fused sites run through PyTorch's own ops instead",
            FallbackWarning,
            stacklevel=2,
        )
    return reason is None


def _no_triton_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"there are no kernels for device {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


def wrap_triton(kernel: Any) -> Any:
    """A Triton kernel whose launch can be traced into a graph."""
    from torch.library import wrap_triton as wrap

    return wrap(kernel)


def register_lowering(op: Any, lowering: Callable[..., Any]) -> None:
    """Register the Inductor lowering of an op overload."""
    from torch._inductor.lowering import register_lowering as inductor_register

    inductor_register(op, type_promotion_kind=None)(lowering)


def fake_arguments() -> tuple[Any, ...]:
    """The fake values of the positional arguments of the node that is being lowered."""
    from torch._inductor.virtualized import V

    return tuple(fx.map_arg(V.graph.current_node.args, lambda n: n.meta["val"]))


def lower_to_eager_call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lower to a call of the op's eager kernel."""
    from torch._inductor.lowering import fallback_handler

    handler: Any = fallback_handler
    return handler(op, add_to_fallback_set=False)(*args, **kwargs)


def tracing_backend_is_ours() -> bool:
    """Whether Dynamo, which calls this while it traces, traces for our backend."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None:
        if getattr(backend, "is_inductor_moe", False):
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(
            backend, "compiler_fn", None
        )
    return False


def lower_by_tracing(
    implementation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Lower implementation(*args) where the args are Inductor IR, from inside a lowering.

    Runs the function on fake tensors and lowers the graph it leaves. Inputs of Triton launches
    are realised first and their fakes get the strides of the buffers, which Inductor may have
    padded: what the kernels are told is what the buffers are.
    """
    from torch._inductor import ir
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    node = V.graph.current_node
    fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    values, spec = pytree.tree_flatten((args, kwargs))
    fakes = pytree.tree_leaves((tuple(fake_args), dict(fake_kwargs)))
    boxes, inputs = [], []
    for position, (value, fake) in enumerate(zip(values, fakes, strict=True)):
        if not isinstance(fake, torch.Tensor):
            continue
        if fake.device.type != "cpu":
            value = _realised(value, ir)
            values[position] = value
            with V.fake_mode:
                fake = _with_strides(fake, value.get_stride())
        boxes.append(value)
        inputs.append(fake)
        fakes[position] = _Hole

    def call(*tensors: torch.Tensor) -> Any:
        remaining = iter(tensors)
        filled = [next(remaining) if fake is _Hole else fake for fake in fakes]
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        return implementation(*call_args, **call_kwargs)

    with V.fake_mode:
        traced = make_fx(call, decomposition_table=select_decomp_table())(*inputs)
    return process_subgraph_nodes(traced, boxes)


class _Hole:
    """Stands where a tensor argument goes."""


def _realised(value: Any, ir: Any) -> Any:
    value = ir.ExternKernel.realize_input(value)
    storage = value.data if isinstance(value, ir.TensorBox) else value
    if ir.is_storage_and_layout(storage):
        ir.as_storage_and_layout(storage, freeze=True)
    return value if isinstance(value, ir.TensorBox) else ir.TensorBox(value)


def _with_strides(fake: torch.Tensor, strides: Any) -> torch.Tensor:
    """The fake with a buffer's strides, where they differ."""
    known = [s.node.expr if isinstance(s, torch.SymInt) else s for s in fake.stride()]
    if all(left == right for left, right in zip(known, strides, strict=True)):
        return fake
    from torch._inductor.virtualized import V

    shape_env = V.graph.sizevars.shape_env
    symbolic = [
        int(s) if getattr(s, "is_number", True) else shape_env.create_symintnode(s, hint=None)
        for s in strides
    ]
    return torch.empty_strided(fake.shape, symbolic, dtype=fake.dtype, device=fake.device)


def schema_of(op: Any) -> Any:
    """The schema of an op overload: its qualified name and its arguments."""
    return op._schema


def size_hint(size: Any, fallback: int = 1024) -> int:
    """A Python int for a size: itself, or the value its symbol had when it was first traced."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return fallback if hint is None else int(hint)
