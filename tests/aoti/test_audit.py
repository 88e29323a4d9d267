"""A package that would need Python is refused, by name; the delta rule never does."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import inductor_moe
from inductor_moe.aoti.audit import inspect
from inductor_moe.cli import app
from inductor_moe.ops.delta_rule import delta_rule
from inductor_moe.reference.delta_rule import delta_rule_recurrent
from inductor_moe.reference.delta_scan import delta_rule_scan


@torch.library.custom_op("inductor_moe_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class Doubling(torch.nn.Module):
    def forward(self, x):
        return (doubled(x) + 1,)


def test_a_python_op_is_refused_and_named(tmp_path):
    exported = torch.export.export(Doubling(), (torch.randn(4),))
    path = tmp_path / "doubling.pt2"
    with pytest.raises(inductor_moe.errors.PackageError) as raised:
        inductor_moe.aoti_compile_and_package(exported, package_path=path)
    assert "inductor_moe_tests::doubled" in str(raised.value)
    assert "return (doubled(x) + 1,)" in str(raised.value)
    assert not path.exists()


class Rule(torch.nn.Module):
    def forward(self, q, k, v, g, beta, state):
        out, final = delta_rule(q, k, v, g, beta, state, 0.25, 1e-6)
        state.copy_(final)
        return (out,)


def rule_inputs(tokens, dtype=torch.float32, per_channel=False):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    decay = (2, tokens, 4, 16) if per_channel else (2, tokens, 4)
    return (
        normal(2, tokens, 2, 16), normal(2, tokens, 2, 16), normal(2, tokens, 4, 8),
        -normal(*decay).abs(), torch.sigmoid(normal(2, tokens, 4)), normal(2, 4, 16, 8),
    )  # fmt: skip


@pytest.mark.slow
def test_a_dynamic_delta_rule_needs_no_python(tmp_path):
    dim = {1: torch.export.Dim("tokens", min=2, max=288)}
    with torch.no_grad():
        exported = torch.export.export(
            Rule(), rule_inputs(100), dynamic_shapes=(dim, dim, dim, dim, dim, None)
        )
        path = inductor_moe.aoti_compile_and_package(exported, package_path=tmp_path / "rule.pt2")
        run = torch._inductor.aoti_load_package(path)
        for tokens in (2, 8, 63, 64, 65, 127, 128, 129, 200, 288):
            inputs = rule_inputs(tokens)
            exact, state = delta_rule_recurrent(*(x.double() for x in inputs), 0.25, 1e-6)
            (found,) = run(*inputs)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(inputs[-1].double(), state, rtol=1e-5, atol=1e-5)
    (method,) = inspect(path).methods
    assert method.kernels and not any(call.needs_python for call in method.calls)
    done = CliRunner().invoke(app, ["package", "--check", path])
    assert done.exit_code == 0, done.output
    assert method.kernels[0] in done.output and "device        cpu" in done.output
    assert CliRunner().invoke(app, ["package", "--check", f"{path}.missing"]).exit_code == 2


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200, 520])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_scan_is_the_rule(tokens, per_channel):
    inputs = rule_inputs(tokens, torch.float64, per_channel)
    expected = delta_rule_recurrent(*inputs, 0.25, 1e-6)
    found = delta_rule_scan(*inputs, 0.25, 1e-6, max_tokens=520)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_a_dynamic_delta_rule_without_a_maximum_is_refused(tmp_path):
    dim = {1: torch.export.Dim("tokens", min=2)}
    with torch.no_grad():
        exported = torch.export.export(
            Rule(), rule_inputs(100), dynamic_shapes=(dim, dim, dim, dim, dim, None)
        )
        with pytest.raises(inductor_moe.errors.PackageError, match="inductor_moe::delta_rule"):
            inductor_moe.aoti_compile_and_package(exported, package_path=tmp_path / "rule.pt2")
