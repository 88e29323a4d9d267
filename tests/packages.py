"""What the tests of generation packages share."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch
import zoo
from transformers import DynamicCache

ROOT = Path(__file__).parents[1]
LENGTHS = (1, 2, 63, 64, 65, 200)
STEPS = 64
ROOM = 288  # 200 + 64, and more than one multiple of the chunk

# One model of each family has a head dim, a window and so on of its own; these are the zoo's.
# The code around the kernels is compiled without optimisation: it is most of the compile time.
FAST = {"aot_inductor.compile_wrapper_opt_level": "O0"}


def build(name, layers=None, device="cpu", dtype=torch.float32):
    """A tiny model of a family with room for the longest session."""
    family = next(family for family in zoo.MOE if family.name == name)
    overrides = {**family.overrides, "max_position_embeddings": 512}
    if layers is not None:
        overrides |= layers
    model = type(family)(name, overrides).build()
    return model.to(device, dtype)


@torch.no_grad()
def eager_tokens(model, ids, steps=STEPS):
    """Greedy tokens of the model as transformers runs it, with its own cache."""
    model.set_experts_implementation("batched_mm")
    cache, tokens, following = DynamicCache(config=model.config), [], ids
    for _ in range(steps):
        logits = model(following, past_key_values=cache).logits[:, -1]
        following = logits.argmax(-1, keepdim=True)
        tokens.append(following.cpu())
    return torch.cat(tokens, 1)


@functools.cache
def cpp_runner(folder):
    """The C++ runner, built in a folder."""
    for command in (
        ["cmake", "-S", str(ROOT / "examples/cpp_runner"), "-B", str(folder),
         f"-DPython3_EXECUTABLE={sys.executable}",
         "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_UNITY_BUILD=ON"],
        ["cmake", "--build", str(folder), "--parallel"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "generate"


def run_cpp(runner, package, ids, *options):
    """(tokens of each session [rows of ints], the whole output); fails on a non-zero exit."""
    text = ",".join(str(token) for token in ids[0].tolist())
    command = [str(runner), "--package", str(package), "--prompt-ids", text, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(":")[1] for line in done.stdout.splitlines() if line.startswith("session")]
    return [[int(token) for token in row.split()] for row in rows], done.stdout


# Plain torch, as a user without this package would write it.
ELSEWHERE = """
import json, sys
sys.modules["inductor_moe"] = None
sys.modules["transformers"] = None
import torch
package, device, prompts, steps, outputs = sys.argv[1:]
reader = torch._C.PyTorchFileReader(package)
about = json.loads(reader.get_record("extra/inductor_moe.json"))
weights = [
    torch.frombuffer(bytearray(reader.get_record(f"data/generation/weights/{i}")),
                     dtype=torch.uint8).to(device)
    for i in range(len(about["weight_bytes"]))
]
methods = {}
for name, constants in about["methods"].items():
    methods[name] = torch._C._aoti.AOTIModelPackageLoader(package, name, True, 1, -1)
    methods[name].load_constants(
        {fqn: weights[c["weight"]].view(getattr(torch, c["dtype"]))
              .as_strided(c["shape"], c["stride"], c["offset"]) for fqn, c in constants.items()},
        False, True, True)
results = []
for prompt in torch.load(prompts):
    rest = [torch.zeros(1), torch.ones(1), torch.zeros(1, about["max_seq_len"] + 1)]
    rest += [torch.zeros(s["shape"], dtype=getattr(torch, s["dtype"])) for s in about["states"]]
    rest = [tensor.to(device) for tensor in rest]
    token, tokens = prompt.to(device), []
    for _ in range(int(steps)):
        method = methods["decode" if token.shape[1] == 1 else "prefill"]
        (found,) = method.run([token, *rest])
        tokens.append(found[:, None].cpu().clone())
        token = found[:, None].clone()  # which decode overwrites
    results.append(torch.cat(tokens, 1))
torch.save(results, outputs)
"""


def run_elsewhere(package, folder, prompts, device="cpu", steps=STEPS):
    """Greedy tokens after each prompt, from a process with neither this package nor transformers.

    That process is Python only because this is the shortest program around AOTInductor's loader.
    """
    torch.save(prompts, folder / "prompts.pt")
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(package), device,
               str(folder / "prompts.pt"), str(steps), str(folder / "tokens.pt")]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "tokens.pt")
