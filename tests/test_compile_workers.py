"""Inductor's compile workers start before a model is traced, where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import async_compile

import inductor_moe.backend as backends
from inductor_moe.testing import graph_backend


@pytest.fixture
def events(monkeypatch):
    """An entry for each time that the workers are told to start."""
    seen = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: seen.append("workers"))
    backends._prepare.cache_clear()
    yield seen
    backends._prepare.cache_clear()


def test_they_start_when_the_backend_is_resolved(events, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert callable(backends.inductor_moe)
    assert events == ["workers"]


def test_they_start_with_the_first_graph_if_the_gpu_is_used_only_then(events, monkeypatch):
    backend = graph_backend()
    assert events == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with torch.no_grad():
        compiled(torch.ones(2))
    assert events == ["workers"]


def test_without_a_gpu_none_start(events):
    compiled = torch.compile(lambda x: x * 3, backend=graph_backend())
    with torch.no_grad():
        compiled(torch.ones(2))
    assert events == []
