"""What one rank holds of a language model: weights by kind of layer, caches, numbers of heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from inductor_moe.parallel_heads import most_shards
from inductor_moe.quant.quantize import FEWEST
from inductor_moe.reference.quant import group_count, packed_width

BF16, FP32 = 2, 4
GROUP = 128  # of int4, as `models.build` packs


@dataclass(frozen=True)
class Decoder:
    """The sizes of a language model with experts in every layer.

    heads, key_heads, head_dim   of attention; gated: each query head has a gate
    delta_*                      of the gated delta rule, 0 layers without it
    shared                       inner width of the shared expert, 0 without one
    """

    hidden: int
    vocabulary: int
    tied: bool
    attention_layers: int
    heads: int
    key_heads: int
    head_dim: int
    gated: bool
    delta_layers: int
    delta_heads: int
    delta_key_heads: int
    delta_key: int
    delta_value: int
    taps: int
    experts: int
    top_k: int
    inner: int
    shared: int

    @property
    def layers(self) -> int:
        return self.attention_layers + self.delta_layers

    @staticmethod
    def of(config: Any) -> Decoder:
        """Of a config of transformers: Qwen3-MoE or Qwen3.5-MoE."""
        kinds = getattr(config, "layer_types", None) or ["full"] * config.num_hidden_layers
        delta = kinds.count("linear_attention")
        return Decoder(
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            attention_layers=len(kinds) - delta,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            gated=delta > 0,
            delta_layers=delta,
            delta_heads=getattr(config, "linear_num_value_heads", 0),
            delta_key_heads=getattr(config, "linear_num_key_heads", 0),
            delta_key=getattr(config, "linear_key_head_dim", 0),
            delta_value=getattr(config, "linear_value_head_dim", 0),
            taps=getattr(config, "linear_conv_kernel_dim", 0),
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            inner=config.moe_intermediate_size,
            shared=getattr(config, "shared_expert_intermediate_size", 0),
        )


@dataclass(frozen=True)
class Weights:
    """How many, and how many bytes they take."""

    number: int = 0
    bytes: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.number + other.number, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Weights:
        return Weights(self.number * times, self.bytes * times)


@dataclass(frozen=True)
class Rank:
    """One of `ranks` ranks that share a model as `parallelize` does.

    scheme        "none", "int4" or "int8", of the linear layers and the experts
    share_heads   whether attention and delta-rule layers are sharded, or whole on every rank
    cut_shared    whether shared experts are, where their channels divide
    """

    decoder: Decoder
    scheme: str
    ranks: int = 1
    share_heads: bool = True
    cut_shared: bool = True

    def alone(self) -> Rank:
        """The only rank of the same model."""
        return dataclasses.replace(self, ranks=1)

    @property
    def attention_shards(self) -> int:
        ranks = self.ranks if self.share_heads else 1
        return most_shards(ranks, self.decoder.heads, self.decoder.key_heads)

    @property
    def delta_shards(self) -> int:
        d = self.decoder
        if not d.delta_layers:
            return 1
        ranks = self.ranks if self.share_heads else 1
        return most_shards(ranks, d.delta_heads, d.delta_key_heads)

    @property
    def heads(self) -> int:
        return self.decoder.heads // self.attention_shards

    @property
    def key_heads(self) -> int:
        return max(self.decoder.key_heads // self.attention_shards, 1)

    @property
    def delta_heads(self) -> int:
        return self.decoder.delta_heads // self.delta_shards

    @property
    def delta_channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        d = self.decoder
        keys = max(d.delta_key_heads // self.delta_shards, 1)
        return 2 * keys * d.delta_key + self.delta_heads * d.delta_value

    def attention(self) -> Weights:
        """The projections of one attention layer."""
        d = self.decoder
        queries, keys = self.heads * d.head_dim, self.key_heads * d.head_dim
        found = self._matrix(queries * (2 if d.gated else 1), d.hidden)
        return found + self._matrix(keys, d.hidden) * 2 + self._matrix(d.hidden, queries)

    def delta(self) -> Weights:
        """The projections and the convolution of one delta-rule layer."""
        d, values = self.decoder, self.delta_heads * self.decoder.delta_value
        found = self._matrix(self.delta_channels, d.hidden) + self._matrix(values, d.hidden)
        found += self._matrix(self.delta_heads, d.hidden) * 2 + self._matrix(d.hidden, values)
        return found + _dense(self.delta_channels * d.taps)

    def expert(self) -> Weights:
        """One expert of one layer."""
        return self._gated_mlp(self.decoder.inner)

    def every_token(self) -> Weights:
        """Of one layer the router, and the shared expert or a part of it, with its gate."""
        d = self.decoder
        own = d.shared // self.ranks
        divides = d.shared % self.ranks == 0 and (self.scheme != "int4" or own % GROUP == 0)
        own = own if self.cut_shared and divides else d.shared
        gate = _dense(d.hidden) if d.shared else Weights()
        return _dense(d.experts * d.hidden) + self._gated_mlp(own) + gate

    def head(self) -> Weights:
        d = self.decoder
        size = d.vocabulary * d.hidden
        return _dense(size) if d.tied else self._matrix(d.vocabulary, d.hidden)

    def norms(self) -> Weights:
        """Norms, and the decays of delta-rule layers."""
        d = self.decoder
        attention = 2 * d.head_dim * d.attention_layers
        delta = (d.delta_value + 2 * self.delta_heads) * d.delta_layers
        return _dense((2 * d.layers + 1) * d.hidden + attention + delta)

    def weights(self) -> Weights:
        """All that the rank holds."""
        d = self.decoder
        experts = self.expert() * (d.experts // self.ranks)
        found = (experts + self.every_token()) * d.layers + self.norms() + self.head()
        found += self.attention() * d.attention_layers + self.delta() * d.delta_layers
        return found if d.tied else found + _dense(d.vocabulary * d.hidden)

    def key_bytes(self) -> int:
        """Keys and values of one position of one sequence, in all layers."""
        return 2 * BF16 * self.key_heads * self.decoder.head_dim * self.decoder.attention_layers

    def state_bytes(self) -> int:
        """Recurrent and convolution states of one sequence, in all layers."""
        d = self.decoder
        recurrent = FP32 * self.delta_heads * d.delta_key * d.delta_value
        return (recurrent + BF16 * self.delta_channels * d.taps) * d.delta_layers

    def memory(self, batch: int, length: int) -> int:
        """Bytes of the weights and of a cache for `batch` sequences of `length` positions."""
        return self.weights().bytes + batch * (length * self.key_bytes() + self.state_bytes())

    def _gated_mlp(self, inner: int) -> Weights:
        hidden = self.decoder.hidden
        return self._matrix(2 * inner, hidden) + self._matrix(hidden, inner)

    def _matrix(self, rows: int, columns: int) -> Weights:
        number = rows * columns
        if self.scheme == "none" or min(rows, columns) < FEWEST:
            return _dense(number)
        bits, group = (4, GROUP) if self.scheme == "int4" else (8, 0)
        codes = packed_width(columns, bits) * (2 if bits == 4 else 1)
        return Weights(number, rows * (codes + BF16 * group_count(columns, group)))


def _dense(number: int) -> Weights:
    return Weights(number, BF16 * number)
