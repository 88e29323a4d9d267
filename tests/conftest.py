"""Shared fixtures."""

from __future__ import annotations

import warnings

import pytest
import torch


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
