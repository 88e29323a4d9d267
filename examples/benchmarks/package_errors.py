"""How far a package and the compiled model are from fp32, and from each other."""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from torch import Tensor

from inductor_moe.bench import models
from inductor_moe.bench.session import PREFILL_EXPERTS
from inductor_moe.testing import relative_error

SLACK = 2.0


def per_position(keys: Tensor, values: Tensor, steps: int) -> Tensor:
    """Keys and values [1, heads, length, dim] as one row [T, features] a position, on the CPU."""
    both = torch.cat([keys[0], values[0]], -1)[:, :steps]
    return both.transpose(0, 1).flatten(1).cpu()


def last_rows(cache: Any, steps: int) -> Tensor:
    """`per_position` of the last attention layer of a cache."""
    layer = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None][-1]
    return per_position(layer.keys, layer.values, steps)


def differences(
    model: Any, fed: Tensor, logits: Tensor, rows: dict[str, Tensor], chosen: list[int]
) -> dict[str, Any]:
    """Errors against fp32 by quarter, and the next tokens of the package (`chosen`) and others.

    fed     [1, T]   the tokens
    logits  [T, V]   the compiled model's
    rows    [T, features]  keys and values, by who computed them
    """
    from transformers import StaticCache

    steps = fed.shape[1]

    def eagerly() -> tuple[Tensor, Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=steps)
        found = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[0]
        return found, last_rows(cache, steps)

    model.set_experts_implementation(PREFILL_EXPERTS)
    plain, rows["eager"] = eagerly()
    with models.widened(model):
        exact, exact_rows = eagerly()
    exact = exact.float()
    errors = {f"{who} keys and values": quarters(found, exact_rows) for who, found in rows.items()}
    errors["compiled logits"] = quarters(logits, exact)
    errors["eager logits"] = quarters(plain, exact)
    apart = quarters(rows["package"], rows["compiled"])
    best = {"compiled": logits.argmax(-1), "eager": plain.argmax(-1)}
    best["package"] = torch.tensor(chosen, device=fed.device)
    deficits = {
        who: float((exact.max(-1).values - exact.gather(1, token[:, None])[:, 0]).mean())
        for who, token in best.items()
    }
    margins = (logits.float().topk(2).values @ torch.tensor([1.0, -1.0], device=fed.device)).cpu()
    differ = (best["package"] != best["compiled"]).nonzero().flatten().tolist()
    return {
        "finite": all(bool(found.isfinite().all()) for found in (logits, *rows.values())),
        "errors": errors, "package_from_compiled": apart,
        "rows_equal_bitwise": int((rows["package"] == rows["compiled"]).all(-1).sum()),
        "deficits": deficits, "eager_rms_error": float((plain - exact).square().mean().sqrt()),
        "median_margin": float(margins.median()), "differ_at": differ,
        "margins_there": margins[differ].tolist(),
        "equal_to_fp32": {
            who: int((token == exact.argmax(-1)).sum()) for who, token in best.items()
        },
    }  # fmt: skip


def quarters(found: Tensor, expected: Tensor) -> list[float]:
    """The median over positions of the relative error, for each quarter of the positions."""
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    size = -(-len(errors) // 4)
    return [statistics.median(errors[at : at + size]) for at in range(0, len(errors), size)]


def too_far(found: dict[str, Any]) -> list[str]:
    """What of `differences` is not as it must be."""
    wrong = [] if found["finite"] else ["a value is not finite"]
    for name, errors in found["errors"].items():
        eager = found["errors"][f"eager {name.partition(' ')[2]}"]
        if any(not one <= SLACK * most for one, most in zip(errors, eager, strict=True)):
            wrong.append(f"{name} are further from fp32 than {SLACK:g} times eager's")
    deficits = found["deficits"]
    # Eager may have met no tie at all.
    allowed = max(SLACK * deficits["eager"], found["eager_rms_error"])
    return wrong + [
        f"the tokens of {who} are less likely in fp32 than eager's"
        for who in ("package", "compiled")
        if deficits[who] > allowed
    ]


def error_rows(found: dict[str, Any]) -> list[str]:
    """Lines of a table."""
    errors = {**found["errors"], "package from compiled": found["package_from_compiled"]}
    return [
        "median error, by quarter of the steps",
        *(
            f"  {name:<25}" + "".join(f"{error:10.2e}" for error in quarter)
            for name, quarter in errors.items()
        ),
        f"mean deficit in fp32 {json.dumps(found['deficits'])}",
        f"next tokens equal to fp32's {json.dumps(found['equal_to_fp32'])}",
    ]
