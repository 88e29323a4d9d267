"""The sum over ranks in shared memory, one rank at a time, its peers' words already there."""

from __future__ import annotations

import math
import os
from unittest import mock

import pytest
import torch
from kernels.interpreted import Interpreted
from triton.runtime.errors import InterpreterError

from inductor_moe.ops import all_reduce as ops
from inductor_moe.ops.all_reduce import PROGRAMS, ROOM, SharedMemory, all_reduce_cuda
from inductor_moe.ops.dispatch import KERNEL_DTYPES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="chooses itself what is interpreted"
)


class Host:
    """The slots of all ranks, in one process."""

    def __init__(self, ranks, timeout=1.0):
        self.slots = [
            torch.zeros(PROGRAMS, 2, ranks, ROOM, dtype=torch.int64) for _ in range(ranks)
        ]
        addresses = torch.tensor([slots.data_ptr() for slots in self.slots])
        self.memories = [
            SharedMemory(rank, ranks, addresses, torch.zeros(PROGRAMS, dtype=torch.int32), timeout)
            for rank in range(ranks)
        ]

    def call(self, inputs, epochs):
        """Every rank's result: each finds the words that the others' kernels would send.

        epochs  the number of this call for each program
        """
        for rank, slots in enumerate(self.slots):
            for sender, x in enumerate(inputs):
                if sender != rank:
                    put(slots, sender, x, epochs)
        return [
            all_reduce_cuda(x, memory, wrap=Interpreted)
            for x, memory in zip(inputs, self.memories, strict=True)
        ]


def words_of(x):
    return x.view(torch.int32).long() & 0xFFFFFFFF


def block_of(words):
    block = ops.FEWEST
    while block * PROGRAMS < words:
        block *= 2
    return block


def put(slots, sender, x, epochs):
    words = words_of(x)
    block = block_of(len(words))
    for program, part in enumerate(words.split(block)):
        epoch = epochs[program]
        flagged = part | (epoch << 32 if epoch < 1 << 31 else (epoch - (1 << 32)) << 32)
        slots[program, epoch % 2, sender, : len(part)] = flagged


@pytest.fixture(autouse=True)
def poisoned():
    empty_like = torch.empty_like
    with mock.patch.object(torch, "empty_like", lambda x: empty_like(x).fill_(math.nan)):
        yield


def in_order(inputs):
    """The sum that all ranks must have, to the bit."""
    total = torch.zeros(inputs[0].shape)
    for x in inputs:
        total += x.float()
    return total.to(inputs[0].dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("ranks, count", [(2, 2048), (3, 90), (4, 600)])
def test_every_rank_has_the_sum(ranks, count, dtype):
    torch.manual_seed(count)
    host = Host(ranks)
    for call in range(1, 4):
        inputs = [torch.randn(count).to(dtype) for _ in range(ranks)]
        results = host.call(inputs, [call] * PROGRAMS)
        exact = sum(x.double() for x in inputs)
        for result in results:
            assert torch.equal(result, in_order(inputs))
            error = (result.double() - exact).norm() / exact.norm()
            assert error < {torch.float32: 2e-7, torch.float16: 4e-4}.get(dtype, 4e-3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_words_that_are_sent(rank):
    torch.manual_seed(7)
    host, x = Host(3), torch.randn(600).bfloat16()
    for sender in range(3):
        put(host.slots[rank], sender, x, [1] * PROGRAMS)
    before = [slots.clone() for slots in host.slots]
    all_reduce_cuda(x, host.memories[rank], wrap=Interpreted)
    for peer, slots in enumerate(host.slots):
        if peer != rank:
            put(before[peer], rank, x, [1] * PROGRAMS)
        assert torch.equal(slots, before[peer])
    assert host.memories[rank].epochs.tolist() == [1] * 3 + [0] * (PROGRAMS - 3)


def test_programs_count_their_own_calls():
    torch.manual_seed(3)
    host, epochs = Host(2), [0] * PROGRAMS
    for count in (600, 100, 256, 600, 17000, 90):
        words = count // 2
        for program in range(-(-words // block_of(words))):
            epochs[program] += 1
        inputs = [torch.randn(count).bfloat16() for _ in range(2)]
        for result in host.call(inputs, epochs):
            assert torch.equal(result, in_order(inputs))
        assert [memory.epochs.tolist() for memory in host.memories] == [epochs, epochs]


@pytest.mark.parametrize("held", [0, 1, 2, 4, -1, 1 << 30])
def test_words_of_another_call_are_not_taken(held):
    """The third call: what the slots hold is of no call, of earlier ones, or of later ones."""
    host, x = Host(2, timeout=1e-4), torch.ones(512).bfloat16()
    for memory in host.memories:
        memory.epochs.fill_(2)
    for parity in (0, 1):
        epoch = held & 0xFFFFFFFF
        put(host.slots[0], 1, torch.full_like(x, 100), [epoch] * PROGRAMS)
        host.slots[0][:, parity] = host.slots[0][:, epoch % 2]
    with pytest.raises(InterpreterError, match="Trap"):
        all_reduce_cuda(x, host.memories[0], wrap=Interpreted)
    put(host.slots[0], 1, x, [3] * PROGRAMS)
    assert torch.equal(all_reduce_cuda(x, host.memories[0], wrap=Interpreted), x + x)


def test_numbers_go_round():
    host, x = Host(2), torch.randn(256).bfloat16()
    for memory in host.memories:
        memory.epochs.fill_(-2)
    for epoch in ((1 << 32) - 1, 0, 1):
        for result in host.call([x, x], [epoch] * PROGRAMS):
            assert torch.equal(result, x + x)


def test_one_missing_word_is_waited_for_no_longer_than_the_time_out():
    host, x = Host(2, timeout=1e-3), torch.ones(512).bfloat16()
    put(host.slots[0], 1, x, [1] * PROGRAMS)
    host.slots[0][1, 1, 1, 77] = 0
    with pytest.raises(InterpreterError, match="Trap"):
        all_reduce_cuda(x, host.memories[0], wrap=Interpreted)
