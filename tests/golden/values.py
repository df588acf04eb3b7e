"""What the cases share: results as flat lists of whole numbers, texts, floats and None."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import fvlens
from fvlens.evaluation import Evaluation
from fvlens.types import Head

Values = dict[str, list[Any]]
"""The numbers of a group, by name."""
MOST_RANK = 200
"""Larger ranks are cut to this: so far down neighbours lie closer than float32 rounds, and log-probabilities tell."""


def ranks(found: Int[Tensor, " query"]) -> list[int]:
    """Ranks as far as rounding lets them be told."""
    return found.clamp(max=MOST_RANK).tolist()


def flat(value: Any) -> list[Any]:
    """A tensor or an iterable as a list of plain values; a NaN is None."""
    found = value.flatten().tolist() if isinstance(value, torch.Tensor) else list(value)
    return [None if isinstance(one, float) and math.isnan(one) else one for one in found]


def heads(chosen: Iterable[Head]) -> list[int]:
    """Layer, head, layer, head ..."""
    return [number for head in chosen for number in head]


def scores(prefix: str, found: Evaluation, *, texts: bool = False) -> Values:
    """An evaluation, query by query."""
    values = {
        f"{prefix} ranks": ranks(found.ranks),
        f"{prefix} probabilities": flat(found.probabilities),
        f"{prefix} log-probabilities": flat(found.log_probabilities),
    }
    return values | ({f"{prefix} predictions": list(found.predictions)} if texts else {})


def curves(prefix: str, tuned: Any) -> Values:
    """A training, epoch by epoch, and the epoch that was chosen."""
    names = ("train_loss", "valid_loss", "valid_top1", "norm", "cosine")
    values = {f"{prefix} {name.replace('_', ' ')}": flat(getattr(tuned.history, name)) for name in names}
    return values | {f"{prefix} learning rate": [tuned.lr], f"{prefix} best epoch": [tuned.best_epoch]}


@functools.cache
def embedded() -> Any:
    """The embedded model."""
    return fvlens.load_model("rel-small", device="cpu")
