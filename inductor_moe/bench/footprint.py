"""What a model has to move and to compute for a step, counted from its own tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inductor_moe.quant.modules import buffers_of, slots_of


@dataclass(frozen=True)
class Footprint:
    """Of all layers together: bytes and numbers of weights.

    dense     read for every step whatever the tokens are, the output head excluded
    head      the output head, read for the last token of a sequence alone
    expert    one expert of every layer
    experts   of a layer, of which a token uses `top_k`
    key       bytes of keys and values of one position of one sequence
    state     bytes of convolution and recurrent states of one sequence
    attention of one token over one position, FLOPs
    """

    dense_bytes: float
    dense_weights: float
    head_bytes: float
    head_weights: float
    expert_bytes: float
    expert_weights: float
    experts: int
    top_k: int
    key_bytes: float
    state_bytes: float
    attention_flops: float

    def bytes(self, batch: int, tokens: int, filled: float) -> float:
        """Of a step of `tokens` for each of `batch` sequences of which `filled` are cached.

        Every weight that is used once, the experts that so many tokens choose on average if they
        choose evenly; the keys and values that are filled; the states, read and written.
        """
        # Of E experts, M tokens that each choose k leave (1 - k / E)^M untouched.
        touched = self.experts * -math.expm1(
            batch * tokens * math.log1p(-min(self.top_k / max(self.experts, 1), 1 - 1e-12))
        )
        weights = self.dense_bytes + self.head_bytes + touched * self.expert_bytes
        states = (filled + tokens) * self.key_bytes + 2 * self.state_bytes
        return weights + batch * states

    def flops(self, batch: int, tokens: int, filled: float) -> float:
        """Of the same step: products with weights, and attention to what came before."""
        a_token = self.dense_weights + self.top_k * self.expert_weights
        attended = tokens * (filled + (tokens + 1) / 2)
        products = 2 * (tokens * a_token + self.head_weights)
        return batch * (products + attended * self.attention_flops)


def measure(model: Any, states: list[tuple[str, Tensor]], batch: int, length: int) -> Footprint:
    """Count a model's tensors.

    states  (kind, tensor) of a cache for `batch` sequences of `length` positions; the kind is
            "keys", "values" or another
    """
    config = model.config.get_text_config(decoder=True)
    experts = int(getattr(config, "num_experts", 0) or 0)
    totals = {"dense": [0.0, 0.0], "head": [0.0, 0.0], "expert": [0.0, 0.0]}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for module in model.modules():
        if module is embedding and not config.tie_word_embeddings:
            continue  # a row for each token is nothing beside the rest
        for name, size, weights in _weights(module):
            expert = name == "experts"
            kind = "expert" if expert else "head" if module is head else "dense"
            totals[kind][0] += size / (experts if expert else 1)
            totals[kind][1] += weights / (experts if expert else 1)
    positions = batch * length
    keys = [tensor for kind, tensor in states if kind in ("keys", "values")]
    others = [tensor for kind, tensor in states if kind not in ("keys", "values", "position")]
    groups = config.num_attention_heads // config.num_key_value_heads
    return Footprint(
        dense_bytes=totals["dense"][0],
        dense_weights=totals["dense"][1],
        head_bytes=totals["head"][0],
        head_weights=totals["head"][1],
        expert_bytes=totals["expert"][0],
        expert_weights=totals["expert"][1],
        experts=experts,
        top_k=int(getattr(config, "num_experts_per_tok", 0) or 0),
        key_bytes=sum(t.numel() * t.element_size() for t in keys) / positions,
        state_bytes=sum(t.numel() * t.element_size() for t in others) / batch,
        attention_flops=2 * groups * sum(t.numel() for t in keys) / positions,
    )


def _weights(module: nn.Module) -> list[tuple[str, int, int]]:
    """("experts" or "dense", bytes, number) of the weights that a module itself holds."""
    found = []
    for slot in slots_of(module):
        packed = buffers_of(module, slot)
        tensors = [t for t in (packed.packed, packed.scales, packed.zeros) if t is not None]
        size = sum(t.numel() * t.element_size() for t in tensors)
        rows = math.prod(packed.packed.shape[:-1])
        kind = "experts" if packed.packed.dim() == 3 else "dense"
        found.append((kind, size, rows * slot.in_features))
    for parameter in module._parameters.values():
        if parameter is not None:
            convolution = isinstance(module, nn.modules.conv._ConvNd)
            kind = "experts" if parameter.dim() == 3 and not convolution else "dense"
            size = parameter.numel() * parameter.element_size()
            found.append((kind, size, parameter.numel()))
    return found
