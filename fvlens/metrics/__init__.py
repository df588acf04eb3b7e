"""Scores and their uncertainty, as pure tensor functions.

Two groups. Per-prompt scores read next-token logits: :func:`probability`, :func:`log_probability`, :func:`rank`,
:func:`best_token`, :func:`is_best`, :func:`kl_divergence`.
Summaries turn many scores into one number: accuracy, bootstrap intervals, rank correlation, overlap of two rankings.
:func:`mds` places things in the plane by their distances.
Whole-answer scores of generated text: :func:`exact_match`, :func:`token_f1`.

One definition of right: tokens are ordered by their logit, largest first, and equal logits by their id, smallest first.
An answer is right if its token comes first. :func:`rank`, :func:`best_token`, :func:`best_tokens` and :func:`is_best`
all read this one order, so that ranks and predictions never disagree, in half precision neither, where ties are common.
Whatever decides what a model answers calls one of them.

Precision: logits below float32 are widened to float32 before any sum; numbers returned as Python floats are summed in
float64 on the CPU. Tensors stay on the device of the logits, and probabilities keep their gradient.
"""

from fvlens.metrics._agreement import spearman, top_k_overlap
from fvlens.metrics._intervals import Difference, Interval, bootstrap_interval, paired_difference
from fvlens.metrics._logits import (
    best_token,
    best_tokens,
    is_best,
    kl_divergence,
    log_probability,
    probability,
    rank,
    top_k_accuracy,
)
from fvlens.metrics._mds import mds
from fvlens.metrics._words import exact_match, token_f1

__all__ = [
    "Difference",
    "Interval",
    "best_token",
    "best_tokens",
    "bootstrap_interval",
    "exact_match",
    "is_best",
    "kl_divergence",
    "log_probability",
    "mds",
    "paired_difference",
    "probability",
    "rank",
    "spearman",
    "token_f1",
    "top_k_accuracy",
    "top_k_overlap",
]
