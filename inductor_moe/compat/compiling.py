"""Compiling with Inductor, its configuration and caches, and what Dynamo is at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from inductor_moe.compat.passes import keep_matmuls


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


def inductor_config(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's validated config patches for a mode and options, as torch.compile makes them."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    return dict(wrapper(mode, dict(options), None).config)


def start_compile_workers() -> None:
    """Start the processes that compile Inductor's kernels, where a GPU is in use. Idempotent.

    They take seconds to start, and kernels that are ready before them compile one after another in
    this process. Inductor's own backend starts them as soon as it is called.
    """
    if torch.cuda.is_initialized():
        from torch._inductor import async_compile

        async_compile.maybe_warm_pool()


def current_config(name: str) -> Any:
    """A value of torch._inductor.config."""
    from torch._inductor import config

    return getattr(config, name)


def reset_cudagraphs() -> None:
    """Drop CUDA graph trees, as torch._dynamo.reset does for Inductor."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


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


def tracing_backend_is_ours() -> bool:
    """Whether Dynamo traces at this moment, and does so for our backend."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # torch.export with strict=False compiles without Dynamo
        return False
    while backend is not None:
        if getattr(backend, "is_inductor_moe", False):
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(
            backend, "compiler_fn", None
        )
    return False


def exporting() -> bool:
    """Whether torch.export runs. Dynamo of torch 2.11 takes `is_exporting()` for always true."""
    return torch.compiler._is_exporting_flag
