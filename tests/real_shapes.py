"""A model of a real architecture's shape with random weights, in fvlens and in plain Hugging Face, and data for it.

SmolLM2-135M: 30 layers, 9 query heads in 3 groups, d_model 576, gated MLPs 1,536 wide, a vocabulary of 49,152, RMSNorm,
rotary positions, tied embeddings; in float32. The checkpoint is a Llama of Hugging Face in a folder and goes through
``fvlens.load_model`` like any other. Its tokenizer is the tests' own, of 9,268 tokens; the vocabulary beyond them is
padding, as many released models have some: real rows of the embedding that no text ever uses.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import Shape
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging as hf_logging

import fvlens

TOKENIZER = Path(__file__).parent / "tokenizer"
SMOLLM2 = Shape(
    n_layers=30, n_heads=9, n_key_value_heads=3, d_model=576, d_head=64, d_mlp=1536, d_vocab=49152
)  # fmt: skip
SPREAD = 0.05
"""Standard deviation of the weights: wide enough that heads and MLPs matter."""
LOGIT_SPREAD = 3.0
"""Standard deviation of a token's logits: peaked predictions, so that patches and vectors move probabilities."""
ANSWER_LENGTHS = [1] * 17 + [2, 3, 5]
"""Tokens of 20 whole answers: 1.35 on average, up to 5."""
QUERY_LENGTHS = [1] * 16 + [2] * 3 + [3]
"""Tokens of 20 query words."""


@dataclass(frozen=True)
class RealShape:
    """The same weights twice: ``model`` from ``fvlens.load_model``, ``plain`` from Hugging Face."""

    shape: Shape
    folder: Path
    model: Any
    plain: Any


def save_checkpoint(shape: Shape, folder: Path) -> None:
    """Write the configuration, random weights and the tests' tokenizer. The global generator is left alone."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    config = LlamaConfig(
        vocab_size=shape.d_vocab, hidden_size=shape.d_model, intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_key_value_heads, head_dim=shape.d_head, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=SPREAD, bos_token_id=0,
        eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        made.model.norm.weight.fill_(LOGIT_SPREAD / (SPREAD * shape.d_model**0.5))
        made.model.embed_tokens.weight[len(tokenizer) :] *= 0.1  # nobody trained these rows
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def real_shape(shape: Shape = SMOLLM2) -> Iterator[RealShape]:
    """The model of a shape, on the CPU; its folder goes at the end of the block."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="fvlens-shape") as name:
        folder = Path(name)
        try:
            save_checkpoint(shape, folder)
            model = fvlens.load_model(str(folder), device="cpu")
            plain = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            )
        finally:
            if shown:
                hf_logging.enable_progress_bar()
        plain.eval().requires_grad_(False)
        yield RealShape(shape, folder, model, plain)


# --- data ---


def one_token_words(model: Any) -> dict[str, int]:
    """Words of the library that are one token behind a space, in a fixed shuffled order, with their tokens."""
    words = sorted(
        {word for name in fvlens.list_relations() for pair in fvlens.load_relation(name) for word in pair}
    )  # fmt: skip
    ids = model.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    single = [(word, own[0]) for word, own in zip(words, ids, strict=True) if len(own) == 1]
    order = torch.randperm(len(single), generator=torch.Generator().manual_seed(0)).tolist()
    return dict(single[i] for i in order)


def word_pairs(
    model: Any, n: int, *, query_lengths: list[int], answer_lengths: list[int], seed: int
) -> list[tuple[str, str]]:
    """Random pairs whose inputs and answers are so many one-token words, joined by spaces; lengths go in circles.

    No input comes twice. Lengths are shuffled within each circle.
    """
    words = list(one_token_words(model))
    g = torch.Generator().manual_seed(seed)

    def phrases(lengths: list[int]) -> list[str]:
        order: list[int] = []
        while len(order) < n:
            order += [lengths[i] for i in torch.randperm(len(lengths), generator=g).tolist()]
        return [
            " ".join(words[i] for i in torch.randint(len(words), (length,), generator=g).tolist())
            for length in order[:n]
        ]

    inputs = phrases(query_lengths)
    free = iter(word for word in words if word not in inputs)
    seen: set[str] = set()
    for i, phrase in enumerate(inputs):
        if phrase in seen:
            inputs[i] = " ".join([*phrase.split()[:-1], next(free)])
        seen.add(inputs[i])
    return list(zip(inputs, phrases(answer_lengths), strict=True))


def likely_pairs(real: RealShape, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same queries with one-word answers that the model finds likely: the i-th gets the word of rank i mod 3."""
    words = one_token_words(real.model)
    prompts = fvlens.build_prompts(real.model, pairs, n_shots=0, generator=torch.Generator())
    with torch.inference_mode():
        logits = real.plain(
            input_ids=prompts.tokens, attention_mask=prompts.attention_mask, use_cache=False, logits_to_keep=1
        ).logits[:, -1]
    best = logits[:, torch.tensor(list(words.values()))].topk(3).indices.tolist()
    names = list(words)
    return [(pair[0], names[ranked[i % 3]]) for i, (pair, ranked) in enumerate(zip(pairs, best, strict=True))]
