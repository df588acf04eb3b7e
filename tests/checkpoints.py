"""Tiny random-weight checkpoints of every decoder architecture in the support matrix, in Hugging Face format.

Each configuration turns on what makes its architecture different: windows shorter than the prompts, soft caps small
enough to bite, heads whose width is not ``d_model / n_heads``, and so on. The tokenizer is the embedded model's.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from conftest import TOKENIZER, seeded
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as hf_logging

VOCABULARY = len(AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True))
SPECIAL = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0)
CONTEXT = 128
WINDOW = 8
GPT2_SHAPE = dict(**SPECIAL, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4)
SHAPE = dict(
    **SPECIAL,
    max_position_embeddings=CONTEXT,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)
GROUPED = dict(num_key_value_heads=2)
FINAL_NORMS = ("ln_f", "final_layer_norm", "final_layernorm", "model.norm")


def _gpt_neo() -> PretrainedConfig:
    shape = {key: value for key, value in SHAPE.items() if not key.startswith("num_")}
    kinds = [[["global", "local"], 1], [["global"], 1]]
    return transformers.GPTNeoConfig(**shape, num_layers=3, num_heads=4, attention_types=kinds, window_size=WINDOW)


def _gemma2() -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    caps = dict(attn_logit_softcapping=3.0, final_logit_softcapping=12.0)
    return transformers.Gemma2Config(
        **SHAPE, **GROUPED, **caps, head_dim=12, query_pre_attn_scalar=6, sliding_window=WINDOW, layer_types=kinds
    )


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SHAPE),
    "gpt-neo": _gpt_neo,
    "neox": lambda: transformers.GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
    "gpt-j": lambda: transformers.GPTJConfig(**GPT2_SHAPE, rotary_dim=4),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **GROUPED, rms_norm_eps=1e-5),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, **GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, **GROUPED, head_dim=12),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, **GROUPED, sliding_window=WINDOW),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=12),
    "gemma2": _gemma2,
    "phi": lambda: transformers.PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "olmo": lambda: transformers.OlmoConfig(**SHAPE),
}
"""Name -> configuration of 3 layers, 4 heads, d_model 32 and the embedded model's vocabulary."""


def _rope(kind: str, **settings: float) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **settings))


LLAMA = dict(**SHAPE, **GROUPED)
VARIANTS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, rotary scaling linear": lambda: transformers.LlamaConfig(**LLAMA, **_rope("linear", factor=4.0)),
    "llama, rotary scaling llama3": lambda: transformers.LlamaConfig(
        **LLAMA,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama, rotary scaling yarn": lambda: transformers.LlamaConfig(
        **LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "llama, rotary scaling dynamic": lambda: transformers.LlamaConfig(
        **{**LLAMA, "max_position_embeddings": 16}, **_rope("dynamic", factor=4.0)
    ),
    "llama, biases in the MLP": lambda: transformers.LlamaConfig(**LLAMA, mlp_bias=True),
    "qwen2, sliding windows": lambda: transformers.Qwen2Config(
        **SHAPE, **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "neox, no biases in attention": lambda: transformers.GPTNeoXConfig(**SHAPE, attention_bias=False),
    "phi, layer norm of queries and keys": lambda: transformers.PhiConfig(**SHAPE, qk_layernorm=True),
    "olmo, clipped queries and keys": lambda: transformers.OlmoConfig(**SHAPE, clip_qkv=0.5),
}
"""Settings that an architecture may have; TransformerLens does not take all of them."""


@contextlib.contextmanager
def _no_bars():
    """Hide Hugging Face's bars over weight files."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def save(name: str, folder: str | Path, *, tokenizer: bool = True) -> Path:
    """Write a checkpoint: configuration, safetensors, tokenizer.

    Every parameter is random, biases and norm gains too, and large enough that heads matter and predictions are
    peaked. The same name gives the same weights; the global generator is left alone.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = AutoModelForCausalLM.from_config((ARCHITECTURES | VARIANTS)[name](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
            final_norm = [module for key, module in made.named_modules() if key.endswith(FINAL_NORMS)][-1]
            if getattr(final_norm, "weight", None) is None:  # OLMo
                made.get_output_embeddings().weight.mul_(3)
            elif type(final_norm).__name__.startswith("Gemma"):  # the gain is 1 + weight
                final_norm.weight.mul_(3).add_(2)
            else:
                final_norm.weight.mul_(3)
    with _no_bars():
        made.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True).save_pretrained(folder)
    return folder


def hugging_face(folder: str | Path, *, dtype: torch.dtype = torch.float32):
    """The checkpoint as plain Hugging Face, with attention written out."""
    with _no_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, attn_implementation="eager"
        )
    return loaded.eval()


def random_tokens(n_vocab, shape=(3, 17)):
    return torch.randint(1, n_vocab, shape, generator=seeded(1))


def relative_difference(mine, reference, tokens, mask=None):
    """Largest difference of the logits at real tokens over the largest logit; positions count real tokens only."""
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = reference(tokens, attention_mask=mask, position_ids=positions).logits
        found = mine(tokens) if bool(mask.all()) else mine(tokens, attention_mask=mask)
    assert expected.std() > 0.3  # not trivially alike
    return float((found - expected)[mask.bool()].abs().max() / expected.abs().max())
