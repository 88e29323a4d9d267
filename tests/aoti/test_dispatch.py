"""One package of a dynamic length runs one form for few tokens and another for many."""

from __future__ import annotations

import pytest
import torch

import inductor_moe
from inductor_moe import lowerings
from inductor_moe.lowerings.trace import by_tokens, lower

FEW = 8


@torch.library.custom_op("inductor_moe_tests::told", mutates_args=())
def told(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x plus 1 and the sum of some of its rows in the form for few tokens; plus 2 for many."""
    raise NotImplementedError


@told.register_fake
def _(x, rows):
    return torch.empty_like(x), x.new_empty((rows.shape[0], x.shape[1]))


def implementation(x, rows, tokens_hint):
    form = 1 if tokens_hint <= FEW else 2
    return x + form, x[rows] * form


def lowering(x, rows):
    return by_tokens(implementation, (x, rows), x.shape[0], FEW)


class Told(torch.nn.Module):
    def forward(self, x, rows):
        first, second = told(x * 2, rows)
        again, _ = told(first, rows)
        return again, second + 1


@pytest.mark.parametrize("hint", [5, 100])
def test_a_package_chooses_when_it_runs(tmp_path, hint):
    lowerings.install()
    lower(told, lowering)
    dim = torch.export.Dim("tokens", min=1, max=256)
    rows = torch.tensor([0, 0])
    with torch.no_grad():
        exported = torch.export.export(
            Told(), (torch.randn(hint, 4), rows), dynamic_shapes=({0: dim}, None)
        )
        path = inductor_moe.aoti_compile_and_package(exported, package_path=tmp_path / "m.pt2")
        run = torch._inductor.aoti_load_package(path)
        for tokens in (1, 2, FEW, FEW + 1, 64, 65, 256):
            form = 1 if tokens <= FEW else 2
            x = torch.randn(tokens, 4)
            again, second = run(x, rows)
            torch.testing.assert_close(again, x * 2 + 2 * form)
            torch.testing.assert_close(second, (x * 2)[rows] * form + 1)


def test_torch_compile_takes_the_form_of_the_length_it_traced():
    lowerings.install()
    lower(told, lowering)
    compiled = torch.compile(Told(), dynamic=True, fullgraph=True)
    rows = torch.tensor([0, 0])
    for tokens in (100, 4):
        x = torch.randn(tokens, 4)
        torch.testing.assert_close(compiled(x, rows)[0], x * 2 + 4)
