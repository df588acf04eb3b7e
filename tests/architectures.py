"""Small random-weight models of every kind of architecture that the fast path tells apart, and prompts for them."""

import dataclasses
import functools

import numpy as np
import torch
from conftest import random_model

import fvlens
from fvlens.prompts import build_prompts

ROTARY = dict(positional_embedding_type="rotary", rotary_dim=8)
ARCHITECTURES = {
    "gpt2": dict(),
    "grouped-query": dict(**ROTARY, n_key_value_heads=2, normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "parallel": dict(positional_embedding_type="rotary", rotary_dim=4, parallel_attn_mlp=True),
    "local": dict(use_local_attn=True, window_size=12, attn_types=["global", "local", "global"]),
    "soft-caps": dict(
        positional_embedding_type="rotary",
        rotary_dim=12,
        d_head=12,
        normalization_type="RMS",
        attn_scores_soft_cap=5.0,
        output_logits_soft_cap=20.0,
        use_normalization_before_and_after=True,
    ),
    "qk-norm": dict(**ROTARY, use_qk_norm=True, normalization_type="RMS"),
    "attn-only": dict(attn_only=True),
    "alibi": dict(positional_embedding_type="alibi"),
    "shortformer": dict(positional_embedding_type="shortformer"),
}
FASTEST = dict.fromkeys(ARCHITECTURES, "weights") | {"alibi": "kv", "shortformer": "naive"}

WORDS = [
    ("hot", "coldishness"), ("big", "smallx"), ("happy", "sad"), ("up", "zzqq"), ("wet", "dry"), ("fast", "slowpoke"),
    ("extraordinarily", "old"), ("in", "out"),
]  # fmt: skip
"""Pairs with inputs and answers of one token and of several, so that prompts differ in length."""


def build(name, **overrides):
    """A random model of one architecture: biases and norm gains are random too, and its predictions are peaked."""
    made = random_model(**ARCHITECTURES[name], **overrides)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            is_gain = key.endswith(".w") and ("ln" in key or "norm" in key)
            if is_gain or ".b_" in key or key.endswith(".b"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))
        made.ln_final.w.mul_(3)
    return made


@functools.cache
def built(name, **overrides):
    """The same model again: made once a session, for tests that leave it as it was."""
    return build(name, **overrides)


def likely_answers(model, prompts):
    """The same prompts with answers that the model finds likely, so that a patch has a probability to change.

    Prompt i gets the token of rank i mod 3 as the first token of its answer; later tokens stay.
    """
    with torch.no_grad():
        last = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
    ranked = last.topk(3).indices
    answers = prompts.answer_tokens.clone()
    answers[:, 0] = torch.tensor([ranked[i, i % 3] for i in range(len(prompts))])
    if answers.shape[1] > 1:
        answers[:, 1:] = torch.where(answers[:, 1:] < 0, answers[:, 1:], ranked[:, :1])
    return dataclasses.replace(prompts, answer_tokens=answers)


def word_prompts(model, generator, **settings):
    """Prompts of unequal lengths with likely answers, some of them of several tokens."""
    settings = {"n_shots": 3, "labels": "permuted", **settings}
    return likely_answers(model, build_prompts(model, WORDS, generator=generator, **settings))


def global_randomness():
    """State of the global generators of torch and NumPy, comparable with == (beartype draws from Python's own)."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002


def rows_of(prompts):
    """Token ids of each prompt without padding, and of its answer."""
    rows = [row[keep.bool()].tolist() for row, keep in zip(prompts.tokens, prompts.attention_mask, strict=True)]
    answers = [row[keep].tolist() for row, keep in zip(prompts.answer_tokens, prompts.answer_mask, strict=True)]
    return rows, answers


# --- effects of heads ---


def effects_of(model, prompts, means, **settings):
    return fvlens.indirect_effects(model, prompts, means, progress=False, **settings)


def means_of(model, prompts, *, stretch=1.0, **settings):
    """Mean head outputs; ``stretch`` moves them further from what the heads really say."""
    means = fvlens.mean_head_activations(model, prompts, progress=False, **settings)
    return dataclasses.replace(means, z=means.z * stretch)
