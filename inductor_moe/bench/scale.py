"""`bench scale`: what more ranks would make of the times that one GPU was measured to take.

The model is written down in docs/how-to/scale.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from inductor_moe.bench.decoder import BF16, Decoder, Rank
from inductor_moe.bench.links import Links
from inductor_moe.bench.measured import Measured
from inductor_moe.bench.results import Row
from inductor_moe.errors import InductorMoeError

EXCHANGES = ("all-reduce", "all-to-all", "faster")
EFFICIENCY = 0.7


@dataclass(frozen=True)
class Setup:
    """What to predict.

    batch, context  sequences of a decode step, and tokens that each has in its cache
    prompt          tokens of a prefill of one sequence
    group           ranks that share a copy of the model; None: as many as divide the experts
    exchange        of `EXCHANGES`: how tokens get to experts and back
    heads           whether attention and delta-rule layers are sharded
    efficiency      of ceilings that dense layers reach where the whole model was not measured
    """

    scheme: str = "none"
    batch: int = 64
    context: int = 2048
    prompt: int = 16384
    group: int | None = None
    exchange: str = "all-reduce"
    heads: bool = True
    links: Links = dataclasses.field(default_factory=Links)
    efficiency: float = EFFICIENCY

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise InductorMoeError(
                f"exchange: there is no {self.exchange!r}; there are {', '.join(EXCHANGES)}"
            )
        if not 0 < self.efficiency <= 1:
            raise InductorMoeError(f"efficiency: expected 0 to 1, got {self.efficiency:g}")


@dataclass(frozen=True)
class Step:
    """Seconds of one call of the model on the busiest rank, by what they are spent on.

    experts   MoE layers with their router and shared expert
    rule      the delta rule over a prompt
    dense     everything else that is computed
    excess    what the whole model took beyond its parts on one GPU
    links     collectives
    """

    experts: float
    rule: float
    dense: float
    excess: float
    links: float
    exchange: str

    @property
    def seconds(self) -> float:
        return self.experts + self.rule + self.dense + self.excess + self.links


@dataclass(frozen=True)
class Prediction:
    """For `ranks` ranks, in `copies` of the model on `group` ranks each; bytes are of one rank."""

    ranks: int
    group: int
    copies: int
    decode: Step
    prefill: Step
    memory: int


class Scale:
    """Predicts for one model and setup. `notes`: what was assumed for want of a measurement."""

    def __init__(self, decoder: Decoder, model: str, measured: Measured, setup: Setup) -> None:
        if decoder.delta_layers and measured.rule is None:
            raise InductorMoeError(
                f"results: no delta-prefill times of {model} on {measured.gpu}; "
                f"inductor-moe bench delta-prefill --model {model} --json FILE measures them"
            )
        self.decoder, self.measured, self.setup = decoder, measured, setup
        self.name = f"{model} {setup.scheme}"
        self.notes: list[str] = []
        # As measured: what the smallest call took beyond its floor stays, however little is done.
        block = Rank(decoder, "none")
        tokens, seconds = measured.block.points[0]
        self.fixed = max(seconds - self._block_floor(block, tokens, tokens), 0.0)
        self.excess = {op: self._excess(op) for op in ("decode", "prefill")}

    def predict(self, ranks: int) -> Prediction:
        """Raises InductorMoeError for a group that does not divide ranks and experts."""
        setup, experts = self.setup, self.decoder.experts
        group = setup.group or math.gcd(ranks, experts)
        if ranks % group or experts % group:
            raise InductorMoeError(
                f"group: {group} ranks for a copy; they must divide {ranks} ranks and "
                f"{experts} experts"
            )
        copies = ranks // group
        cut_shared = setup.exchange == "all-reduce"
        rank = Rank(self.decoder, setup.scheme, group, setup.heads, cut_shared)
        batch = math.ceil(setup.batch / copies)
        return Prediction(
            ranks, group, copies,
            decode=self._step("decode", rank, batch, 1, setup.context),
            prefill=self._step("prefill", rank, 1, setup.prompt, 0),
            memory=rank.memory(batch, setup.context + 1),
        )  # fmt: skip

    def _step(self, op: str, rank: Rank, batch: int, tokens: int, filled: float) -> Step:
        """Of `tokens` for each of `batch` sequences of which `filled` are in the cache."""
        wanted = self.setup.exchange
        exchanges = EXCHANGES[:2] if wanted == "faster" else (wanted,)
        excess = self.excess[op]
        dense = self._dense(rank, batch, tokens, filled)
        beyond = excess or 0.0
        if op == "prefill":  # work on the rank's share, where a decode step has gaps and launches
            whole = Rank(self.decoder, self.setup.scheme)
            beyond *= dense / self._dense(whole, batch, tokens, filled)
        steps = [
            Step(
                experts=self._experts(rank, batch * tokens, exchange),
                rule=self._rule(rank, batch, tokens),
                dense=dense / (self.setup.efficiency if excess is None else 1.0),
                excess=beyond,
                links=self._links(rank, batch * tokens, exchange),
                exchange=exchange,
            )
            for exchange in exchanges
        ]
        return min(steps, key=lambda step: step.seconds)

    def _roof(self, size: float, flops: float) -> float:
        ceilings = self.measured.ceilings
        return max(size / ceilings.read, flops / ceilings.flops)

    def _experts(self, rank: Rank, tokens: int, exchange: str) -> float:
        """All MoE layers: the measured time of one in bf16, scaled by the least times of both."""
        own = tokens if exchange == "all-reduce" else math.ceil(tokens / rank.ranks)
        whole = self._block_floor(Rank(self.decoder, "none"), tokens, tokens)
        share = self._block_floor(rank, tokens, own) / whole
        measured = self.measured.block.at(tokens)
        fixed = min(self.fixed, measured)
        return self.decoder.layers * (fixed + (measured - fixed) * share)

    def _block_floor(self, rank: Rank, tokens: int, own: int) -> float:
        """The least time of one MoE layer on the busiest rank.

        own  tokens for which this rank computes the router and the shared expert
        """
        d, expert, always = self.decoder, rank.expert(), rank.every_token()
        used = 1 - (1 - d.top_k / d.experts) ** tokens
        experts = busiest(d.experts // rank.ranks, used, rank.ranks)
        rows = busiest(tokens * d.top_k, 1 / rank.ranks, rank.ranks)
        size = experts * expert.bytes + always.bytes + 2 * BF16 * tokens * d.hidden
        return self._roof(size, 2 * (rows * expert.number + own * always.number))

    def _rule(self, rank: Rank, batch: int, tokens: int) -> float:
        """The delta rule over a prompt. Chunks wait for one another: the floor alone shrinks."""
        rule, floor = self.measured.rule, self.measured.rule_floor
        if tokens == 1 or rule is None or floor is None:
            return 0.0
        share = rank.delta_heads / self.decoder.delta_heads
        one = rule.at(tokens) - floor.at(tokens) * (1 - share)
        return self.decoder.delta_layers * batch * one

    def _dense(self, rank: Rank, batch: int, tokens: int, filled: float) -> float:
        """The least time of projections, attention, states and the output head."""
        d, calls = self.decoder, batch * tokens
        layers = 0.0
        for count, weights in (
            (d.attention_layers, rank.attention()),
            (d.delta_layers, rank.delta() if d.delta_layers else None),
        ):
            if weights is not None:
                layers += count * self._roof(weights.bytes, 2 * calls * weights.number)
        attended = calls * (filled + (tokens + 1) / 2) * d.attention_layers
        attention = self._roof(
            batch * (filled + tokens) * rank.key_bytes(), 4 * rank.heads * d.head_dim * attended
        )
        states = self._roof(2 * batch * rank.state_bytes(), 0) if tokens == 1 else 0.0
        head = rank.head()
        return layers + attention + states + self._roof(head.bytes, 2 * batch * head.number)

    def _links(self, rank: Rank, tokens: int, exchange: str) -> float:
        """Collectives of all layers; none on one rank."""
        d, links, ranks = self.decoder, self.setup.links, rank.ranks
        if ranks == 1:
            return 0.0
        size = BF16 * tokens * d.hidden
        whole = links.all_reduce(size, ranks)
        sharded = d.attention_layers * (rank.attention_shards > 1)
        sharded += d.delta_layers * (rank.delta_shards > 1)
        if exchange == "all-reduce":
            experts = whole
        else:
            reached = ranks * (1 - (1 - 1 / ranks) ** d.top_k)  # of the ranks, by each token
            sent = BF16 * math.ceil(tokens / ranks) * reached * d.hidden
            experts = 2 * links.all_to_all(sent, ranks) + links.all_gather(size, ranks)
        return sharded * whole + d.layers * experts

    def _excess(self, op: str) -> float | None:
        """What the measured call nearest to ours took beyond its parts; None without one."""
        rows = [row for row in self.measured.whole if (row.op, row.model) == (op, self.name)]
        if not rows:
            self.notes.append(
                f"{op}: {self.name} was not measured whole on one {self.measured.gpu}; dense "
                f"layers are taken to reach {self.setup.efficiency:.0%} of the ceilings"
            )
            return None
        setup = self.setup
        batch = setup.batch if op == "decode" else 1
        length = setup.context if op == "decode" else setup.prompt
        row = min(rows, key=lambda row: _distance(row, batch, length))
        if not _distance(row, batch, length) < 1e-9:
            self.notes.append(f"{op}: what is beyond the parts is that of {_sizes(row)}")
        rank = Rank(self.decoder, setup.scheme)
        tokens = 1 if op == "decode" else row.size["prompt"]
        filled = _length(row) if op == "decode" else 0.0
        count = row.size["batch"]
        parts = (
            self._experts(rank, count * tokens, "all-reduce")
            + self._rule(rank, count, tokens)
            + self._dense(rank, count, tokens, filled)
        )
        return max((row.us or 0.0) * 1e-6 - parts, 0.0)


def busiest(count: int, chance: float, ranks: int) -> float:
    """The expected largest of `ranks` counts, each how many of `count` even chances came true."""
    if ranks == 1 or chance >= 1:
        return count * chance
    spread = 12 * math.sqrt(count * chance * (1 - chance)) + 12
    low, high = max(0, int(count * chance - spread)), min(count, int(count * chance + spread))
    below, found = 0.0, float(low)
    for n in range(low, high):
        ways = math.lgamma(count + 1) - math.lgamma(n + 1) - math.lgamma(count - n + 1)
        odds = n * math.log(chance) + (count - n) * math.log1p(-chance)
        below += math.exp(ways + odds)
        found += 1 - min(below, 1.0) ** ranks
    return found


def _length(row: Row) -> float:
    """Tokens in the cache on average, or of the prompt."""
    return row.size["prompt"] + row.size.get("decode", 0) / 2


def _distance(row: Row, batch: int, length: float) -> float:
    sizes = ((row.size["batch"], batch), (_length(row), max(length, 1)))
    return sum(abs(math.log(measured / wanted)) for measured, wanted in sizes)


def _sizes(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.size.items())
