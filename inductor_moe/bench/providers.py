"""Who runs a case: this backend, stock Inductor, eager, and libraries with own kernels."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from inductor_moe.bench.case import Case

PROVIDERS = ("ours", "inductor", "eager", "fla", "liger")
MODULES = {"fla": "fla", "liger": "liger_kernel"}
# Why no CUDA graph holds a provider's calls.
UNCAPTURED = {"liger": "no CUDA graph: it waits for the routing on the host"}
BACKENDS = {"ours": "inductor_moe", "inductor": "inductor"}


def absence(name: str, case: Case) -> str | None:
    """Why a provider cannot run a case, or None if it can."""
    if name in case.absent:
        return case.absent[name]
    if name in BACKENDS or name == "eager":
        return None
    if name not in case.peers:
        return f"has no {case.op}"
    if importlib.util.find_spec(MODULES[name]) is None:
        return "not installed"
    return None


def callable_of(name: str, case: Case) -> Callable[..., Any]:
    """The case's code as the provider runs it. Nothing is compiled before the first call."""
    if name == "eager":
        return case.call
    if name in case.peers:
        return case.peers[name]()
    torch.compiler.reset()
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    return torch.compile(case.call, backend=BACKENDS[name], fullgraph=True, dynamic=False)
