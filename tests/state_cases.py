"""Functions that update tensors of theirs in place: what in-place rewriting could get wrong.

A case is run for several steps over one set of states, eagerly and compiled; results and states
have to agree after every step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import forms
import torch
from decode_step import CHANNELS, HIDDEN, KEY, VALUE, VALUE_HEADS, Step
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inductor_moe.testing import relative_error

BATCH, LENGTH, STEPS = 2, 4, 3
KV_HEADS, HEADS, ROOM, DIM = 2, 6, 21, 16
PROMPT_ROOM, PROMPT_LENGTH = 60, 17
TOLERANCE, BF16_TOLERANCE = 2e-6, 8e-3

DECODE, CALLED = "delta_rule.decode", "delta_rule.called"
ATTENTION, PROMPT = "attention.decode", "attention.prompt"
EXPERTS = "moe.experts.batched_mm"


@dataclasses.dataclass(frozen=True)
class Case:
    """functions take the inputs of a step and the states, and take turns; `rewrites` match."""

    functions: Sequence[Callable[..., Any]]
    inputs: Callable[[int], list[Tensor]]
    states: Callable[[], list[Tensor]]
    rewrites: tuple[str, ...]
    tolerance: float = TOLERANCE


def run(case: Case, compiled: Callable[..., Any], device: str = "cpu") -> None:
    """Compare eager and compiled functions step by step."""
    torch.manual_seed(4)
    wanted_states = _to(case.states(), device)
    found_states = copy.deepcopy(wanted_states)
    functions = [compiled(function) for function in case.functions]
    leaves = torch.utils._pytree.tree_leaves
    for step in range(STEPS):
        turn = step % len(functions)
        inputs = [value.to(device) for value in case.inputs(step)]
        wanted = case.functions[turn](*inputs, *wanted_states)
        found = functions[turn](*inputs, *found_states)
        pairs = zip(leaves((found, found_states)), leaves((wanted, wanted_states)), strict=True)
        for position, (left, right) in enumerate(pairs):
            error = relative_error(left, right)
            assert error < case.tolerance, f"step {step}, tensor {position}: {error:.1e}"


def _to(states: list[Tensor], device: str) -> list[Tensor]:
    """The states on a device; what shares memory still does."""
    if device == "cpu":
        return states
    storages: dict[int, Tensor] = {}
    moved = []
    for state in states:
        key = state.untyped_storage().data_ptr()
        if key not in storages:
            count = state.untyped_storage().nbytes() // state.element_size()
            storages[key] = torch.as_strided(state, (count,), (1,), 0).to(device)
        moved.append(
            torch.as_strided(storages[key], state.shape, state.stride(), state.storage_offset())
        )
    return moved


def rows(step: int) -> list[Tensor]:
    return [torch.randn(BATCH, HIDDEN)]


def two_layers() -> tuple[Step, Step]:
    first, second = Step().eval(), Step().eval()
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(0.7)
    return first, second


FIRST, SECOND = two_layers()
ROW_SHAPE, STATE_SHAPE = (BATCH, CHANNELS, LENGTH), (BATCH, VALUE_HEADS, KEY, VALUE)


def states() -> list[Tensor]:
    return FIRST.states(BATCH)


def packed() -> Tensor:
    return torch.randn(BATCH, CHANNELS * LENGTH + VALUE_HEADS * KEY * VALUE)


def unpacked(buffer: Tensor) -> list[Tensor]:
    parts = buffer.split([CHANNELS * LENGTH, VALUE_HEADS * KEY * VALUE], dim=1)
    return [part.view(shape) for part, shape in zip(parts, (ROW_SHAPE, STATE_SHAPE), strict=True)]


def both_layers(x: Tensor, *states: Tensor) -> Tensor:
    first, second = states[:2], states[-2:]
    return FIRST(x, *first) + SECOND(x, *second)


def stacked_layers(x: Tensor, conv_states: Tensor, rule_states: Tensor) -> Tensor:
    return FIRST(x, conv_states[0], rule_states[0]) + SECOND(x, conv_states[1], rule_states[1])


def old_state_returned(x: Tensor, conv_state: Tensor, state: Tensor) -> Any:
    old = conv_state.clone(), state.clone()
    return FIRST(x, conv_state, state), old


def old_state_kept(x: Tensor, history: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    history.mul_(0).add_(state)
    return FIRST(x, conv_state, state)


def new_state_kept(x: Tensor, history: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    out = FIRST(x, conv_state, state)
    history.copy_(state)
    return out


def new_state_returned(x: Tensor, conv_state: Tensor, state: Tensor) -> Any:
    return FIRST(x, conv_state, state), state, conv_state[:, 0]


def state_scaled_after(x: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    out = FIRST(x, conv_state, state)
    state.mul_(0.5)
    return out


def state_scaled_before(x: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    state.mul_(0.5)
    conv_state[:, 0] = 0
    return FIRST(x, conv_state, state)


def state_read_by_the_input(x: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
    return FIRST(x + state.mean(), conv_state, state)


def turned() -> list[Tensor]:
    conv_state, state = states()
    return [conv_state.mT.contiguous().mT, state.mT.contiguous().mT]


def every_other() -> list[Tensor]:
    return [torch.randn(2 * size, *rest)[::2] for size, *rest in (ROW_SHAPE, STATE_SHAPE)]


def twice(values: list[Tensor]) -> list[Tensor]:
    return [*values, *values]


def queries(step: int) -> list[Tensor]:
    heads = torch.randn(BATCH, HEADS, 1, DIM)
    return [torch.tensor([step + 3]), heads, torch.randn(2, BATCH, KV_HEADS, 1, DIM)]


def caches() -> list[Tensor]:
    return [torch.randn(BATCH, KV_HEADS, ROOM, DIM) for _ in range(2)]


def prompts(step: int) -> list[Tensor]:
    position = torch.arange(PROMPT_LENGTH) + step * PROMPT_LENGTH
    q = torch.randn(BATCH, HEADS, PROMPT_LENGTH, DIM)
    new = torch.randn(2, BATCH, KV_HEADS, PROMPT_LENGTH, DIM)
    return [position, q.bfloat16(), new.bfloat16()]


def prompt_caches() -> list[Tensor]:
    return [torch.randn(BATCH, KV_HEADS, PROMPT_ROOM, DIM).bfloat16() for _ in range(2)]


def write(position: Tensor, new: Tensor, k: Tensor, v: Tensor) -> None:
    k.index_copy_(2, position, new[0])
    v.index_copy_(2, position, new[1])


def attend(position: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    room = k.shape[2]
    seen = (torch.arange(room, device=q.device) <= position[:, None])[None, None]
    k, v = (
        x[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(BATCH, HEADS, room, DIM)
        for x in (k, v)
    )
    return scaled_dot_product_attention(q, k, v, attn_mask=seen)


def cache_written_first(position: Tensor, q: Tensor, new: Tensor, k: Tensor, v: Tensor) -> Tensor:
    write(position, new, k, v)
    return attend(position, q, k, v)


def cache_read_first(position: Tensor, q: Tensor, new: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(position, q, k.clone(), v.clone())
    write(position, new, k, v)
    return out


def cache_shared(position: Tensor, q: Tensor, new: Tensor, k: Tensor, v: Tensor) -> Tensor:
    before = attend(position, q, k, v)
    write(position, new, k, v)
    between = attend(position, q + 1, k, v)
    write(position + 1, 0.5 * new, k, v)
    return before + between + attend(position + 1, q - 1, k, v)


def cache_in_one_buffer(position: Tensor, q: Tensor, new: Tensor, both: Tensor) -> Tensor:
    write(position, new, both[0], both[1])
    return attend(position, q, both[0], both[1])


def choices(step: int) -> list[Tensor]:
    scores = torch.rand(forms.TOKENS, forms.EXPERTS)
    weights, ids = scores.topk(forms.TOP_K, dim=-1)
    return [ids, weights]


def tokens() -> Tensor:
    return torch.randn(forms.TOKENS, forms.HIDDEN)


def expert_layer() -> forms.Experts:
    return forms.Experts(form="batched").eval()


MIXTURE = expert_layer()


def residual_in_place(ids: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    x.add_(MIXTURE(x, ids, weights))
    return x.sum(-1)


def experts_around_a_write(ids: Tensor, weights: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    before = MIXTURE(x * scale, ids, weights)
    scale.mul_(0.5)
    x.copy_(0.1 * before)
    return before + MIXTURE(x * scale, ids.flip(0), weights)


CASES = {
    "plain": Case([FIRST], rows, states, (DECODE,)),
    "a layer each": Case([both_layers], rows, lambda: states() + states(), (DECODE, DECODE)),
    "one state in two layers": Case([both_layers], rows, states, (CALLED, CALLED)),
    "one tensor as the states of two layers": Case(
        [both_layers], rows, lambda: twice(states()), (CALLED, CALLED)
    ),
    "two models": Case([FIRST, SECOND], rows, states, (DECODE,)),
    "views inside": Case(
        [lambda x, buffer: FIRST(x, *unpacked(buffer))], rows, lambda: [packed()], (CALLED,)
    ),
    "views of one buffer": Case([FIRST], rows, lambda: unpacked(packed()), (CALLED,)),
    "rows of a stack": Case(
        [stacked_layers], rows,
        lambda: [torch.randn(2, *ROW_SHAPE), torch.randn(2, *STATE_SHAPE)], (CALLED, CALLED),
    ),
    "turned": Case([FIRST], rows, turned, (CALLED,)),
    "every other row": Case([FIRST], rows, every_other, (CALLED,)),
    "old state returned": Case([old_state_returned], rows, states, (CALLED,)),
    "old state kept": Case(
        [old_state_kept], rows, lambda: [torch.randn(STATE_SHAPE), *states()], (CALLED,)
    ),
    "new state kept": Case(
        [new_state_kept], rows, lambda: [torch.randn(STATE_SHAPE), *states()], (CALLED,)
    ),
    "new state returned": Case([new_state_returned], rows, states, (CALLED,)),
    "state scaled after": Case([state_scaled_after], rows, states, (CALLED,)),
    "state scaled before": Case([state_scaled_before], rows, states, (CALLED,)),
    "state read by the input": Case([state_read_by_the_input], rows, states, (CALLED,)),
    "cache written first": Case([cache_written_first], queries, caches, (ATTENTION,)),
    "cache read first": Case([cache_read_first], queries, caches, (ATTENTION,)),
    "cache shared": Case([cache_shared], queries, caches, (ATTENTION,) * 3),
    "cache in one buffer": Case(
        [cache_in_one_buffer], queries, lambda: [torch.stack(caches())], (ATTENTION,)
    ),
    "prompt, cache written first": Case(
        [cache_written_first], prompts, prompt_caches, (PROMPT,), BF16_TOLERANCE
    ),
    "prompt, cache read first": Case(
        [cache_read_first], prompts, prompt_caches, (PROMPT,), BF16_TOLERANCE
    ),
    "prompt, cache shared": Case(
        [cache_shared], prompts, prompt_caches, (PROMPT,) * 3, BF16_TOLERANCE
    ),
    "prompt, cache in one buffer": Case(
        [cache_in_one_buffer], prompts, lambda: [torch.stack(prompt_caches())], (PROMPT,),
        BF16_TOLERANCE,
    ),
    "residual in place": Case(
        [residual_in_place], choices, lambda: [tokens()], (EXPERTS,)
    ),
    "experts around a write": Case(
        [experts_around_a_write], choices,
        lambda: [tokens(), torch.ones(forms.HIDDEN)], (EXPERTS, EXPERTS),
    ),
}  # fmt: skip
