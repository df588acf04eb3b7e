"""The engine over ``HookedTransformer``: over its weights, or through its own ``start_at_layer`` and cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.interventions import hooked, resid_pre_hook, z_hook
from fvlens.suffix._attention import Keys, allowed_keys, attend, attend_within
from fvlens.suffix._edits import SiteEdits
from fvlens.suffix._layout import Block, Layout, is_half, rotated, wide_logits
from fvlens.suffix._run import SuffixRun, row_edits
from fvlens.suffix._scratch import Scratch
from fvlens.suffix._steps import LaidOutSteps, SteeredSuffix


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
    return torch.nn.functional.linear(resid, weight.T, bias)  # the class's own forward copies the whole weight first


# --- over the weights ---


@dataclass(frozen=True, slots=True)
class Walk:
    """A model's blocks over rows of tokens, by its layout.

    Attributes:
        cfg: the model's configuration.
        layout: its weights, laid out.
        mask: 1 for real tokens of prefix and suffix, 0 for padding.
        rotations: cosines and sines of the last positions, for each table of the layout.
        allowed: window of a block -> which keys the last positions attend to in it, None for all that are not later.
    """

    cfg: Any
    layout: Layout
    mask: Int[Tensor, "prompt pos"]
    rotations: list[tuple[Tensor, Tensor]]
    allowed: dict[int | None, Bool[Tensor, "prompt last key"] | None]

    @classmethod
    def over(cls, model: Any, layout: Layout, mask: Int[Tensor, "prompt pos"], n_last: int) -> "Walk":
        """The walk of the last positions of rows with this mask."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - n_last :]
        windows = {block.window for block in layout.blocks}
        allowed = {window: allowed_keys(mask.bool(), n_last, window) for window in windows}
        return cls(model.cfg, layout, mask, layout.rotations(positions), allowed)

    @property
    def cap(self) -> float:
        """Soft cap of the attention scores, 0 without one."""
        return max(0.0, self.cfg.attn_scores_soft_cap or 0.0)

    def heads(
        self,
        block: Block,
        resid: Float[Tensor, "row d_model"],
        shape: Sequence[int],
        rotations: Sequence[Any],
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[*shape heads d_head]`` of what goes into a block, normed and rotated as it does.

        From ``scratch`` they are there till the next block.
        """
        n_heads, n_kv = self.cfg.n_heads, self.cfg.n_key_value_heads or self.cfg.n_heads
        together = block.qkv(block.ln1(resid, scratch), scratch, "qkv").view(
            *shape, n_heads + 2 * n_kv, self.cfg.d_head
        )
        if block.qk_norm is not None:
            q, k, v = together.split([n_heads, n_kv, n_kv], dim=-2)
            q, k = block.qk_norm[0](q), block.qk_norm[1](k)
            qk = torch.cat([q, k], dim=-2) if block.rotary is not None else None
        else:
            qk, v = together.split([n_heads + n_kv, n_kv], dim=-2)
            q, k = qk.split([n_heads, n_kv], dim=-2)
        if block.rotary is not None:
            assert qk is not None
            cos, sin = rotations[block.rotary]
            q, k = rotated(qk, cos, sin, self.cfg.rotary_adjacent_pairs, scratch).split([n_heads, n_kv], dim=-2)
        return q, k, v

    def finish(
        self,
        block: Block,
        resid: Float[Tensor, "row d_model"],
        z: Float[Tensor, "row z"],
        scratch: Scratch | None = None,
    ) -> Float[Tensor, "row d_model"]:
        """Everything of a block after its heads' mixed values."""
        attn_out = block.out(z, scratch, "attn_out")
        if block.after_attention is not None:
            attn_out = block.after_attention(attn_out)
        middle = resid + attn_out
        if block.mlp is None or block.ln2 is None:
            return middle
        mlp_out = block.mlp(block.ln2(resid if self.cfg.parallel_attn_mlp else middle, scratch), scratch)
        return middle + mlp_out if middle.requires_grad else middle.add_(mlp_out)


@dataclass(frozen=True, slots=True)
class WeightsRun(SuffixRun):
    """Over the model's weights, laid out once; the variants of a prompt share its keys and values.

    Attributes:
        kept: keys and values of the prefix from ``from_layer`` on, keys first, rotated already.
        layout: the weights.
        walk: the model's blocks over the suffix.
    """

    kept: Float[Tensor, "prompt _layer two_kv prefix d_head"]
    layout: Layout
    walk: Walk = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "walk", Walk.over(self.model, self.layout, self.attention_mask, self.n_suffix))

    def _cache(self, take: Any) -> dict[str, Any]:
        return {"kept": take(self.kept)}

    def keys(self, layer: int) -> Keys:
        """What the suffix attends to in a layer."""
        block = self.layout.blocks[layer]
        return Keys(self.kept[:, layer - self.from_layer], self.walk.allowed[block.window], block.scale, self.walk.cap)

    def _block(
        self, layer: int, active: Tensor | None, n_fresh: int, edits: SiteEdits, scratch: Scratch | None = None
    ) -> Tensor:
        block, walk = self.layout.blocks[layer], self.walk
        zs, resids = [], []
        if active is not None:
            rows = active.reshape(-1, active.shape[-1])
            rotations = [(cos[:, None], sin[:, None]) for cos, sin in walk.rotations]  # alike for all variants
            q, k, v = walk.heads(block, rows, active.shape[:3], rotations, scratch)
            zs.append(attend(q, k, v, self.keys(layer), scratch))
            resids.append(active)
        if n_fresh:
            zs.append(self.kept_z(layer)[:, None].expand(-1, n_fresh, -1, -1, -1))
            resids.append(self.resid_before(layer)[:, None].expand(-1, n_fresh, -1, -1))
        z = edits.apply(zs[0] if len(zs) == 1 else torch.cat(zs, dim=1))
        resid = resids[0] if len(resids) == 1 else torch.cat(resids, dim=1)
        rows = resid.reshape(-1, resid.shape[-1])
        return walk.finish(block, rows, z.flatten(3).flatten(0, 2), scratch).view(resid.shape)

    def logits(
        self, resid: Float[Tensor, "*rows d_model"], scratch: Scratch | None = None
    ) -> Float[Tensor, "*rows d_vocab"]:
        layout = self.layout
        flat = layout.final(resid.reshape(-1, resid.shape[-1]), scratch)
        return layout.unembed(flat, scratch).view(*resid.shape[:-1], -1)

    def steps(self, layer: int) -> SteeredSuffix:
        return LaidOutSteps(self, layer)


@dataclass(frozen=True, slots=True)
class Passed:
    """A block that whole prompts have gone through.

    Keys, values and z are there till the next block comes.

    Attributes:
        layer: the block.
        k, v: keys, rotated already, and values.
        z: its heads' mixed values; of the last block, at the last positions only.
        rows_before, rows_after: the residual stream before and after it, a row for each distinct token.
        places: the row of each position; of the last block, of the last positions only.
    """

    layer: int
    k: Float[Tensor, "prompt pos kv d_head"]
    v: Float[Tensor, "prompt pos kv d_head"]
    z: Float[Tensor, "prompt query head d_head"]
    rows_before: Float[Tensor, "row d_model"]
    rows_after: Float[Tensor, "row d_model"]
    places: Int[Tensor, "prompt query"]

    @property
    def before(self) -> Float[Tensor, "prompt query d_model"]:
        """The residual stream before the block."""
        return self._at_places(self.rows_before)

    @property
    def after(self) -> Float[Tensor, "prompt query d_model"]:
        """The residual stream after the block."""
        return self._at_places(self.rows_after)

    def _at_places(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "prompt query d_model"]:
        # as many rows as positions are those of the positions, in order: no copy
        return rows.view(*self.places.shape, -1) if len(rows) == self.places.numel() else rows[self.places]


def passes(
    model: Any, layout: Layout, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"], n_last: int
) -> Iterator[Passed]:
    """Whole prompts through the laid-out weights, block after block.

    A token whose prompt begins like another's up to there goes through the products once for both, and padding once
    for all: only attention sees every prompt by itself.

    Args:
        model: the model.
        layout: its weights.
        tokens, mask: the prompts, left-padded.
        n_last: last positions that are wanted of the last block; nothing above reads the others.
    """
    cfg = model.cfg
    walk = Walk.over(model, layout, mask, tokens.shape[1])
    embedded, *_ = model.input_to_embed(tokens, attention_mask=mask)
    places, first = distinct(tokens, mask)
    is_shared = len(first) < places.numel()
    resid = embedded.reshape(-1, cfg.d_model)
    rotations = [(cos.flatten(0, 1), sin.flatten(0, 1)) for cos, sin in walk.rotations]
    if is_shared:
        resid, rotations = resid[first], [(cos[first], sin[first]) for cos, sin in rotations]
    del embedded

    def spread(x: Float[Tensor, "_row ..."]) -> Float[Tensor, "prompt pos ..."]:
        return x[places] if is_shared else x.view(*places.shape, *x.shape[1:])

    scratch = Scratch()
    for layer, block in enumerate(layout.blocks):
        q, k, v = (spread(x) for x in walk.heads(block, resid, (len(resid),), rotations, scratch))
        is_last = layer == cfg.n_layers - 1
        if is_last:
            q, resid = q[:, -n_last:], resid[places[:, -n_last:].flatten()]
            places = torch.arange(len(resid), device=resid.device).view(-1, n_last)
        allowed = walk.allowed[block.window]
        if allowed is not None:
            allowed = allowed[:, -q.shape[1] :]
        z = attend_within(q, k, v, allowed, scale=block.scale, cap=walk.cap)
        rows = z.reshape(-1, cfg.n_heads * cfg.d_head)
        after = walk.finish(block, resid, rows[first] if is_shared and not is_last else rows, scratch)
        yield Passed(layer, k, v, z, resid, after, places)
        resid = after
        del q, k, v, z, rows, after  # not beside those of the next block


_WORTH = 0.9
"""Share of the positions that are distinct from which on all of them go through by themselves."""


def distinct(
    tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, " row"]]:
    """Which positions of left-padded prompts have the same tokens up to and with their own, padding aside.

    Returns:
        The number of its distinct beginning for each position, all padding having the same; and for each of these the
        first position that has it, counted prompt after prompt. Where that would spare little, each position is its
        own.
    """
    n_prompts, n_pos = tokens.shape
    every = torch.arange(n_prompts * n_pos, device=tokens.device).view(n_prompts, n_pos)
    lengths = mask.sum(dim=1)
    places = torch.zeros_like(every)
    n_found = int(bool((lengths < n_pos).any()))  # number 0 is padding, where there is any
    above = torch.zeros(n_prompts, dtype=torch.long, device=tokens.device)
    step = int(tokens.max()) + 1
    for depth in range(int(lengths.max())):
        alive = (lengths > depth).nonzero().flatten()
        column = n_pos - lengths[alive] + depth
        beginnings, which = torch.unique(above[alive] * step + tokens[alive, column], return_inverse=True)
        above[alive] = which
        places[alive, column] = n_found + which
        n_found += len(beginnings)
        if len(beginnings) == len(alive):  # all differ, and so does whatever follows them
            later = torch.arange(n_pos, device=tokens.device)[None] > n_pos - lengths[:, None] + depth
            rest = int(later.sum())
            places[later] = torch.arange(n_found, n_found + rest, device=tokens.device)
            n_found += rest
            break
    if n_found > _WORTH * every.numel():
        return every, every.flatten()
    first = torch.full((n_found,), every.numel(), dtype=torch.long, device=tokens.device)
    return places, first.scatter_reduce(0, places.flatten(), every.flatten(), "amin")


def run_weights(
    model: Any,
    layout: Layout,
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    n_suffix: int,
    from_layer: int,
    keep_z: bool,
) -> WeightsRun:
    """Run prompts once over the weights and keep what suffixes need."""
    cfg = model.cfg
    n_prompts, n_prefix = tokens.shape[0], tokens.shape[1] - n_suffix
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    kept = torch.empty(0)
    pre, zs = [], []
    final = torch.empty(0)
    for passed in passes(model, layout, tokens, mask, n_suffix):
        if passed.layer == 0:
            shape = n_prompts, cfg.n_layers - from_layer, 2 * n_kv, n_prefix, cfg.d_head
            kept = passed.k.new_empty(shape)
        if passed.layer >= from_layer:
            pre.append(passed.rows_before[passed.places[:, -n_suffix:]])
            own = kept[:, passed.layer - from_layer]
            own[:, :n_kv], own[:, n_kv:] = (x[:, :n_prefix].transpose(1, 2) for x in (passed.k, passed.v))
            if keep_z:
                zs.append(passed.z[:, -n_suffix:].clone())
        if passed.layer == cfg.n_layers - 1:
            final = passed.after
        del passed  # nothing of a block lies beside the next one but what is kept
    return WeightsRun(
        model=model,
        path="weights",
        from_layer=from_layer,
        resid_pre=torch.stack(pre) if pre else final.new_empty(0, n_prompts, n_suffix, cfg.d_model),
        z=torch.stack(zs) if zs else None,
        resid_final=final.contiguous(),
        attention_mask=mask,
        suffix_tokens=tokens[:, n_prefix:],
        kept=kept,
        layout=layout,
    )


# --- through the class's own blocks ---


@dataclass(frozen=True, slots=True)
class CachedRun(SuffixRun):
    """The model's own ``start_at_layer`` and a frozen ``past_kv_cache``, one block after another.

    Attributes:
        keys, values: of the prefix, one tensor a layer, as the class's cache holds them.
    """

    keys: tuple[Float[Tensor, "prompt prefix kv_head d_head"], ...]
    values: tuple[Float[Tensor, "prompt prefix kv_head d_head"], ...]

    def _cache(self, take: Any) -> dict[str, Any]:
        return {name: tuple(take(tensor) for tensor in getattr(self, name)) for name in ("keys", "values")}

    def logits(
        self, resid: Float[Tensor, "*rows d_model"], scratch: Scratch | None = None
    ) -> Float[Tensor, "*rows d_vocab"]:
        return unembedded(self.model, resid)

    def _block(
        self, layer: int, active: Tensor | None, n_fresh: int, edits: SiteEdits, scratch: Scratch | None = None
    ) -> Tensor:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

        resid = self.resid_in_block(layer, active, n_fresh)
        n_prompts, n_variants = resid.shape[:2]

        def copies(kept: tuple[Tensor, ...], i: int) -> Tensor:
            """What each variant attends to; of blocks that do not run, only the length is asked."""
            if i == layer:
                return kept[i].repeat_interleave(n_variants, dim=0)
            return kept[i][:1].expand(n_prompts * n_variants, -1, -1, -1)

        entries = [
            TransformerLensKeyValueCacheEntry(copies(self.keys, i), copies(self.values, i), frozen=True)
            for i in range(len(self.keys))
        ]
        mask = self.attention_mask.repeat_interleave(n_variants, dim=0)
        cache = TransformerLensKeyValueCache(entries, mask[:, : self.keys[0].shape[1]], frozen=True)
        with hooked(self.model, row_edits(edits, layer, n_prompts)):
            out = self.model(
                resid.flatten(0, 1),
                start_at_layer=layer,
                stop_at_layer=layer + 1,
                past_kv_cache=cache,
                attention_mask=mask,
                return_type=None,
            )
        return out.unflatten(0, (n_prompts, n_variants))


def run_cached(
    model: Any, tokens: Int[Tensor, "prompt pos"], attention_mask: Int[Tensor, "prompt pos"], n_suffix: int
) -> CachedRun:
    """Run prompts once through a HookedTransformer's own blocks and keep what suffixes need."""
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
    device = tokens.device  # a model split over devices leaves each layer's on its own
    return CachedRun(
        model=model,
        path="kv",
        from_layer=0,
        resid_pre=torch.stack([kept[resid_pre_hook(layer)].to(device) for layer in range(cfg.n_layers)]),
        z=torch.stack([kept[z_hook(layer)].to(device) for layer in range(cfg.n_layers)]),
        resid_final=final[:, -n_suffix:].detach().clone().to(device),
        attention_mask=attention_mask,
        suffix_tokens=tokens[:, -n_suffix:],
        keys=tuple(entry.past_keys[:, :n_prefix].contiguous() for entry in cache.entries),
        values=tuple(entry.past_values[:, :n_prefix].contiguous() for entry in cache.entries),
    )
