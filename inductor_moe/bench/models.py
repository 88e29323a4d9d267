"""Whole language models of transformers at published sizes, with random weights on the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_moe.errors import InductorMoeError
from inductor_moe.quant.modules import buffers_of, packed_modules, slots_of
from inductor_moe.quant.quantize import randomize_

SCHEMES = ("int4", "int8", "none")
QUERIES = 1024  # of a block whose scores are held at once
RESIDUAL = ("o_proj", "out_proj", "down_proj")  # what adds to the residual stream


@dataclass(frozen=True)
class LanguageModel:
    """A config of transformers. `options` differ from the config's defaults."""

    config: str
    options: tuple[tuple[str, Any], ...] = ()


LANGUAGE_MODELS = {
    "qwen3.5-35b-a3b": LanguageModel("Qwen3_5MoeTextConfig"),  # the config's defaults are its size
    "qwen3-30b-a3b": LanguageModel(
        "Qwen3MoeConfig",
        (("num_hidden_layers", 48), ("head_dim", 128), ("norm_topk_prob", True),
         ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
         ("max_position_embeddings", 40960)),
    ),
    "tiny": LanguageModel(
        "Qwen3_5MoeTextConfig",
        (("vocab_size", 512), ("hidden_size", 64), ("num_hidden_layers", 2),
         ("num_attention_heads", 2), ("num_key_value_heads", 1), ("head_dim", 32),
         ("num_experts", 8), ("num_experts_per_tok", 2), ("moe_intermediate_size", 32),
         ("shared_expert_intermediate_size", 32), ("linear_num_key_heads", 2),
         ("linear_num_value_heads", 4), ("linear_key_head_dim", 16),
         ("linear_value_head_dim", 16),
         ("layer_types", ["linear_attention", "full_attention"])),
    ),
}  # fmt: skip


def build(name: str, scheme: str, device: str, layers: int | None = None) -> Any:
    """The unmodified model in bf16, frozen, its weights made on `device` and packed by `scheme`.

    Norms, decays and rotary frequencies are what the model's own initialisation makes them.
    Matrices have a standard deviation of 0.02, divided by (2 * layers)**0.5 in what adds to the
    residual stream; convolutions have one of 0.5, embeddings of 1. So a layer changes the stream
    by a little, as in trained models: were it made of the layers' outputs alone, routers that
    are undecided at bf16's rounding would turn it into something else within a few layers, and
    errors would say nothing. Packed weights never exist unpacked.

    Raises InductorMoeError for an unknown name, scheme or number of layers.
    """
    config = config_of(name, layers)
    scheme = known_scheme(scheme)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    randomize_(model, None if scheme == "none" else scheme, device)
    _initialise(model, device)
    _balance(model)
    return model


def known_scheme(scheme: str) -> str:
    """The name itself. Raises InductorMoeError for one that is not in `SCHEMES`."""
    if scheme not in SCHEMES:
        raise InductorMoeError(f"quant: no scheme {scheme!r}; there are {', '.join(SCHEMES)}")
    return scheme


def config_of(name: str, layers: int | None = None) -> Any:
    """transformers' config of a model, of its first `layers` layers or all.

    Raises InductorMoeError for an unknown name or number of layers.
    """
    if name not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise InductorMoeError(f"model: no model {name!r} to generate with; there are {known}")
    chosen = LANGUAGE_MODELS[name]
    try:
        import transformers
    except ImportError as error:
        raise InductorMoeError(
            f"this benchmark needs transformers 5 or later ({error}); "
            "pip install 'inductor-moe[bench]'"
        ) from error
    transformers.logging.set_verbosity_error()
    make = getattr(transformers, chosen.config)
    config = make(**dict(chosen.options))
    if layers is None:
        return config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    least = kinds.index("full_attention") + 1  # a static cache needs one
    if not least <= layers <= config.num_hidden_layers:
        raise InductorMoeError(
            f"layers: expected {least} to {config.num_hidden_layers} for this model, got {layers}"
        )
    options = {**dict(chosen.options), "num_hidden_layers": layers}
    if getattr(config, "layer_types", None):
        options["layer_types"] = kinds[:layers]
    return make(**options)


def _initialise(model: Any, device: str) -> None:
    """Values where random ones would not do: one-dimensional parameters, and buffers."""
    torch.manual_seed(0)
    for module in model.modules():
        buffers = [name for name, value in module._buffers.items() if value is not None]
        for name in buffers:
            if module._buffers[name].is_meta:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        vectors = any(p is not None and p.dim() == 1 for p in module._parameters.values())
        if (vectors or buffers) and not slots_of(module) and not isinstance(module, nn.Linear):
            model._init_weights(module)
        if isinstance(module, nn.modules.conv._ConvNd):
            module.weight.normal_(0, 0.5)  # few taps: smaller ones would leave next to nothing


def _balance(model: Any) -> None:
    """The residual stream: embeddings of variance 1, and little from each layer."""
    factor = (2 * model.config.get_text_config(decoder=True).num_hidden_layers) ** -0.5
    packed = ((f"{path}.{slot.name}", buffers_of(module, slot).scales)
              for path, module, slot in packed_modules(model))  # fmt: skip
    for name, values in (*model.named_parameters(), *packed):
        if name.removesuffix(".weight").endswith(RESIDUAL):
            values.mul_(factor)
    model.get_input_embeddings().weight.normal_(0, 1)


@contextlib.contextmanager
def widened(model: Any) -> Iterator[None]:
    """Run the model's own values in fp32, one layer at a time, so that one copy fits.

    Scores of a long prompt, which no fused kernel of PyTorch's computes in fp32 with
    fewer heads of keys than of queries, are held a block of queries at a time.
    """
    attend = functools.partial(_attend_by_blocks, F.scaled_dot_product_attention)
    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
            undo.callback(_widen(part))
        held: dict[nn.Module, Any] = {}

        def enter(layer: nn.Module, _: Any) -> None:
            held[layer] = _widen(layer)

        def leave(layer: nn.Module, *_: Any) -> None:
            held.pop(layer)()

        for layer in model.model.layers:
            undo.callback(layer.register_forward_pre_hook(enter).remove)
            undo.callback(layer.register_forward_hook(leave, always_call=True).remove)
        yield


def _attend_by_blocks(
    attend: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> Tensor:
    """Causal attention, a block of queries after the other where there are more; others whole."""
    tokens = query.shape[-2]
    if args or not options.get("is_causal") or tokens != key.shape[-2] or tokens <= QUERIES:
        whole: Tensor = attend(query, key, value, *args, **options)
        return whole
    options["is_causal"] = False
    position = torch.arange(tokens, device=query.device)
    parts = [
        attend(
            query[..., first : first + QUERIES, :],
            key[..., : first + QUERIES, :],
            value[..., : first + QUERIES, :],
            **{**options, "attn_mask": position[first : first + QUERIES, None]
               >= position[None, : first + QUERIES]},
        )
        for first in range(0, tokens, QUERIES)
    ]  # fmt: skip
    return torch.cat(parts, -2)


def _widen(part: nn.Module) -> Any:
    """Put fp32 copies of bf16 tensors into a module; what is returned puts the own ones back."""
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (table, name, value)
        for module in part.modules()
        for table in (module._parameters, module._buffers)
        for name, value in table.items()
        if value is not None and value.dtype == torch.bfloat16
    ]
    for table, name, value in before:
        wide = value.detach().float()
        table[name] = nn.Parameter(wide, requires_grad=False) if isinstance(
            value, nn.Parameter) else wide  # fmt: skip

    def restore() -> None:
        for table, name, value in before:
            table[name] = value

    return restore
