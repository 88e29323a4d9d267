"""A roofline of benchmark rows: FLOP/s reached over FLOP a byte, under what the GPU can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inductor_moe.bench.results import Results
from inductor_moe.errors import InductorMoeError

MARKERS = {"ours": "o", "inductor": "s", "eager": "v", "fla": "D", "liger": "^"}
NAMES = {"ours": "inductor_moe", "inductor": "Inductor", "eager": "eager", "fla": "fla",
         "liger": "Liger"}  # fmt: skip


def roofline(results: Results, path: Path) -> None:
    """Write a picture (.png, .svg or .pdf) of every timed row.

    Raises InductorMoeError without matplotlib, or without a row to show.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InductorMoeError("--plot: needs matplotlib; pip install matplotlib") from error
    timed = [row for row in results.rows if row.us and row.bytes]
    if not timed:
        raise InductorMoeError("--plot: no row has a time")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    intensities = [row.flops / row.bytes for row in timed]
    low, high = min(intensities) / 2, max(intensities) * 2
    best = results.ceilings
    knee = best.flops / best.read
    roof = sorted({low, min(max(knee, low), high), high})
    heights = [min(best.flops, best.read * x) / 1e12 for x in roof]
    axes.plot(roof, heights, color="0.3", label=f"{results.gpu}, measured")
    kinds = list(dict.fromkeys((row.op, row.model) for row in timed))
    shades, count = ("tab20", 20) if len(kinds) > 10 else ("tab10", 10)
    colours = {kind: colormaps[shades](i % count) for i, kind in enumerate(kinds)}
    for (op, model), colour in colours.items():
        for provider, marker in MARKERS.items():
            some = [r for r in timed if (r.op, r.model, r.provider) == (op, model, provider)]
            if some:
                axes.plot(
                    [row.flops / row.bytes for row in some],
                    [row.flops / (row.us or 1.0) / 1e6 for row in some],
                    marker,
                    color=colour,
                    fillstyle="full" if provider == "ours" else "none",
                )
        axes.plot([], [], "s", color=colour, label=f"{op}, {model}")
    for provider in dict.fromkeys(row.provider for row in timed):
        fill = "full" if provider == "ours" else "none"
        axes.plot([], [], MARKERS[provider], color="0.3", fillstyle=fill, label=NAMES[provider])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte moved")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    # without a date and random names: the same rows give the same file
    with rc_context({"svg.hashsalt": "roofline"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
