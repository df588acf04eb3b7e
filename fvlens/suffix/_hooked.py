"""The fast path over ``HookedTransformer``: over its weights, or through its own ``start_at_layer`` and cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fvlens.interventions import hooked, resid_pre_hook, z_hook
from fvlens.suffix._paths import Path
from fvlens.suffix._run import Patch, SuffixRun, is_half, wide_logits
from fvlens.suffix._steps import GeneralSteps, SteeredSuffix, WeightsSteps
from fvlens.types import Head


def unembedded(model: Any, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Final norm, unembedding and soft cap; float32 logits of a model in half precision."""
    cfg = model.cfg
    flat = resid.reshape(1, -1, resid.shape[-1]).to(model.unembed.W_U.device)  # the last one of a split model
    if cfg.normalization_type is not None:
        flat = model.ln_final(flat)
    unembed = model.unembed
    linear = wide_logits if is_half(unembed.W_U.dtype) else _linear
    logits = unembed.hook_out(linear(unembed.hook_in(flat), unembed.W_U, unembed.b_U))
    cap = cfg.output_logits_soft_cap
    if cap is not None and cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits.reshape(*resid.shape[:-1], -1)


def _linear(resid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(resid, weight.T, bias)  # the class's own forward copies the whole weight first


@dataclass(frozen=True, slots=True)
class WeightsRun(SuffixRun):
    """The blocks' own norms, MLPs and projections, but our own attention: the prefix is not copied for each variant.

    Keys and values are ``[prompt prefix kv_head d_head]``; keys are rotated already.
    """

    def steps(self, layer: int) -> SteeredSuffix:
        if self._score_cap:
            return GeneralSteps(self, layer)
        n_prefix, n_suffix = self.attention_mask.shape[1] - self.n_suffix, self.n_suffix
        return WeightsSteps(self, layer, lambda attn: self._allowed(attn, n_prefix, n_suffix))

    @property
    def _score_cap(self) -> float:
        """Soft cap of the attention scores, 0 without one."""
        return max(0.0, self.model.cfg.attn_scores_soft_cap or 0.0)

    def logits(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        return unembedded(self.model, resid)

    def _patched(self, heads: Sequence[Head], values: Tensor, where: Tensor) -> Tensor:
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
        return self._finish_block(layer, resid, attn_out)

    def _run_from(self, layer: int, resid: Tensor, patch: Patch | None) -> Tensor:
        assert patch is None
        for i in range(layer, self.model.cfg.n_layers):
            resid = self._block(i, resid)
        return resid

    def _block(self, layer: int, resid: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        return self._finish_block(layer, resid, self._attention(layer, block, resid))

    def _finish_block(self, layer: int, resid: Tensor, attn_out: Tensor) -> Tensor:
        """Everything of a block after its attention, with the block's own norms and MLP."""
        block = self.model.blocks[layer]
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
        allowed = self._allowed(attn, n_prefix, n_suffix)  # [prompt suffix prefix+suffix]
        everywhere = bool(allowed.all())
        if n_variants == 1 and not self._score_cap:  # nothing is shared, so one fused operation will do
            z = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                torch.cat([self.keys[layer], k], dim=1).transpose(1, 2),
                torch.cat([self.values[layer], v], dim=1).transpose(1, 2),
                attn_mask=None if everywhere else allowed[:, None],
                scale=1 / attn.attn_scale,
                enable_gqa=k.shape[2] < q.shape[2],
            )
            z = z.transpose(1, 2).flatten(2)[:, None]
            return F.linear(z, attn.W_O.flatten(0, 1).T, attn.b_O)
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
        if self._score_cap:
            scores = self._score_cap * torch.tanh(scores / self._score_cap)
        if not everywhere:
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


@dataclass(frozen=True, slots=True)
class CachedRun(SuffixRun):
    """The model's own ``start_at_layer`` and a frozen ``past_kv_cache``. Keys: ``[prompt prefix kv_head d_head]``."""

    def logits(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        return unembedded(self.model, resid)

    def _run_from(self, layer: int, resid: Tensor, patch: Patch | None) -> Tensor:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

        n_prompts, n_variants = resid.shape[:2]
        copies = [
            TransformerLensKeyValueCacheEntry(
                keys.repeat_interleave(n_variants, dim=0), values.repeat_interleave(n_variants, dim=0), frozen=True
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        mask = self.attention_mask.repeat_interleave(n_variants, dim=0)
        cache = TransformerLensKeyValueCache(copies, mask[:, : self.keys[0].shape[1]], frozen=True)
        with hooked(self.model, {} if patch is None else {z_hook(layer): patch.apply}):
            out = self.model(
                resid.flatten(0, 1),
                start_at_layer=layer,
                stop_at_layer=self.model.cfg.n_layers,
                past_kv_cache=cache,
                attention_mask=mask,
                return_type=None,
            )
        return out.unflatten(0, (n_prompts, n_variants))


def run_hooked(
    model: Any, tokens: Int[Tensor, "prompt pos"], attention_mask: Int[Tensor, "prompt pos"], n_suffix: int, path: Path
) -> SuffixRun:
    """Run prompts once through a HookedTransformer and keep what patched suffixes need."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    cfg = model.cfg
    cache = TransformerLensKeyValueCache.init_cache(cfg, tokens.device, tokens.shape[0])
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def see(value: Tensor) -> None:
            kept[name] = value[:, -n_suffix:].detach().clone()

        return see

    names = [name(layer) for layer in range(cfg.n_layers) for name in (resid_pre_hook, z_hook)]
    with torch.no_grad(), hooked(model, {name: keep(name) for name in names}):
        final = model(
            tokens,
            attention_mask=attention_mask,
            past_kv_cache=cache,
            stop_at_layer=cfg.n_layers,
            return_type=None,
        )
    n_prefix = tokens.shape[1] - n_suffix
    keys, values = [], []
    for layer, entry in enumerate(cache.entries):
        k = entry.past_keys
        if path == "weights" and cfg.positional_embedding_type == "rotary":
            with torch.no_grad():
                k = model.blocks[layer].attn.apply_rotary(k, 0, attention_mask)
        keys.append(k[:, :n_prefix].contiguous())
        values.append(entry.past_values[:, :n_prefix].contiguous())
    device = tokens.device  # a model split over devices leaves each layer's on its own
    return (WeightsRun if path == "weights" else CachedRun)(
        model=model,
        path=path,
        keys=tuple(keys),
        values=tuple(values),
        resid_pre=torch.stack([kept[resid_pre_hook(layer)].to(device) for layer in range(cfg.n_layers)]),
        z=torch.stack([kept[z_hook(layer)].to(device) for layer in range(cfg.n_layers)]),
        resid_final=final[:, -n_suffix:].detach().clone().to(device),
        attention_mask=attention_mask,
        suffix_tokens=tokens[:, -n_suffix:],
    )
