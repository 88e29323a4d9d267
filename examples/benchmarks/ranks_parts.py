"""What `two_gpus.py` looks at beside the times of whole calls: kernels, layers, a prediction."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]


def kernels_of(step: Callable[[], None], device: str, say: Say) -> dict[str, Any]:
    """How many kernels a step has, and how often and long (us) those of each name ran."""
    from inductor_moe.bench import profile
    from inductor_moe.errors import InductorMoeError

    held: dict[str, list[float]] = {}
    try:
        kernels = profile.record(step, device)
    except InductorMoeError as error:  # after as many steps as on the other ranks
        say(str(error))
        return {}
    for kernel in kernels:
        held.setdefault(kernel.name[:100], []).append(kernel.duration)
    most = sorted(held.items(), key=lambda item: -sum(item[1]))
    return {
        "kernels": len(kernels),
        "longest": [[name, len(times), sum(times)] for name, times in most[:40]],
    }


def predicted(
    given: argparse.Namespace, measured_here: dict[str, Any], device: str, steps: int, say: Say
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`bench scale` from this run's times of one GPU alone, and the times that it starts from.

    measured_here  what the process with the whole model found of each phase
    """
    import dataclasses

    import torch

    from inductor_moe.bench import ceilings, delta, measured, models, moe, results, run
    from inductor_moe.bench.decoder import Decoder
    from inductor_moe.bench.results import Row
    from inductor_moe.bench.scale import Scale, Setup

    best = ceilings.measure(device)
    rows = []
    for op, sizes in ((moe.BLOCK, [1, 64, given.prompt]), (delta.PREFILL, [given.prompt])):
        for case in op.cases(given.model, device, sizes):
            rows += run.measure(case, ["ours"], best)
    say(", ".join(f"{row.op} {row.label()}: {row.us} us {row.note}" for row in rows))
    for phase in given.phases.split(","):
        size = {"prompt": given.prompt, "batch": 1}
        if phase != "prefill":
            size = {"prompt": given.context, "batch": int(phase[6:]), "decode": steps}
        op = "prefill" if phase == "prefill" else "decode"
        name = f"{given.model} {given.quant}"
        rows.append(Row(op, name, size, "ours", us=measured_here[phase]["us"]))
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    parts = given.folder / "parts.json"
    parts.write_text(
        results.Results(
            gpu, results.versions(), results.commit(), " ".join(sys.argv), best, tuple(rows)
        ).to_json()
    )
    decoder = Decoder.of(models.config_of(given.model, given.layers))
    found = {}
    for phase in given.phases.split(","):
        setup = Setup(
            given.quant, 1 if phase == "prefill" else int(phase[6:]),
            given.context + steps // 2, given.prompt, heads=given.heads,
            exchange="all-to-all" if given.exchange == "all-to-all" else "all-reduce",
        )  # fmt: skip
        scale = Scale(decoder, given.model, measured.load([parts], given.model), setup)
        for count in (1, given.ranks):
            one = scale.predict(count)
            step = one.prefill if phase == "prefill" else one.decode
            found[f"{phase} {count}"] = {
                **dataclasses.asdict(step), "us": step.seconds * 1e6, "memory": one.memory,
            }  # fmt: skip
    return found, json.loads(parts.read_text())
