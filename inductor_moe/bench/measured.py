"""What `bench scale` starts from: times of one GPU, from the JSON of the other benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inductor_moe.bench.ceilings import Ceilings
from inductor_moe.bench.results import Results, Row
from inductor_moe.errors import InductorMoeError

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"


@dataclass(frozen=True)
class Curve:
    """Seconds by number of tokens, in ascending order."""

    points: tuple[tuple[int, float], ...]

    def at(self, tokens: float) -> float:
        """By straight lines between logarithms; flat before them, in proportion after them."""
        first, last = self.points[0], self.points[-1]
        if tokens <= first[0]:
            return first[1]
        if tokens >= last[0]:
            return last[1] * tokens / last[0]
        pairs = zip(self.points, self.points[1:], strict=False)
        (x, a), (y, b) = next(pair for pair in pairs if tokens <= pair[1][0])
        return a * math.exp(math.log(b / a) * math.log(tokens / x) / math.log(y / x))


@dataclass(frozen=True)
class Measured:
    """Of one model on one GPU, with this backend.

    block        one MoE layer in bf16
    rule         the delta rule of one layer over one sequence, if the model has one
    rule_floor   the least that it could have taken
    whole        rows of the whole model, of any scheme
    """

    gpu: str
    ceilings: Ceilings
    block: Curve
    rule: Curve | None
    rule_floor: Curve | None
    whole: tuple[Row, ...]


def load(paths: Iterable[Path], model: str, gpu: str | None = None) -> Measured:
    """The rows of a model in JSON files, or in all those of a folder; later files go first.

    Raises InductorMoeError if there are none, or of several GPUs and `gpu` does not choose.
    """
    paths = list(paths) or [FOLDER]
    found = [Results.load(file) for path in paths for file in _files(path)]
    of_model = [one for one in found if any(_is_block(row, model) for row in one.rows)]
    gpus = list(dict.fromkeys(one.gpu for one in of_model))
    if gpu is None and len(gpus) == 1:
        gpu = gpus[0]
    where = ", ".join(map(str, paths))
    if not gpus:
        raise InductorMoeError(
            f"results: {where} has no moe-block times of {model}; "
            f"inductor-moe bench moe-block --model {model} --json FILE measures them"
        )
    if gpu not in gpus:
        raise InductorMoeError(
            f"gpu: {where} has moe-block times of {model} on {', '.join(gpus)}"
            + (f", not on {gpu}" if gpu else "; choose one with --gpu")
        )
    rows = [row for one in found if one.gpu == gpu for row in one.rows if row.us and _ours(row)]
    blocks = [row for row in rows if _is_block(row, model)]
    rules = [row for row in rows if row.op == "delta-prefill" and row.model == model]
    whole = [row for row in rows if row.op in ("decode", "prefill")]
    return Measured(
        gpu=gpu,
        ceilings=[one.ceilings for one in of_model if one.gpu == gpu][-1],
        block=_curve(blocks),
        rule=_curve(rules) if rules else None,
        rule_floor=_curve(rules, floor=True) if rules else None,
        whole=tuple(row for row in whole if row.model.split(" ")[0] == model),
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InductorMoeError(f"results: there is no {path}; give JSON of `bench` with --results")
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


def _ours(row: Row) -> bool:
    return row.provider == "ours"


def _is_block(row: Row, model: str) -> bool:
    return bool(row.op == "moe-block" and row.model == model and row.us and _ours(row))


def _curve(rows: list[Row], floor: bool = False) -> Curve:
    seconds = {
        row.size["tokens"]: (row.us or 0) * 1e-6 * ((row.of_ceiling or 0) if floor else 1)
        for row in rows
    }
    return Curve(tuple(sorted(seconds.items())))
