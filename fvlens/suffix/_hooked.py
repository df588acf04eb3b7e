"""The fast path over ``HookedTransformer``: over its weights, or through its own ``start_at_layer`` and cache."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fvlens.interventions import hooked, resid_pre_hook, z_hook
from fvlens.suffix._paths import Path
from fvlens.suffix._run import Patch, SuffixRun, is_half, wide_logits
from fvlens.types import Head


def unembedded(
    model: Any, resid: Float[Tensor, "*rows d_model"], norm: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "*rows d_vocab"]:
    """Final norm (``norm`` in its place), unembedding and soft cap; float32 logits of a model in half precision."""
    cfg = model.cfg
    flat = resid.reshape(1, -1, resid.shape[-1]).to(model.unembed.W_U.device)  # the last one of a split model
    if cfg.normalization_type is not None:
        flat = (norm or model.ln_final)(flat)
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
class _Ready:
    """A block laid out for many runs with weights that do not change: the same values in fewer operations.

    Attributes:
        weight, bias: of queries, keys and values in one, rows in that order. The class itself rearranges its weights
            anew at each call.
        ln1, ln2, mlp: the block's own, or one operation of torch's for several where both compute the same: the layer
            norm and the tanh approximation of GELU, in single precision or wider. A block of attention alone does not
            use ln2 and mlp.
    """

    weight: Float[Tensor, "row d_model"]
    bias: Float[Tensor, " row"]
    ln1: Callable[[Tensor], Tensor]
    ln2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, block: Any) -> "_Ready":
        attn = block.attn
        own = "_" if attn.cfg.n_key_value_heads is not None else ""  # without it, a copy for each query head
        names = [("", "Q"), (own, "K"), (own, "V")]
        weights = [getattr(attn, f"{mark}W_{name}").detach() for mark, name in names]
        biases = [getattr(attn, f"{mark}b_{name}").detach() for mark, name in names]
        weight = torch.cat([einops.rearrange(w, "head d_model d_head -> (head d_head) d_model") for w in weights])
        bias = torch.cat([b.flatten() for b in biases])
        if block.cfg.attn_only:
            return cls(weight, bias, _lean_norm(block.ln1), nn.Identity(), nn.Identity())
        return cls(weight, bias, _lean_norm(block.ln1), _lean_norm(block.ln2), _lean_mlp(block))


def _lean_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    from transformer_lens.components.layer_norm import LayerNorm

    if type(norm) is not LayerNorm or is_half(norm.w.dtype):
        return norm
    return lambda x: F.layer_norm(x, norm.w.shape, norm.w, norm.b, norm.eps)


def _lean_mlp(block: Any) -> Callable[[Tensor], Tensor]:
    from transformer_lens.components.mlps.mlp import MLP
    from transformer_lens.utilities.activation_functions import gelu_new

    mlp = block.mlp
    plain = type(mlp) is MLP and mlp.act_fn is gelu_new and not block.cfg.use_normalization_before_and_after
    if not plain or is_half(mlp.W_in.dtype):
        return block.apply_mlp

    def lean(x: Tensor) -> Tensor:
        inside = F.gelu(torch.addmm(mlp.b_in, x.flatten(0, -2), mlp.W_in), approximate="tanh")
        return torch.addmm(mlp.b_out, inside, mlp.W_out).view_as(x)

    return lean


@dataclass(frozen=True, slots=True)
class WeightsRun(SuffixRun):
    """The blocks' own norms, MLPs and projections, but our own attention: the prefix is not copied for each variant.

    Keys and values are ``[prompt prefix kv_head d_head]``; keys are rotated already.

    Attributes:
        ready: the blocks that :meth:`prepared` laid out for many runs, by layer.
    """

    ready: Mapping[int, "_Ready"] = field(default_factory=dict)

    def prepared(self, layer: int) -> "WeightsRun":
        upper = range(layer, self.model.cfg.n_layers)
        return dataclasses.replace(self, ready={i: _Ready.of(self.model.blocks[i]) for i in upper})

    def logits(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        return unembedded(self.model, resid, _lean_norm(self.model.ln_final) if self.ready else None)

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
        block, ready = self.model.blocks[layer], self.ready.get(layer)
        cfg = self.model.cfg
        shape = resid.shape
        resid, attn_out = resid.reshape(-1, *shape[2:]), attn_out.reshape(-1, *shape[2:])
        if cfg.use_normalization_before_and_after:
            attn_out = block.ln1_post(attn_out)
        middle = resid + attn_out
        if not cfg.attn_only:
            ln2, mlp = (block.ln2, block.apply_mlp) if ready is None else (ready.ln2, ready.mlp)
            middle = middle + mlp(ln2(resid if cfg.parallel_attn_mlp else middle))
        return middle.reshape(shape)

    def _attention(self, layer: int, block: Any, resid: Tensor) -> Tensor:
        """Attention of suffix variants over the shared prefix and their own suffix."""
        attn = block.attn
        n_prompts, n_variants, n_suffix, _ = resid.shape
        n_prefix = self.keys[layer].shape[1]
        x = (self.ready[layer].ln1 if layer in self.ready else block.ln1)(resid.flatten(0, 1))
        q, k, v = self._queries_keys_values(layer, attn, x)
        if self.model.cfg.positional_embedding_type == "rotary":
            mask = self.attention_mask.repeat_interleave(n_variants, dim=0)
            q, k = attn.apply_rotary(q, n_prefix, mask), attn.apply_rotary(k, n_prefix, mask)
        cap = self.model.cfg.attn_scores_soft_cap
        allowed = self._allowed(attn, n_prefix, n_suffix)  # [prompt suffix prefix+suffix]
        everywhere = bool(allowed.all())
        if n_variants == 1 and not (cap is not None and cap > 0):  # nothing is shared, so one fused operation will do
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
        if cap is not None and cap > 0:
            scores = cap * torch.tanh(scores / cap)
        if not everywhere:
            allowed = allowed[:, None, None, :, None].expand(-1, 1, n_variants, -1, group, -1).flatten(2, 4)
            scores = scores.masked_fill(~allowed, -torch.inf)
        pattern = scores.softmax(dim=-1).to(v.dtype)
        z = pattern[..., :n_prefix] @ einops.rearrange(self.values[layer], "p t k e -> p k t e")
        own = einops.rearrange(pattern[..., n_prefix:], "p k (v s g) t -> p v k (s g) t", v=n_variants, s=n_suffix)
        z = z + einops.rearrange(own @ v_new, "p v k (s g) e -> p k (v s g) e", s=n_suffix)
        z = einops.rearrange(z, "p k (v s g) e -> p v s (k g e)", v=n_variants, s=n_suffix)
        return F.linear(z, attn.W_O.flatten(0, 1).T, attn.b_O)

    def _queries_keys_values(
        self, layer: int, attn: Any, x: Float[Tensor, "row suffix d_model"]
    ) -> tuple[
        Float[Tensor, "row suffix head d_head"],
        Float[Tensor, "row suffix kv_head d_head"],
        Float[Tensor, "row suffix kv_head d_head"],
    ]:
        """What attention calls q, k and v, before any rotation."""
        if layer not in self.ready:
            return attn.calculate_qkv_matrices(x, x, x)
        n_kv_heads, d_head = self.keys[layer].shape[-2:]
        together = F.linear(x, self.ready[layer].weight, self.ready[layer].bias).unflatten(-1, (-1, d_head))
        q, k, v = together.split([together.shape[-2] - 2 * n_kv_heads, n_kv_heads, n_kv_heads], dim=-2)
        if self.model.cfg.use_qk_norm:
            q, k = attn._apply_qk_norm(q, attn.q_norm), attn._apply_qk_norm(k, attn.k_norm)
        return q, k, v

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
