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

Two implementations share this plan. ``weights`` runs the blocks' own norms, MLPs and projections, but its own
attention, so that the prefix is not copied for each variant. ``kv`` goes through the model's own ``start_at_layer`` and
a frozen ``past_kv_cache``, layer by layer; it covers every architecture that has them. Where neither applies, callers
fall back to ``naive``, whole forward passes with hooks, and say so.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fvlens.interventions import z_hook
from fvlens.types import Head

Path = Literal["weights", "kv", "naive"]
PATHS: tuple[Path, ...] = ("weights", "kv", "naive")


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
    """Whether anybody's hooks sit on the model."""
    return any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def why_not_weights(model: Any) -> str | None:
    """Why the ``weights`` path would not be exact for this model, or None if it is."""
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
    """Why the ``kv`` path would not be exact for this model, or None if it is."""
    cfg = model.cfg
    reasons = (
        (cfg.positional_embedding_type == "shortformer", "positions shortformer"),
        (getattr(cfg, "attention_dir", "causal") != "causal", "attention is not causal"),
        (getattr(cfg, "use_dynamic_ntk_rope", False), "dynamic NTK rotary"),
        (has_hooks(model), "hooks on the model"),
    )
    return next((text for applies, text in reasons if applies), None)


def choose_path(model: Any, wanted: Path | None = None) -> tuple[Path, str]:
    """The path to take and why.

    Args:
        model: the model.
        wanted: a path to insist on; by default the fastest that is exact for this model.

    Returns:
        The path, and the reason why a faster one was not taken (empty if the fastest was).

    Raises:
        ValueError: ``wanted`` is not a path, or would not be exact for this model.
    """
    if wanted is not None and wanted not in PATHS:
        raise ValueError(f"path={wanted!r}; expected one of {', '.join(PATHS)}, or None for the fastest exact one.")
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


@dataclass(frozen=True, slots=True)
class SuffixRun:
    """Prompts that were run once, ready for patched suffixes.

    Attributes:
        model: the model.
        path: ``"weights"`` or ``"kv"``.
        keys, values: a tensor a layer ``[prompt prefix kv_head d_head]``; keys are rotated already on the weights path.
        resid_pre: the residual stream before each layer at the suffix.
        z: every head's output at the suffix.
        resid_final: the residual stream after the last layer at the suffix.
        attention_mask: 1 for real tokens of prefix and suffix, 0 for padding.
    """

    model: Any
    path: Path
    keys: tuple[Float[Tensor, "prompt prefix kv_head d_head"], ...]
    values: tuple[Float[Tensor, "prompt prefix kv_head d_head"], ...]
    resid_pre: Float[Tensor, "layer prompt suffix d_model"]
    z: Float[Tensor, "layer prompt suffix head d_head"]
    resid_final: Float[Tensor, "prompt suffix d_model"]
    attention_mask: Int[Tensor, "prompt pos"]

    @property
    def n_suffix(self) -> int:
        """Number of suffix positions."""
        return self.resid_pre.shape[2]

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return self.resid_pre.shape[1]

    def patched(
        self,
        heads: Sequence[Head],
        values: Float[Tensor, "variant d_head"],
        where: Bool[Tensor, "prompt suffix"],
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Residual stream after the last layer, one variant a head, with that head's z replaced.

        Args:
            heads: the patched heads, sorted by layer; variant i has only ``heads[i]`` patched.
            values: the new z of each head.
            where: the suffix positions at which z is replaced.
        """
        if list(heads) != sorted(heads):
            raise ValueError(f"patched: expected heads sorted by layer, got {[str(head) for head in heads]}.")
        if self.path == "weights":
            return self._patched_weights(heads, values, where)
        return self._patched_kv(heads, values, where)

    def continue_from(
        self, layer: int, resid: Float[Tensor, "prompt variant suffix d_model"]
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Run suffix variants whose residual stream BEFORE ``layer`` is given through the rest of the model."""
        if self.path == "kv":
            return self._continue_kv(layer, resid, None)
        for i in range(layer, self.model.cfg.n_layers):
            resid = self._block(i, resid)
        return resid

    def logits(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm and unembedding."""
        flat = resid.reshape(1, -1, resid.shape[-1])
        logits = self.model.unembed(self.model.ln_final(flat))
        cap = getattr(self.model.cfg, "output_logits_soft_cap", 0.0) or 0.0
        if cap > 0:
            logits = cap * torch.tanh(logits / cap)
        return logits.reshape(*resid.shape[:-1], -1)

    def log_probs(
        self, resid: Float[Tensor, "prompt variant suffix d_model"], targets: Int[Tensor, "prompt suffix"]
    ) -> Float[Tensor, "prompt variant suffix"]:
        """Log-probability of ``targets`` as next tokens of each suffix position, in nats; negative targets give 0.

        The unembedding runs in slices, so that the logits of all variants are never held at once.
        """
        n_prompts, n_variants, n_suffix, _ = resid.shape
        wanted = targets[:, None].expand(-1, n_variants, -1).reshape(-1)
        flat = resid.reshape(-1, resid.shape[-1])
        rows = max(1, _LOGIT_SLICE // self.model.cfg.d_vocab)
        parts = []
        for start in range(0, flat.shape[0], rows):
            ids = wanted[start : start + rows]
            logits = self.logits(flat[start : start + rows]).float()
            chosen = logits.gather(-1, ids.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(dim=-1)
            parts.append(torch.where(ids < 0, torch.zeros_like(chosen), chosen))
        return torch.cat(parts).reshape(n_prompts, n_variants, n_suffix)

    # -- weights path -------------------------------------------------------------------------------------------------

    def _patched_weights(self, heads: Sequence[Head], values: Tensor, where: Tensor) -> Tensor:
        active: Tensor | None = None
        start = 0
        first = heads[0].layer
        for layer in range(first, self.model.cfg.n_layers):
            if active is not None:
                active = self._block(layer, active)
            end = start + sum(head.layer == layer for head in heads)
            if end > start:
                index = torch.tensor([head.head for head in heads[start:end]], device=values.device)
                fresh = self._patch_layer(layer, index, values[start:end], where)
                active = fresh if active is None else torch.cat([active, fresh], dim=1)
                start = end
        assert active is not None
        return active

    def _patch_layer(self, layer: int, index: Tensor, values: Tensor, where: Tensor) -> Tensor:
        """Output of block ``layer`` for one variant a head in ``index``; only the attention's output changes."""
        block = self.model.blocks[layer]
        z = self.z[layer]
        weight = block.attn.W_O
        attn_out = F.linear(z.flatten(2), weight.flatten(0, 1).T, block.attn.b_O)
        change = values[None, :, None] - einops.rearrange(z[:, :, index], "p s v e -> p v s e")
        change = change * where[:, None, :, None]
        attn_out = attn_out[:, None] + torch.einsum("pvse,ved->pvsd", change, weight[index])
        resid = self.resid_pre[layer][:, None].expand_as(attn_out)
        return self._finish_block(block, resid, attn_out)

    def _block(self, layer: int, resid: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        return self._finish_block(block, resid, self._attention(layer, block, resid))

    def _finish_block(self, block: Any, resid: Tensor, attn_out: Tensor) -> Tensor:
        """Everything of a block after its attention, with the block's own norms and MLP."""
        cfg = self.model.cfg
        shape = resid.shape
        resid, attn_out = resid.reshape(-1, *shape[2:]), attn_out.reshape(-1, *shape[2:])
        if cfg.use_normalization_before_and_after:
            attn_out = block.ln1_post(attn_out)
        middle = resid + attn_out
        if not cfg.attn_only:
            middle = middle + block.apply_mlp(block.ln2(resid if cfg.parallel_attn_mlp else middle))
        return middle.reshape(shape)

    def _attention(self, layer: int, block: Any, resid: Tensor) -> Tensor:
        """Attention of suffix variants over the shared prefix and their own suffix."""
        attn = block.attn
        n_prompts, n_variants, n_suffix, _ = resid.shape
        n_prefix = self.keys[layer].shape[1]
        x = block.ln1(resid.flatten(0, 1))
        q, k, v = attn.calculate_qkv_matrices(x, x, x)
        if self.model.cfg.positional_embedding_type == "rotary":
            mask = self.attention_mask.repeat_interleave(n_variants, dim=0)
            q, k = attn.apply_rotary(q, n_prefix, mask), attn.apply_rotary(k, n_prefix, mask)
        kv_heads = k.shape[2]
        sizes = {"p": n_prompts, "v": n_variants, "s": n_suffix, "k": kv_heads}
        q = einops.rearrange(q, "(p v) s (k g) e -> p k (v s g) e", **sizes)
        k_new = einops.rearrange(k, "(p v) s k e -> p v k s e", p=n_prompts, v=n_variants)
        v_new = einops.rearrange(v, "(p v) s k e -> p v k s e", p=n_prompts, v=n_variants)
        group = q.shape[2] // (n_variants * n_suffix)
        to_prefix = q @ einops.rearrange(self.keys[layer], "p t k e -> p k e t")
        q_own = einops.rearrange(q, "p k (v s g) e -> p v k (s g) e", v=n_variants, s=n_suffix)
        to_suffix = einops.rearrange(q_own @ k_new.mT, "p v k (s g) t -> p k (v s g) t", s=n_suffix)
        scores = torch.cat([to_prefix, to_suffix], dim=-1) / attn.attn_scale
        cap = self.model.cfg.attn_scores_soft_cap
        if cap is not None and cap > 0:
            scores = cap * torch.tanh(scores / cap)
        allowed = self._allowed(attn, n_prefix, n_suffix)  # [prompt suffix prefix+suffix]
        if not bool(allowed.all()):
            allowed = allowed[:, None, None, :, None].expand(-1, 1, n_variants, -1, group, -1).flatten(2, 4)
            scores = scores.masked_fill(~allowed, -torch.inf)
        pattern = scores.softmax(dim=-1).to(v.dtype)
        z = pattern[..., :n_prefix] @ einops.rearrange(self.values[layer], "p t k e -> p k t e")
        own = einops.rearrange(pattern[..., n_prefix:], "p k (v s g) t -> p v k (s g) t", v=n_variants, s=n_suffix)
        z = z + einops.rearrange(own @ v_new, "p v k (s g) e -> p k (v s g) e", s=n_suffix)
        z = einops.rearrange(z, "p k (v s g) e -> p v s (k g e)", v=n_variants, s=n_suffix)
        return F.linear(z, attn.W_O.flatten(0, 1).T, attn.b_O)

    def _allowed(self, attn: Any, n_prefix: int, n_suffix: int) -> Bool[Tensor, "prompt suffix key"]:
        """Which keys each suffix position may attend to: real tokens, not later ones, inside a local window.

        Padding inside the suffix (of prompts shorter than others) attends to itself alone, which keeps it finite; no
        real token attends to it.
        """
        device = self.attention_mask.device
        query = n_prefix + torch.arange(n_suffix, device=device)[:, None]
        key = torch.arange(n_prefix + n_suffix, device=device)[None]
        allowed = key <= query
        if attn.attn_type == "local":
            allowed = allowed & (key > query - self.model.cfg.window_size)
        return (allowed[None] & self.attention_mask[:, None].bool()) | (key == query)

    # -- kv path ------------------------------------------------------------------------------------------------------

    def _patched_kv(self, heads: Sequence[Head], values: Tensor, where: Tensor) -> Tensor:
        parts = []
        for layer in sorted({head.layer for head in heads}):
            rows = [i for i, head in enumerate(heads) if head.layer == layer]
            index = torch.tensor([heads[i].head for i in rows], device=values.device)
            resid = self.resid_pre[layer][:, None].expand(-1, len(rows), -1, -1)
            parts.append(self._continue_kv(layer, resid, (index, values[rows], where)))
        return torch.cat(parts, dim=1)

    def _continue_kv(self, layer: int, resid: Tensor, patch: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

        model = self.model
        n_prompts, n_variants = resid.shape[:2]
        if layer == model.cfg.n_layers:
            return resid
        n_prefix = self.keys[0].shape[1]
        copies = [
            TransformerLensKeyValueCacheEntry(
                keys.repeat_interleave(n_variants, dim=0), values.repeat_interleave(n_variants, dim=0), frozen=True
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        mask = self.attention_mask.repeat_interleave(n_variants, dim=0)
        cache = TransformerLensKeyValueCache(copies, mask[:, :n_prefix], frozen=True)
        hooks = []
        if patch is not None:
            index, values, where = patch

            def replace(z: Tensor, hook: Any) -> Tensor:
                z = z.unflatten(0, (n_prompts, n_variants)).clone()
                variant = torch.arange(n_variants, device=z.device)
                old = z[:, variant, :, index]  # [variant prompt suffix d_head]
                new = torch.where(where[None, :, :, None], values[:, None, None].to(z.dtype), old)
                z[:, variant, :, index] = new
                return z.flatten(0, 1)

            hooks.append((z_hook(layer), replace))
        with model.hooks(fwd_hooks=hooks):
            out = model(
                resid.flatten(0, 1),
                start_at_layer=layer,
                stop_at_layer=model.cfg.n_layers,
                past_kv_cache=cache,
                attention_mask=mask,
                return_type=None,
            )
        return out.unflatten(0, (n_prompts, n_variants))


_LOGIT_SLICE = 16 * 1024 * 1024
"""Numbers in one slice of logits."""


def run_prefix(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    attention_mask: Int[Tensor, "prompt pos"],
    *,
    n_suffix: int = 1,
    path: Path = "weights",
) -> SuffixRun:
    """Run prompts once and keep what patched suffixes need.

    Args:
        model: the model.
        tokens: prompts, left-padded, with the answer's tokens (all but the last) appended where several are scored.
        attention_mask: 1 for real tokens, 0 for padding.
        n_suffix: number of last positions that patches may change.
        path: ``"weights"`` or ``"kv"``.

    Raises:
        ValueError: ``n_suffix`` is not between 1 and the number of positions.
    """
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    n_pos = tokens.shape[1]
    if not 1 <= n_suffix <= n_pos:
        raise ValueError(f"run_prefix: expected n_suffix between 1 and {n_pos} (the prompt length), got {n_suffix}.")
    cfg = model.cfg
    device = next(model.parameters()).device
    tokens, attention_mask = tokens.to(device), attention_mask.to(device)
    cache = TransformerLensKeyValueCache.init_cache(cfg, device, tokens.shape[0])
    resid_pre: list[Tensor] = []
    z: list[Tensor] = []

    def keep(store: list[Tensor]) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            store.append(value[:, -n_suffix:].detach().clone())

        return hook

    hooks = [(f"blocks.{layer}.hook_resid_pre", keep(resid_pre)) for layer in range(cfg.n_layers)]
    hooks += [(z_hook(layer), keep(z)) for layer in range(cfg.n_layers)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        final = model(
            tokens,
            attention_mask=attention_mask,
            past_kv_cache=cache,
            stop_at_layer=cfg.n_layers,
            return_type=None,
        )
    keys, values = [], []
    n_prefix = n_pos - n_suffix
    for layer, entry in enumerate(cache.entries):
        k = entry.past_keys
        if path == "weights" and cfg.positional_embedding_type == "rotary":
            with torch.no_grad():
                k = model.blocks[layer].attn.apply_rotary(k, 0, attention_mask)
        keys.append(k[:, :n_prefix].contiguous())
        values.append(entry.past_values[:, :n_prefix].contiguous())
    return SuffixRun(
        model=model,
        path=path,
        keys=tuple(keys),
        values=tuple(values),
        resid_pre=torch.stack(resid_pre),
        z=torch.stack(z),
        resid_final=final[:, -n_suffix:].detach().clone(),
        attention_mask=attention_mask,
    )


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not every system counts its free pages
        return 4 * 1024**3


@dataclass(frozen=True, slots=True)
class Slices:
    """How work is cut to stay inside a memory bound."""

    prompts: int
    variants: int

    def over_prompts(self, n: int) -> Iterator[slice]:
        """Slices that cover ``n`` prompts."""
        return (slice(start, min(n, start + self.prompts)) for start in range(0, n, self.prompts))

    def over_variants(self, n: int) -> Iterator[slice]:
        """Slices that cover ``n`` variants."""
        return (slice(start, min(n, start + self.variants)) for start in range(0, n, self.variants))


def plan_slices(
    model: Any, *, n_pos: int, n_suffix: int, n_variants: int, path: Path, max_memory: int | None
) -> Slices:
    """How many prompts and variants go through together.

    Args:
        model: the model.
        n_pos, n_suffix: positions of a prompt, and of its suffix.
        n_variants: patched copies of a prompt.
        path: the path taken.
        max_memory: bytes for activations; by default a quarter of what is free, at most 1 GiB on a CPU and 8 GiB on a
            GPU.

    Raises:
        ValueError: ``max_memory`` is too small for a single prompt with a single variant.
    """
    cfg = model.cfg
    device = next(model.parameters()).device
    if max_memory is None:
        ceiling = 8 * 1024**3 if device.type == "cuda" else 1024**3
        max_memory = min(free_memory(device) // 4, ceiling)
    size = torch.finfo(cfg.dtype).bits // 8
    d_mlp = cfg.d_mlp or 0
    # a variant: residual streams, MLP, projections and scores of its suffix; on the kv path also a copy of the prefix
    per_variant = (
        n_suffix * size * (6 * cfg.d_model + 3 * d_mlp + 4 * cfg.n_heads * cfg.d_head + 3 * cfg.n_heads * n_pos)
    )
    if path == "kv":
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        per_variant += 2 * size * cfg.n_layers * n_pos * kv_heads * cfg.d_head
    # a prompt: its own run (one layer's activations at every position) and what is kept of it
    kept = (
        size
        * cfg.n_layers
        * (2 * n_pos * cfg.n_heads * cfg.d_head + n_suffix * (cfg.d_model + cfg.n_heads * cfg.d_head))
    )
    own = size * n_pos * (6 * cfg.d_model + 3 * d_mlp + 3 * cfg.n_heads * n_pos)
    per_prompt = kept + own
    if per_prompt + per_variant > max_memory:
        raise ValueError(
            f"max_memory={max_memory} bytes is too small: one prompt of {n_pos} tokens with one patched copy needs "
            f"about {per_prompt + per_variant} bytes; give more memory or shorter prompts."
        )
    variants = min(n_variants, max(1, (max_memory - per_prompt) // per_variant))
    prompts = max(1, max_memory // (per_prompt + variants * per_variant))
    return Slices(prompts=int(prompts), variants=int(variants))


def steered_resid(
    run: SuffixRun, layer: int, vector: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "prompt 1 suffix d_model"]:
    """Final residual stream with ``vector`` added after ``layer`` at the first suffix position (differentiable)."""
    last = layer + 1 == run.model.cfg.n_layers
    after = run.resid_final if last else run.resid_pre[layer + 1]
    first = (after[:, 0] + vector.to(after.dtype))[:, None]
    resid = torch.cat([first, after[:, 1:]], dim=1)[:, None]
    return resid if last else run.continue_from(layer + 1, resid)


__all__ = [
    "PATHS",
    "Path",
    "Slices",
    "SuffixRun",
    "choose_path",
    "counted_gain",
    "free_memory",
    "has_hooks",
    "plan_slices",
    "run_prefix",
    "steered_resid",
    "why_not_kv",
    "why_not_weights",
]
