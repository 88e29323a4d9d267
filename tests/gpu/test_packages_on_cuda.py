"""Generation packages on a GPU: eager's tokens, a CUDA graph, memory, what leaves the device."""

from __future__ import annotations

import shutil
import subprocess
import sys

import packages
import pytest
import torch
import zoo

import inductor_moe

# One worker builds the packages; compiling them takes minutes beside other tests.
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.xdist_group("packages"),
]

FAMILIES = ("qwen3_moe", "qwen3_5_moe_text", "gpt_oss")
# Head dims that our chunked kernels serve; and more than one head of keys, since PyTorch's
# memory-efficient attention is wrong for one that is expanded (docs/limits.md).
LAYERS = {
    "qwen3_5_moe_text": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "qwen3_moe": {"num_attention_heads": 4, "num_key_value_heads": 2},
}

EXPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import packages, inductor_moe
from test_packages_on_cuda import model_of
inductor_moe.export_generation(model_of(sys.argv[2]), sys.argv[3], packages.ROOM)
"""


def model_of(name):
    return packages.build(name, LAYERS.get(name), "cuda")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every family's package, exported by processes that run side by side."""
    folder = tmp_path_factory.mktemp("packages")
    paths = {name: folder / f"{name}.pt2" for name in FAMILIES}
    tests = packages.ROOT / "tests"
    source = f"import sys; sys.path.insert(0, {str(tests / 'gpu')!r})\n{EXPORT}"
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", source, str(tests), name, str(path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name, path in paths.items()
    }  # fmt: skip
    for name, process in running.items():
        output, _ = process.communicate(timeout=390)
        assert process.returncode == 0, f"{name}: {output}"
    return paths


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_eagers(tmp_path, made, name):
    model = model_of(name)
    given = [zoo.prompt(model, length, seed=length) for length in packages.LENGTHS]
    expected = [packages.eager_tokens(model, ids.cuda()).tolist() for ids in given]
    found = packages.run_elsewhere(made[name], tmp_path, given, "cuda")
    assert [tokens.tolist() for tokens in found] == expected
    loaded = inductor_moe.load_generation(made[name])
    for graph in (False, True):
        for ids, tokens in zip(given, expected, strict=True):
            session = loaded.session(cuda_graph=graph)
            again = session.generate(ids, packages.STEPS, eos_token_ids=())
            assert again.tolist() == tokens, f"cuda_graph={graph}, prompt of {ids.shape[1]}"


@pytest.mark.parametrize("name", FAMILIES)
def test_sessions_do_not_meet(made, name):
    model = model_of(name)
    loaded = inductor_moe.load_generation(made[name])
    given = [zoo.prompt(model, length, seed=90 + length) for length in (70, 3)]
    alone = [loaded.generate(ids, 12, eos_token_ids=()) for ids in given]
    sessions = [loaded.session() for _ in given]
    streams = [
        session.stream(ids, 12, eos_token_ids=())
        for session, ids in zip(sessions, given, strict=True)
    ]
    together = list(zip(*streams, strict=True))
    for row, expected in enumerate(alone):
        found = torch.stack([step[row] for step in together], 1)
        assert found.tolist() == expected.tolist()


def test_only_the_token_leaves_the_gpu(made):
    name = "qwen3_5_moe_text"
    loaded = inductor_moe.load_generation(made[name])
    session = loaded.session(cuda_graph=True)
    ids = zoo.prompt(model_of(name), 9, seed=9)
    stream = session.stream(ids, 20, eos_token_ids=())
    for _ in range(4):  # prefill, the capture, replays
        next(stream)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(8):
            next(stream)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    copies = {key: count for key, count in counts.items() if "Memcpy DtoH" in key}
    assert sum(copies.values()) == 8, counts
    assert not any("Memcpy HtoD" in key for key in counts), counts
    assert sum(count for key, count in counts.items() if "cudaGraphLaunch" in key) == 8, counts


MEMORY = """
import sys, torch, inductor_moe
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
before = torch.cuda.mem_get_info()[0]
loaded = inductor_moe.load_generation(sys.argv[1])
session = loaded.session(cuda_graph=False)
torch.cuda.synchronize()
weights = sum(loaded.metadata.weight_bytes)
states = sum(s.numel() * s.element_size() for s in session._states)
print(before - torch.cuda.mem_get_info()[0], weights, states)
"""


@pytest.mark.xdist_group("large package")
def test_weights_are_on_the_gpu_once(tmp_path):
    path = tmp_path / "large.pt2"
    large = {"hidden_size": 512, "moe_intermediate_size": 2048, "num_experts": 8}
    model = packages.build("qwen3_moe", large, "cuda", torch.bfloat16)
    inductor_moe.export_generation(model, path, 512)
    del model
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(path)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    used, weights, states = (int(word) for word in done.stdout.split())
    assert weights > 90e6
    # Modules of the two methods and the allocator's blocks are of a size of their own.
    assert used <= 1.1 * (weights + states) + 8e6, (used, weights, states)


def test_the_cpp_runner_replays_a_graph(tmp_path, made):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    runner = packages.cpp_runner(tmp_path)
    name = "qwen3_5_moe_text"
    model = model_of(name)
    for length in (1, 65):
        ids = zoo.prompt(model, length, seed=length)
        expected = packages.eager_tokens(model, ids.cuda()).tolist()
        for options in ((), ("--cuda-graph", "--sessions", "2", "--warmup", "1")):
            rows, _ = packages.run_cpp(
                runner, made[name], ids, "--ignore-eos", "--max-new-tokens",
                str(packages.STEPS), *options,
            )  # fmt: skip
            assert rows == expected * len(rows)


def test_a_gpu_package_does_not_run_on_a_cpu(made):
    with pytest.raises(inductor_moe.errors.PackageError, match="compiled for cuda"):
        inductor_moe.load_generation(made["qwen3_moe"], device="cpu")
