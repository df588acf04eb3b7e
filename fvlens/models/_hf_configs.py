"""HookedTransformer settings and weights for Hugging Face checkpoints, one small function an architecture class.

TransformerLens has settings for many checkpoints, but looks part of them up by the checkpoint's name and reads fields
that today's configurations no longer have. Here everything is read from the configuration; the weights go through
TransformerLens' own conversion functions. What HookedTransformer cannot compute as Hugging Face does is named by
:func:`obstacle`.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary scaling that HookedTransformer can compute."""


def _sizes(config: Any) -> dict[str, Any]:
    """Fields that all configurations share, under whatever name."""
    return {
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _layer_norm(config: Any, eps: float) -> dict[str, Any]:
    return {
        **_sizes(config),
        "d_mlp": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "act_fn": _activation(config),
        "normalization_type": "LN",
        "eps": eps,
    }


def _gated(config: Any) -> dict[str, Any]:
    """RMS norms, rotary positions, grouped heads, gated MLP: Llama and what came after it."""
    sizes = _sizes(config)
    return {
        **sizes,
        **_rotary(config, sizes["d_head"]),
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": _activation(config),
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": config.rms_norm_eps,
    }


def _activation(config: Any) -> str:
    for field in ("activation_function", "hidden_activation", "hidden_act"):
        name = getattr(config, field, None)
        if name is not None:
            return "silu" if name == "swish" else str(name)
    return "gelu_pytorch_tanh"


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _rotary(config: Any, d_head: int) -> dict[str, Any]:
    """Rotary settings, with the scalings of :data:`ROPE_TYPES`."""
    rope = _rope(config)
    settings = {
        "positional_embedding_type": "rotary",
        "rotary_dim": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_adjacent_pairs": False,
    }
    kind = rope.get("rope_type", "default")
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "linear":
        settings["rotary_scaling_factor"] = rope["factor"]
    elif kind == "llama3":
        settings["use_NTK_by_parts_rope"] = True
        settings["NTK_original_ctx_len"] = trained
        settings["NTK_by_parts_low_freq_factor"] = rope["low_freq_factor"]
        settings["NTK_by_parts_high_freq_factor"] = rope["high_freq_factor"]
        settings["NTK_by_parts_factor"] = rope["factor"]
    elif kind == "yarn":
        gain = rope.get("attention_factor")
        settings["use_yarn_rope"] = True
        settings["yarn_original_max_position_embeddings"] = trained
        settings["yarn_factor"] = rope["factor"]
        settings["yarn_attention_factor"] = gain or (0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0)
        settings["yarn_beta_fast"] = rope.get("beta_fast") or 32.0
        settings["yarn_beta_slow"] = rope.get("beta_slow") or 1.0
        settings["yarn_truncate"] = rope.get("truncate", True)
    return settings


def _windows(config: Any) -> dict[str, Any]:
    """Sliding windows by layer; HookedTransformer's window, like Hugging Face's, counts the token itself."""
    kinds = getattr(config, "layer_types", None) or []
    if "sliding_attention" not in kinds:
        return {}
    return _local(["local" if kind == "sliding_attention" else "global" for kind in kinds], config.sliding_window)


def _local(kinds: list[str], window: int) -> dict[str, Any]:
    return {"use_local_attn": True, "attn_types": kinds, "window_size": window}


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        **_layer_norm(config, config.layer_norm_epsilon),
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _gpt_neo(config: Any) -> dict[str, Any]:
    return {
        **_layer_norm(config, config.layer_norm_epsilon),
        **_local(list(config.attention_layers), config.window_size),
        "use_attn_scale": False,
    }


def _neox(config: Any) -> dict[str, Any]:
    settings = _layer_norm(config, config.layer_norm_eps)
    return {
        **settings,
        **_rotary(config, settings["d_head"]),
        "parallel_attn_mlp": config.use_parallel_residual,
    }


def _gptj(config: Any) -> dict[str, Any]:
    return {
        **_layer_norm(config, config.layer_norm_epsilon),
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "positional_embedding_type": "rotary",
        "rotary_dim": config.rotary_dim,
        "rotary_adjacent_pairs": True,
        "parallel_attn_mlp": True,
    }


def _llama(config: Any) -> dict[str, Any]:
    n_groups = config.num_key_value_heads
    return {**_gated(config), "n_key_value_heads": n_groups if n_groups != config.num_attention_heads else None}


def _qwen2(config: Any) -> dict[str, Any]:
    return {**_gated(config), **_windows(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    return {**_llama(config), **_windows(config), "use_qk_norm": True}


def _mistral(config: Any) -> dict[str, Any]:
    if config.sliding_window is None:
        return _gated(config)
    return {**_gated(config), **_local(["local"] * config.num_hidden_layers, config.sliding_window)}


def _gemma2(config: Any) -> dict[str, Any]:
    settings = {
        **_gated(config),
        **_windows(config),
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "use_normalization_before_and_after": True,
    }
    if config.attn_logit_softcapping is not None:
        settings["attn_scores_soft_cap"] = config.attn_logit_softcapping
    if config.final_logit_softcapping is not None:
        settings["output_logits_soft_cap"] = config.final_logit_softcapping
    return settings


def _phi(config: Any) -> dict[str, Any]:
    settings = _layer_norm(config, config.layer_norm_eps)
    return {
        **settings,
        **_rotary(config, settings["d_head"]),
        **_grouped(config),
        "parallel_attn_mlp": True,
    }


def _olmo(config: Any) -> dict[str, Any]:
    settings = _layer_norm(config, 1e-5)  # OLMo's norms have neither gain nor bias, and this epsilon
    return {
        **settings,
        **_rotary(config, settings["d_head"]),
        **_grouped(config),
        "gated_mlp": True,
        "clip_qkv": config.clip_qkv,
    }


def _grouped(config: Any) -> dict[str, Any]:
    n_groups = config.num_key_value_heads
    return {"n_key_value_heads": n_groups} if n_groups != config.num_attention_heads else {}


ARCHITECTURES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoForCausalLM": _gpt_neo,
    "GPTNeoXForCausalLM": _neox,
    "GPTJForCausalLM": _gptj,
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "MistralForCausalLM": _mistral,
    "GemmaForCausalLM": _gated,
    "Gemma2ForCausalLM": _gemma2,
    "PhiForCausalLM": _phi,
    "OlmoForCausalLM": _olmo,
}
"""Architecture class -> its HookedTransformer settings, from its configuration."""


def obstacle(config: Any) -> str | None:
    """Why HookedTransformer cannot give this checkpoint's numbers; None if it can."""
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    kind = _rope(config).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return f"it has no rotary scaling {kind!r}, only {', '.join(ROPE_TYPES)}"
    if kind == "linear" and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        return "it does not scale the rotary positions of layers with a sliding window"
    if _activation(config) not in SUPPORTED_ACTIVATIONS:
        return f"it has no activation {_activation(config)!r}"
    if getattr(config, "mlp_bias", False):
        return "its gated MLP has no biases before the product (mlp_bias)"
    if getattr(config, "qk_layernorm", False):
        return "it has no layer norm over queries and keys (qk_layernorm)"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is causal (use_bidirectional_attention)"
    return None


def hooked_settings(config: Any, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    """Settings of a HookedTransformer for a checkpoint of one of :data:`ARCHITECTURES`."""
    return {
        **ARCHITECTURES[architecture](config),
        "original_architecture": architecture,
        "init_weights": False,
        "device": "cpu",
        "dtype": dtype,
    }


def hooked_state(hf_model: Any, cfg: Any) -> dict[str, Float[Tensor, "*axes"]]:
    """Weights of a Hugging Face model under HookedTransformer's names, by TransformerLens' conversion functions.

    For our own :data:`ARCHITECTURES`, those functions leave out the biases that some configurations switch on
    (``attention_bias``) and know no grouped heads in some; both are put in here.
    """
    loading = importlib.import_module(
        "transformer_lens.loading_from_pretrained"
    )  # TransformerLens 4 has no such module
    if cfg.original_architecture not in ARCHITECTURES:
        return loading.get_pretrained_state_dict("/", cfg, hf_model=hf_model, dtype=cfg.dtype)
    layers = _layers(hf_model)
    for layer in layers:
        _zero_bias(layer, "attention.query_key_value", "attention.dense")
    state = loading.get_pretrained_state_dict("/", cfg, hf_model=hf_model, dtype=cfg.dtype)
    for index, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            state.update(_projections(attention, cfg, f"blocks.{index}.attn."))
            if cfg.n_key_value_heads is not None:
                for name in ("W_K", "W_V", "b_K", "b_V"):
                    state.pop(f"blocks.{index}.attn.{name}", None)
    return state


def _layers(hf_model: Any) -> Any:
    base = hf_model.base_model
    return getattr(base, "layers", None) or base.h


def _zero_bias(layer: Any, *names: str) -> None:
    """Give these linear maps a bias of zero where they have none: the conversion of GPT-NeoX reads it."""
    for name in names:
        parent, _, leaf = name.partition(".")
        linear = getattr(getattr(layer, parent, None), leaf, None)
        if linear is not None and linear.bias is None:
            linear.bias = torch.nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _projections(attention: Any, cfg: Any, prefix: str) -> dict[str, Float[Tensor, "*axes"]]:
    """Key and value maps and all biases of an attention layer with separate projections."""
    grouped = cfg.n_key_value_heads is not None
    mark = "_" if grouped else ""
    state = {}
    for name, linear in (("Q", attention.q_proj), ("K", attention.k_proj), ("V", attention.v_proj)):
        under = mark if name != "Q" else ""
        if grouped and name != "Q":
            state[f"{prefix}_W_{name}"] = linear.weight.unflatten(0, (-1, cfg.d_head)).transpose(1, 2)
        if linear.bias is not None:
            state[f"{prefix}{under}b_{name}"] = linear.bias.unflatten(0, (-1, cfg.d_head))
    output = getattr(attention, "o_proj", None)
    if output is not None and output.bias is not None:
        state[f"{prefix}b_O"] = output.bias
    return state
