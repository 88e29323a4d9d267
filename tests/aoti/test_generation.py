"""Generation packages: eager's tokens, in Python and C++, session by session; errors."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
import subprocess
import zipfile
import zlib

import packages
import pytest
import torch
import zoo
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import inductor_moe
from inductor_moe import compat
from inductor_moe.aoti import archive, audit
from inductor_moe.aoti import runner as aoti_runner
from inductor_moe.aoti.random import uniforms
from inductor_moe.aoti.sampling import argmax_last, next_token
from inductor_moe.errors import ExportError, GenerationError, PackageError

FAMILIES = [
    "qwen3_5_moe_text",
    "qwen3_moe",
    "gpt_oss",
    pytest.param("qwen3_next", marks=pytest.mark.slow),
    pytest.param("mixtral", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (model, package), each made once."""
    folder, known = tmp_path_factory.mktemp("packages"), {}

    def make(name):
        if name not in known:
            model = packages.build(name)
            path = folder / f"{name}.pt2"
            inductor_moe.export_generation(model, path, packages.ROOM, options=packages.FAST)
            known[name] = (model, path)
        return known[name]

    return make


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return packages.cpp_runner(tmp_path_factory.mktemp("cpp"))


def prompts(model):
    return [zoo.prompt(model, length, seed=length) for length in packages.LENGTHS]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_eagers(tmp_path, made, runner, name):
    model, path = made(name)
    given = prompts(model)
    expected = [packages.eager_tokens(model, ids) for ids in given]
    loaded = inductor_moe.load_generation(path)
    elsewhere = packages.run_elsewhere(path, tmp_path, given)
    for ids, tokens, found in zip(given, expected, elsewhere, strict=True):
        assert found.tolist() == tokens.tolist(), f"elsewhere, prompt of {ids.shape[1]}"
        if ids.shape[1] in (1, 65):  # the same methods once more, by our own loader
            again = loaded.generate(ids, packages.STEPS, eos_token_ids=())
            assert again.tolist() == tokens.tolist(), f"in Python, prompt of {ids.shape[1]}"
        (row,), _ = packages.run_cpp(
            runner, path, ids, "--ignore-eos", "--max-new-tokens", str(packages.STEPS)
        )
        assert [row] == tokens.tolist(), f"in C++, prompt of {ids.shape[1]}"


@pytest.mark.parametrize("name", FAMILIES)
def test_sessions_do_not_meet(made, name):
    model, path = made(name)
    loaded = inductor_moe.load_generation(path)
    given = [zoo.prompt(model, length, seed=90 + length) for length in (70, 3)]
    alone = [loaded.generate(ids, 12, eos_token_ids=()) for ids in given]
    sessions = [loaded.session() for _ in given]
    streams = [
        session.stream(ids, 12, eos_token_ids=())
        for session, ids in zip(sessions, given, strict=True)
    ]
    pairs = list(zip(*streams, strict=True))
    for found, expected in zip(zip(*pairs, strict=True), alone, strict=True):
        assert torch.stack(found, 1).tolist() == expected.tolist()
    sessions[0].reset()
    assert sessions[0].generate(given[1], 12, eos_token_ids=()).tolist() == alone[1].tolist()


def test_a_session_goes_on_where_it_was(made):
    model, path = made("qwen3_5_moe_text")
    loaded = inductor_moe.load_generation(path)
    whole = zoo.prompt(model, 100, seed=4)
    expected = loaded.generate(whole, 8, eos_token_ids=())
    session = loaded.session()
    session.generate(whole[:, :37], 1)  # the one token is not appended to the session
    assert session.tokens_used == 37
    assert session.generate(whole[:, 37:], 8, eos_token_ids=()).tolist() == expected.tolist()


def test_runners_draw_the_same_tokens(made, runner):
    model, path = made("qwen3_5_moe_text")
    loaded = inductor_moe.load_generation(path)
    ids = zoo.prompt(model, 9, seed=9)
    settings = {"temperature": 1.3, "top_p": 0.9, "eos_token_ids": ()}
    drawn = {seed: loaded.generate(ids, 24, seed=seed, **settings).tolist() for seed in (7, 8)}
    assert drawn[7] == loaded.generate(ids, 24, seed=7, **settings).tolist()
    assert drawn[7] != drawn[8]
    options = ("--temperature", "1.3", "--top-p", "0.9", "--seed", "7", "--ignore-eos",
               "--max-new-tokens", "24", "--sessions", "2", "--warmup", "1")  # fmt: skip
    rows, output = packages.run_cpp(runner, path, ids, *options)
    assert rows == [drawn[7][0], drawn[8][0]]
    assert "prefill" in output and "decode" in output and "tokens/s" in output


def test_weights_are_stored_once_and_the_package_needs_no_python(made):
    model, path = made("qwen3_5_moe_text")
    contents = audit.inspect(path)
    assert [method.name for method in contents.methods] == ["decode", "prefill"]
    assert contents.python_ops == ()
    # Inductor writes vectors of up to 8 elements into the code.
    own = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in model.parameters()
        if parameter.numel() > 8
    }
    stored = sum(contents.metadata.weight_bytes)
    assert stored == sum(own.values())
    for method in contents.methods:
        assert method.kernels and "cpu" in method.device
        assert set(method.constants) == set(contents.metadata.methods[method.name])


def test_generation_stops_at_the_end_of_text(made):
    model, path = made("qwen3_5_moe_text")
    loaded = inductor_moe.load_generation(path)
    ids = zoo.prompt(model, 5, seed=5)
    free = loaded.generate(ids, 20, eos_token_ids=())[0].tolist()
    end = free[6]
    stopped = loaded.generate(ids, 20, eos_token_ids=(end,))[0].tolist()
    assert stopped == free[: free.index(end) + 1]


@pytest.mark.parametrize(
    "ids, count, settings, message",
    [
        ([[1, 2]], 400, {}, "max_seq_len 288"),
        ([[1, 2], [3, 4]], 1, {}, "takes 1 rows"),
        ([1, 96], 1, {}, r"in \[0, 96\)"),
        ([], 1, {}, "integers|at least one token"),
        ([1.5], 1, {}, "integers"),
        ([1], 0, {}, "max_new_tokens is 0"),
        ([1], 1, {"temperature": -1.0}, "temperature is -1"),
        ([1], 1, {"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_bad_calls_are_named(made, ids, count, settings, message):
    loaded = inductor_moe.load_generation(made("qwen3_5_moe_text")[1])
    with pytest.raises(GenerationError, match=message):
        loaded.generate(ids, count, **settings)


def damaged(path, folder, kind):
    """A copy of a package with something wrong with it, and what the errors must say."""
    copy = folder / f"{kind}.pt2"
    if kind == "missing":
        return copy, "no such file"
    content = path.read_bytes()
    if kind == "truncated":
        copy.write_bytes(content[: len(content) // 2])
        return copy, "cut off"
    if kind == "empty":
        copy.write_bytes(b"")
        return copy, "cut off"
    if kind == "code":
        start, size = record(content, b"wrapper.so")
        middle = start + size // 2
        copy.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
        return copy, "wrapper.so is damaged"
    replaced = {
        "newer": (b'"format": 1,', b'"format": 2,', "has format 2"),
        "elsewhere": (b'"device": "cpu"', b'"device": "mps"', "mps"),
        "on a GPU": (b'"device": "cpu"', b'"device":"cuda"', "compiled for a CUDA GPU"),
        "garbled": (b'"format": 1,', b'"format": ?,', "is damaged"),
    }
    old, new, message = replaced[kind]
    rewritten = content.replace(old, new)
    assert rewritten != content and len(rewritten) == len(content)
    copy.write_bytes(with_checksum(rewritten, archive.METADATA.encode()))
    return copy, message


def record(content, name):
    """(start, size) of a stored record whose name ends so."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        info = next(i for i in file.infolist() if i.filename.encode().endswith(name))
    names, extra = struct.unpack_from("<HH", content, info.header_offset + 26)
    return info.header_offset + 30 + names + extra, info.file_size


def with_checksum(content, name):
    """The zip with the CRC of one stored record made right, in both places that have it."""
    start, size = record(content, name)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        info = next(i for i in file.infolist() if i.filename.encode().endswith(name))
    checksum = struct.pack("<I", zlib.crc32(content[start : start + size]))
    return content.replace(struct.pack("<I", info.CRC), checksum)


DAMAGES = ("missing", "truncated", "empty", "newer", "elsewhere", "on a GPU", "garbled",
           "code")  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_package_that_cannot_be_used_is_refused(tmp_path, made, runner, kind):
    if kind == "on a GPU" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    _, path = made("qwen3_5_moe_text")
    copy, message = damaged(path, tmp_path, kind)
    with pytest.raises(PackageError, match=message) as raised:
        inductor_moe.load_generation(copy)
    assert "\n" not in str(raised.value)
    command = [str(runner), "--package", str(copy), "--prompt-ids", "1,2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (("--prompt-ids", "1,x"), "must be an integer"),
        (("--prompt-ids", "1,96"), "outside the vocabulary"),
        (("--prompt-ids", "1", "--max-new-tokens", "400"), "max_seq_len 288"),
        (("--prompt-ids", "1,2", "--max-new-tokens", str(2**63 - 1)), "max_seq_len 288"),
        (("--prompt-ids", str(2**63)), "is '9223372036854775808'; it must be an integer"),
        (("--prompt-ids", "1", "--cuda-graph"), "--cuda-graph"),
        (("--prompt", "hello"), "needs --tokenizer"),
        (("--prompt", "hello", "--tokenizer", "/nowhere"), "cannot read /nowhere"),
        (("--prompt", "hello", "--prompt-ids", "1"), "one of --prompt-ids and --prompt"),
        (("--prompt-ids", "1", "--iters", "0"), "--iters is '0'"),
        (("--prompt-ids", "1", "--top-p", "2"), "--top-p is 2.000000; it must be in (0, 1]"),
        (("--prompt-ids", "1", "--temperature", "nan"), "--temperature is nan; it must be 0"),
        (("--nonsense", "1"), "unknown option"),
    ],
)
def test_bad_arguments_of_the_runner_are_named(made, runner, options, message):
    command = [str(runner), "--package", str(made("qwen3_5_moe_text")[1]), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("made_for, fits", [("9.0", True), ("9.1", False), ("8.0", False)])
def test_a_gpu_of_another_kind_is_refused(made, monkeypatch, made_for, fits):
    file = archive.Archive(made("qwen3_5_moe_text")[1])
    metadata = dataclasses.replace(file.metadata(), device="cuda", compute_capability=made_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compat, "compute_capability", lambda device: "9.0")
    if fits:
        assert aoti_runner._device(metadata, "cuda:1", file) == torch.device("cuda:1")
        return
    with pytest.raises(PackageError, match=f"capability {made_for}; cuda:0 has 9.0: export"):
        aoti_runner._device(metadata, "cuda:0", file)


def test_the_cpp_runner_reads_and_writes_text(tmp_path, made, runner):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat", "a quick brown fox"], trainer)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    text, (_, path) = "the fox sat", made("qwen3_5_moe_text")
    ids = torch.tensor([tokenizer.encode(text).ids])
    expected = inductor_moe.load_generation(path).generate(ids, 8, eos_token_ids=())[0].tolist()
    command = [str(runner), "--package", str(path), "--tokenizer", str(file), "--prompt", text,
               "--max-new-tokens", "8", "--ignore-eos"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row, said = done.stdout.splitlines()[:2]
    assert [int(token) for token in row.split(":")[1].split()] == expected
    known = [tokenizer.id_to_token(token) or "" for token in expected]
    assert said == f"text 0 0: {''.join(known).replace('Ġ', ' ')}"


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (lambda model: model.train(), {}, "model.eval"),
        (lambda model: model, {"max_seq_len": 1024}, "max_position_embeddings is 512"),
        (lambda model: model, {"max_seq_len": 2}, "max_seq_len is 2"),
        (lambda model: model, {"batch_size": 0}, "batch_size is 0"),
        (lambda model: model, {"sampling": "top_k"}, "sampling is 'top_k'.* one of top_p, greedy"),
        (lambda model: torch.nn.Linear(2, 2).eval(), {}, "causal LM"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, change, arguments, message):
    model = change(packages.build("qwen3_moe"))
    with pytest.raises(ExportError, match=message):
        inductor_moe.export_generation(
            model, tmp_path / "m.pt2", **{"max_seq_len": 288, **arguments}
        )
    assert not list(tmp_path.iterdir())


def test_a_package_that_cannot_be_written_is_said_before_it_is_compiled(tmp_path):
    model, path = packages.build("qwen3_moe"), tmp_path / "no" / "m.pt2"
    with pytest.raises(ExportError, match=f"package_path: there is no folder {tmp_path}/no for"):
        inductor_moe.export_generation(model, path, 288)
    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(ExportError, match="package_path: there is no folder"):
        inductor_moe.aoti_compile_and_package(exported, package_path=path)
    with pytest.raises(ExportError, match="exported_program is a Linear; it must be an Exported"):
        inductor_moe.aoti_compile_and_package(torch.nn.Linear(2, 2), package_path=path)


def test_metadata_survives_its_file(made):
    metadata = archive.Archive(made("qwen3_5_moe_text")[1]).metadata()
    assert archive.Metadata.from_json(metadata.to_json()) == metadata
    assert json.loads(metadata.to_json())["format"] == archive.FORMAT


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """A package that takes the most likely token alone, and its model."""
    model = packages.build("qwen3_moe", {"num_hidden_layers": 1})
    path = tmp_path_factory.mktemp("greedy") / "model.pt2"
    inductor_moe.export_generation(
        model, path, packages.ROOM, sampling="greedy", options=packages.FAST
    )
    return model, path


@pytest.mark.slow
def test_a_greedy_package_gives_eagers_tokens_without_sorting(made, greedy, runner):
    model, path = greedy
    ids = zoo.prompt(model, 65, seed=1)
    expected = packages.eager_tokens(model, ids)
    found = inductor_moe.load_generation(path).generate(ids, packages.STEPS, eos_token_ids=())
    assert found.tolist() == expected.tolist()
    steps = ("--ignore-eos", "--max-new-tokens", str(packages.STEPS))
    assert packages.run_cpp(runner, path, ids, *steps)[0] == expected.tolist()
    for package, sampling in ((path, "greedy"), (made("qwen3_5_moe_text")[1], "top_p")):
        contents = audit.inspect(package)
        assert f"; sampling {sampling}" in str(contents)
        file = archive.Archive(package)
        code = [file.read(name) for name in file.names if name.endswith(".cpp")]
        assert any(b"_sort" in source for source in code) == (sampling == "top_p")


@pytest.mark.slow
def test_a_greedy_package_does_not_draw(greedy, runner):
    _, path = greedy
    with pytest.raises(GenerationError, match=r"temperature is 0.7; .* sampling='greedy'"):
        inductor_moe.load_generation(path).generate([1, 2], 4, temperature=0.7)
    command = [str(runner), "--package", str(path), "--prompt-ids", "1,2", "--temperature", "0.7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--temperature" in done.stderr and "sampling='greedy'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_packages_from_before_the_choice_of_sampling_are_read(tmp_path, made, runner):
    model, path = made("qwen3_5_moe_text")
    content, field = path.read_bytes(), b',\n "sampling": "top_p"'
    assert content.count(field) == 1
    older = tmp_path / "older.pt2"
    content = content.replace(field, b" " * len(field))
    older.write_bytes(with_checksum(content, archive.METADATA.encode()))
    ids = zoo.prompt(model, 3, seed=3)
    draw = {"temperature": 1.0, "seed": 5, "eos_token_ids": ()}
    expected = inductor_moe.load_generation(path).generate(ids, 8, **draw).tolist()
    assert inductor_moe.load_generation(older).generate(ids, 8, **draw).tolist() == expected
    options = ("--temperature", "1", "--seed", "5", "--ignore-eos", "--max-new-tokens", "8")
    assert packages.run_cpp(runner, older, ids, *options)[0] == expected


def awkward(size, dtype, rows=5):
    """Rows with ties across parts, NaN, nothing but -inf, and the greatest at either end."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    x[0, [size // 3, size // 2, -1]] = 50.0
    x[1, [size // 2, -1]] = float("nan")
    x[2] = float("-inf")
    x[3, -1] = 60.0
    x[4, 0] = float("inf")
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 9973, 65536, 151936])
def test_argmax_in_two_stages_is_argmax(size, dtype):
    x = awkward(size, dtype) if size > 4 else torch.randn(5, size).to(dtype)
    assert torch.equal(argmax_last(x), x.argmax(-1))
    assert torch.equal(argmax_last(x[None]), x[None].argmax(-1))
    assert torch.equal(argmax_last(x[0]), x[0].argmax())


def test_argmax_in_two_stages_compiles_for_any_batch():
    compiled = torch.compile(argmax_last, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x = awkward(9973, torch.float32, rows)
        torch._dynamo.mark_static(x, 1)
        assert torch.equal(compiled(x), x.argmax(-1))


def test_no_reduction_of_a_vocabulary_is_one_row_long():
    graph = torch.fx.experimental.proxy_tensor.make_fx(argmax_last)(torch.randn(1, 248320)).graph
    reduced = [node for node in graph.nodes if "max" in str(node.target)]
    assert [tuple(n.args[0].meta["val"].shape) for n in reduced] == [(1, 512, 485), (1, 512)]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    rows = 20000
    draws = uniforms(3, rows, 1)[:, 0]
    full, temperature = torch.ones(rows), torch.full((rows,), 0.7)
    tokens = next_token(logits.expand(rows, 5), temperature, full, draws)
    probabilities = torch.softmax(logits / 0.7, -1)
    found = torch.bincount(tokens, minlength=5) / rows
    deviation = (probabilities * (1 - probabilities) / rows).sqrt()
    assert ((found - probabilities).abs() <= 4 * deviation + 1e-4).all()
    nucleus = next_token(logits.expand(rows, 5), temperature, full * 0.9, draws)
    assert set(nucleus.tolist()) == {0, 1}  # 0.76 and 0.18
    single = next_token(logits.expand(rows, 5), temperature, full * 0.5, draws)
    assert set(single.tolist()) == {0}


def test_temperature_zero_is_greedy_row_by_row():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0])
    high = torch.full((4,), 1 - 2.0**-24)
    tokens = next_token(logits, temperature, torch.ones(4), high)
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()
    assert tokens[1] == logits[1].argmin() and tokens[3] == logits[3].argmin()
