"""Shared fixtures."""

from __future__ import annotations

import os
import warnings

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    # Workers share the cores, and so does what they start; read when torch is imported.
    cores = str(max(1, (os.cpu_count() or 1) // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", cores)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", cores)

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Every test compiles from nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _rewrite_failures_are_errors():
    """A rewrite that raises is a bug, even though users only get a warning."""
    from inductor_moe.errors import RewriteFailedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", RewriteFailedWarning)
        yield
