"""`bench scale`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inductor_moe.bench.generation_command import errors, quiet_and_clear, to_write
from inductor_moe.errors import InductorMoeError

if TYPE_CHECKING:
    from inductor_moe.bench.scale import Prediction

EXAMPLES = (
    "bench scale --ranks 8..1024",
    "bench scale --ranks 1,2,4,8 --quant int4 --batch 1",
    "bench scale --ranks 2 --results mine.json --nvlink 400 2 --json scale.json",
)
RANGE = re.compile(r"(\d+)\.\.(\d+)")
console = Console()


def scale(
    ranks: Annotated[
        str, typer.Option(help="2,4,8, or 8..1024: doubling from the first up to the last.")
    ] = "1..64",
    model: Annotated[str, typer.Option(help="A model that was measured.")] = "qwen3.5-35b-a3b",
    quant: Annotated[str, typer.Option(help="int4, int8 or none (bf16).")] = "none",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a decode step, in all.")] = 64,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache of each.")] = 2048,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of a prefill.")] = 16384,
    group: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks that share a copy of the model; as many as divide its experts."
        ),
    ] = None,
    exchange: Annotated[
        str, typer.Option(help="all-reduce, all-to-all, or faster: the better of the two.")
    ] = "all-reduce",
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Shard attention and delta-rule layers.")
    ] = True,
    node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    nvlink: Annotated[
        tuple[float, float], typer.Option(help="Within a node: GB/s each way, us a step.")
    ] = (360, 10),
    network: Annotated[
        tuple[float, float], typer.Option(help="Between nodes, of each GPU: GB/s, us a step.")
    ] = (40, 6),
    small_sum: Annotated[
        float,
        typer.Option(min=0, help="Of a sum through memory that a node shares, us; 0: without."),
    ] = 2.1,
    efficiency: Annotated[
        float, typer.Option(help="Of the ceilings, by dense layers, if not measured whole.")
    ] = 0.7,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of `bench` or a folder; the published ones if none."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Whose rows to take, if there are several GPUs'.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the predictions here.", callback=to_write)
    ] = None,
) -> None:
    """Predict time per token, per prefill and memory on more ranks than there are.

    From what layers were measured to take on one GPU and the bandwidth and latency of the links;
    the documentation says how. No GPU is used.
    """
    with quiet_and_clear():
        from inductor_moe.bench import measured, models
        from inductor_moe.bench.decoder import Decoder
        from inductor_moe.bench.links import Link, Links
        from inductor_moe.bench.scale import Scale, Setup

        counts = rank_counts(ranks)
        near, far = _link(Link, "nvlink", nvlink), _link(Link, "network", network)
        setup = Setup(
            models.known_scheme(quant), batch, context, prompt, group, exchange, heads,
            Links(near, far, node, small_sum / 1e6 or None), efficiency,
        )  # fmt: skip
        with errors.status("predicting"):
            decoder = Decoder.of(models.config_of(model))
            found = Scale(decoder, model, measured.load(results or [], model, gpu), setup)
            predictions = [found.predict(count) for count in counts]
        console.print(_table(found.name, found.measured.gpu, setup, predictions))
        for note in found.notes:
            console.print(escape(note), soft_wrap=True)
        if json:
            json.write_text(_json(found.name, found.measured.gpu, setup, predictions))


def rank_counts(text: str) -> list[int]:
    """ "2,4,8", or "8..1024" for 8, 16, ..., 1024; each once, in this order."""
    found: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        ends = RANGE.fullmatch(part)
        first, last = map(int, ends.groups() if ends else (part, part)) if (
            ends or part.isdigit()) else (0, 0)  # fmt: skip
        if first < 1:
            raise InductorMoeError(
                f"ranks: expected positive numbers as in 2,4,8 or a range as in 8..1024, "
                f"got {text!r}"
            )
        if last < first:
            raise InductorMoeError(f"ranks: {part} runs backwards; say {last}..{first}")
        while first <= last:
            found.append(first)
            first *= 2
    return list(dict.fromkeys(found))


def _link(make: Any, name: str, given: tuple[float, float]) -> Any:
    bandwidth, latency = given
    if bandwidth <= 0 or latency < 0:
        raise InductorMoeError(
            f"{name}: expected GB/s above 0 and us of at least 0, got {bandwidth:g} {latency:g}"
        )
    return make(bandwidth * 1e9, latency / 1e6)


def _table(name: str, gpu: str, setup: Any, predictions: list[Prediction]) -> Table:
    view = Table(title=f"predicted: {name} on {gpu}, batch {setup.batch} at {setup.context} "
                       f"tokens, prefill of {setup.prompt}")  # fmt: skip
    for heading in ("ranks", "copies", "ms/token", "tokens/s", "links", "prefill ms", "links",
                    "GB a rank"):  # fmt: skip
        view.add_column(heading, justify="right")
    for one in predictions:
        decode, prefill = one.decode, one.prefill
        view.add_row(
            f"{one.ranks}",
            f"{one.copies}",
            f"{decode.seconds * 1e3:.2f}",
            f"{setup.batch / decode.seconds:,.0f}",
            f"{decode.links / decode.seconds:.0%}",
            f"{prefill.seconds * 1e3:.1f}",
            f"{prefill.links / prefill.seconds:.0%}",
            f"{one.memory / 1e9:.2f}",
        )
    return view


def _json(name: str, gpu: str, setup: Any, predictions: list[Prediction]) -> str:
    import dataclasses
    import json

    held = [dataclasses.asdict(one) for one in predictions]
    whole = {"model": name, "gpu": gpu, "setup": dataclasses.asdict(setup), "predictions": held}
    return json.dumps(whole, indent=1) + "\n"
