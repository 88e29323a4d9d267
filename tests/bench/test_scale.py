"""`bench scale`: its formulas by hand, one rank against what was measured, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from typer.testing import CliRunner

from inductor_moe.bench import measured, models, scale
from inductor_moe.bench.ceilings import Ceilings
from inductor_moe.bench.decoder import Decoder, Rank
from inductor_moe.bench.links import Link, Links
from inductor_moe.bench.measured import Curve, Measured
from inductor_moe.bench.results import Results, Row
from inductor_moe.bench.scale import Scale, Setup, busiest
from inductor_moe.bench.scale_command import rank_counts
from inductor_moe.cli import app
from inductor_moe.errors import InductorMoeError
from inductor_moe.parallel_heads import layers_to_share, shard_heads
from inductor_moe.parallel_shared import keep_channels, shared_expert_to_cut

QWEN = "qwen3.5-35b-a3b"
LINKS = Links(Link(100e9, 2e-6), Link(10e9, 5e-6), 4, None)


@pytest.fixture(scope="module")
def published():
    return measured.load([], QWEN)


@pytest.fixture(scope="module")
def qwen():
    return Decoder.of(models.config_of(QWEN))


def rows(published, op, scheme="int4"):
    return [row for row in published.whole if (row.op, row.model) == (op, f"{QWEN} {scheme}")]


@pytest.mark.parametrize(
    "ranks, gather, to_all",
    [
        (2, 2e-6 + 0.5e9 / 100e9, 2e-6 + 0.5e9 / 100e9),
        (4, 4e-6 + 0.75e9 / 100e9, 4e-6 + 0.75e9 / 100e9),
        # Two nodes: 1/2 of a quarter comes from the other one, then 3/4 from the node.
        (8, 5e-6 + 0.125e9 / 10e9 + 4e-6 + 0.75e9 / 100e9, 9e-6 + 0.5e9 / 10e9),
        (1, 0, 0),
    ],
)
def test_collectives_by_hand(ranks, gather, to_all):
    assert LINKS.all_gather(1e9, ranks) == pytest.approx(gather, abs=1e-12)
    assert LINKS.all_reduce(1e9, ranks) == pytest.approx(2 * gather, abs=1e-12)
    assert LINKS.all_to_all(1e9, ranks) == pytest.approx(to_all, abs=1e-12)


def test_small_sums_by_hand():
    links = dataclasses.replace(LINKS, small=1e-6)
    assert links.all_reduce(4096, 2) == pytest.approx(1e-6 + 2 * 4096 / 100e9)
    assert links.all_reduce(4096, 4) == pytest.approx(1e-6 + 3 * 2 * 4096 / 100e9)
    assert links.all_reduce(4096, 1) == 0
    for size, ranks in ((4096, 8), ((256 << 10) + 1, 2)):  # across nodes, and too large
        assert links.all_reduce(size, ranks) == LINKS.all_reduce(size, ranks)


def test_the_busiest_rank_by_hand():
    # Two of two coin tosses each: the larger is 0, 1, 2 with chances 1/16, 8/16, 7/16.
    assert busiest(2, 0.5, 2) == pytest.approx(22 / 16)
    assert busiest(1, 0.25, 4) == pytest.approx(1 - 0.75**4)
    assert busiest(8, 0.5, 1) == 4 and busiest(8, 1.0, 16) == 8
    # Of many normal variables the larger of two is sigma / sqrt(pi) above the mean.
    assert busiest(131072, 0.5, 2) == pytest.approx(65536 + (32768 / 3.14159) ** 0.5, abs=0.5)


@pytest.mark.parametrize("scheme", ["none", "int4", "int8"])
def test_weights_are_those_of_the_model_and_of_its_parts(scheme):
    model = models.build("tiny", scheme, "cpu")
    decoder = Decoder.of(model.config)
    tensors = [
        *model.parameters(),
        *(b for name, b in model.named_buffers() if "freq" not in name),
    ]
    assert bytes_of(tensors) == Rank(decoder, scheme).weights().bytes
    part = Rank(decoder, scheme, 2)
    for layer in layers_to_share(model, 2):
        shard_heads(layer, 1)
        attention = layer.name.endswith("self_attn")
        own = [t for name, t in (*layer.module.named_parameters(), *layer.module.named_buffers())
               if "norm" not in name and name not in ("A_log", "dt_bias")]  # fmt: skip
        assert bytes_of(own) == (part.attention() if attention else part.delta()).bytes


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_a_rank_has_its_part_of_shared_experts(scheme):
    model = models.build("tiny", scheme, "cpu")
    block = model.model.layers[0].mlp
    keep_channels(shared_expert_to_cut(block, 2), 1, 2)
    own = [t for name, t in (*block.named_parameters(), *block.named_buffers())
           if not name.startswith("experts.")]  # fmt: skip
    decoder = Decoder.of(model.config)
    assert bytes_of(own) == Rank(decoder, scheme, 2).every_token().bytes
    whole = Rank(decoder, scheme, 2, cut_shared=False).every_token()
    assert whole == Rank(decoder, scheme).every_token() != Rank(decoder, scheme, 2).every_token()


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_bytes_are_those_of_the_published_rows(published, qwen):
    """As `bench` counted them on the GPU: layers in bf16, and decode steps of the whole model."""
    block = Scale(
        qwen, QWEN, dataclasses.replace(published, ceilings=Ceilings(1, 1, 1e30)), Setup()
    )
    for row in Results.load(measured.FOLDER / "moe_block.json").rows:
        tokens = row.size["tokens"]
        floor = block._block_floor(Rank(qwen, "none"), tokens, tokens)
        # `bench` counts the experts that its router chose, here they are drawn evenly: the same
        # for one token and where all are read.
        drawn = 1 < tokens < 1024
        assert floor == pytest.approx(row.bytes, rel=0.1 if drawn else 1e-3), tokens
    rank = Rank(qwen, "int4")
    one = [row for row in rows(published, "decode") if row.size["batch"] == 1]
    assert one
    for row in one:
        filled = row.size["prompt"] + row.size["decode"] / 2
        used = (rank.expert() * qwen.top_k + rank.every_token()).bytes * qwen.layers
        layers = rank.attention().bytes * qwen.attention_layers
        layers += rank.delta().bytes * qwen.delta_layers + rank.head().bytes
        states = (filled + 1) * rank.key_bytes() + 2 * rank.state_bytes()
        assert used + layers + states == pytest.approx(row.bytes, rel=1e-3)


def test_one_rank_is_the_measured_gpu(published, qwen):
    for row in rows(published, "decode"):
        context = row.size["prompt"] + row.size["decode"] // 2
        setup = Setup("int4", batch=row.size["batch"], context=context, prompt=2048)
        found = Scale(qwen, QWEN, published, setup)
        one = found.predict(1)
        assert one.decode.seconds == pytest.approx(row.us * 1e-6, rel=1e-12)
        (prefill,) = rows(published, "prefill")
        assert one.prefill.seconds == pytest.approx(prefill.us * 1e-6, rel=1e-12)
        assert one.decode.excess > 0 and one.decode.links == 0 and found.notes == []
        # What prompts of a batch take while they are read is no part of a decode step's memory.
        least = 0.9 if row.size["batch"] == 1 else 0.8
        assert least < one.memory / row.peak_bytes < 1


def test_one_rank_has_the_measured_layers(published, qwen):
    block = {row.size["tokens"]: row.us * 1e-6
             for row in Results.load(measured.FOLDER / "moe_block.json").rows
             if row.provider == "ours"}  # fmt: skip
    found = Scale(qwen, QWEN, published, Setup(batch=64, prompt=16384))
    one = found.predict(1)
    assert one.decode.experts == pytest.approx(40 * block[64])
    assert one.prefill.experts == pytest.approx(40 * block[16384])
    at = {row.size["tokens"]: row.us * 1e-6
          for row in Results.load(measured.FOLDER / "delta_prefill.json").rows
          if row.provider == "ours"}  # fmt: skip
    # Half way between 8192 and 32768 by logarithms.
    assert one.prefill.rule == pytest.approx(30 * (at[8192] * at[32768]) ** 0.5)
    assert len(found.notes) == 2 and "not measured whole" in found.notes[0]


def small(**changes):
    """One attention layer and 4 experts of 2, on a GPU that reads 1 GB/s and computes at once."""
    decoder = Decoder(
        hidden=64, vocabulary=1000, tied=True, attention_layers=1, heads=4, key_heads=2,
        head_dim=32, gated=False, delta_layers=0, delta_heads=0, delta_key_heads=0, delta_key=0,
        delta_value=0, taps=0, experts=4, top_k=2, inner=32, shared=0,
    )  # fmt: skip
    block = Curve(((1, 100e-6), (4, 200e-6)))
    found = Measured("a GPU", Ceilings(1e9, 1e9, 1e30), block, None, None, ())
    setup = {"batch": 1, "context": 9, "prompt": 4, "links": LINKS, "efficiency": 1.0}
    return Scale(decoder, "small", found, Setup(**{**setup, **changes}))


def test_a_decode_step_by_hand():
    """Bytes are nanoseconds here."""
    expert, router, ends = 3 * 64 * 32 * 2, 4 * 64 * 2, 2 * 64 * 2
    attention = (2 * 64 * 128 + 2 * 64 * 64) * 2
    keys, head = 10 * 2 * 2 * 32 * 2, 1000 * 64 * 2
    one = small().predict(1)
    assert one.decode.experts == pytest.approx(100e-6)
    assert one.decode.dense == pytest.approx((attention + keys + head) * 1e-9)
    assert one.memory == 4 * expert + router + attention + head + (3 * 64 + 64) * 2 + keys

    # Two ranks: of two experts each that are used with a chance of 1/2, the busier one has 11/8.
    fixed = 100e-6 - (2 * expert + router + ends) * 1e-9
    two = small().predict(2)
    assert two.decode.experts == pytest.approx(fixed + (11 / 8 * expert + router + ends) * 1e-9)
    assert two.decode.dense == pytest.approx((attention / 2 + keys / 2 + head) * 1e-9)
    assert two.decode.links == pytest.approx(2 * (2 * (2e-6 + 64 / 100e9)))  # 128 bytes, twice
    assert two.memory == one.memory - 2 * expert - attention / 2 - keys / 2

    # Four: a key head for two ranks each.
    four = small().predict(4)
    projections = (2 * 64 * 32 + 2 * 64 * 32) * 2
    assert four.decode.dense == pytest.approx((projections + keys / 2 + head) * 1e-9)
    whole = small(heads=False).predict(4)
    assert whole.decode.dense == one.decode.dense
    assert whole.decode.links == pytest.approx(2 * (4e-6 + 0.75 * 128 / 100e9))


def test_the_all_to_all_exchange_by_hand():
    """Four tokens on two ranks: each has two, and a token's two choices reach 1.5 ranks."""
    found = small(exchange="all-to-all", heads=False).predict(2).prefill
    to_all = 2e-6 + 0.5 * (2 * 1.5 * 64 * 2) / 100e9
    gather = 2e-6 + 0.5 * (4 * 64 * 2) / 100e9
    assert found.links == pytest.approx(2 * to_all + gather)
    assert small(exchange="faster", heads=False).predict(2).prefill.exchange == "all-reduce"


def test_ranks_beyond_the_experts_hold_copies():
    six, two = small(batch=6).predict(6), small(batch=2).predict(2)
    assert (six.group, six.copies) == (2, 3)  # 4 experts
    assert (six.decode, six.memory) == (two.decode, two.memory)
    assert small(group=1).predict(4).decode == small().predict(1).decode


@pytest.mark.parametrize("scheme", ["none", "int4"])
def test_more_ranks_compute_less_and_talk_more(published, qwen, scheme):
    found = Scale(qwen, QWEN, published, Setup(scheme))
    series = [found.predict(ranks) for ranks in rank_counts("1..256")]
    for fewer, more in itertools.pairwise(series):
        for before, after in ((fewer.decode, more.decode), (fewer.prefill, more.prefill)):
            assert after.seconds - after.links < before.seconds - before.links
            assert after.links > before.links
        assert more.memory < fewer.memory
    # Shared experts that may get a slice of the tokens are whole, as with all-to-all.
    each = {
        exchange: Scale(qwen, QWEN, published, Setup(scheme, exchange=exchange)).predict(4)
        for exchange in ("faster", "all-to-all", "all-reduce")
    }
    assert each["faster"].prefill.seconds <= each["all-to-all"].prefill.seconds
    assert each["faster"].memory == each["all-to-all"].memory > each["all-reduce"].memory
    slow = Setup(scheme, links=Links(Link(10e9, 3e-6), Link(1e9, 6e-6)))
    assert Scale(qwen, QWEN, published, slow).predict(8).decode.links > series[3].decode.links
    larger = Scale(qwen, QWEN, published, Setup(scheme, batch=256, context=4096, prompt=32768))
    assert larger.predict(8).decode.seconds > series[3].decode.seconds
    assert larger.predict(8).prefill.seconds > series[3].prefill.seconds


def test_ranks_are_lists_and_ranges():
    assert rank_counts("8..1024") == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert rank_counts("2, 4,8") == [2, 4, 8]
    assert rank_counts("1..4,3,2..6") == [1, 2, 4, 3]
    for text in ("", "x", "0", "-2", "2,", "1...4", "2..", "0..4", "2.5"):
        with pytest.raises(InductorMoeError, match="ranks: expected positive numbers as in 2,4,8"):
            rank_counts(text)
    with pytest.raises(InductorMoeError, match=r"ranks: 8\.\.2 runs backwards; say 2\.\.8"):
        rank_counts("1,8..2")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--ranks", "4", "--group", "3"], "group: 3 ranks for a copy; they must divide 4 ranks"),
        (["--exchange", "ring"], "exchange: there is no 'ring'; there are all-reduce, all-to-all"),
        (["--nvlink", "0", "1"], "nvlink: expected GB/s above 0"),
        (["--network", "1", "-1"], "network: expected GB/s above 0"),
        (["--efficiency", "2"], "efficiency: expected 0 to 1, got 2"),
        (["--quant", "int3"], "quant: no scheme 'int3'"),
        (["--model", "none"], "model: no model 'none'"),
        (["--model", "tiny"], "has no moe-block times of tiny; inductor-moe bench moe-block"),
        (["--gpu", "A GPU"], "on NVIDIA H100 80GB HBM3, not on A GPU"),
        (["--results", "missing.json"], "results: there is no missing.json"),
        (["--results", str(measured.FOLDER / "moe_block.json")], "no delta-prefill times of"),
    ],
)
def test_what_cannot_be_predicted_is_said(arguments, said):
    done = CliRunner().invoke(app, ["bench", "scale", *arguments])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_rows_of_two_gpus_need_a_choice(tmp_path):
    row = Row("moe-block", QWEN, {"tokens": 1}, "ours", us=50.0, of_ceiling=0.5)
    rule = dataclasses.replace(row, op="delta-prefill", size={"tokens": 512})
    own = Results("B", {}, "", "", Ceilings(1, 1, 1), (row, rule))
    (tmp_path / "own.json").write_text(own.to_json())
    paths = [measured.FOLDER, tmp_path]
    with pytest.raises(InductorMoeError, match="HBM3, B; choose one with --gpu"):
        measured.load(paths, QWEN)
    found = measured.load(paths, QWEN, "B")
    assert found.block.at(1) == pytest.approx(50e-6)
    assert found.rule_floor.at(512) == pytest.approx(25e-6)
    assert found.whole == () and found.ceilings == own.ceilings


def test_curves_join_logarithms():
    curve = Curve(((4, 1.0), (16, 4.0)))
    assert [curve.at(n) for n in (1, 4, 8, 16, 64)] == pytest.approx([1, 1, 2, 4, 16])


def test_command_prints_and_writes_what_is_predicted(tmp_path, qwen, published):
    out = tmp_path / "scale.json"
    arguments = ["bench", "scale", "--ranks", "2,8", "--batch", "1", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "70% of the ceilings" in done.output
    held = json.loads(out.read_text())
    expected = Scale(qwen, QWEN, published, Setup(batch=1))
    assert held["predictions"] == [dataclasses.asdict(expected.predict(n)) for n in (2, 8)]
    assert held["setup"]["links"]["node"] == 8 and held["gpu"] == published.gpu
    assert f"{expected.predict(8).decode.seconds * 1e3:.2f}" in done.output


def test_documented_defaults_are_those_of_the_command():
    text = (measured.FOLDER.parents[2] / "docs" / "how-to" / "scale.md").read_text()
    links = Links()
    for argument, link in (("nvlink", links.near), ("network", links.far)):
        default = f"{link.bandwidth / 1e9:g} GB/s, {link.latency * 1e6:g} µs"
        assert f"| `--{argument}` | {default} |" in text
    assert f"| `--small-sum` | {links.small * 1e6:g} µs |" in text
    assert f"| `--node` | {links.node} |" in text and f"{scale.EFFICIENCY} unless told" in text
