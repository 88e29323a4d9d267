"""Where the time of a decode step or a prefill goes: kernels, their classes, and gaps between."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from inductor_moe import lowerings
from inductor_moe.bench import models
from inductor_moe.bench.session import Decode, Prefill, Session
from inductor_moe.errors import InductorMoeError

# The first that a name matches; a fused kernel belongs to where its name says it comes from.
CLASSES = {
    "experts": r"moe_|quantized_(up|down)_|grouped_?(mm|gemm)",
    "delta rule": r"delta_|conv1d|convolution|depthwise",
    "attention": r"flash|fmha|attention|sdpa",
    "dense": r"quantized_(vector|slices)|widen_|gem[mv]|cublas|cutlass|nvjet|splitk|triton_tem"
    r"|(add|b|^|::)mm\b|linear|merged|matmul",
    "norms, elementwise": r"triton_|norm_rope|quantize_|elementwise|reduce|cpp_fused|aten::"
    r"|vectorized",
}
OTHER = "other"
TITLES = {"decode": "decode step", "prefill": "prefill"}
CPU_OPTIONS = {"cpp.enable_kernel_profile": True}  # or compiled kernels would have no events


@dataclass(frozen=True)
class Kernel:
    """One launch; microseconds."""

    name: str
    start: float
    duration: float

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name)), OTHER)


@dataclass(frozen=True)
class Profile:
    """The kernels of one decode step, or of one prefill, as they began, and the model's layers."""

    name: str
    layers: int
    kernels: tuple[Kernel, ...]
    phase: str = "decode"

    @property
    def span(self) -> float:
        """Microseconds from the first kernel's begin to the last one's end."""
        return max(k.start + k.duration for k in self.kernels) - self.kernels[0].start

    def gaps(self) -> list[float]:
        """Microseconds of no kernel before each kernel but the first."""
        found, end = [], self.kernels[0].start
        for kernel in self.kernels:
            found.append(max(0.0, kernel.start - end))
            end = max(end, kernel.start + kernel.duration)
        return found[1:]

    def kinds(self) -> list[str]:
        """The class of each kernel. An up projection that no down projection follows is that of a
        wide linear layer, which takes the same kernel."""
        found = [kernel.kind for kernel in self.kernels]
        for i, kernel in enumerate(self.kernels):
            following = self.kernels[i + 1].name if i + 1 < len(self.kernels) else ""
            if kernel.name.startswith("quantized_up_") and "_down_" not in following:
                found[i] = "dense"
        return found

    def classes(self) -> dict[str, list[Kernel]]:
        """The kernels of each class that has any, the one with the most time first."""
        held: dict[str, list[Kernel]] = {}
        for kernel, kind in zip(self.kernels, self.kinds(), strict=True):
            held.setdefault(kind, []).append(kernel)
        return dict(sorted(held.items(), key=lambda item: -_total(item[1])))

    def table(self) -> Table:
        title = TITLES[self.phase]
        whole = title.split()[-1]
        view = Table(title=f"{self.name}: one {title}")
        for heading in ("", "kernels", "a layer", "us", f"of the {whole}"):
            view.add_column(heading, justify="right" if heading else "left")
        for kind, kernels in self.classes().items():
            view.add_row(kind, *self._cells(len(kernels), _total(kernels)))
        gaps = self.gaps()
        view.add_section()
        idle = sum(gaps)
        view.add_row("gaps", *self._cells(sum(gap > 0 for gap in gaps), idle))
        view.add_row(whole, *self._cells(len(self.kernels), self.span))
        return view

    def longest(self, count: int = 12) -> Table:
        """The kernels that take the most time together."""
        held: dict[tuple[str, str], list[Kernel]] = {}
        for kernel, kind in zip(self.kernels, self.kinds(), strict=True):
            held.setdefault((kernel.name, kind), []).append(kernel)
        view = Table(title="by name")
        for heading in ("kernel", "class", "calls", "us", "us each"):
            view.add_column(heading, justify="right" if heading[0] in "cu" else "left")
        for (name, kind), kernels in sorted(held.items(), key=lambda i: -_total(i[1]))[:count]:
            total = _total(kernels)
            cells = (f"{len(kernels)}", f"{total:.1f}", f"{total / len(kernels):.2f}")
            view.add_row(name[:70], kind, *cells)
        return view

    def _cells(self, count: int, us: float) -> tuple[str, str, str, str]:
        return f"{count}", f"{count / self.layers:.2f}", f"{us:.1f}", f"{us / self.span:.1%}"


def profile(
    model: str,
    scheme: str,
    device: str,
    layers: int | None = None,
    provider: str = "ours",
    prompt: int = 512,
    batch: int = 1,
    trace: Path | None = None,
    phase: str = "decode",
) -> Profile:
    """Build a model, compile a decode step after `prompt` tokens or their prefill, look at it.

    phase  decode or prefill
    trace  where a Chrome trace of it goes

    Raises InductorMoeError for an unknown name, or if the profiler saw no kernel.
    """
    if phase not in TITLES:
        raise InductorMoeError(f"phase: there is no {phase!r}; there are {', '.join(TITLES)}")
    lowerings.install()
    with torch.no_grad():
        built = models.build(model, scheme, device, layers)
        session = Session(built, batch, -(-(prompt + 64) // 64) * 64)
        vocabulary = built.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (batch, prompt), device=device)
        options = CPU_OPTIONS if device == "cpu" else None
        if phase == "prefill":
            prefill = Prefill(session, provider, dynamic=False, options=options)
            prefill(ids)
            kernels = record(
                lambda: prefill.compiled(ids), device, trace, before=session.cache.reset
            )
        else:
            first = session.prefill(ids)
            decode = Decode(session, provider, options)
            decode.token.copy_(first)
            decode.run(8)
            kernels = record(decode.step, device, trace)
    return Profile(f"{model} {scheme}, {provider}, batch {batch}", len(session.cache.layers),
                   tuple(kernels), phase)  # fmt: skip


def record(
    step: Callable[[], Any],
    device: str,
    trace: Path | None = None,
    before: Callable[[], Any] | None = None,
) -> list[Kernel]:
    """The kernels of one call on a GPU, the innermost operators of it on a CPU, in order.

    before  called before each call, unseen
    """
    activity = torch.profiler.ProfilerActivity
    on_gpu = device == "cuda"
    # the host's own events cost it time, in which it launches no kernel
    with_host = trace is not None or not on_gpu
    activities = [activity.CPU] * with_host + [activity.CUDA] * on_gpu
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        for _ in range(2):  # the profiler's first window may miss what it is still setting up for
            if before is not None:
                before()
            if on_gpu:
                torch.cuda.synchronize()
            with torch.profiler.profile(activities=activities) as profiler:
                step()
                if on_gpu:
                    torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        if trace is not None:
            shutil.copy(path, trace)
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    kernels = [
        Kernel(event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]
    if not kernels:
        raise InductorMoeError("the profiler saw no kernel; may this user profile the GPU?")
    kernels.sort(key=lambda k: (k.start, -k.duration))
    return kernels if on_gpu else _innermost(kernels)


def _innermost(calls: list[Kernel]) -> list[Kernel]:
    """Calls in which no other call of the list lies; they are sorted by start."""
    following = [*calls[1:], None]
    return [
        call
        for call, after in zip(calls, following, strict=True)
        if after is None or after.start >= call.start + call.duration
    ]


def _total(kernels: list[Kernel]) -> float:
    return sum(kernel.duration for kernel in kernels)
