"""The torch.compile backend "inductor_moe": Inductor with our pass, options and report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from inductor_moe import report as reporting
from inductor_moe.config import Options, parse
from inductor_moe.errors import StrictError, TrainingGraphWarning
from inductor_moe.report import Report

if TYPE_CHECKING:
    from inductor_moe.passes import FusionPass

log = logging.getLogger("inductor_moe")

PASS_KEY = "post_grad_custom_pre_pass"


class Backend:
    """Compiles Dynamo's graphs with Inductor after fusing MoE and delta-rule sites."""

    __name__ = "inductor_moe"
    is_inductor_moe = True

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
        inner_compile: Any = None,
    ) -> Any:
        """Compile one graph. `options` holds ours (``inductor_moe.*``) and Inductor's together.

        Raises UnknownOptionError for a bad option; under ``strict`` StrictError for a graph
        that is not fused as a whole.
        """
        from inductor_moe import compat

        compat.start_compile_workers()
        ours, inductor_options = parse(options)
        patches = compat.inductor_config(mode, inductor_options)
        if _needs_gradients(example_inputs):
            return self._leave_to_inductor(gm, example_inputs, patches, ours, inner_compile)

        plain_patches = dict(patches)
        original = fx.GraphModule(gm, copy.deepcopy(gm.graph)) if ours.verify else gm
        fusion = make_pass(ours, patches)
        key = _graph_key(gm, example_inputs, fusion, patches) if compat.caches_enabled() else None
        compiled = compat.compile_fx(gm, example_inputs, patches, inner_compile)
        report = self._report(fusion, key, ours)
        if ours.verify and report.matched:
            plain = compat.compile_fx(original, example_inputs, plain_patches, inner_compile)
            return self._verified(compiled, plain, original, report, ours)
        return compiled

    def reset(self) -> None:
        """Called by torch._dynamo.reset()."""
        from inductor_moe import compat

        compat.reset_cudagraphs()

    def _leave_to_inductor(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        patches: Mapping[str, Any],
        options: Options,
        inner_compile: Any,
    ) -> Any:
        from inductor_moe import compat

        note = (
            "a graph traced with gradients was left to Inductor; wrap the call in torch.no_grad() "
            "or torch.inference_mode() to have its MoE and delta-rule layers fused"
        )
        if options.strict:
            raise StrictError(f"inductor_moe.strict: {note}")
        warnings.warn(f"inductor_moe: {note}", TrainingGraphWarning, stacklevel=2)
        reporting.record(Report(notes=(note,)))
        return compat.compile_fx(gm, example_inputs, patches, inner_compile)

    def _verified(
        self, fused: Any, plain: Any, eager: fx.GraphModule, report: Report, options: Options
    ) -> Any:
        from inductor_moe.verification import Verified

        def failed(text: str) -> None:
            sites = tuple(dataclasses.replace(site, reason=text) for site in report.matched)
            reporting.record(Report(sites=sites, notes=(text,)))

        names = sorted({site.rewrite for site in report.matched})
        return Verified(fused, plain, eager, names, options.strict, failed)

    def _report(self, fusion: FusionPass, key: str | None, options: Options) -> Report:
        if fusion.reports:
            report = reporting.merge(fusion.reports)
            if key is not None:
                _store(key, report)
        else:
            report = (key and _load(key)) or Report(
                notes=("the graph came from Inductor's cache without a stored report",),
                cached=True,
            )
        reporting.record(report)
        log.info("%s", report.summary())
        log.debug("%s", report)
        if options.strict:
            check_strict(report)
        return report


def check_strict(report: Report) -> None:
    """Raise StrictError unless every site of the report was fused and there was one."""
    if report.refused:
        reasons = "; ".join(
            f"{site.module or site.rewrite}: {site.reason}" for site in report.refused
        )
        raise StrictError(f"inductor_moe.strict: {len(report.refused)} sites refused: {reasons}")
    if not report.sites:
        raise StrictError(
            "inductor_moe.strict: no sites; the graph holds no MoE or delta-rule layer in a known "
            "form (inductor_moe.explain(model, *args) shows what was seen)"
        )


def make_pass(options: Options, patches: dict[str, Any]) -> FusionPass:
    """Our pass, composed with the user's, put into Inductor's config patches."""
    from inductor_moe import compat
    from inductor_moe.passes import FusionPass

    user_pass = patches.get(PASS_KEY, compat.current_config(PASS_KEY))
    fusion = FusionPass(options, user_pass)
    patches[PASS_KEY] = fusion
    return fusion


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def _graph_key(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    fusion: FusionPass,
    patches: Mapping[str, Any],
) -> str:
    """What the report of a compile is stored under, the same in every process."""
    digest = hashlib.sha256(repr(fusion.uuid()).encode())
    # Strides between the inputs and the outputs are PyTorch's choice, as of an attention kernel,
    # and no part of its own key: a graph from its cache must find its report.
    # So are the comments, which say where a node comes from.
    code = gm.print_readable(print_output=False).splitlines()
    digest.update("\n".join(line for line in code if not line.lstrip().startswith("#")).encode())
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            text = f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
        else:
            text = repr(value)
        digest.update(text.encode())
    digest.update(repr(sorted((k, repr(v)) for k, v in patches.items() if k != PASS_KEY)).encode())
    return digest.hexdigest()


def _store(key: str, report: Report) -> None:
    from inductor_moe import compat

    with contextlib.suppress(OSError):
        folder = compat.cache_folder() / "inductor_moe_reports"
        folder.mkdir(parents=True, exist_ok=True)
        # A reader in another process must never see half a file.
        partial = folder / f"{key}.{id(report)}.partial"
        partial.write_text(report.to_json())
        partial.replace(folder / f"{key}.json")


def _load(key: str) -> Report | None:
    from inductor_moe import compat

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        text = (compat.cache_folder() / "inductor_moe_reports" / f"{key}.json").read_text()
        return dataclasses.replace(Report.from_json(text), cached=True)
    return None


@contextlib.contextmanager
def collected() -> Iterator[list[Report]]:
    """Collect the reports of the compiles inside the block."""
    before = len(reporting.reports())
    found: list[Report] = []
    yield found
    found.extend(reporting.reports()[before:])


_backend = Backend()


def __getattr__(name: str) -> Any:
    # Resolving the backend, by name or by import, comes before Dynamo traces: the moment to
    # install what replaces functions during tracing and to start what takes long to start.
    # Importing this module alone stays cheap.
    if name != "inductor_moe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _prepare()
    return _backend


@functools.cache
def _prepare() -> None:
    from inductor_moe import compat
    from inductor_moe.capture import delta_rule, experts

    compat.start_compile_workers()

    delta_rule.install()
    experts.install()
