"""Products of one token, which Inductor unbatches on a GPU before our pass sees them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.fx_passes import joint_graph
from torch.nn import functional as F

from inductor_moe.testing import capture, fused_layers, relative_error


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(joint_graph, "get_gpu_type", lambda: "cpu")


class Einsum(nn.Module):
    def forward(self, x, up, down, ids, weights):
        h = F.silu(torch.einsum("tkih,th->tki", up[ids], x))
        return (torch.einsum("tkhi,tki->tkh", down[ids], h) * weights[..., None]).sum(1)


class Batched(nn.Module):
    def forward(self, x, up, down, ids, weights):
        tokens, top_k = ids.shape
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(top_k, 0)[..., None]
        out = torch.bmm(down[flat], F.silu(torch.bmm(up[flat], rows)))[..., 0]
        return (out * weights.reshape(-1)[:, None]).view(tokens, top_k, -1).sum(1)


class Dense(nn.Module):
    def forward(self, x, up, down, ids, weights):
        return torch.bmm(x[None], up[:1].mT) * weights.sum()


def arguments(top_k, tokens=1, experts=5, hidden=24, inner=40):
    torch.manual_seed(11)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    return (
        torch.randn(tokens, hidden), torch.randn(experts, inner, hidden),
        torch.randn(experts, hidden, inner), ids, torch.rand(tokens, top_k),
    )  # fmt: skip


@pytest.mark.parametrize("model, top_k", [(Einsum(), 2), (Einsum(), 1), (Batched(), 1)])
def test_experts_of_one_token(model, top_k):
    given = arguments(top_k)
    with torch.no_grad():
        found, report = capture(model, *given)
        x, up, down, ids, weights = given
        exact = model(x.double(), up.double(), down.double(), ids, weights.double())
        assert fused_layers(report) == {"moe_experts": 1}, str(report)
        assert relative_error(found, exact) <= 2 * relative_error(model(*given), exact) + 1e-7


def test_other_products_stay_unbatched():
    given, graphs = arguments(1), []
    with torch.no_grad():
        found, _ = capture(Dense(), *given, graphs=graphs)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert "aten.mm.default" in targets
    assert "aten.bmm.default" not in targets
    torch.testing.assert_close(found, Dense()(*given))
