"""The most likely token of a large vocabulary: one reduction, two, and the top-p sampler.

`check` compares with torch.argmax, ties and NaN included; `time` prints microseconds of a call in
a CUDA graph over rotating logits, as Inductor compiles each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inductor_moe.aoti.sampling import argmax_last, next_token
from inductor_moe.bench.timing import microseconds

VOCABULARIES, BATCHES = (151936, 201088, 248320), (1, 4, 16)
L2 = 100 << 20  # the logits of all rotations together are larger than an H100's L2


def one_stage(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def sampler(logits: Tensor) -> Tensor:
    zeros = torch.zeros(logits.shape[0], device=logits.device)
    return next_token(logits, zeros, zeros + 1, zeros)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_stage": one_stage, "two_stages": argmax_last, "sampler": sampler,
}  # fmt: skip


def check(device: str) -> int:
    """Compiled, against eager torch.argmax; returns the number of rows that differ."""
    wrong = 0
    for size in (1, 5000, 9973, *VOCABULARIES):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(6, size, device=device).to(dtype)
            x[1] = float("-inf")
            x[2, size // 2 :] = 90.0
            x[3, [size // 3, -1]] = float("nan")
            x[4, -1] = 99.0
            torch._dynamo.reset()
            compiled = torch.compile(argmax_last, dynamic=False, fullgraph=True)
            wrong += int((compiled(x) != x.argmax(-1)).sum())
    print(f"check: {wrong} rows differ from torch.argmax")
    return wrong


def time() -> list[dict[str, Any]]:
    """A row for each vocabulary, batch and way."""
    rows = []
    for size in VOCABULARIES:
        for batch in BATCHES:
            count = max(2, L2 // (batch * size * 2))
            inputs = [
                (torch.randn(batch, size, device="cuda", dtype=torch.bfloat16),)
                for _ in range(min(count, 64))
            ]
            row: dict[str, Any] = {"vocabulary": size, "batch": batch}
            for name, way in WAYS.items():
                torch._dynamo.reset()
                compiled = torch.compile(way, dynamic=False)
                row[name], row[f"{name}_iqr"] = microseconds(compiled, inputs)
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", choices=("check", "time"), default="time")
    parser.add_argument("--json", help="write the result to this file")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if arguments.mode == "check":
        return check("cuda" if cuda else "cpu")
    if not cuda:
        sys.exit("argmax.py: timing needs a CUDA GPU")
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "benchmark": "argmax",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "us": time(),
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
