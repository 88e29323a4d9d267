"""Whether a package goes on generating what torch.compile generates, for hundreds of tokens.

    python examples/benchmarks/package_tokens.py --model qwen3.5-35b-a3b --quant int4 --json FILE

One model with random weights, from one token on: its greedy package, and the same model under
torch.compile with this backend. The latter is fed the package's tokens, so that a difference is
seen wherever it is and not passed on. Exit status 1 if the next tokens differ at more positions
than --differ allows, or if a logit is not finite.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import inductor_moe
from inductor_moe import lowerings
from inductor_moe.bench import models, results
from inductor_moe.bench.session import Decode, Session


def measure(name: str, scheme: str, layers: int | None, steps: int) -> dict[str, Any]:
    """The tokens of both, where they differ, and how undecided the compiled model was there."""
    lowerings.install()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.build(name, scheme, device, layers)
    length, first = steps + 8, torch.tensor([[5]])
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "model.pt2", time.perf_counter()
        inductor_moe.export_generation(model, path, length, sampling="greedy")
        export_s = time.perf_counter() - start
        package = inductor_moe.load_generation(path).session(cuda_graph=device == "cuda")
        tokens = package.generate(first, steps, eos_token_ids=()).cpu()
        del package
    session = Session(model, 1, length)
    session.cache.reset()
    decode = Decode(session, "ours")
    given = torch.cat([first, tokens[:, :-1]], 1).to(device)
    logits = decode.follow(given)[0].float().cpu()
    best = logits.topk(2).values
    differ = (logits.argmax(-1) != tokens[0]).nonzero().flatten().tolist()
    return {
        "model": f"{name} {scheme}", "layers": layers, "steps": steps, "export_s": export_s,
        "finite": bool(logits.isfinite().all()), "differ_at": differ,
        "margins_there": [float(best[at, 0] - best[at, 1]) for at in differ],
        "median_margin": float((best[:, 0] - best[:, 1]).median()),
        "distinct_tokens": len(set(tokens[0].tolist())), "versions": results.versions(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "commit": results.commit(),
    }  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3.5-35b-a3b", choices=models.LANGUAGE_MODELS)
    parser.add_argument("--quant", default="int4", choices=models.SCHEMES)
    parser.add_argument("--layers", type=int, help="the first so many of them")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--differ", type=int, default=0, help="positions that may differ")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    given = parser.parse_args()
    found = measure(given.model, given.quant, given.layers, given.steps)
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    return int(len(found["differ_at"]) > given.differ or not found["finite"])


if __name__ == "__main__":
    sys.exit(main())
