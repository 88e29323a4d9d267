"""The rewrites, in the order in which they are tried."""

if __name__ == "patterns":
    raise ImportError(
        "import inductor_moe.patterns, not patterns: the folder is part of the package"
    )

from inductor_moe.patterns import dequantised, merged, quant
from inductor_moe.patterns.delta_rule import decode, heads, unrolled
from inductor_moe.patterns.moe import called, dense, experts, gathered, router
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
    quant.LINEAR,
    dequantised.DEQUANTISED,
    merged.MERGED,
)

__all__ = ["ALL", "Refusal", "Rewrite"]
