"""Inductor's analysis of our launches: right, and done once for launches that are alike."""

from __future__ import annotations

import os

import pytest
import torch
import triton
from delta_inputs import decode_inputs
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget

from inductor_moe import compat
from inductor_moe.kernels.delta_decode import delta_decode, delta_decode_kernel
from inductor_moe.ops.quant_cuda import quantized_linear_cuda
from inductor_moe.quant.fit import Scheme, quantize_weight
from inductor_moe.quant_tiles import QuantizedPlan
from inductor_moe.tiles import GemmTile

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles: not under the interpreter"
)

WRITTEN = [{"state", "out"}, {"conv_state", "out"}]  # of the step and of its tail


class Driver:
    """As much of a GPU's driver as the analysis asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def generated(monkeypatch):
    """The launches whose Triton IR was generated, by kernel name."""
    names = []

    def counting(kernel, *rest):
        names.append(kernel.fn.__name__)
        return generate(kernel, *rest)

    generate = wrap.generate_ttir
    monkeypatch.setattr(wrap, "generate_ttir", counting)
    for name in ("identify_accessed_tensors", "identify_mutated_tensors"):
        if hasattr(wrap, name):
            own = getattr(wrap, name)
            fresh = compat.remembering(getattr(own, "__wrapped__", own))
            monkeypatch.setattr(wrap, name, fresh)
    driver = triton.runtime.driver
    driver.set_active(Driver())
    yield names
    driver.set_active(None)


def launches(arguments, calls):
    """The arguments of the launches of so many decode steps."""
    return traced(lambda *given: [delta_decode(*given) for _ in range(calls)], arguments)


def traced(function, arguments):
    """The arguments of the launches of a function on a GPU's tensors."""
    fake = FakeTensorMode()
    with fake:
        tensors = tree_map_only(
            torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), arguments
        )
        graph = make_fx(function)(*tensors).graph
    return [
        {
            **node.kwargs,
            "kwargs": {
                name: value.meta["val"] if isinstance(value, torch.fx.Node) else value
                for name, value in node.kwargs["kwargs"].items()
            },
        }
        for node in graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]


def mutated(launch):
    return wrap.get_mutated_tensors(
        launch["kernel_idx"], launch["constant_args_idx"], launch["kwargs"],
        launch["tma_descriptor_metadata"],
    )  # fmt: skip


def test_launches_of_every_layer_are_analysed_once(generated):
    found = [mutated(launch) for launch in launches(decode_inputs(), 3)]
    assert [set(names) for names in found] == WRITTEN * 3
    assert sorted(generated) == ["delta_decode_kernel", "delta_decode_tail_kernel"]


def test_a_launch_is_analysed_once_with_and_without_its_options(generated):
    """Traced, a kernel comes as it is; lowered, as an Autotuner of one config."""
    (launch, _) = launches(decode_inputs(), 1)
    kernel = delta_decode_kernel
    tuned = triton.autotune([triton.Config({}, num_warps=2)], key=[])(kernel)
    constants = wrap.kernel_side_table.get_constant_args(launch["constant_args_idx"])
    analyse = getattr(wrap, "identify_mutated_tensors", None) or wrap.identify_accessed_tensors
    found = [analyse(form, {**launch["kwargs"], **constants}, {}) for form in (kernel, tuned)]
    assert found[0] == found[1] and found[0]
    assert generated == ["delta_decode_kernel"]


def test_a_config_is_part_of_a_launch():
    calls = []
    analyse = compat.remembering(lambda *arguments: calls.append(arguments) or [])
    kernel = delta_decode_kernel
    for width in (16, 32, 16):
        tuned = triton.autotune([triton.Config({"BLOCK_V": width})], key=[])(kernel)
        analyse(tuned, {"x": 1}, {})
    assert len(calls) == 2


def test_another_dtype_is_another_launch(generated):
    arguments = list(decode_inputs())
    first = [mutated(launch) for launch in launches(arguments, 1)]
    arguments[8] = arguments[8].bfloat16()  # the recurrent state, which the tail does not see
    second = [mutated(launch) for launch in launches(arguments, 1)]
    assert first == second
    assert generated.count("delta_decode_kernel") == 2
    assert generated.count("delta_decode_tail_kernel") == 1


def test_int8_activations_change_their_outputs_alone(generated):
    """Packed words that a kernel reads as bytes are not written."""
    scheme = Scheme(4, 128, False, "rtn")
    weight = quantize_weight(torch.randn(96, 256).bfloat16(), scheme)
    plan = QuantizedPlan(64, GemmTile(64, 128, 8, 4, 3), GemmTile(64, 128, 8, 4, 3))
    found = traced(
        lambda x, packed, scales, zeros: quantized_linear_cuda(
            x, packed, scales, zeros, None, 128, True, plan=plan, wrap=compat.wrap_triton
        ),
        (torch.randn(64, 256).bfloat16(), weight.packed, weight.scales, weight.zeros),
    )
    assert [set(mutated(launch)) for launch in found] == [{"out", "scales", "sums"}, {"out"}]
    assert generated == ["quantize_activations_kernel", "int8_linear_kernel"]


def test_kernels_of_others_are_not_remembered():
    calls = []
    analyse = compat.remembering(lambda *arguments: calls.append(arguments) or [])
    kernel = triton.JITFunction(triton.language.zeros_like.fn)
    for _ in range(2):
        analyse(kernel, {"x": 1}, {})
    assert len(calls) == 2
