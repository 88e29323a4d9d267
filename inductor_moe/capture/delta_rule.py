"""Delta-rule functions become one op while Dynamo traces for our backend.

Unrolled, the chunked rule costs dozens of nodes a chunk and a recompile for every chunk count.
Here the functions of transformers (and of FLA, in `capture.fla`) keep their signature and lose
their body: Dynamo inlines a substitute that calls the op. Other backends, eager calls and graphs
with gradients still run the original body.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inductor_moe import compat
from inductor_moe.capture import fla
from inductor_moe.capture.imports import MODULES, is_modeling, watch_imports
from inductor_moe.ops.delta_rule import delta_rule

Result = tuple[torch.Tensor, torch.Tensor | None]
Function = Callable[..., Result]

L2NORM_EPS = 1e-6


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    dtype = query.dtype
    if not (key.dtype == value.dtype == dtype):
        query, key, value = query.float(), key.float(), value.float()
    state = None if initial_state is None else initial_state.float()
    eps = L2NORM_EPS if use_qk_l2norm_in_kernel else None
    scale = query.shape[-1] ** -0.5
    out, final = delta_rule(query, key, value, g, beta, state, scale, eps, cu_seqlens)
    return out.to(dtype), final if output_final_state else None


def _chunked(original: Function, packed: bool) -> Function:
    def substitute(
        query: Any,
        key: Any,
        value: Any,
        g: Any,
        beta: Any,
        chunk_size: int = 64,
        initial_state: Any = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Result:
        if not applies() or torch.is_grad_enabled():
            return original(
                query, key, value, g=g, beta=beta, chunk_size=chunk_size,
                initial_state=initial_state, output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        return _run(
            query, key, value, g, beta, initial_state, output_final_state,
            use_qk_l2norm_in_kernel, kwargs.get("cu_seqlens") if packed else None,
        )  # fmt: skip

    return substitute


def _recurrent(original: Function, packed: bool) -> Function:
    def substitute(
        query: Any,
        key: Any,
        value: Any,
        g: Any,
        beta: Any,
        initial_state: Any = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Result:
        if not applies() or torch.is_grad_enabled():
            return original(
                query, key, value, g=g, beta=beta, initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        return _run(
            query, key, value, g, beta, initial_state, output_final_state,
            use_qk_l2norm_in_kernel, kwargs.get("cu_seqlens") if packed else None,
        )  # fmt: skip

    return substitute


def _reads_ends(function: types.FunctionType) -> bool:
    """Whether a function of transformers keeps sequences apart that cu_seqlens packs into one row.

    It does if it calls FLA's, where that is installed; transformers' own PyTorch code does not.
    """
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    called = dict(cells).get("implementation")
    implementation = function if called is None else called.cell_contents
    return "cu_seqlens" in inspect.signature(implementation).parameters


SUBSTITUTES: dict[str, Callable[[Function, bool], Function]] = {
    "torch_chunk_gated_delta_rule": _chunked,
    "torch_recurrent_gated_delta_rule": _recurrent,
    "chunk_kimi_delta_attention": _chunked,
    "recurrent_kimi_delta_attention": _recurrent,
}

_installed: dict[types.FunctionType, str] = {}
_enabled = True
_exporting = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def applies() -> bool:
    """Whether the graph being traced is for our backend. Evaluated by Dynamo, never in a graph."""
    return _enabled and (_exporting or compat.tracing_backend_is_ours())


def install() -> None:
    """Substitute in all of transformers and FLA that is loaded, or will be. Idempotent."""
    global _enabled
    _enabled = True
    for name, module in list(sys.modules.items()):
        if _is_watched(name):
            _substitute(module)
    watch_imports(_substitute, _is_watched)


def uninstall() -> None:
    """Graphs traced from now on run the original bodies again, until install() is called."""
    global _enabled
    _enabled = False


def _is_watched(name: str) -> bool:
    return name in fla.FUNCTIONS or is_modeling(name)


def _substitute(module: types.ModuleType) -> None:
    if module.__name__ in fla.FUNCTIONS:
        _substitute_fla(module)
        return
    for name, make in SUBSTITUTES.items():
        function = vars(module).get(name)
        if not isinstance(function, types.FunctionType) or function in _installed:
            continue
        _installed[function] = f"{module.__name__}.{name}"
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(
            make(_copied(function), _reads_ends(function))
        )


@contextlib.contextmanager
def capture_for_export() -> Iterator[None]:
    """Within the block, transformers' delta-rule functions are one op each.

    So are the experts of the families that loop over them by data-dependent counts.

    For torch.export, which (with strict=False) runs the model as plain Python:

        with torch.no_grad(), inductor_moe.capture_for_export():
            exported = torch.export.export(model, args, strict=False)

    Replaces the functions in the globals of every transformers model module that is loaded, and
    puts them back at the end. Calls with gradients enabled still run the original bodies. The
    replacement is seen by every thread.
    """
    from inductor_moe.capture import experts

    global _exporting
    experts.install()
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    before, _exporting = _exporting, True
    try:
        for module_name, module in list(sys.modules.items()):
            if not module_name.startswith(MODULES):
                continue
            for name in SUBSTITUTES:
                function = vars(module).get(name)
                if isinstance(function, types.FunctionType):
                    replaced.append((vars(module), name, function))
                    vars(module)[name] = _for_export(function)
        yield
    finally:
        _exporting = before
        for names, name, function in replaced:
            names[name] = function


def _for_export(original: Function) -> Function:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Result:
        if torch.is_grad_enabled():
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        return _run(
            given["query"], given["key"], given["value"], given["g"], given["beta"],
            given["initial_state"], given["output_final_state"],
            given["use_qk_l2norm_in_kernel"], None,  # what is exported is never FLA's
        )  # fmt: skip

    return call


def _substitute_fla(module: types.ModuleType) -> None:
    name = fla.FUNCTIONS[module.__name__]
    function = vars(module).get(name)
    if not isinstance(function, types.FunctionType) or function in _installed:
        return
    _installed[function] = f"{module.__name__}.{name}"
    original = fla.original_of(function, _copied)
    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(
        fla.substitute_for(function, original, applies)
    )


def _copied(function: types.FunctionType) -> Any:
    """The same function under another identity, which Dynamo inlines as it stands."""
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
