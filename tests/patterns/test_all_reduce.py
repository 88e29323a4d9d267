"""Which sums over ranks are put into shared memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe import compat
from inductor_moe.config import Options
from inductor_moe.ops import all_reduce as ops
from inductor_moe.passes import FusionPass, rewrite
from inductor_moe.patterns.all_reduce import left_to_backends

collectives = torch.ops._c10d_functional


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Shared memory of a group "shared", and none of a group "far"."""
    monkeypatch.setattr(compat, "runs_triton_kernels", lambda device: True)
    empty = torch.zeros(1)
    ops.set_shared_memory("shared", ops.SharedMemory(0, 2, empty, empty, 1.0))
    ops.set_shared_memory("far", "the ranks are on several hosts")
    yield
    for name in ("shared", "far"):
        ops.set_shared_memory(name, "")


def summed(x, kind="sum", group="shared"):
    return collectives.wait_tensor(collectives.all_reduce(x, kind, group))


def traced(function, *shape, dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return make_fx(lambda x: function(x))(torch.empty(shape, dtype=dtype, device=device)).graph


def calls(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_small_sum_is_one_op():
    graph = traced(lambda x: summed(x + 1) * 2, 1, 1, 2048)
    (site,) = rewrite(graph, Options())
    assert (site.op, site.rewrite, site.reason) == ("all_reduce", "collective.all_reduce", None)
    assert site.before == "all_reduce" and site.kernels == "all_reduce_kernel"
    assert site.detail == "4096 bytes of torch.bfloat16"
    names = calls(graph)
    assert "inductor_moe.all_reduce.default" in names
    assert not any("c10d" in name for name in names)
    (op,) = (node for node in graph.nodes if "inductor_moe" in str(node.target))
    assert op.args[1] == "shared" and op.meta["val"].shape == (1, 1, 2048)
    assert left_to_backends(graph) == ()


def used_early(x):
    started = collectives.all_reduce(x, "sum", "shared")
    return collectives.wait_tensor(started), started + 1


@pytest.mark.parametrize(
    "function, shape, dtype, reason",
    [
        (summed, (128, 2048), torch.bfloat16, "524288 bytes are more than 262144"),
        (summed, (33, 2048), torch.float32, "270336 bytes are more than 262144"),
        (summed, (5,), torch.bfloat16, "10 bytes are no whole number of 32-bit words"),
        (summed, (8,), torch.float64, "no kernel for torch.float64"),
        (summed, (8,), torch.int32, "no kernel for torch.int32"),
        (lambda x: summed(x, "max"), (8,), torch.float32, "not added up: max"),
        (lambda x: summed(x, group="far"), (8,), torch.float32, "several hosts"),
        (lambda x: summed(x, group="new"), (8,), torch.float32, "parallelize sets it up"),
        (used_early, (8,), torch.float32, "used before it is waited for"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_others_are_left_with_a_remark(function, shape, dtype, reason):
    graph = traced(function, *shape, dtype=dtype)
    before = calls(graph)
    assert rewrite(graph, Options()) == [] and calls(graph) == before
    (note,) = left_to_backends(graph)
    assert reason in note and "left to the process group's backend" in note


def test_what_lies_between_words_is_moved_not_left_to_the_backend():
    whole = torch.arange(9.0, dtype=torch.bfloat16)
    for x in (whole[1:], whole[:8].view(2, 4).t(), whole[:8]):
        found = ops.as_words(x)
        assert torch.equal(found, x) and found.is_contiguous() and found.data_ptr() % 4 == 0
    assert found.data_ptr() == whole.data_ptr()


def test_a_sum_on_a_cpu_is_none_of_ours():
    graph = traced(summed, 8, device="cpu")
    assert rewrite(graph, Options()) == [] and left_to_backends(graph) == ()


def test_a_package_keeps_its_collectives(monkeypatch):
    monkeypatch.setattr(compat, "compiles_package", lambda: True)
    graph = traced(summed, 2048)
    assert rewrite(graph, Options()) == []
    assert "without Python" in left_to_backends(graph)[0]


def test_it_has_a_switch():
    graph = traced(summed, 2048)
    assert rewrite(graph, Options(disable=("collective",))) == []
    assert "is off" in left_to_backends(graph)[0]


def test_memory_of_a_group_that_is_gone_is_not_used():
    """Names of groups start anew with each init_process_group."""
    x, one, reasons = torch.empty(8), torch.zeros(1), []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        name = dist.group.WORLD.group_name
        if not reasons:
            ops.set_shared_memory(name, ops.SharedMemory(0, 2, one, one, 1.0, dist.group.WORLD))
        reasons.append(ops.why_not(x, name))
        dist.destroy_process_group()
        reasons.append(ops.why_not(x, name))
    ops.set_shared_memory(name, "")
    assert reasons[0] is None
    assert all("its ranks share no memory" in reason for reason in reasons[1:])


def test_what_was_compiled_for_other_groups_is_not_taken_from_a_cache():
    first = FusionPass(Options()).uuid()
    ops.set_shared_memory("shared", "gone")
    assert FusionPass(Options()).uuid() != first
