"""The exact engine: run a prompt once, then run again only what edits can change.

An edit at position p changes nothing at earlier positions (causal mask) and nothing below the edited layer. The
algorithm has three phases:

1. *Prefix.* Each prompt runs once. Kept are the keys and values of the prefix (every position before the suffix) and,
   at the suffix, the residual stream before each layer and every head's output z. The suffix is the last token, or more
   when positions further left are edited or an answer of several tokens is scored.
2. *Variants.* An :class:`Edit` adds to, replaces or scales a residual stream or a head's z at chosen suffix positions;
   a variant is a tuple of edits. A causal indirect effect is a variant of one replaced z, an injected vector one of one
   addition, a distributed vector and an ablation ones of several, a layer sweep one variant a layer.
3. *Suffix.* All variants of all prompts go up together (:meth:`SuffixRun.under`): each joins the batch at its first
   edited layer, and gets its later edits on the way; they share the prefix's keys and values.

The result equals whole passes under hooks up to float rounding. Counted gain at one suffix token, one variant a head:
``(1 + L H) T / (T + L H / 2)`` for L layers, H heads and T tokens (see :func:`counted_gain`).

Two routes share this plan. ``weights`` (HookedTransformer) multiplies with the model's weights, laid out once
(:mod:`fvlens.suffix._layout`), so that the prefix is not copied for each variant. ``kv`` goes through the model's own
blocks and a frozen key/value cache, one block after another: ``start_at_layer`` of a HookedTransformer, or the Hugging
Face model inside a TransformerBridge, whose lower blocks then hand on what they are given. Where neither is exact,
callers fall back to ``naive``, whole forward passes with hooks, and say so.
"""

from fvlens.suffix._edits import OPS, SITES, Edit, Op, Site, Variant, rows_of
from fvlens.suffix._halving import halving, in_batches
from fvlens.suffix._kept import Added, SteeredPrompts
from fvlens.suffix._layout import laid_out, wide_logits
from fvlens.suffix._memory import Slices, Weights, plan_batch, plan_slices, portions, power_above
from fvlens.suffix._prefix import run_prefix, watch_prompts
from fvlens.suffix._reader import Reader, open_reader, read_out, read_out_slices
from fvlens.suffix._routes import (
    ROUTES,
    Route,
    check_compute,
    choose_route,
    counted_gain,
    has_hooks,
    named_precision,
    why_not_kv,
    why_not_weights,
)
from fvlens.suffix._run import SuffixRun
from fvlens.suffix._steps import SteeredSuffix, steered_resid

__all__ = [
    "OPS",
    "ROUTES",
    "SITES",
    "Added",
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
    "laid_out",
    "named_precision",
    "open_reader",
    "plan_batch",
    "plan_slices",
    "portions",
    "power_above",
    "read_out",
    "read_out_slices",
    "rows_of",
    "run_prefix",
    "steered_resid",
    "watch_prompts",
    "why_not_kv",
    "why_not_weights",
    "wide_logits",
]
