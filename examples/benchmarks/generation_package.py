"""Decode through a generation package against torch.compile(mode="reduce-overhead").

Layers of Qwen3.5-35B-A3B with random bf16 weights, both in one process: the package replays its
CUDA graph, the other compiles transformers' unmodified model with a StaticCache and the package's
own sampler (`--argmax`: the most likely token, in the package too), its token fed back. Both are
timed from token to token on the CPU's clock, the token copied to the CPU. The first token of each
must be as likely in fp32 as the most likely one, to within what bf16 changes: with random weights
the best logits are close together, and a router near a tie sends a row to other experts. `check`
runs tiny models and no timing.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

WARM_UP, ROUNDS, STEPS = 10, 5, 40
FULL = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 256,
    "num_experts_per_tok": 8, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
TINY = {
    **FULL, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "vocab_size": 500,
}  # fmt: skip


def build(sizes: dict[str, int], layers: int, device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig

    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    config = Qwen3_5MoeTextConfig(**sizes, num_hidden_layers=layers, layer_types=kinds)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device, torch.bfloat16)


class Compiled:
    """transformers' model under torch.compile, one token at a time."""

    def __init__(
        self, model: Any, prompt: torch.Tensor, length: int, backend: str, argmax: bool
    ) -> None:
        from transformers import StaticCache

        from inductor_moe.aoti.sampling import argmax_last, next_token

        self.cache = StaticCache(config=model.config, max_cache_len=length)
        logits = model(prompt, past_key_values=self.cache, logits_to_keep=1).logits
        self.first = logits[:, -1].argmax(-1, keepdim=True)
        self.token = self.first.clone()

        def step(token: torch.Tensor) -> torch.Tensor:
            out = model(token, past_key_values=self.cache).logits[:, -1]
            if argmax:
                return argmax_last(out)[:, None]
            return next_token(out, zeros, ones, zeros)[:, None]

        # What transformers' generate() chooses for decode, and what stock Inductor does best.
        model.set_experts_implementation("batched_mm")
        zeros, ones = (torch.full((1,), x, device=prompt.device) for x in (0.0, 1.0))
        mode = "reduce-overhead" if prompt.is_cuda else "default"
        torch._dynamo.reset()
        self.step = torch.compile(step, backend=backend, mode=mode, fullgraph=True)

    def __call__(self) -> int:
        self.token.copy_(self.step(self.token))
        return int(self.token)


class FirstToken:
    """How much less likely in fp32 a token is than the best one, and how much bf16 explains."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.exact = copy.deepcopy(model).float()(prompt, logits_to_keep=1).logits[0, -1]
        found = model(prompt, logits_to_keep=1).logits[0, -1].float()
        # Three standard deviations of the difference of two logits.
        self.allowed = float(3 * 2**0.5 * (found - self.exact).square().mean().sqrt())

    def deficit(self, token: int) -> float:
        return float(self.exact.max() - self.exact[token])


def milliseconds_per_token(step: Any) -> tuple[float, float]:
    """(median, spread) over rounds."""
    for _ in range(WARM_UP):
        step()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        rounds.append((time.perf_counter() - start) * 1e3 / STEPS)
    return statistics.median(rounds), max(rounds) - min(rounds)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", choices=("check", "time"), default="time")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--argmax", action="store_true", help="no sampler on either side")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--backends", nargs="*", default=["inductor_moe", "inductor"])
    arguments = parser.parse_args()
    import inductor_moe

    device = "cuda" if torch.cuda.is_available() else "cpu"
    timing = arguments.mode == "time"
    if timing and device == "cpu":
        sys.exit("generation_package.py: timing needs a CUDA GPU")
    model = build(FULL if timing else TINY, arguments.layers, device)
    length = 64 + WARM_UP + ROUNDS * STEPS + 8
    prompt = torch.randint(3, 400, (1, 64), device=device)
    result: dict[str, Any] = {"benchmark": "generation_package", "layers": arguments.layers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        start = time.perf_counter()
        sampling = "greedy" if arguments.argmax else "top_p"
        inductor_moe.export_generation(model, path, length, sampling=sampling)
        result["export_s"] = time.perf_counter() - start
        session = inductor_moe.load_generation(path).session()
        stream = session.stream(prompt.cpu(), length - 64, eos_token_ids=())
        tokens = {"package": [int(next(stream)) for _ in range(4)]}
        if timing:
            result["package_ms"], result["package_spread_ms"] = milliseconds_per_token(
                lambda: int(next(stream))
            )
    for backend in arguments.backends:
        compiled = Compiled(model, prompt, length, backend, arguments.argmax)
        tokens[backend] = [int(compiled.first), *(compiled() for _ in range(3))]
        if timing:
            row = milliseconds_per_token(compiled)
            result[f"{backend}_ms"], result[f"{backend}_spread_ms"] = row
            result[f"package_over_{backend}"] = row[0] / result["package_ms"]
    first = FirstToken(model, prompt)
    deficits = {name: first.deficit(found[0]) for name, found in tokens.items()}
    result |= {"tokens": tokens, "deficits": deficits, "allowed_deficit": first.allowed}
    result |= {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                 check=False).stdout.strip(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2))
    return int(max(deficits.values()) > first.allowed)


if __name__ == "__main__":
    sys.exit(main())
