"""Lowerings of our ops into Inductor IR."""

if __name__ == "lowerings":
    raise ImportError(
        "import inductor_moe.lowerings, not lowerings: the folder is part of the package"
    )

import functools


@functools.cache
def install() -> None:
    """Register every lowering with Inductor. Idempotent."""
    from inductor_moe import compat
    from inductor_moe.lowerings import attention, delta_rule, merged_linear, moe, quant

    compat.remember_launches()
    compat.launch_dependently()
    compat.keep_array_scopes()
    attention.register()
    moe.register()
    delta_rule.register()
    quant.register()
    merged_linear.register()
