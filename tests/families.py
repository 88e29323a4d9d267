"""Every family of transformers with expert or delta-rule layers, as tiny random models.

One table of small sizes serves all configs: a size applies where a config has an argument of that
name. What a family needs beyond it stands in OVERRIDES.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

# Experts of their own, outside transformers' switchable implementations.
OWN_EXPERTS = {
    "aria": "AriaExperts",
    "dbrx": "DbrxExperts",
    "jetmoe": "JetMoeMoE",
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "nllb_moe": "NllbMoeExperts",
    "step3p7": "Step3p7Experts",
    "switch_transformers": "SwitchTransformersExperts",
}
# Families whose experts are left, and why.
_MODULES = (
    "each expert is a module, called in a loop over the experts that were hit: how often it runs "
    "depends on the data, and transformers has no other form"
)
WHY_LEFT = {"nllb_moe": _MODULES, "switch_transformers": _MODULES}
# A size that depends on data has no bound in this form alone; the table has PyTorch's words.
NOT_EXPORTED = {"qwen4_exp"}
# Families without three prompts in which bf16 leaves every choice of experts decided.
UNDECIDED = {"ernie4_5_moe", "flex_olmo", "inkling", "longcat_flash", "mistral4", "zaya"}
DELTA_CLASSES = r"\w*(GatedDeltaNet|DeltaAttention)|Glm5NextTextLinearAttention"

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "decoder_sparse_step": 1,
    "router_jitter_noise": 0.0,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "shared_intermediate_size": 24,
}

LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "n_heads": 2, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2
        },
    },
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * 2},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 12], "mlp_layer_types": ["sparse"] * 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]
        },
    },
    "gemma4": {
        "enable_moe_block": True, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 96,
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "glm5_next": {
        **LINEAR_THEN_FULL, "qk_rope_head_dim": 0, "mlp_layer_types": ["sparse"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
        "expert_layer_period": 1, "expert_layer_offset": 0,
    },
    "kimi_linear": {**LINEAR_THEN_FULL, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        for kind in ("full_attention", "sliding_attention")
    }},
    "nllb_moe": {
        **{f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in {
            "layers": 1, "ffn_dim": 48, "attention_heads": 2, "sparse_step": 1}.items()},
        "moe_token_dropout": 0.0,
    },
    "olmo_hybrid": LINEAR_THEN_FULL,
    "qwen3_5": LINEAR_THEN_FULL,
    "qwen3_5_moe": LINEAR_THEN_FULL,
    "qwen3_next": LINEAR_THEN_FULL,
    "qwen4_exp": {
        **LINEAR_THEN_FULL, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 64, "indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 4,
    },
    "step3p7": {
        "mlp_layer_types": ["sparse"] * 2, "sliding_window": 64, "share_expert_dim": 24,
    },
    "switch_transformers": {
        "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "num_heads": 2, "d_kv": 16, "d_ff": 48,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
# The class to build where it is not the one that is registered for the config.
MODELS = {
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "step3p7": "Step3p7TextModel",
}
ENCODER_DECODER = ("nllb_moe", "switch_transformers")
ENCODERS = ("openai_privacy_filter", "diffusion_gemma")


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One folder of transformers.models; `switchable` experts have several implementations."""

    name: str
    switchable: bool
    delta: bool

    @functools.cached_property
    def config(self) -> Any:
        """The tiny config of the text model."""
        config_class = self._config_class()
        known = inspect.signature(config_class.__init__).parameters
        sizes = {key: value for key, value in SIZES.items() if key in known}
        return config_class(**{**sizes, **OVERRIDES.get(self.name, {})})

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"transformers.models.{self.name}.{kind}_{self.name}")

    def _config_class(self) -> Any:
        module = self._module("configuration")
        classes = [
            value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, transformers.PreTrainedConfig)
            and value.__module__ == module.__name__
            and not re.search("Vision|Audio|VL_Moe", name)
            and "vocab_size" in inspect.signature(value.__init__).parameters
        ]
        text = [value for value in classes if "TextConfig" in value.__name__]
        return (text or classes)[0]

    def _model_class(self) -> Any:
        modeling = self._module("modeling")
        if self.name in MODELS:
            return getattr(modeling, MODELS[self.name])
        own = [
            value
            for value in vars(modeling).values()
            if isinstance(value, type)
            and issubclass(value, transformers.PreTrainedModel)
            and value.__module__ == modeling.__name__
            and value.__dict__.get("config_class", getattr(value, "config_class", None))
            is self._config_class()
        ]
        for ending in ("ForCausalLM", "ForConditionalGeneration", "Model"):
            for value in own:
                if value.__name__.endswith(ending):
                    return value
        raise LookupError(f"{self.name}: no model for {self._config_class().__name__}")

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The model in fp32 with weights large enough that every part matters."""
        torch.manual_seed(seed)
        model = self._model_class()(self.config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 or name.endswith("bias"):
                    parameter.normal_(0, 0.1 if parameter.dim() < 3 else 0.2)
        return model

    def layers(self, model: torch.nn.Module, call: Callable[[], Any]) -> dict[str, int]:
        """How many expert and delta-rule layers run in a call of the model, by op."""
        ran: dict[torch.nn.Module, str] = {}
        hooks = [
            module.register_forward_pre_hook(lambda m, _, op=op: ran.setdefault(m, op) and None)
            for module in model.modules()
            if (op := self._layer_op(module))
        ]
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()
        return dict(collections.Counter(ran.values()))

    def _layer_op(self, module: torch.nn.Module) -> str | None:
        name, own = type(module).__name__, OWN_EXPERTS.get(self.name)
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            return "moe_experts"
        if own and re.fullmatch(own, name):
            return "moe_experts"
        return "delta_rule" if re.fullmatch(DELTA_CLASSES, name) else None


def families() -> tuple[Family, ...]:
    """All families of the installed transformers, by the source of their modeling files."""
    found = []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text, name = file.read_text(), file.parent.name
        if name == "auto":
            continue
        switchable = bool(re.search("^@use_experts_implementation", text, re.M))
        delta = bool(re.search("def (torch_)?(chunk|recurrent)_\\w*delta_\\w+", text))
        if switchable or delta or name in OWN_EXPERTS:
            found.append(Family(name, switchable, delta))
    return tuple(found)
