"""A lowering from a plain function, for every op alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from inductor_moe import compat

DECODE_TOKENS = 8  # the most that the experts' kernels for few tokens are for
MANY = 1024  # tokens to choose kernels for many by, where no hint says how many


def lower(
    op: Any,
    implementation: Callable[..., Any],
    traceable: Callable[..., bool] = lambda *_: True,
) -> None:
    """Register `implementation`, called with the op's arguments, as the op's lowering.

    The function runs on fake tensors and may launch Triton kernels through
    torch.library.wrap_triton; Inductor then owns the launches, in its Python wrapper and in
    AOTInductor packages alike, so that no package needs Python. Where `traceable`, called with
    the fake arguments, says no, the op stays a call of its eager kernel.
    """

    def lowering(*args: Any, **kwargs: Any) -> Any:
        if not traceable(*compat.fake_arguments()):
            return compat.lower_to_eager_call(op._opoverload, args, kwargs)
        return compat.lower_by_tracing(implementation, args, kwargs)

    lowering.__name__ = f"{op._name}_lowering"
    compat.register_lowering(op._opoverload, lowering)


def by_tokens(
    implementation: Callable[..., Any], args: tuple[Any, ...], tokens: Any, few: int
) -> Any:
    """implementation(*args, tokens_hint=N) for the number of tokens at hand.

    tokens  an int, or a size with a hint
    few     the most tokens that kernels for few of them are for
    A package whose `tokens` may be on either side of `few` holds both forms and chooses when it
    runs; under torch.compile, where a choice would end CUDA graphs, the hint decides.
    """
    hint = compat.size_hint(tokens)
    most = compat.upper_bound(tokens)
    both = max(1, compat.lower_bound(tokens)) <= few and (most is None or most > few)
    if not (both and compat.packaging()):
        return implementation(*args, tokens_hint=hint)
    many = hint if hint > few else min(most or MANY, MANY)
    found = compat.branch(
        tokens <= few,
        functools.partial(implementation, tokens_hint=max(1, few // 2)),
        functools.partial(implementation, tokens_hint=many),
        args,
    )
    return found if len(found) > 1 else found[0]
