"""The exact fast path: run a prompt once, then run again only what a patch can change.

A patch at position p changes nothing at earlier positions (causal mask) and nothing below the patched layer. The
algorithm has three phases:

1. *Prefix.* Each prompt runs once. Kept are the keys and values of the prefix (every position before the suffix) and,
   at the suffix, the residual stream before each layer and every head's output z. The suffix is the last token, or more
   when positions further left are patched or an answer of several tokens is scored.
2. *Patch.* At layer l the patched copies ("variants") of a prompt differ from the kept run by one head's z, so that the
   attention of layer l needs no second run: its output changes by ``(new z - z) @ W_O``.
3. *Suffix.* From layer l upward all variants of all prompts go through the blocks together; they share the prefix's
   keys and values. Variants of lower layers are already on their way and travel in the same batch.

The result equals the naive loop over hooks up to float rounding. Counted gain at one suffix token: ``(1 + L H) T / (T +
L H / 2)`` for L layers, H heads and T tokens (see :func:`counted_gain`).

Two implementations share this plan. ``weights`` (HookedTransformer) runs the blocks' own norms, MLPs and projections,
but its own attention, so that the prefix is not copied for each variant. ``kv`` goes through the model's own blocks and
a frozen key/value cache, layer by layer: ``start_at_layer`` of a HookedTransformer, or the Hugging Face model inside a
TransformerBridge, whose lower blocks then hand on what they are given. Where neither applies, callers fall back to
``naive``, whole forward passes with hooks, and say so.
"""

from fvlens.suffix._edits import OPS, SITES, Edit, Op, Site, Variant, rows_of
from fvlens.suffix._kept import SteeredPrompts
from fvlens.suffix._layout import laid_out, wide_logits
from fvlens.suffix._memory import Slices, Weights, halving, in_batches, plan_batch, plan_slices, power_above
from fvlens.suffix._prefix import run_prefix, watch_prompts
from fvlens.suffix._reader import Reader, open_reader
from fvlens.suffix._routes import (
    ROUTES,
    Route,
    check_compute,
    choose_route,
    counted_gain,
    has_hooks,
    why_not_kv,
    why_not_weights,
)
from fvlens.suffix._run import SuffixRun, joined_runs
from fvlens.suffix._steps import SteeredSuffix, steered_resid

__all__ = [
    "OPS",
    "ROUTES",
    "SITES",
    "Edit",
    "Op",
    "Reader",
    "Route",
    "Site",
    "Slices",
    "SteeredPrompts",
    "SteeredSuffix",
    "SuffixRun",
    "Variant",
    "Weights",
    "check_compute",
    "choose_route",
    "counted_gain",
    "halving",
    "has_hooks",
    "in_batches",
    "joined_runs",
    "laid_out",
    "open_reader",
    "plan_batch",
    "plan_slices",
    "power_above",
    "rows_of",
    "run_prefix",
    "steered_resid",
    "watch_prompts",
    "why_not_kv",
    "why_not_weights",
    "wide_logits",
]
