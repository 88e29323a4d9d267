"""The rewrites, in the order in which they are tried."""

if __name__ == "patterns":
    raise ImportError(
        "import inductor_moe.patterns, not patterns: the folder is part of the package"
    )

from inductor_moe.patterns import all_reduce, dequantised, merged, quant
from inductor_moe.patterns.attention import decode as attention_decode
from inductor_moe.patterns.attention import prompt, rope
from inductor_moe.patterns.delta_rule import decode, heads, unrolled
from inductor_moe.patterns.moe import (
    called,
    dense,
    experts,
    gate,
    gathered,
    local,
    router,
    shared,
)
from inductor_moe.patterns.rewrite import Refusal, Rewrite

ALL: tuple[Rewrite, ...] = (
    called.CALLED,
    experts.GROUPED,
    experts.BATCHED,
    gathered.EINSUM,
    dense.DENSE,
    router.ROUTER,
    unrolled.UNROLLED,
    decode.DECODE,
    heads.CALLED,
    shared.SHARED,
    quant.LINEAR,
    dequantised.DEQUANTISED,
    gate.GATE,
    local.LOCAL,
    merged.MERGED,
    attention_decode.DECODE,
    prompt.PROMPT,
    rope.ROPE,
    all_reduce.ALL_REDUCE,
)

__all__ = ["ALL", "Refusal", "Rewrite"]
