"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inductor_moe import __version__
from inductor_moe.bench import command as bench_command
from inductor_moe.bench.generation_command import to_write
from inductor_moe.errors import InductorMoeError

if TYPE_CHECKING:
    from inductor_moe.demo import Result

PROGRAM = "inductor-moe"
STDOUT = Path("-")
WRONG, UNUSABLE = 1, 2  # exit statuses: the answer is bad news; there is no answer


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"  {PROGRAM} {command}" for command in commands)])


app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fused Mixture-of-Experts layers for unmodified PyTorch models, under torch.compile.",
    epilog=_examples("doctor", "demo", "explain my_model.py --html report.html"),
)
console = Console()
errors = Console(stderr=True)


def _or_stdout(path: Path | None) -> Path | None:
    return path if path == STDOUT else to_write(path)


class Experts(enum.StrEnum):
    grouped_mm = "grouped_mm"
    batched_mm = "batched_mm"


class Shapes(enum.StrEnum):
    auto = "auto"
    static = "static"
    dynamic = "dynamic"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


@app.command(
    epilog=_examples(
        "demo",
        "demo --device cpu --experts batched_mm",
        "demo --layers 8 --mode reduce-overhead",
    )
)
def demo(
    device: Annotated[
        str | None, typer.Option(help="Where to run; a GPU if there is one, else the CPU.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="How many layers; 2 on a CPU, 4 on a GPU.")
    ] = None,
    experts: Annotated[
        Experts, typer.Option(help="Which of transformers' forms of the experts to compile.")
    ] = Experts.grouped_mm,
    mode: Annotated[str | None, typer.Option(help="torch.compile's mode.")] = None,
) -> None:
    """Compile a Qwen3.5-MoE built on the spot, check it against fp64, and time it.

    Small on a CPU, at full layer size on a GPU; with random weights.

    The exit status is 1 if an MoE layer was not fused or the numbers disagree.
    """
    with console.status("load torch"):
        from inductor_moe import demo as job

    with _clear_errors():
        setup = job.choose(device, layers, str(experts), mode)
        console.print(escape(setup.describe()), soft_wrap=True)
        result = job.run(setup, _stage)
    console.print()
    console.print(escape(str(result.report)), soft_wrap=True)
    console.print()
    console.print(_table(result))
    if setup.sizes is job.SMALL:
        console.print("Layers this small show that it works, not how fast it is on real ones.")
    for problem in result.problems:
        errors.print(f"[bold red]wrong:[/] {escape(problem)}", soft_wrap=True)
    if result.problems:
        raise typer.Exit(WRONG)
    console.print(
        f"[bold green]All MoE layers fused[/], errors within {job.SLACK:g} times eager's."
    )


def _table(result: Result) -> Table:
    from inductor_moe.demo import EAGER, PHASES

    prompt = result.setup.prompt
    table = Table(
        title=f"Median time of a prefill of {prompt} tokens and of one decoded token",
        caption="x: times faster than eager; error: relative, against fp64",
    )
    table.add_column("")
    for phase in PHASES:
        for heading in (f"{phase} ms", "x", "error"):
            table.add_column(heading, justify="right", no_wrap=True)
    eager = result.runs[EAGER]
    for way, measured in result.runs.items():
        cells = [way]
        for phase in PHASES:
            seconds = measured.seconds[phase]
            cells += [
                f"{seconds * 1e3:.3f}",
                f"{eager.seconds[phase] / seconds:.2f}",
                f"{measured.error[phase]:.1e}",
            ]
        table.add_row(*cells)
    return table


@app.command(
    epilog=_examples(
        "explain my_model.py --html report.html",
        "explain my_model.py:build_small --json -",
        "explain my_package.models:build --shapes dynamic --strict",
    )
)
def explain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_SCRIPT",
            help="script.py, script.py:function or package.module:function. The function (build "
            "if none is named) takes nothing and returns (model, args) or (model, args, kwargs).",
        ),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page here.", callback=to_write)
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            help="Write JSON here; - for standard output.", metavar="FILE", callback=_or_stdout
        ),
    ] = None,
    shapes: Annotated[Shapes, typer.Option(help="torch.compile's dynamic=.")] = Shapes.auto,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a site was refused or none was found.")
    ] = False,
) -> None:
    """Run a model once, without generating code, and report what would be fused and why not.

    A script that builds a model and its input is enough:

        def build(): return Model().eval(), (torch.arange(16)[None],)
    """
    from inductor_moe.targets import load

    with _clear_errors():
        with _stage(f"load {target}", errors):
            model, args, kwargs = load(target)
        with _stage("run it", errors):
            from inductor_moe.explanation import explain as explain_model

            dynamic = {"auto": None, "static": False, "dynamic": True}[shapes]
            report = explain_model(model, *args, dynamic=dynamic, **kwargs)
    if json == STDOUT:
        print(report.to_json())
    else:
        console.print(escape(str(report)), soft_wrap=True)
    with _clear_errors():
        if json and json != STDOUT:
            _write(json, report.to_json())
        if html:
            _write(html, report.to_html())
    if strict and (report.refused or not report.sites):
        raise typer.Exit(WRONG)


@app.command(
    epilog=_examples("bisect my_model.py", "bisect my_package.models:build --tolerance 0.001")
)
def bisect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_SCRIPT",
            help="As for explain: a function that returns (model, args) or (model, args, kwargs).",
        ),
    ],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative distance from the result without any rewrite.")
    ] = 1e-2,
) -> None:
    """Find the rewrite, and the site, that changes what a model returns.

    The exit status is 1 if there is one.
    """
    from inductor_moe.targets import load

    with _clear_errors(), _stage(f"bisect {target}", errors):
        import torch

        from inductor_moe.backend import inductor_moe
        from inductor_moe.bisection import bisect as find

        def run(options: Any) -> Any:
            torch.manual_seed(0)  # a model with random weights gets the same ones every time
            model, args, kwargs = load(target)
            compiled = torch.compile(model, backend=inductor_moe, options=dict(options))
            with torch.no_grad():
                return compiled(*args, **kwargs)

        culprits = find(run, tolerance)
    for culprit in culprits:
        console.print(escape(str(culprit)), soft_wrap=True)
    if culprits:
        raise typer.Exit(WRONG)
    console.print("no rewrite changes the result")


@app.command(epilog=_examples("package --check model.pt2"))
def package(
    check: Annotated[Path, typer.Option(metavar="FILE", help="The .pt2 to look into.")],
) -> None:
    """List a package's methods, constants, kernels and GPU architecture.

    The exit status is 1 if the package needs Python.
    """
    with _clear_errors(), errors.status(escape(f"read {check}")):
        from inductor_moe.aoti.audit import inspect

        contents = inspect(check)
    console.print(escape(str(contents)), soft_wrap=True)
    if contents.python_ops:
        errors.print(
            f"[bold red]needs Python:[/] {escape(', '.join(contents.python_ops))}", soft_wrap=True
        )
        raise typer.Exit(WRONG)


@app.command(epilog=_examples("doctor"))
def doctor() -> None:
    """Check the environment, with a remedy for each finding.

    The exit status is 1 on an error.
    """
    from inductor_moe.doctor import diagnose

    marks = {
        "ok": "[green]ok[/]     ",
        "warning": "[yellow]warning[/]",
        "error": "[red]error[/]  ",
    }
    failed = 0
    with console.status("checking"):
        for finding in diagnose():
            failed += finding.status == "error"
            line = f"{marks[finding.status]}  {finding.what:<15} {escape(finding.found)}"
            console.print(line, soft_wrap=True)
            if finding.remedy:
                console.print(f"         {'':<15} -> {escape(finding.remedy)}", soft_wrap=True)
    if failed:
        raise typer.Exit(WRONG)


bench_command.add_to(app, _examples)


@contextlib.contextmanager
def _stage(text: str, where: Console = console) -> Iterator[None]:
    """Show that a part of the work goes on, and how long it took."""
    start = time.perf_counter()
    with where.status(escape(text)):
        yield
    where.print(f"[dim]{escape(text)}: {time.perf_counter() - start:.1f} s[/]", soft_wrap=True)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Print our own errors and unwritable files as one line instead of a traceback."""
    try:
        yield
    except (InductorMoeError, OSError) as error:
        _fail(str(error))


def _fail(text: str) -> NoReturn:
    errors.print(f"[bold red]{PROGRAM}:[/] {escape(text)}", soft_wrap=True)
    raise typer.Exit(UNUSABLE)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    errors.print(f"wrote {escape(str(path))}", soft_wrap=True)


def main() -> Any:
    """The console script."""
    return app(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
