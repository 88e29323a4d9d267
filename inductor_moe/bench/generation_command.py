"""`bench generate` and `profile`: whole models. Nothing heavy is imported before they run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from inductor_moe.errors import InductorMoeError
from inductor_moe.files import unwritable

if TYPE_CHECKING:
    from inductor_moe.bench.results import Results, Row

WRONG, UNUSABLE = 1, 2
EXAMPLES = (
    "bench generate --quant int4 --json generate.json",
    "bench generate --model qwen3-30b-a3b --quant none --phases decode --batch 1,4,16",
    "bench generate --layers 8 --prompt 128 --decode 128 --budget 400",
)
PROFILE_EXAMPLES = (
    "profile",
    "profile --model qwen3-30b-a3b --quant int8 --trace step.json",
    "profile --layers 8 --provider inductor",
    "profile --phase prefill --prompt 2048",
)
console = Console()
errors = Console(stderr=True)


def to_write(path: Path | None) -> Path | None:
    """An option's callback: a file to write, refused before the work if it cannot be."""
    reason = unwritable(path) if path is not None else None
    if reason is not None:
        raise typer.BadParameter(reason)
    return path


Model = Annotated[str, typer.Option(help="qwen3.5-35b-a3b, qwen3-30b-a3b or tiny.")]
Quant = Annotated[str, typer.Option(help="int4 (groups of 128), int8 (by row) or none (bf16).")]
Layers = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many layers; all if none.")
]
Device = Annotated[str | None, typer.Option(help="cuda, or cpu to try it; a GPU if there is one.")]


def generate(
    model: Model = "qwen3.5-35b-a3b",
    quant: Quant = "int4",
    prompt: Annotated[
        str, typer.Option(help="Tokens of the prompts, comma-separated.")
    ] = "128,512,2048",
    decode: Annotated[
        str, typer.Option(help="Tokens to decode after each, comma-separated.")
    ] = "128,512",
    batch: Annotated[str, typer.Option(help="Sequences at once, comma-separated.")] = "1",
    against: Annotated[
        str, typer.Option(help='The other provider, inductor; "" for none.')
    ] = "inductor",
    phases: Annotated[
        str, typer.Option(help="What to time, of decode and prefill, comma-separated.")
    ] = "decode,prefill",
    layers: Layers = None,
    device: Device = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the rows here.", callback=to_write)
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Begin nothing new after this many seconds.")
    ] = float("inf"),
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the logits with fp32 first.")
    ] = True,
) -> None:
    """Time prefill and decode of a whole unmodified model with random weights.

    Both providers compile the same model with the same packed weights, in one process. Decode is
    one CUDA graph, timed from token to token on the CPU. A time is shown only if the logits
    agreed with fp32; the exit status is 1 if a provider was wrong or failed.
    """

    def show(so_far: Results) -> None:
        if json:
            json.write_text(so_far.to_json())

    with quiet_and_clear():
        from inductor_moe.bench import generate as job
        from inductor_moe.bench import results

        setup = job.Setup(
            model, quant, chosen_device(device), _numbers("prompt", prompt),
            _numbers("decode", decode), _numbers("batch", batch), _names(against), _names(phases),
            layers, budget, check,
        )  # fmt: skip
        with errors.status("measuring"):
            found = job.run(setup, show, _say)
        for op in dict.fromkeys(row.op for row in found.rows):
            console.print(results.generation_table(found.rows, op, setup.name))
    for row in found.rows:
        if row.note:
            console.print(escape(f"{row.op} {row.size} {row.provider}: {row.note}"))
    if any(_failed(row) for row in found.rows):
        raise typer.Exit(WRONG)


def profile(
    model: Model = "qwen3.5-35b-a3b",
    quant: Quant = "int4",
    provider: Annotated[str, typer.Option(help="ours or inductor.")] = "ours",
    phase: Annotated[str, typer.Option(help="decode or prefill.")] = "decode",
    prompt: Annotated[
        int, typer.Option(min=2, help="Tokens of the prompt, or in the cache before the step.")
    ] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    layers: Layers = None,
    device: Device = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace here.", callback=to_write)
    ] = None,
) -> None:
    """Show where the time of one decode step, or of a prefill, goes: classes of kernels, and gaps.

    On a GPU the kernels of one replay of the step's CUDA graph, or those that the prefill launches
    from Python; on a CPU the operators.
    """
    with quiet_and_clear():
        from inductor_moe.bench import profile as job
        from inductor_moe.bench.session import BACKENDS

        if provider not in BACKENDS:
            raise InductorMoeError(
                f"provider: there is no {provider!r}; there are {', '.join(BACKENDS)}"
            )
        device = chosen_device(device)
        with errors.status("building and compiling the model"):
            found = job.profile(
                model, quant, device, layers, provider, prompt, batch, trace, phase
            )
        console.print(found.table())
        console.print(found.longest())
        if trace:
            console.print(f"trace: {escape(str(trace))}", soft_wrap=True)


class quiet_and_clear:
    """Our own errors and unwritable files as one line; Dynamo's advice about others' code not."""

    def __enter__(self) -> None:
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.filterwarnings("ignore", module=r"torch\._dynamo")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.caught.__exit__(kind, error, trace)
        if isinstance(error, InductorMoeError | OSError):
            errors.print(f"[bold red]inductor-moe:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(UNUSABLE) from None


def _failed(row: Row) -> bool:
    return row.us is None and not row.note.startswith("not compiled:")


def _say(text: str) -> None:
    errors.print(f"[dim]{escape(text)}[/]", soft_wrap=True)


def chosen_device(name: str | None) -> str:
    """The device of that name; a GPU if there is one and no name. Raises InductorMoeError."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise InductorMoeError(f"device: expected cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InductorMoeError("device: this torch sees no GPU; use --device cpu to try it")
    return device


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(what: str, text: str) -> tuple[int, ...]:
    parts = _names(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InductorMoeError(f"{what}: expected positive integers, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))
