"""What `two_gpus.py` found in all of its processes, as one value and as a table."""

from __future__ import annotations

import argparse
import json
from typing import Any

PLACES = ("folder", "json", "role")
GOALS = {"memory": 0.56, "prefill": 1.6, "decode64": 1.4, "decode1": 0.95}


def gathered(given: argparse.Namespace) -> dict[str, Any]:
    """What all processes have found until now, and what follows from it."""
    found: dict[str, Any] = {
        "setup": {k: str(v) for k, v in vars(given).items() if k not in PLACES}
    }
    for role in ("one", *(f"rank{rank}" for rank in range(given.ranks))):
        file = given.folder / f"{role}.json"
        found[role] = json.loads(file.read_text()) if file.exists() else {}
    one = found["one"]
    ranks = [found[f"rank{rank}"] for rank in range(given.ranks)]
    summary: dict[str, Any] = {}
    if one.get("weights") and all("weights" in rank for rank in ranks):
        share = max(rank["weights"]["bytes"] for rank in ranks) / one["weights"]["bytes"]
        summary["memory"] = {"ratio": share, "met": share <= GOALS["memory"]}
    for phase in given.phases.split(","):
        if phase not in one or not all(phase in rank for rank in ranks):
            continue
        slowest = max(rank[phase]["us"] for rank in ranks)
        ratio = one[phase]["us"] / slowest
        entry = {"one_us": one[phase]["us"], "ranks_us": slowest, "ratio": ratio,
                 "met": ratio >= GOALS[phase], "errors": one.get(f"{phase}-errors"),
                 "ranks_agree": len({rank[phase]["sum"] for rank in ranks}) == 1}  # fmt: skip
        predicted = one.get("predicted", {}).get(f"{phase} {given.ranks}")
        if predicted:
            entry["predicted_us"] = predicted["us"]
            entry["predicted_off"] = predicted["us"] / slowest - 1
        summary[phase] = entry
    return {"summary": summary, **found}


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':10}{'one':>12}{'ranks':>12}{'ratio':>8}{'goal':>7}{'predicted':>12}{'off':>7}"]
    for name, one in found["summary"].items():
        if name == "memory":
            sizes = [found[role]["weights"]["bytes"] / 1e9 for role in ("one", "rank0")]
            lines.append(f"{'GB':10}{sizes[0]:12.2f}{sizes[1]:12.2f}{one['ratio']:8.3f}"
                         f"{GOALS[name]:7.2f}")  # fmt: skip
            continue
        text = f"{name + ' ms':10}{one['one_us'] / 1e3:12.3f}{one['ranks_us'] / 1e3:12.3f}"
        text += f"{one['ratio']:8.3f}{GOALS[name]:7.2f}"
        if "predicted_us" in one:
            text += f"{one['predicted_us'] / 1e3:12.3f}{one['predicted_off']:+7.0%}"
        lines.append(text)
        lines.append(f"  errors {one['errors']}, ranks agree to the bit: {one['ranks_agree']}")
    reduced = found["rank0"].get("all_reduce_us")
    lines.append(f"all-reduce us by tokens: {reduced}")
    lines += [f"{k}: {v['failed']}" for k, v in found.items() if "failed" in v]
    return "\n".join(lines)
