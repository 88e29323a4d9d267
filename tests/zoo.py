"""Tiny random models of the transformers families, built from configs alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EXPERTS = 8
SCORES = torch.tensor([-4.0, -1.86, -1.23, -0.7, -0.19, 1.01, 1.75, 2.83])

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.5,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One family: its config, its layers, whether transformers can switch its experts."""

    name: str
    overrides: dict[str, Any]
    moe_layers: int = 2
    switchable: bool = True
    delta_layers: int = 0

    def expected(self) -> dict[str, int]:
        """The counts of a report in which every layer is fused."""
        counts = {"moe_experts": self.moe_layers, "delta_rule": self.delta_layers}
        return {op: count for op, count in counts.items() if count}

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The model in fp32, with weights large enough that every part matters."""
        config = CONFIG_MAPPING[self.name](**{**BASE, **self.overrides})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 or name.endswith("bias"):
                    parameter.normal_(0, 0.1 if parameter.dim() < 3 else 0.2)
            decide_routing(model)
        return model


def decide_routing(model: torch.nn.Module) -> None:
    """Make every routing decision independent of rounding.

    A near-tie in a router flips between two correct computations, and one flip outweighs every
    rounding error. Here the first E dims of the residual stream carry well separated scores, one
    permutation of them per token of the vocabulary, that nothing writes to later and that the
    routers read.
    """
    hidden = model.config.hidden_size
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0, 1)
    for row in embedding:
        row[:EXPERTS] = SCORES[torch.randperm(EXPERTS)]
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parts = name.split(".")[-3:]
        if shape == (EXPERTS, hidden) and any(part in ("gate", "router") for part in parts):
            parameter.copy_(torch.eye(EXPERTS, hidden))
        elif "router" in name and name.endswith("bias"):
            parameter.zero_()
        elif any(word in name for word in ("o_proj", "out_proj", "down_proj", "output_linear")):
            dim = len(shape) - 1 if shape[-1] == hidden else len(shape) - 2
            assert shape[dim] == hidden, (name, shape)
            parameter.narrow(dim, 0, EXPERTS).zero_()


MOE = (
    Family("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 24}),
    Family("qwen3_moe", QWEN),
    Family(
        "qwen3_next", {**QWEN, **LINEAR, "shared_expert_intermediate_size": 24},
        delta_layers=1,
    ),
    Family(
        "qwen3_5_moe_text", {**QWEN, **LINEAR, "shared_expert_intermediate_size": 24},
        delta_layers=1,
    ),
    Family("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    # Its norms of queries and keys are as wide as the hidden size: no heads are shared.
    Family("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    Family("deepseek_v2", {**DEEPSEEK, **MLA, "topk_method": "group_limited_greedy"}),
    Family("deepseek_v3", {**DEEPSEEK, **MLA}),
    Family("glm4_moe", DEEPSEEK),
    Family("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 40}),
    Family("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Family(
        "llama4_text",
        {"num_local_experts": 8, "intermediate_size": 24, "intermediate_size_mlp": 48,
         "num_experts_per_tok": 1, "moe_layers": [0, 1]},
        switchable=False,
    ),
)  # fmt: skip


DELTA = (
    *(family for family in MOE if family.delta_layers),
    Family("qwen3_5_text", LINEAR, moe_layers=0, switchable=False, delta_layers=1),
    Family(
        "olmo_hybrid", {**LINEAR, "num_key_value_heads": 2},
        moe_layers=0, switchable=False, delta_layers=1,
    ),
    Family(
        "kimi_linear",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "layer_types": LINEAR["layer_types"], "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 16, "linear_num_heads": 2, "num_key_value_heads": 2,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 16,
        },
        moe_layers=1, delta_layers=1,
    ),
)  # fmt: skip


def prepare(
    model: torch.nn.Module, dtype: torch.dtype, implementation: str, switchable: bool = True
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model in `dtype`, and the same rounded weights in fp64 as the reference."""
    low = copy.deepcopy(model).to(dtype)
    reference = copy.deepcopy(low).double()
    if switchable:
        low.set_experts_implementation(implementation)
        reference.set_experts_implementation("batched_mm")
    return low, reference


def prompt(model: torch.nn.Module, length: int, seed: int) -> torch.Tensor:
    """Random token ids [1, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator)


def static_cache(model: torch.nn.Module, length: int = 128) -> StaticCache:
    """A static cache with room for `length` tokens, in the model's dtype."""
    return StaticCache(config=model.config, max_cache_len=length)
