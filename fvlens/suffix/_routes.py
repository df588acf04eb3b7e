"""Which way to compute: the fastest path that is exact for a model, and why not a faster one."""

from typing import Any, Literal

import torch

from fvlens.interventions import acts_on
from fvlens.types import is_bridge

Route = Literal["weights", "kv", "naive"]
ROUTES: tuple[Route, ...] = ("weights", "kv", "naive")


def counted_gain(n_layers: int, n_heads: int, n_tokens: int) -> float:
    """Operations of the naive loop over those of the fast path, for one-token suffixes.

    ``(1 + L H) T / (T + L H / 2)``: the naive loop runs every prompt once and once a head, T tokens each; the fast path
    runs it once and then one token a head through half the layers on average.

    Example:
        >>> from fvlens.suffix import counted_gain
        >>> round(counted_gain(12, 12, 97))
        83
    """
    cells = n_layers * n_heads
    return (1 + cells) * n_tokens / (n_tokens + cells / 2)


def has_hooks(model: Any) -> bool:
    """Whether hooks would act on a forward of the model here: blocks of this thread and task, and hooks of others."""
    return acts_on(model)


def why_not_weights(model: Any) -> str | None:
    """Why the ``weights`` path would not be exact for this model, or None if it is."""
    if is_bridge(model):
        return "TransformerBridge runs Hugging Face's own blocks"
    cfg = model.cfg
    reasons = (
        (cfg.positional_embedding_type not in ("standard", "rotary"), f"positions {cfg.positional_embedding_type}"),
        (getattr(cfg, "attention_dir", "causal") != "causal", "attention is not causal"),
        (getattr(cfg, "use_attention_sinks", False), "attention sinks"),
        (getattr(cfg, "use_logn_attn", False), "log-n attention"),
        (getattr(cfg, "use_dynamic_ntk_rope", False), "dynamic NTK rotary"),
        (getattr(cfg, "clip_qkv", None) is not None, "clipped queries and keys"),
        (getattr(cfg, "load_in_4bit", False), "4-bit weights"),
        (cfg.original_architecture in _OWN_NORM_PLACES, f"norm places of {cfg.original_architecture}"),
        (cfg.use_split_qkv_input or cfg.use_attn_in, "split attention inputs"),
        (getattr(cfg, "ungroup_grouped_query_attention", False), "ungrouped query groups"),
        (getattr(cfg, "n_devices", 1) > 1, "a model on several devices"),
        (has_hooks(model), "hooks on the model"),
    )
    return next((text for applies, text in reasons if applies), None)


_OWN_NORM_PLACES = ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")


def why_not_kv(model: Any) -> str | None:
    """Why the ``kv`` path would not be exact for this model, or None if it is.

    For a ``TransformerBridge``, whose blocks are whatever Hugging Face wrote, this is tried out once a model on a short
    random batch.
    """
    if has_hooks(model):
        return "hooks on the model"
    if is_bridge(model):
        from fvlens.suffix._bridge import why_not_exact

        return why_not_exact(model)
    cfg = model.cfg
    reasons = (
        (cfg.positional_embedding_type == "shortformer", "positions shortformer"),
        (getattr(cfg, "attention_dir", "causal") != "causal", "attention is not causal"),
        (getattr(cfg, "use_dynamic_ntk_rope", False), "dynamic NTK rotary"),
    )
    return next((text for applies, text in reasons if applies), None)


def choose_route(model: Any, wanted: Route | None = None) -> tuple[Route, str]:
    """The path to take and why.

    Args:
        model: the model.
        wanted: a path to insist on; by default the fastest that is exact for this model.

    Returns:
        The path, and the reason why a faster one was not taken (empty if the fastest was).

    Raises:
        ValueError: ``wanted`` is not a path, or would not be exact for this model.
    """
    if wanted is not None and wanted not in ROUTES:
        raise ValueError(f"path={wanted!r}; expected one of {', '.join(ROUTES)}, or None for the fastest exact one.")
    if wanted == "naive":
        return "naive", "asked for"
    no_weights = why_not_weights(model)
    if wanted == "weights" and no_weights is not None:
        raise ValueError(f"path='weights' is not exact for this model ({no_weights}); use path=None or 'kv'.")
    if wanted in (None, "weights") and no_weights is None:
        return "weights", ""
    no_kv = why_not_kv(model)
    if no_kv is None:
        return "kv", no_weights or "asked for"
    if wanted == "kv":
        raise ValueError(f"path='kv' is not exact for this model ({no_kv}); use path=None or 'naive'.")
    return "naive", no_kv


def named_precision(compute: torch.dtype | None) -> str | None:
    """A precision of products as results record it: ``"bfloat16"``, or None for the model's own."""
    return None if compute is None else str(compute).removeprefix("torch.")


def check_compute(what: str, model: Any, path: Route, compute: torch.dtype | None) -> None:
    """Refuse another precision of products where there is none.

    Raises:
        ValueError: the path is not ``"weights"``, the model is not float32, or ``compute`` is no precision of floats.
    """
    if compute is None:
        return
    if path != "weights":
        raise ValueError(f"{what}: compute={compute} is for path='weights', but this takes {path!r}.")
    if model.cfg.dtype != torch.float32 or not compute.is_floating_point:
        raise ValueError(
            f"{what}: compute={compute} of a model in {model.cfg.dtype}; expected a float32 model and a precision such "
            "as torch.bfloat16; leave compute out for the model's own."
        )
