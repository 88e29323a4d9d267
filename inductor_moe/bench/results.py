"""What was measured, as rows; their JSON file and their table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from inductor_moe.bench.ceilings import Ceilings
from inductor_moe.errors import InductorMoeError

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    us, iqr_us  median and interquartile range of one call, microseconds; None without a time
    error       relative to float64 (whole models: fp32), like eager_error; None if it never ran
    compile_s   seconds of the first call, compilation included
    of_ceiling  least possible time over `us`, by the larger of bytes and FLOPs
    note        why there is no time, or no CUDA graph
    kernels     of a call, where it is one CUDA graph
    peak_bytes  the most memory in use while it was compiled and run, weights included
    """

    op: str
    model: str
    size: dict[str, int]
    provider: str
    us: float | None = None
    iqr_us: float | None = None
    error: float | None = None
    eager_error: float | None = None
    compile_s: float | None = None
    bytes: float = 0.0
    flops: float = 0.0
    of_ceiling: float | None = None
    note: str = ""
    kernels: int | None = None
    peak_bytes: float | None = None

    def label(self) -> str:
        return " ".join(f"{value}" for value in self.size.values())


@dataclass(frozen=True)
class Results:
    """The rows of one run on one machine."""

    gpu: str
    versions: dict[str, str]
    commit: str
    command: str
    ceilings: Ceilings
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> Results:
        """Raises InductorMoeError for no file, or one that is not such JSON."""
        if not path.is_file():
            raise InductorMoeError(f"{path}: no such file")
        try:
            held: dict[str, Any] = json.loads(path.read_text())
            found = held.pop("format")
            rows = tuple(Row(**row) for row in held.pop("rows"))
            ceilings = Ceilings(**held.pop("ceilings"))
            if found != FORMAT:
                raise InductorMoeError(f"{path}: format {found}, expected {FORMAT}")
            return Results(ceilings=ceilings, rows=rows, **held)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InductorMoeError(f"{path}: not the JSON of a benchmark: {error}") from error


def merged(found: Sequence[Results], ops: Sequence[str], models: Sequence[str]) -> Results:
    """The rows of several runs on one GPU, those of certain ops and models; none means all.

    The ceilings are the highest measured. Raises InductorMoeError for runs on different GPUs, or
    if no row is left.
    """
    gpus = dict.fromkeys(each.gpu for each in found)
    if len(gpus) != 1:
        raise InductorMoeError(f"show: expected results of one GPU, got {', '.join(gpus)}")
    rows = tuple(
        row
        for each in found
        for row in each.rows
        if (not ops or row.op in ops) and (not models or row.model in models)
    )
    if not rows:
        raise InductorMoeError("show: the files have no row of these ops and models")
    limits = [dataclasses.astuple(each.ceilings) for each in found]
    best = Ceilings(*(max(values) for values in zip(*limits, strict=True)))
    return dataclasses.replace(found[0], ceilings=best, rows=rows)


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ("torch", "triton", "transformers", "inductor-moe", "flash-linear-attention",
             "liger-kernel")  # fmt: skip
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}


def commit() -> str:
    """The commit of the source tree this package lies in, or "" outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def throughput(row: Row) -> float | None:
    """Tokens a second of a prefill, or of a decode step of whole models."""
    if row.us is None:
        return None
    tokens = 1 if "decode" in row.size else row.size["prompt"]
    return row.size["batch"] * tokens / row.us * 1e6


def generation_table(rows: list[Row] | tuple[Row, ...], op: str, model: str) -> Table:
    """Prefill or decode of one whole model: a line for each size and provider."""
    view = Table(title=f"{op}, {model}")
    chosen = [row for row in rows if (row.op, row.model) == (op, model)]
    for heading in (*chosen[0].size, "provider", "tokens/s", "ms", "floor ms", "of floor",
                    "kernels", "GB moved", "peak GB", "compile s", "error (eager's)"):  # fmt: skip
        view.add_column(heading, justify="left" if heading == "provider" else "right")
    for row in chosen:
        speed, share = throughput(row), row.of_ceiling
        timed = row.us is not None and share is not None
        view.add_row(
            *(f"{value}" for value in row.size.values()),
            row.provider,
            f"{speed:,.1f}" if speed else row.note[:40],
            f"{row.us / 1e3:.3f}" if row.us else "-",
            f"{row.us * share / 1e3:.3f}" if timed else "-",  # type: ignore[operator]
            f"{share:.1%}" if share else "-",
            f"{row.kernels}" if row.kernels else "-",
            f"{row.bytes / 1e9:.2f}",
            f"{row.peak_bytes / 1e9:.1f}" if row.peak_bytes else "-",
            f"{row.compile_s:.0f}" if row.compile_s else "-",
            "-" if row.error is None else f"{row.error:.1e} ({row.eager_error or 0:.1e})",
        )
    return view


def table(rows: list[Row] | tuple[Row, ...], op: str, model: str) -> Table:
    """One op of one model: a line per size, the times of every provider side by side."""
    chosen = [row for row in rows if (row.op, row.model) == (op, model)]
    if "prompt" in chosen[0].size:
        return generation_table(rows, op, model)
    providers = list(dict.fromkeys(row.provider for row in chosen if row.us))
    view = Table(title=f"{op}, {model}: microseconds a call")
    view.add_column(next(iter(chosen[0].size)), justify="right")
    for provider in providers:
        view.add_column(provider, justify="right")
        if provider == "ours":
            for heading in ("of ceiling", "TB/s", "TFLOP/s"):
                view.add_column(heading, justify="right")
        elif "ours" in providers:
            view.add_column("ours is", justify="right")
    for label in dict.fromkeys(row.label() for row in chosen):
        line = {row.provider: row for row in chosen if row.label() == label}
        cells = [label]
        for provider in providers:
            row = line.get(provider)
            cells.append(f"{row.us:.1f}" if row and row.us else "-")
            ours = line.get("ours")
            if provider == "ours":
                share = row.of_ceiling if row else None
                cells.append(f"{share:.0%}" if share else "-")
                rates = (row.bytes, row.flops) if row and row.us else ()
                cells += [f"{rate / row.us / 1e6:.3g}" for rate in rates] or ["-", "-"]  # type: ignore[union-attr, operator]
            elif "ours" in providers:
                both = row and row.us and ours and ours.us
                cells.append(f"{row.us / ours.us:.2f}x" if both else "-")  # type: ignore[operator, union-attr]
        view.add_row(*cells)
    return view
