"""What a whole model computes after each of its layers, compiled by this backend and eagerly.

    python examples/benchmarks/layer_errors.py --model qwen3.5-35b-a3b --quant int4 --json FILE

Every layer's output in prefill and in decode is compared with the same weights unpacked to fp32;
eager runs them unpacked to bf16. A router that is all but undecided makes one position differ in
any two right computations, so a layer is judged by the median of its positions: exit status 1 if
one is further off than twice eager's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inductor_moe import lowerings
from inductor_moe.backend import collected
from inductor_moe.bench import models, results
from inductor_moe.bench.session import DECODE_EXPERTS, PREFILL_EXPERTS, Session
from inductor_moe.report import merge
from inductor_moe.testing import relative_error

SLACK = 2.0


def hidden(model: Any, ids: Tensor, **settings: Any) -> list[Tensor]:
    """The output [B, T, H] of every layer; the last one's after the final norm."""
    out = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1, **settings)
    return list(out.hidden_states[1:])


def positions(found: Tensor, exact: Tensor) -> float:
    """The median over positions of the relative error."""
    pairs = zip(found.flatten(0, 1), exact.flatten(0, 1), strict=True)
    return statistics.median(relative_error(one, other) for one, other in pairs)


def compiled(session: Session, experts: str) -> Any:
    session.model.set_experts_implementation(experts)
    return torch.compile(
        lambda ids: hidden(session.model, ids, past_key_values=session.cache, use_cache=True),
        backend="inductor_moe", fullgraph=True, dynamic=False,
    )  # fmt: skip


def measure(name: str, scheme: str, layers: int | None, prompt: int, steps: int) -> dict[str, Any]:
    """Rows of a phase and a layer each: the errors of ours and of eager."""
    lowerings.install()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.build(name, scheme, device, layers)
    session = Session(model, 1, prompt + steps)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocabulary, (1, prompt + steps), generator=generator).to(device)
    model.set_experts_implementation(PREFILL_EXPERTS)
    eager = hidden(model, ids, use_cache=False)
    with models.widened(model):
        exact = hidden(model, ids, use_cache=False)
    session.cache.reset()
    fused = {}
    with collected() as reports:
        fused["prefill"] = compiled(session, PREFILL_EXPERTS)(ids[:, :prompt])
        step = compiled(session, DECODE_EXPERTS)
        tokens = [
            [layer.clone() for layer in step(token)] for token in ids[:, prompt:].split(1, 1)
        ]
        fused["decode"] = [torch.cat(layer, 1) for layer in zip(*tokens, strict=True)]
    places = {"prefill": slice(0, prompt), "decode": slice(prompt, None)}
    rows = []
    for phase, every in fused.items():
        for layer, found in enumerate(every):
            expected, plain = (way[layer][:, places[phase]] for way in (exact, eager))
            rows.append({
                "phase": phase, "layer": layer, "error": positions(found, expected),
                "eager_error": positions(plain, expected),
            })  # fmt: skip
    return {
        "model": f"{name} {scheme}", "layers": layers, "prompt": prompt, "decode": steps,
        "report": merge(reports).summary(), "versions": results.versions(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "commit": results.commit(),
        "rows": rows,
    }  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3.5-35b-a3b", choices=models.LANGUAGE_MODELS)
    parser.add_argument("--quant", default="int4", choices=models.SCHEMES)
    parser.add_argument("--layers", type=int, help="the first so many of them")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    given = parser.parse_args()
    found = measure(given.model, given.quant, given.layers, given.prompt, given.decode)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(found["report"])
    bad = 0
    for row in found["rows"]:
        right = row["error"] <= SLACK * row["eager_error"]
        bad += not right
        print(f"{'ok ' if right else 'BAD'} {row['phase']} after layer {row['layer']}: "
              f"{row['error']:.1e}, eager {row['eager_error']:.1e}")  # fmt: skip
    print(f"{bad} of {len(found['rows'])} layers further off than {SLACK:g} times eager")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
