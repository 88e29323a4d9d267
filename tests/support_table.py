"""Runs every family of transformers through the backend and writes the support table.

python tests/support_table.py                      all families, four forms each
python tests/support_table.py --every-form         all families, all forms
python tests/support_table.py --family mixtral     one family; --form picks forms by words

The results go to docs/data/support.json, the table made from them to docs/support.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path

import families
import torch
import transformers
from support_cases import FEW, FORMS, Result, run

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--form", action="append", default=[], help="words a form must contain")
    parser.add_argument("--every-form", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "data" / "support.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "support.md")
    parser.add_argument(
        "--table-only", action="store_true", help="rewrite the table from the JSON"
    )
    asked = parser.parse_args(arguments)
    if not asked.table_only:
        forms = [form for form in FORMS if asked.every_form or form.name in FEW]
        forms = [f for f in forms if all(word in f.name.split() for word in asked.form)]
        results = []
        for family in families.families():
            if asked.family and family.name not in asked.family:
                continue
            for form in forms:
                if not family.switchable and form.experts == "batched_mm":
                    # Its experts have one form only.
                    form = dataclasses.replace(form, experts="grouped_mm")
                    if form in forms:
                        continue
                result = run(family, form)
                results.append(result)
                print(line(result), flush=True)
                write_json(asked.json, results)
    text = markdown(json.loads(asked.json.read_text()))
    asked.markdown.parent.mkdir(parents=True, exist_ok=True)
    asked.markdown.write_text(text)
    return 0


def line(result: Result) -> str:
    state = "wrong" if result.wrong else "matched" if result.whole else "left"
    error = "" if result.error is None else f" {result.error:.1e}/{result.eager_error:.1e}"
    reason = "" if result.whole else f" {'; '.join(result.reasons[:2])}"
    return (
        f"{state:8} {result.family} {result.form} {result.matched}/{result.expected}"
        f"{error}{reason}"
    )


def write_json(path: Path, results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": [
            {**dataclasses.asdict(r), "whole": r.whole, "wrong": r.wrong} for r in results
        ],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def markdown(data: dict) -> str:
    """The table: a row for each family, with what is left and why below it."""
    rows: dict[str, list[dict]] = {}
    for result in data["results"]:
        if result["expected"]:
            rows.setdefault(result["family"], []).append(result)
    whole = [name for name, results in rows.items() if all(r["whole"] for r in results)]
    wrong = [r for results in rows.values() for r in results if r["wrong"]]
    lines = [
        "# Supported models",
        "",
        "Made by `python tests/support_table.py`: every family of transformers "
        f"{data['transformers']} with expert or delta-rule layers, as a tiny random model, on "
        f"torch {data['torch']}. A layer counts where it is rewritten; the error is that of the "
        "rewritten model against fp64, divided by eager's own (the largest over the forms; the "
        "median of three prompts in each, those in which rounding may turn the fewest choices of "
        "experts). A model with graph breaks has several graphs; one of "
        "them may serve several layers.",
        "",
        f"{len(whole)} of {len(rows)} families have every layer rewritten in every form "
        "that was run; "
        f"{len(wrong)} wrong results.",
        "",
        "| family | layers | forms | error / eager's | graphs |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for name, results in rows.items():
        layers = ", ".join(f"{n} {op}" for op, n in results[0]["expected"].items())
        matched = sum(r["whole"] for r in results)
        ratios = [
            r["error"] / max(r["eager_error"], 1e-300) for r in results if r["error"] is not None
        ]
        ratio = f"{max(ratios):.2f}" if ratios else "-"
        graphs = max(r["graphs"] for r in results)
        lines.append(f"| {name} | {layers} | {matched}/{len(results)} | {ratio} | {graphs} |")
        left = {r["form"]: r["reasons"] for r in results if not r["whole"]}
        notes += [f"- **{name}**, {form}: {why(name, reasons)}" for form, reasons in left.items()]
    if notes:
        lines += ["", "## What is left, and why", "", *notes]
    return "\n".join(lines) + "\n"


def why(name: str, reasons: list[str]) -> str:
    text = "; ".join(dict.fromkeys(reasons[:2])) or "not found in the graph"
    cause = families.WHY_LEFT.get(name)
    return f"{cause} ({text})" if cause else text


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
