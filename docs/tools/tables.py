"""Tables from JSON, for README.md and the documentation: measurements, supported models.

python docs/tools/tables.py         rewrite what README.md has of them, and the roofline picture
MkDocs runs this file as a hook, which fills in the tables and lists the support table.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "benchmarks" / "results"
HEADLINE_MODEL = "qwen3.5-35b-a3b"
HEADLINE_OPS = ("moe-block", "moe-experts", "delta-prefill", "delta-decode")
ROOFLINE = ROOT / "docs" / "images" / "roofline.svg"
BEGIN, END = "<!-- benchmarks: made by docs/tools/tables.py -->", "<!-- end of benchmarks -->"
SUPPORT = ROOT / "docs" / "data" / "support.json"
SUPPORT_BEGIN = "<!-- support: made by docs/tools/tables.py -->"
SUPPORT_END = "<!-- end of support -->"
NAMES = {"ours": "inductor_moe", "inductor": "Inductor", "eager": "eager", "fla": "fla",
         "liger": "Liger"}  # fmt: skip


@dataclasses.dataclass
class Table:
    """One op of one model on one GPU; `cells` maps size -> provider -> (microseconds, error).

    `notes` maps a provider to what is to be known of its times.
    """

    op: str
    model: str
    dimension: str
    gpu: str
    versions: str
    commit: str
    command: str
    cells: dict[int, dict[str, tuple[float | None, float | None]]]
    eager_error: dict[int, float | None]
    of_ceiling: dict[int, float | None]
    rates: dict[int, tuple[float, float]]  # of inductor_moe: TB/s and TFLOP/s
    notes: dict[str, str]


def load(folder: Path = RESULTS) -> list[Table]:
    """The tables of every file; of an op, a model and providers timed twice, the file that sorts
    last.
    """
    found: dict[tuple[Any, ...], Table] = {}
    for path in sorted(folder.glob("*.json")):
        for table in _tables(json.loads(path.read_text())):
            timed = frozenset(n for row in table.cells.values() for n in row if row[n][0])
            found[table.op, table.model, table.gpu, timed] = table
    return list(found.values())


def _tables(held: dict[str, Any]) -> list[Table]:
    tables: dict[tuple[str, str], Table] = {}
    versions = ", ".join(
        f"{name} {held['versions'][name]}"
        for name in ("torch", "triton")
        if name in held["versions"]
    )
    for row in held["rows"]:
        if len(row["size"]) > 1:  # whole models
            continue
        ((dimension, size),) = row["size"].items()
        key = (row["op"], row["model"])
        if key not in tables:
            tables[key] = Table(
                *key,
                dimension,
                held["gpu"],
                versions,
                held["commit"],
                held["command"],
                {},
                {},
                {},
                {},
                {},
            )
        table = tables[key]
        table.cells.setdefault(size, {})[row["provider"]] = (row["us"], row["error"])
        table.eager_error[size] = row["eager_error"]
        if row["note"] and row["us"]:
            table.notes[row["provider"]] = row["note"]
        if row["provider"] == "ours":
            table.of_ceiling[size] = row["of_ceiling"]
            if row["us"]:
                table.rates[size] = (
                    row["bytes"] / row["us"] / 1e6,
                    row["flops"] / row["us"] / 1e6,
                )
    return list(tables.values())


@dataclasses.dataclass
class Generation:
    """Decode or prefill of whole models on one GPU: the rows of one file, phase and model."""

    phase: str
    model: str
    origin: str
    command: str
    rows: list[dict[str, Any]]

    def title(self) -> str:
        return f"{self.phase} of {self.model}, whole"

    def caption(self) -> str:
        return (
            f"`{self.phase}` of {self.model}, the whole model, on {self.origin}; `{self.command}`"
        )

    def markdown(self) -> str:
        head = ["prompt", "batch", "decoded", "", "tokens/s", "ms a step", "kernels a step",
                "of the least possible time", "error (eager's)"]  # fmt: skip
        lines = [_line(head), _line(["---:"] * len(head))]
        for row in self.rows:
            size, us, kernels = row["size"], row["us"], row.get("kernels")
            tokens = size["batch"] * (size["prompt"] if self.phase == "prefill" else 1)
            lines.append(_line([
                f"{size['prompt']:,}", f"{size['batch']}", _shown(size.get("decode"), "{:,}"),
                NAMES[row["provider"]], _shown(tokens * 1e6 / us if us else None, "{:,.0f}"),
                _shown(us / 1e3 if us else None, "{:,.2f}"), _shown(kernels, "{}"),
                _shown(row["of_ceiling"], "{:.0%}"),
                f"{_shown(row['error'], '{:.1e}')} ({_shown(row['eager_error'], '{:.1e}')})",
            ]))  # fmt: skip
        return "\n".join(lines)


def _order(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["size"].get(name, 0) for name in ("batch", "prompt", "decode"))


def load_generations(folder: Path = RESULTS) -> list[Generation]:
    """What `inductor-moe bench generate` has left."""
    found: dict[tuple[str, str, str], Generation] = {}
    for path in sorted(folder.glob("*.json")):
        held = json.loads(path.read_text())
        rows = [row for row in held["rows"] if len(row.get("size", ())) > 1]
        for row in sorted(rows, key=_order):
            key = (path.name, row["op"], row["model"])
            versions = ", ".join(f"{n} {held['versions'][n]}" for n in ("torch", "triton"))
            origin = f"one {held['gpu']}; {versions}, commit {held['commit'][:9]}"
            model = row["model"].replace(" none", " bf16")  # the quantisation of its weights
            made = Generation(row["op"], model, origin, held["command"], [])
            found.setdefault(key, made).rows.append(row)
    return list(found.values())


def markdown(table: Table) -> str:
    """A row for each size: times, how often ours fits into each other one, error, ceiling."""
    providers = [
        name for name in NAMES if any(row.get(name, (None,))[0] for row in table.cells.values())
    ]
    others = [name for name in providers if name != "ours"]
    head = [table.dimension, *(f"{NAMES[name]}, µs" for name in providers)]
    head += [f"{NAMES[name]} / inductor_moe" for name in others]
    bounded = any(share is not None for share in table.of_ceiling.values())
    head += ["TB/s", "TFLOP/s"] + ["of the least possible time"] * bounded + ["error (eager's)"]
    lines = [_line(head), _line(["---:"] * len(head))]
    for size, row in sorted(table.cells.items()):
        ours, error = row.get("ours", (None, None))
        line = [f"{size:,}", *(_shown(row.get(name, (None,))[0], "{:,.1f}") for name in providers)]
        for name in others:
            other = row.get(name, (None,))[0]
            line.append(_shown(other / ours if other and ours else None, "{:.2f}"))
        line += [_shown(rate, "{:.3g}") for rate in table.rates.get(size, (None, None))]
        if bounded:
            line.append(_shown(table.of_ceiling.get(size), "{:.0%}"))
        eager = table.eager_error[size]
        line.append(f"{_shown(error, '{:.1e}')} ({_shown(eager, '{:.1e}')})")
        lines.append(_line(line))
    return "\n".join(lines)


def experts_summary(tables: list[Table]) -> str:
    """Routed experts of every model: share of the least possible time, and TFLOP/s at most."""
    measured = [table for table in tables if table.op == "moe-experts" and table.of_ceiling]
    measured.sort(key=lambda table: (table.gpu, table.model, len(table.of_ceiling)))
    chosen = list({(table.gpu, table.model): table for table in measured}.values())  # most sizes
    if not chosen:
        return ""
    few = sorted(set.intersection(*({*table.of_ceiling} for table in chosen)) & {*range(65)})
    head = ["model", *(f"{size:,} tokens" for size in few), "most TFLOP/s", "at tokens"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for table in chosen:
        size, (_, most) = max(table.rates.items(), key=lambda item: item[1][1])
        shares = [_shown(table.of_ceiling.get(each), "{:.0%}") for each in few]
        lines.append(_line([table.model, *shares, f"{most:,.0f}", f"{size:,}"]))
    gpus = ", ".join(dict.fromkeys(table.gpu for table in chosen))
    return (
        f"Routed experts alone, bf16, on one {gpus}: share of the least possible time, for few "
        "tokens that of reading the experts they go to:\n\n" + "\n".join(lines)
    )


def caption(table: Table) -> str:
    """What was measured, where, and how to repeat it."""
    commit = f", commit {table.commit[:9]}" if table.commit else ""
    notes = "".join(f"; {NAMES[name]} with {note}" for name, note in table.notes.items())
    return (
        f"`{table.op}` of {table.model}, bf16, on one {table.gpu}; {table.versions}{commit}; "
        f"`{table.command}`{notes}"
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def headline(tables: list[Table], generations: list[Generation] | None = None) -> str:
    """The tables of the README: whole models, then one model's MoE block and delta rule."""
    generations = generations or []
    chosen = [
        table
        for op in HEADLINE_OPS
        for table in tables
        if (table.op, table.model) == (op, HEADLINE_MODEL)
    ]
    if not chosen and not generations:
        return "No measurement lies in `examples/benchmarks/results/` yet."
    models = [each for each in generations if each.model.startswith(HEADLINE_MODEL)]
    parts = [f"{each.caption()}:\n\n{each.markdown()}" for each in models]
    parts += [f"{caption(table)}:\n\n{markdown(table)}" for table in chosen]
    parts += [text for text in [experts_summary(tables)] if text]
    return "\n\n".join(parts)


def ranks_table(folder: Path = RESULTS / "ranks") -> str:
    """What `two_gpus.py` has measured, beside what `bench scale` predicts from one GPU's times."""
    held = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    one, steps = held["one_gpu"], {"decode64": "64", "decode1": "1"}
    versions = ", ".join(f"{name} {one['versions'][name]}" for name in ("torch", "triton"))
    head = ["", "one GPU", "two", "one / two", "predicted for two", "kernels", "commit"]
    lines = [_line(head), _line(["---", *["---:"] * 5, "---"])]
    for run in ("prefill", "decode"):
        found = held[run]["summary"]
        for phase in [name for name in found if name != "memory"]:
            size = held["predicted_" + steps.get(phase, "1")]["predictions"][1]
            step = size["prefill" if phase == "prefill" else "decode"]
            seconds = sum(value for value in step.values() if isinstance(value, float))
            row = found[phase]
            label = {
                "prefill": f"prefill of {int(held[run]['setup']['prompt']):,} tokens, ms",
                "decode64": "decode step of 64 sequences, ms",
                "decode1": "decode step of one sequence, ms",
            }[phase]
            kernels = [held[run][role][phase].get("kernels") for role in ("one", "rank0")]
            lines.append(_line([
                label, *(f"{row[name] / 1e3:,.2f}" for name in ("one_us", "ranks_us")),
                f"{row['ratio']:.2f}", _shown(seconds and seconds * 1e3, "{:,.2f}"),
                "-" if None in kernels else " and ".join(map(str, kernels)),
                held[run]["commit"][:9],
            ]))  # fmt: skip
    share = [held["decode"][role]["weights"]["bytes"] / 1e9 for role in ("one", "rank0")]
    lines.append(_line([
        "weights on a GPU, GB", *(f"{size:.2f}" for size in share),
        f"{share[0] / share[1]:.2f}", "-", "-", held["decode"]["commit"][:9],
    ]))  # fmt: skip
    return (
        f"Qwen3.5-35B-A3B, bf16, all layers, on two {one['gpu']}, NCCL without NVLink multicast; "
        f"{versions}; `{one['command']}`:\n\n" + "\n".join(lines)
    )


def sums_table(path: Path = RESULTS / "ranks" / "small_sums.json") -> str:
    """What `small_sums.py` has measured; "" if nothing."""
    if not path.is_file():
        return ""
    held = json.loads(path.read_text())
    ways = {
        "ours": "this", "nccl": "NCCL", "copy and one-shot": "PyTorch's one-shot, with its copy",
        "empty kernel": "a kernel that does nothing",
    }  # fmt: skip
    took: dict[int, dict[str, float]] = {}
    for row in held["found"][0]["times"]:
        took.setdefault(row["bytes"], {})[row["way"]] = row["us"]
    lines = [_line(["KiB", *ways.values()]), _line(["---:"] * (1 + len(ways)))]
    for size, found in took.items():
        lines.append(_line([f"{size / 1024:g}", *(f"{found[way]:.1f}" for way in ways)]))
    ends = [f"{one['seconds']:.1f} s" for kind in ("dies", "late") for one in held[kind]]
    versions = ", ".join(f"{name} {held['versions'][name]}" for name in ("torch", "triton"))
    return (
        f"µs of a sum, as one of a hundred in a CUDA graph, on {held['ranks']} {held['gpu']}; "
        f"{versions}; `python3 examples/benchmarks/small_sums.py --json FILE`:\n\n"
        + "\n".join(lines)
        + f"\n\nWith a time-out of {held['timeout']:g} s, a rank that died within a graph, and "
        f"one that came late, ended the others after {' and '.join(ends)}."
    )


def prompts_table(path: Path = RESULTS / "attention" / "prompts.json") -> str:
    """What `attention_prompt.py` has measured."""
    held = json.loads(path.read_text())
    ways = {
        "inductor_moe": "inductor_moe", "repeat, cudnn, mask": "cuDNN, a mask",
        "repeat, efficient, mask": "memory-efficient, a mask",
        "cudnn, causal flag": "cuDNN, a flag",
    }  # fmt: skip
    lines = [_line(["model", "queries", "cache", "filled before", *ways.values(), "TFLOP/s"])]
    lines.append(_line(["---", *["---:"] * (4 + len(ways))]))
    for row in held["rows"]:
        sizes = [f"{row[name]:,}" for name in ("queries", "length", "before")]
        took = [_shown(row.get(way, {}).get("microseconds"), "{:,.1f}") for way in ways]
        lines.append(_line([row["model"], *sizes, *took, f"{row['inductor_moe']['tflops']:.0f}"]))
    models = " ".join(dict.fromkeys(row["model"] for row in held["rows"]))
    return (
        f"µs a layer, bf16, on one {held['gpu']}; torch {held['torch']}, triton "
        f"{held['triton']}, commit {held['commit'][:9]}; `python "
        f"examples/benchmarks/attention_prompt.py time --models {models} --json FILE`:\n\n"
        + "\n".join(lines)
    )


def every_table(tables: list[Table]) -> str:
    """The page of all measurements."""
    ordered = sorted(tables, key=lambda table: (table.gpu, table.op, table.model))
    if not ordered:
        return "No measurement lies in `examples/benchmarks/results/` yet."
    return "\n\n".join(
        f"## {table.op}, {table.model}\n\n{caption(table)}\n\n{markdown(table)}"
        for table in ordered
    )


def support(path: Path = SUPPORT) -> str:
    """How many families are rewritten whole, and the names of both sorts."""
    held = json.loads(path.read_text())
    families: dict[str, list[bool]] = {}
    for result in held["results"]:
        if result["expected"]:
            families.setdefault(result["family"], []).append(result["whole"])
    whole = sorted(name for name, results in families.items() if all(results))
    rest = sorted(families.keys() - whole)
    wrong = sum(result["wrong"] for result in held["results"])
    text = (
        f"Of the {len(families)} families of transformers {held['transformers']} with expert or "
        f"delta-rule layers, {len(whole)} have every layer rewritten in every form that was run; "
        f"{wrong} wrong results."
    )
    lines = textwrap.wrap(text, 98)
    if rest:
        lines += ["", *textwrap.wrap(f"Not, or not in every form: {', '.join(rest)}.", 98)]
    names = textwrap.wrap(f"Rewritten whole: {', '.join(whole)}.", 98)
    return "\n".join([*lines, "", *names])


def updated(text: str, tables: list[Table]) -> str:
    """A text with the headline and the support summary between their marks."""
    text = _between(text, BEGIN, END, headline(tables, load_generations()))
    if SUPPORT.is_file():
        text = _between(text, SUPPORT_BEGIN, SUPPORT_END, support())
    return text


def _between(text: str, begin: str, end: str, body: str) -> str:
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def on_config(config: Any) -> None:
    """The support table is a page where it has been made."""
    if (Path(config.docs_dir) / "support.md").is_file():
        config.nav[2:2] = [{"Supported models": "support.md"}]


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    del page
    # What a block needs is for the tests; Markdown takes no fence with an unknown option.
    text = re.sub(r'^(```\w+.*?) needs="\w+"', r"\1", text, flags=re.MULTILINE)
    whole = [f"## {g.title()}\n\n{g.caption()}\n\n{g.markdown()}" for g in load_generations()]
    text = text.replace("<!-- ranks -->", ranks_table())
    text = text.replace("<!-- small sums -->", sums_table())
    text = text.replace("<!-- prompt attention -->", prompts_table())
    tables = load()
    text = text.replace("<!-- experts -->", experts_summary(tables))
    return text.replace("<!-- every benchmark -->", "\n\n".join([*whole, every_table(tables)]))


def roofline(folder: Path = RESULTS, picture: Path = ROOFLINE) -> None:
    """Draw the layers that were measured on one H100."""
    from inductor_moe.bench import plot, results

    found = [results.Results.load(path) for path in sorted(folder.glob("*.json"))]
    chosen = [
        each
        for each in found
        if "H100" in each.gpu and all(len(row.size) == 1 for row in each.rows)
    ]
    plot.roofline(results.merged(chosen, (), ()), picture)


if __name__ == "__main__":
    roofline()
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(), load()))
