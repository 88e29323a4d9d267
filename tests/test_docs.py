"""Every code block of the documentation runs, and what it shows of measurements is their JSON.

A page's blocks run in order and share their names; a block with a title is a file, which every
page has. Blocks say what they need: time (they run with the slow tests), torchao (where it is
installed), or what UNAVAILABLE lists. Those are skipped one by one, with the reason; they still
have to parse and to name commands and options that exist.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import inductor_moe
from inductor_moe.cli import app
from inductor_moe.config import Options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UNAVAILABLE = {
    "gpu": "needs a GPU and a model of full size",
    "clone": "installs and checks a clone, which is what .ci/run does",
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

RUNNER = """
import json, os, pathlib, subprocess, sys, time
import torch
PAGES, FILES, EXAMPLES = json.loads(pathlib.Path("blocks.json").read_text())
for page, blocks in PAGES.items():
    folder = pathlib.Path(page).with_suffix("").resolve()
    folder.mkdir(parents=True)
    os.chdir(folder)
    pathlib.Path("examples").symlink_to(EXAMPLES)
    for title, text in FILES:
        pathlib.Path(title).write_text(text)
    sys.path.insert(0, str(folder))
    names = {"__name__": "__main__"}
    for language, text in blocks:
        start = time.perf_counter()
        try:
            if language == "python":
                exec(compile(text, page, "exec"), names)
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
        except BaseException:
            print("FAILED:", page, text, sep="\\n", file=sys.stderr)
            raise
        print(f"{page}: {time.perf_counter() - start:.1f} s")
    sys.path.remove(str(folder))
    os.chdir(folder.parents[page.count("/")])
    torch._dynamo.reset()
"""


def blocks(text):
    """(language, title, what it needs, text) of every block; tables and pictures are no code."""
    for language, extra, body in FENCE.findall(text):
        found = dict(re.findall(r'(\w+)="([^"]*)"', extra))
        assert set(found) <= {"title", "needs"}, extra
        yield language, found.get("title", ""), found.get("needs", ""), body


ALL = [(page, *block) for page, text in PAGES.items() for block in blocks(text)]


def test_what_a_block_needs_is_known():
    assert {needs for _, _, _, needs, _ in ALL} <= {"", "time", "torchao", *UNAVAILABLE}
    assert {language for _, language, _, _, _ in ALL} <= {"python", "sh"}
    fences = sum(text.count("```") for text in PAGES.values())
    assert fences == 2 * len(ALL)  # none that the expression above does not read


@pytest.mark.parametrize(
    "page, body, needs",
    [
        pytest.param(page, body, needs, id=f"{page}: {body.splitlines()[0]}")
        for page, _, _, needs, body in ALL
        if needs in UNAVAILABLE
    ],
)
def test_block_that_cannot_run_here(page, body, needs):
    """Shows each of them among the skipped tests."""
    pytest.skip(UNAVAILABLE[needs])


def test_what_a_clone_is_told_to_run_is_what_ci_runs():
    body = "".join(body for _, _, _, needs, body in ALL if needs == "clone")
    checks = (ROOT / ".ci" / "run").read_text() + (ROOT / "README.md").read_text()
    for command in (
        "-c constraints.txt -e '.[test,docs]'",
        "ruff check .",
        ".ci/mypy",
        "pytest -n 2",
        "mkdocs build --strict",
    ):
        assert command in body and command in checks, command


def test_python_blocks_parse():
    for page, language, _, _, body in ALL:
        if language == "python":
            ast.parse(body, page)


def test_commands_exist_with_their_options():
    """Also of the blocks that are not run."""
    for page, language, _, _, body in ALL:
        for line in body.splitlines() if language == "sh" else ():
            words = line.split()
            if words[:1] != ["inductor-moe"]:
                continue
            command = COMMANDS[words[1]]
            if words[1] == "bench":
                command = command.commands.get(words[2], command.commands["layers"])
            known = {option for parameter in command.params for option in parameter.opts}
            assert {w for w in words if w.startswith("--")} <= known, f"{page}: {line}"


TORCHAO = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@pytest.mark.parametrize(
    "needs",
    [
        "",
        pytest.param("time", marks=pytest.mark.slow),
        pytest.param("torchao", marks=TORCHAO),
    ],
)
def test_blocks_run(needs, tmp_path):
    readme = (ROOT / "README.md").read_text()
    runnable, files = {}, [(title, body) for _, _, title, _, body in ALL if title]
    for page, language, title, what, body in ALL:
        if what == needs and not title and body not in readme:  # the README's run with it
            runnable.setdefault(page, []).append((language, body))
    assert len(dict(files)) == len(files)
    (tmp_path / "blocks.json").write_text(json.dumps([runnable, files, str(ROOT / "examples")]))
    (tmp_path / "runner.py").write_text(RUNNER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # has inductor-moe
    env = {**os.environ, "PATH": path}
    done = subprocess.run(
        [sys.executable, "runner.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_option_is_in_the_table():
    text = PAGES["how-to/options.md"]
    assert re.findall(r"^\| `inductor_moe\.(\w+)` \|", text, re.MULTILINE) == list(
        Options.__dataclass_fields__
    )


def test_every_public_name_is_on_the_page_of_the_api():
    listed = set(re.findall(r"^::: .*\.(\w+)$", PAGES["api.md"], re.MULTILINE))
    assert set(inductor_moe.__all__) - {"__version__"} <= listed


def test_links_and_files_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", FENCE.sub("", text)):
            assert (DOCS / page).parent.joinpath(target).exists(), f"{page}: {target}"
        for name in re.findall(
            r"`((?:inductor_moe|patterns|lowerings|tests|examples)/[\w./]*)`", text
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tools" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def test_pages_are_built_without_what_a_block_needs(tables):
    """Or Markdown shows the fence as text."""
    for text in PAGES.values():
        built = tables.on_page_markdown(text, page=None)
        for fence in re.findall(r"^```.+$", built, re.MULTILINE):
            assert re.fullmatch(r'```\w+( title="[^"]+")?', fence), fence


ROW = {
    "op": "moe-block", "model": "qwen3.5-35b-a3b", "size": {"tokens": 4}, "provider": "ours",
    "us": 50.0, "iqr_us": 1.0, "error": 2e-3, "eager_error": 3e-3, "compile_s": 1.0, "bytes": 1e8,
    "flops": 2e9, "of_ceiling": 0.5, "note": "",
}  # fmt: skip
HELD = {
    "format": 1, "gpu": "A GPU", "versions": {"torch": "2", "triton": "3"}, "commit": "0123456789",
    "command": "inductor-moe bench", "ceilings": {"read": 1.0, "copy": 1.0, "flops": 1.0},
}  # fmt: skip


def test_tables_are_made_from_the_rows(tables, tmp_path):
    other = {**ROW, "provider": "inductor", "us": 75.0, "of_ceiling": 0.33}
    absent = {**ROW, "provider": "fla", "us": None, "of_ceiling": None, "note": "not installed"}
    large = {**ROW, "size": {"tokens": 1024}, "us": None, "of_ceiling": None, "note": "wrong"}
    (tmp_path / "a.json").write_text(json.dumps({**HELD, "rows": [large, ROW, other, absent]}))
    (table,) = tables.load(tmp_path)
    head, _, first, second = tables.markdown(table).splitlines()
    assert "fla" not in head
    assert first == "| 4 | 50.0 | 75.0 | 1.50 | 2 | 40 | 50% | 2.0e-03 (3.0e-03) |"
    assert second == "| 1,024 | - | - | - | - | - | - | 2.0e-03 (3.0e-03) |"
    assert "A GPU" in tables.caption(table) and "012345678" in tables.caption(table)
    assert "not installed" not in tables.caption(table) and "wrong" not in tables.caption(table)
    assert "No measurement" in tables.headline([])


def test_routed_experts_of_all_models_are_one_table(tables, tmp_path):
    row = {**ROW, "op": "moe-experts", "model": "a"}
    large = {**row, "size": {"tokens": 16384}, "flops": 2.5e10, "of_ceiling": 0.6}
    (tmp_path / "a.json").write_text(json.dumps({**HELD, "rows": [row, large]}))
    found = tables.experts_summary(tables.load(tmp_path)).splitlines()
    assert found[-1] == "| a | 50% | 500 | 16,384 |"
    assert found[-3] == "| model | 4 tokens | most TFLOP/s | at tokens |"
    assert tables.experts_summary([]) == ""

    peer = {**row, "provider": "liger", "us": 75.0, "note": "no CUDA graph"}
    ours = {**row, "of_ceiling": 0.4}
    (tmp_path / "b.json").write_text(json.dumps({**HELD, "rows": [ours, peer]}))
    both = tables.load(tmp_path)
    assert [tables.caption(table).endswith("; Liger with no CUDA graph") for table in both] == [
        False, True,
    ]  # fmt: skip
    assert tables.experts_summary(both).splitlines() == found


def test_whole_models_are_shown_by_tokens(tables, tmp_path):
    row = {**ROW, "op": "decode", "model": "m", "us": 2000.0, "kernels": 300,
           "size": {"prompt": 128, "batch": 4, "decode": 64}}  # fmt: skip
    longer = {**row, "size": {**row["size"], "prompt": 2048}, "us": None, "note": "wrong"}
    (tmp_path / "a.json").write_text(json.dumps({**HELD, "rows": [longer, row]}))
    (found,) = tables.load_generations(tmp_path)
    first, second = sorted(found.markdown().splitlines()[2:])
    assert first == (
        "| 128 | 4 | 64 | inductor_moe | 2,000 | 2.00 | 300 | 50% | 2.0e-03 (3.0e-03) |"
    )
    assert second == "| 2,048 | 4 | 64 | inductor_moe | - | - | 300 | 50% | 2.0e-03 (3.0e-03) |"
    assert "A GPU" in found.caption() and "012345678" in found.caption()
    assert tables.load(tmp_path) == []


def test_the_readme_has_the_headline_of_the_json(tables):
    text = (ROOT / "README.md").read_text()
    assert tables.BEGIN in text and tables.END in text
    assert text == tables.updated(text, tables.load()), "run: python docs/tools/tables.py"


def test_support_is_summed_up_from_its_json(tables, tmp_path):
    result = {"expected": {"moe_experts": 1}, "whole": True, "wrong": False}
    rows = [
        {**result, "family": "one"},
        {**result, "family": "two"},
        {**result, "family": "two", "whole": False},
        {**result, "family": "none", "expected": {}},
    ]
    path = tmp_path / "support.json"
    path.write_text(json.dumps({"transformers": "5", "results": rows}))
    text = tables.support(path)
    assert "2 families of transformers 5" in text.replace("\n", " ")
    assert "not in every form: two." in text and "Rewritten whole: one." in text


def test_results_are_of_the_format_that_bench_reads(tables):
    from inductor_moe.bench.results import Results

    for path in tables.RESULTS.glob("*.json"):
        if "format" in json.loads(path.read_text()):
            Results.load(path)
