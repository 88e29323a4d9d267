"""The backend's options: ``inductor_moe.*`` keys in ``torch.compile(options=...)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from inductor_moe.errors import UnknownOptionError

PREFIX = "inductor_moe."


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user can ask of the backend.

    strict   raise instead of reporting: an exception in a rewrite, a refused site, a graph
             without sites, a training graph
    disable  names or dotted prefixes of rewrites to leave out, for example
             ("moe.experts.batched_mm",) or ("moe",)
    verify   run the first call of every rewritten graph with and without the rewrites; where
             they disagree the rewrites are undone with a warning, or under strict it raises
    limit    rewrite at most so many sites of a compile, in graph order within each rewrite
    int8_activations  in calls of many tokens, multiply int4 weights with activations that are
             rounded to int8 for each token and group (W4A8)
    dependent_launch  on GPUs of compute capability 9.0 and later, place a kernel's programs while
             the kernel before it ends (programmatic dependent launch)
    """

    strict: bool = False
    disable: tuple[str, ...] = ()
    verify: bool = False
    limit: int | None = None
    int8_activations: bool = False
    dependent_launch: bool = True

    def enabled(self, rewrite: str) -> bool:
        """Whether the rewrite of this name may run."""
        return not any(rewrite == name or rewrite.startswith(name + ".") for name in self.disable)


def parse(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split a mixed option dict into ours and Inductor's.

    Raises UnknownOptionError for an unknown ``inductor_moe.`` key or a value of the wrong type.
    """
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    valid = {field.name for field in dataclasses.fields(Options)}
    for key, value in (options or {}).items():
        if not key.startswith(PREFIX):
            inductor[key] = value
            continue
        name = key[len(PREFIX) :]
        if name not in valid:
            listing = ", ".join(PREFIX + option for option in sorted(valid))
            raise UnknownOptionError(f"unknown option {key!r}; valid options: {listing}")
        ours[name] = _check(name, value)
    if ours.get("verify") and ours.get("int8_activations"):
        raise UnknownOptionError(
            f"{PREFIX}verify allows for rounding to the dtype of the model, which "
            f"{PREFIX}int8_activations exceeds; set one of them"
        )
    return Options(**ours), inductor


def _check(name: str, value: Any) -> Any:
    if name == "disable":
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise UnknownOptionError(
                f"{PREFIX}disable must be a rewrite name or a list of them, got {value!r}"
            )
        _check_rewrite_names(names)
        return tuple(names)
    if name == "limit":
        if value is not None and (type(value) is not int or value < 0):
            raise UnknownOptionError(
                f"{PREFIX}limit must be None or a number of sites, got {value!r}"
            )
        return value
    if not isinstance(value, bool):
        raise UnknownOptionError(f"{PREFIX}{name} must be True or False, got {value!r}")
    return value


def _check_rewrite_names(names: list[str] | tuple[str, ...]) -> None:
    from inductor_moe.patterns import ALL
    from inductor_moe.patterns.delta_rule import convolution

    known = [*(rewrite.name for rewrite in ALL), convolution.NAME]
    for name in names:
        if not any(rewrite == name or rewrite.startswith(name + ".") for rewrite in known):
            raise UnknownOptionError(
                f"{PREFIX}disable names {name!r}, which is no rewrite; known: {', '.join(known)}"
            )
