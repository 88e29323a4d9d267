"""The `bench`, `tune` and `profile` commands. Nothing heavy is imported before they run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from inductor_moe.bench import generation_command, scale_command
from inductor_moe.bench.generation_command import to_write
from inductor_moe.errors import InductorMoeError

if TYPE_CHECKING:
    from inductor_moe.bench.results import Results, Row
    from inductor_moe.bench.tune import Progress

WRONG, UNUSABLE = 1, 2
EXAMPLES = (
    "bench",
    "bench moe-block delta-decode --against inductor,fla --json results.json",
    "bench moe-experts --model mixtral-8x7b --sizes 1,16,1024 --plot roofline.png",
    "bench --show results.json",
    "bench moe-block --show h100.json --show more.json --plot roofline.svg",
)
TUNE_EXAMPLES = (
    "tune",
    "tune --model mixtral-8x7b --sizes 1,64,4096",
    "tune --budget 600 --again",
)
console = Console()
errors = Console(stderr=True)


LAYERS = "layers"
PICTURES = (".png", ".svg", ".pdf")


def _picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in PICTURES:
        raise typer.BadParameter(f"expected a file in {', '.join(PICTURES)}, got {path}")
    return to_write(path)


class _LayersUnlessNamed(typer.core.TyperGroup):
    """`bench moe-block` is `bench layers moe-block`: what names no command goes to that one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [LAYERS, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_LayersUnlessNamed,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Time layers of real models, or whole models, against other ways to run the same code.",
)


def layers(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help="moe-block, moe-experts, delta-prefill, delta-prompts, delta-decode; none: all.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Whose layers to time, qwen3.5-35b-a3b if none; again for more."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(help="Other providers, of inductor, eager, fla and liger; comma-separated."),
    ] = "inductor",
    sizes: Annotated[
        str, typer.Option(help="Tokens or batches, comma-separated; each op's own list if none.")
    ] = "",
    device: Annotated[
        str | None, typer.Option(help="cuda, or cpu to try it; a GPU if there is one.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the rows here.", callback=to_write)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a roofline picture here.", callback=_picture)
    ] = None,
    show: Annotated[
        list[Path] | None,
        typer.Option(
            help="Time nothing; show the rows of this file; again for more.", dir_okay=False
        ),
    ] = None,
) -> None:
    """Time layers of real models: this backend against other ways to run the same code.

    On a GPU by CUDA graphs over rotating inputs, all kernels counted; a time is shown only if
    the output agreed with float64. The exit status is 1 if a provider was wrong or failed.
    """

    def show_last(so_far: Results) -> None:
        _print_row(so_far.rows[-1])
        if json:
            json.write_text(so_far.to_json())

    # transformers' lru_caches and the fallbacks it announces are no news here.
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")
    try:
        from inductor_moe.bench import results, run
        from inductor_moe.bench.plot import roofline

        if show:
            held = [results.Results.load(path) for path in show]
            found = results.merged(held, ops or (), model or ())
        else:
            device = generation_command.chosen_device(device)
            console.print("[dim]op model size provider: microseconds, error (eager's)[/]")
            with errors.status("measuring"):
                found = run.run(
                    ops or (),
                    model or ("qwen3.5-35b-a3b",),
                    [name for name in against.split(",") if name],
                    _numbers(sizes),
                    device,
                    show_last,
                )
        for op, name in dict.fromkeys((row.op, row.model) for row in found.rows):
            console.print(results.table(found.rows, op, name))
        if plot:
            roofline(found, plot)
    except (InductorMoeError, OSError) as error:
        errors.print(f"[bold red]inductor-moe:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(UNUSABLE) from None
    if any(row.error is not None and row.us is None for row in found.rows):
        raise typer.Exit(WRONG)


def add_to(main: typer.Typer, examples: Callable[..., str]) -> None:
    """Add the commands of this package; `examples` makes the text below a command's help."""
    app.command(LAYERS, epilog=examples(*EXAMPLES))(layers)
    app.command("generate", epilog=examples(*generation_command.EXAMPLES))(
        generation_command.generate
    )
    app.command("scale", epilog=examples(*scale_command.EXAMPLES))(scale_command.scale)
    both = (*EXAMPLES, *generation_command.EXAMPLES[:1], *scale_command.EXAMPLES[:1])
    main.add_typer(app, name="bench", epilog=examples(*both))
    main.command(epilog=examples(*TUNE_EXAMPLES))(tune)
    main.command(epilog=examples(*generation_command.PROFILE_EXAMPLES))(generation_command.profile)


def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Whose experts to tune, qwen3.5-35b-a3b if none; again for more."),
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="Numbers of tokens, comma-separated; 1 to 16384 if none.")
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the table goes; your own folder if none.", file_okay=False),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Begin no new size after this many seconds.")
    ] = float("inf"),
    again: Annotated[
        bool, typer.Option("--again", help="Repeat sizes that the table already has.")
    ] = False,
) -> None:
    """Find the fastest tiles of a model's experts on this GPU and keep them in a table.

    Every candidate's numbers are checked before it is timed. An interrupted run goes on where it
    stopped. Compiles use the table from then on.
    """

    def show(progress: Progress) -> None:
        wrong = f", {progress.wrong} wrong" if progress.wrong else ""
        text = (
            f"{progress.model} {progress.tokens} tokens: {progress.us:.1f} us, "
            f"best of {progress.tried} plans{wrong}"
        )
        console.print(escape(text), soft_wrap=True)

    try:
        from inductor_moe.bench import tune as job

        with errors.status("tuning"):
            path = job.tune(
                model or ("qwen3.5-35b-a3b",), _numbers(sizes) or job.TOKENS, folder, budget,
                again, show,
            )  # fmt: skip
        console.print(f"table: {escape(str(path))}", soft_wrap=True)
    except (InductorMoeError, OSError) as error:
        errors.print(f"[bold red]inductor-moe:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(UNUSABLE) from None


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InductorMoeError(f"sizes: expected positive integers, got {text!r}")
    return [int(part) for part in parts]


def _print_row(row: Row) -> None:
    what = f"{row.op} {row.model} {row.label()} {row.provider}:"
    errors_text = "" if row.error is None else f", error {row.error:.1e} ({row.eager_error:.1e})"
    time = "" if row.us is None else f" {row.us:.1f} us"
    console.print(escape(f"{what}{time}{errors_text} {row.note}"), soft_wrap=True)
