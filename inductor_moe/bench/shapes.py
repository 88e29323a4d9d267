"""Layer shapes of published models, and transformers' unmodified layers at those shapes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inductor_moe.errors import InductorMoeError


@dataclass(frozen=True)
class Moe:
    """One MoE layer. `shared`: inner width of the shared expert, 0 without one."""

    hidden: int
    experts: int
    top_k: int
    inner: int
    shared: int
    config: str
    block: str
    options: tuple[tuple[str, Any], ...] = ()

    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.inner


@dataclass(frozen=True)
class Delta:
    """One delta-rule layer. `gate`: decay per value "head" or per "channel" of the keys."""

    hidden: int
    heads: int
    value_heads: int
    key: int
    value: int
    taps: int
    gate: str


@dataclass(frozen=True)
class Model:
    moe: Moe | None = None
    delta: Delta | None = None


def _qwen(
    family: str, experts: int, top_k: int, inner: int, shared: int, hidden: int = 2048
) -> Moe:
    sizes: dict[str, Any] = {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
    }
    if shared:
        sizes["shared_expert_intermediate_size"] = shared
    else:
        sizes["norm_topk_prob"] = True
    stem = "".join(part.capitalize() for part in family.split("_")).replace("35", "3_5")
    config = f"{family}.{stem}{'Text' if family == 'qwen3_5_moe' else ''}Config"
    block = f"{family}.{stem}SparseMoeBlock"
    return Moe(hidden, experts, top_k, inner, shared, config, block, tuple(sizes.items()))


_MIXTRAL = Moe(
    4096, 8, 2, 14336, 0, "mixtral.MixtralConfig", "mixtral.MixtralSparseMoeBlock",
    (("num_local_experts", 8), ("num_experts_per_tok", 2), ("intermediate_size", 14336)),
)  # fmt: skip
_DEEPSEEK_V3 = Moe(
    7168, 256, 8, 2048, 2048, "deepseek_v3.DeepseekV3Config", "deepseek_v3.DeepseekV3MoE",
    (("n_routed_experts", 256), ("num_experts_per_tok", 8), ("moe_intermediate_size", 2048),
     ("n_shared_experts", 1), ("n_group", 8), ("topk_group", 4)),
)  # fmt: skip
_GPT_OSS = Moe(
    2880, 32, 4, 2880, 0, "gpt_oss.GptOssConfig", "gpt_oss.GptOssMLP",
    (("num_local_experts", 32), ("num_experts_per_tok", 4), ("intermediate_size", 2880)),
)  # fmt: skip
_KIMI = Moe(
    2304, 256, 8, 1024, 1024, "kimi_linear.KimiLinearConfig", "kimi_linear.KimiLinearMoE",
    (("num_local_experts", 256), ("num_experts_per_tok", 8), ("moe_intermediate_size", 1024)),
)  # fmt: skip
_TINY = _qwen("qwen3_5_moe", 8, 2, 32, 32, hidden=64)

MODELS: dict[str, Model] = {
    "qwen3.5-35b-a3b": Model(
        _qwen("qwen3_5_moe", 256, 8, 512, 512), Delta(2048, 16, 32, 128, 128, 4, "head")
    ),
    "qwen3-30b-a3b": Model(_qwen("qwen3_moe", 128, 8, 768, 0)),
    "qwen3-next-80b": Model(
        _qwen("qwen3_next", 512, 10, 512, 512), Delta(2048, 16, 32, 128, 128, 4, "head")
    ),
    "mixtral-8x7b": Model(_MIXTRAL),
    "deepseek-v3": Model(_DEEPSEEK_V3),
    "gpt-oss-20b": Model(_GPT_OSS),
    "kimi-linear": Model(_KIMI, Delta(2304, 32, 32, 128, 128, 4, "channel")),
    "tiny": Model(_TINY, Delta(64, 2, 4, 16, 16, 4, "head")),
}


def model_named(name: str) -> Model:
    """The shapes of a model.

    Raises InductorMoeError for a name that is not in `MODELS`.
    """
    if name not in MODELS:
        raise InductorMoeError(f"model: no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def transformers_class(name: str) -> Any:
    """ "family.Class" of transformers' models; configs and layers alike."""
    family, cls = name.split(".")
    part = "configuration" if cls.endswith("Config") else "modeling"
    module = importlib.import_module(f"transformers.models.{family}.{part}_{family}")
    return getattr(module, cls)


def moe_block(shape: Moe, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """transformers' whole MoE block with random weights, experts as `grouped_mm`."""
    config = transformers_class(shape.config)(hidden_size=shape.hidden, **dict(shape.options))
    config._experts_implementation = "grouped_mm"
    held = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a fp32 copy of DeepSeek-V3's experts takes 45 GB
    try:
        with torch.device(device):
            block: nn.Module = transformers_class(shape.block)(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(held)
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if tensor.is_floating_point():
            std = 0.02 if tensor.dim() > 1 and "gate_up" not in name else 0.04
            nn.init.normal_(tensor, std=std)
    return block.requires_grad_(False)


def delta_layer(shape: Delta, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """transformers' Qwen3.5 layer of the gated delta rule with random weights, and its config."""
    config = transformers_class("qwen3_5.Qwen3_5TextConfig")(
        hidden_size=shape.hidden,
        num_hidden_layers=1,
        linear_num_key_heads=shape.heads,
        linear_num_value_heads=shape.value_heads,
        linear_key_head_dim=shape.key,
        linear_value_head_dim=shape.value,
        linear_conv_kernel_dim=shape.taps,
        layer_types=["linear_attention"],
    )
    with torch.device(device):
        layer = transformers_class("qwen3_5.Qwen3_5GatedDeltaNet")(config, 0).to(dtype).eval()
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5 if parameter.dim() == 3 else 0.02)
    return layer.requires_grad_(False), config
