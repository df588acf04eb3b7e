"""Shared fixtures. Shape and type checking (jaxtyping + beartype) is on for the whole package."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("fvlens", "beartype.beartype")

import pytest
import torch
from transformers import AutoTokenizer

import fvlens
from fvlens.models import embedded_folder, quiet_deprecation


@pytest.fixture(scope="session")
def model():
    """The embedded model."""
    return fvlens.load_model("rel-small", device="cpu")


def random_model(**overrides):
    """A random-weight HookedTransformer with the embedded model's tokenizer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)
    settings = dict(
        n_layers=3, n_heads=4, d_model=32, d_head=8, d_mlp=64, n_ctx=160, act_fn="gelu_new", normalization_type="LN",
        d_vocab=len(tokenizer), device="cpu", seed=None, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet_deprecation():
        torch.default_generator.manual_seed(0)
        made = HookedTransformer(
            HookedTransformerConfig(**{**settings, **overrides}), tokenizer=tokenizer, default_padding_side="left"
        )
    return made.eval()


@pytest.fixture(scope="session")
def tiny():
    """A random-weight model of 3 layers and 4 heads."""
    return random_model()


@pytest.fixture
def generator():
    """A generator with seed 0."""
    return torch.Generator().manual_seed(0)
