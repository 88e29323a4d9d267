"""What prefill and decode are to torch.export: an unmodified model between states and a sampler.

The states (keys and values, convolution and recurrent states, the position) are inputs that the
methods update in place. A buffer of the package could not be: each method of a package owns its
constants, and functionalisation refuses to write a delta-rule state into one. As inputs they
belong to the caller, who has as many sessions as there are sets of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inductor_moe.aoti.sampling import argmax_last, next_token
from inductor_moe.errors import ExportError


@dataclasses.dataclass(frozen=True)
class State:
    """One tensor of a session: zero before the first token."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def new(self, device: torch.device | str) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def read_states(model: Any, batch_size: int, max_seq_len: int) -> list[State]:
    """The states of one session of a model, found by running it on two tokens."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=8)
    tokens = torch.zeros((batch_size, 2), dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    states = [State("position", (), torch.int64)]
    for index, layer in enumerate(cache.layers):
        for name, tensor in _tensors(layer, index).items():
            shape = tuple(tensor.shape)
            if name in ("keys", "values"):
                shape = (*shape[:2], max_seq_len, shape[3])
            states.append(State(f"layers.{index}.{name}", shape, tensor.dtype))
    return states


def _tensors(layer: Any, index: int) -> dict[str, Tensor]:
    from transformers.cache_utils import (
        LinearAttentionLayer,
        StaticLayer,
        StaticSlidingWindowLayer,
    )

    if type(layer) in (StaticLayer, StaticSlidingWindowLayer):
        return {"keys": layer.keys, "values": layer.values}
    if type(layer) is LinearAttentionLayer:
        found: dict[str, Tensor] = {}
        for slot in layer.conv_states:
            for kind in ("conv", "recurrent"):
                tensor = getattr(layer, f"{kind}_states")[slot]
                if tensor is None:
                    raise ExportError(
                        f"export_generation: layer {index} keeps no {kind} state; such models "
                        "are not supported"
                    )
                found[f"{kind}.{slot}"] = tensor
        return found
    raise ExportError(
        f"export_generation: layer {index} caches in a {type(layer).__name__}; supported are "
        "StaticLayer, StaticSlidingWindowLayer and LinearAttentionLayer"
    )


class Step(torch.nn.Module):
    """`prefill` or `decode`: some tokens in, the next one out, states updated in place.

    Called with tokens [B, T] int64, temperature [B], top_p [B], uniforms [B, max_seq_len + 1]
    (fp32; the token at position p is drawn with uniforms[:, p]), and the states. Returns the next
    token [B] int64. With `feed` it also overwrites tokens [B, 1] with it, so that a replay of the
    step alone goes on to the next token. Without `sample` it is the most likely token, and
    temperature, top_p and uniforms are not read.
    """

    def __init__(
        self, model: torch.nn.Module, states: Sequence[State], feed: bool, sample: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.names = [state.name for state in states]
        self.feed, self.sample = feed, sample

    def forward(
        self,
        tokens: Tensor,
        temperature: Tensor,
        top_p: Tensor,
        uniforms: Tensor,
        *states: Tensor,
    ) -> tuple[Tensor]:
        given = dict(zip(self.names, states, strict=True))
        position = given["position"]
        cache = _cache(self.model.config, given)
        logits = self.model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        end = position + tokens.shape[1]
        if self.sample:
            uniform = uniforms.index_select(1, end.reshape(1)).squeeze(1)
            token = next_token(logits, temperature, top_p, uniform)
        else:
            token = argmax_last(logits)
        position.copy_(end)
        if self.feed:
            tokens.copy_(token[:, None])
        return (token,)


def _cache(config: Any, given: dict[str, Tensor]) -> Any:
    """A cache of transformers' whose layers hold the given states."""
    from transformers import StaticCache

    keys = next((tensor for name, tensor in given.items() if name.endswith(".keys")), None)
    length = 1 if keys is None else keys.shape[2]
    cache = StaticCache(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in given.items()
            if name.startswith(prefix)
        }
        if "keys" in own:
            cache.layers[index] = _attention_layer(
                own["keys"], own["values"], given["position"], layer.is_sliding
            )
        else:
            _fill(layer, own)
    return cache


def _attention_layer(keys: Tensor, values: Tensor, position: Tensor, sliding: bool) -> Any:
    from transformers.cache_utils import CacheLayerMixin, StaticLayer

    class Attention(StaticLayer):  # type: ignore[misc]
        """Keys and values of every position; a sliding window is left to the mask.

        transformers' own sliding layer counts in Python, which one graph for all lengths cannot.
        """

        def __init__(self) -> None:
            CacheLayerMixin.__init__(self)
            self.max_cache_len = keys.shape[2]
            self.keys, self.values = keys, values
            self.dtype, self.device = keys.dtype, keys.device
            self.batch_size, self.num_heads = keys.shape[:2]
            self.k_head_dim, self.v_head_dim = keys.shape[3], values.shape[3]
            self.cumulative_length = position
            self.is_sliding = sliding
            self.is_initialized = True

        def update(self, new_keys: Tensor, new_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = torch.arange(new_keys.shape[2], device=position.device) + position
            keys.index_copy_(2, rows, new_keys)
            values.index_copy_(2, rows, new_values)
            return keys, values

    return Attention()


def _fill(layer: Any, own: dict[str, Tensor]) -> None:
    """Give a linear-attention layer its states, marked as used.

    A zero state is what a first prefill starts from, so the same graph also continues a session.
    """
    for slot in layer.conv_states:
        conv, recurrent = own[f"conv.{slot}"], own[f"recurrent.{slot}"]
        layer.conv_states[slot], layer.recurrent_states[slot] = conv, recurrent
        layer.conv_kernel_size[slot] = conv.shape[-1]
        layer.is_conv_states_initialized[slot] = True
        layer.is_recurrent_states_initialized[slot] = True
        layer.has_previous_state[slot] = True
        layer.dtype, layer.device = conv.dtype, conv.device
