"""Attention of suffixes and of whole prompts over keys and values that are there already."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fvlens.suffix._scratch import Scratch


@dataclass(frozen=True, slots=True)
class Keys:
    """What the queries of one layer may attend to besides themselves.

    Attributes:
        kept: keys and values of the prefix, keys first, heads in the second axis.
        allowed: which keys, of prefix and suffix, each suffix position attends to; None if it is every one that is not
            later.
        scale: factor on the scores.
        cap: soft cap of the scores, 0 without one.
    """

    kept: Float[Tensor, "prompt two_kv prefix d_head"]
    allowed: Bool[Tensor, "prompt suffix key"] | None
    scale: float
    cap: float


def attend(
    q: Float[Tensor, "prompt variant suffix head d_head"],
    k: Float[Tensor, "prompt variant suffix kv d_head"],
    v: Float[Tensor, "prompt variant suffix kv d_head"],
    keys: Keys,
    scratch: Scratch | None = None,
) -> Float[Tensor, "prompt variant suffix head d_head"]:
    """Mixed values of suffix variants, which share the prefix of their prompt and have a suffix of their own."""
    if q.shape[1] == 1 and not keys.cap:
        return _alone(q[:, 0], k[:, 0], v[:, 0], keys)[:, None]
    return _shared(q, k, v, keys, scratch)


def _alone(
    q: Float[Tensor, "prompt suffix head d_head"],
    k: Float[Tensor, "prompt suffix kv d_head"],
    v: Float[Tensor, "prompt suffix kv d_head"],
    keys: Keys,
) -> Float[Tensor, "prompt suffix head d_head"]:
    """One variant a prompt: nothing is shared, so one fused operation will do."""
    n_kv = k.shape[2]
    new = torch.cat([k, v], dim=2).transpose(1, 2)
    all_keys, all_values = torch.cat([keys.kept, new], dim=2).split(n_kv, dim=1)
    n_suffix, allowed = q.shape[1], keys.allowed
    if allowed is None and n_suffix > 1:
        allowed = later_hidden(all_keys.shape[2], n_suffix, q.device)[None]
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        all_keys,
        all_values,
        attn_mask=None if allowed is None else allowed[:, None],
        scale=keys.scale,
        enable_gqa=n_kv < q.shape[2],
    )
    return z.transpose(1, 2)


def _shared(
    q: Float[Tensor, "prompt variant suffix head d_head"],
    k: Float[Tensor, "prompt variant suffix kv d_head"],
    v: Float[Tensor, "prompt variant suffix kv d_head"],
    keys: Keys,
    scratch: Scratch | None,
) -> Float[Tensor, "prompt variant suffix head d_head"]:
    """Many variants a prompt: one product with the prefix for all of them, one with each one's own suffix."""
    n_prompts, n_variants, n_suffix, n_heads, d_head = q.shape
    n_kv, n_prefix = k.shape[3], keys.kept.shape[2]
    group = n_heads // n_kv
    old_keys, old_values = keys.kept.split(n_kv, dim=1)
    # [prompt kv variant*suffix*group d_head]: the queries of a key head, one after another
    grouped = q.view(n_prompts, n_variants, n_suffix, n_kv, group, d_head).permute(0, 3, 1, 2, 4, 5)
    asked = grouped.reshape(n_prompts, n_kv, -1, d_head)
    to_prefix = asked @ (old_keys * keys.scale).mT
    own = asked.view(n_prompts, n_kv, n_variants, n_suffix * group, d_head)
    k, v = (k * keys.scale).permute(0, 3, 1, 2, 4), v.permute(0, 3, 1, 2, 4)  # prompt kv variant suffix d_head
    # a product of one row with one column each is faster as a sum
    to_suffix = (own * k).sum(dim=-1).flatten(2)[..., None] if n_suffix == 1 else (own @ k.mT).flatten(2, 3)
    work = scratch if scratch is not None and scratch.takes(q) else None
    scores = _side_by_side(to_prefix, to_suffix, work, n_heads)
    if keys.cap:
        scores = keys.cap * torch.tanh(scores / keys.cap)
    allowed = keys.allowed
    if allowed is None and n_suffix > 1:
        allowed = later_hidden(n_prefix + n_suffix, n_suffix, q.device)[None]
    if allowed is not None:
        hidden = ~allowed[:, None, None, :, None].expand(-1, 1, n_variants, -1, group, -1).flatten(2, 4)
        scores = scores.masked_fill(hidden, -torch.inf)
    # over themselves where nothing needs the scores again
    pattern = scores.softmax(dim=-1) if work is None else torch.softmax(scores, dim=-1, out=scores)
    z = pattern[..., :n_prefix] @ old_values
    mine = pattern[..., n_prefix:].view(n_prompts, n_kv, n_variants, n_suffix * group, n_suffix)
    z = torch.addcmul(z.view_as(own), mine, v) if n_suffix == 1 else z.view_as(own) + mine @ v
    z = z.view(n_prompts, n_kv, n_variants, n_suffix, group, d_head).permute(0, 2, 3, 1, 4, 5)
    return z.reshape(n_prompts, n_variants, n_suffix, n_heads, d_head)


def _side_by_side(left: Tensor, right: Tensor, scratch: Scratch | None, n_heads: int) -> Tensor:
    """Scores of both along the last axis."""
    if scratch is None:
        return torch.cat([left, right], dim=-1)
    width = left.shape[-1] + right.shape[-1]
    out = scratch.rows("scores", left.shape[:-1].numel(), width, left, each=n_heads)
    return torch.cat([left, right], dim=-1, out=out.view(*left.shape[:-1], width))


def later_hidden(n_keys: int, n_queries: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """True where a key is not later than a query; the queries are the last positions."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    return torch.arange(n_keys, device=device)[None] <= query


def allowed_keys(
    mask: Bool[Tensor, "prompt key"], n_queries: int, window: int | None
) -> Bool[Tensor, "prompt query key"] | None:
    """Which keys the last positions attend to: real tokens, not later ones, inside a local window.

    None if that is every key that is not later. Padding attends to itself alone, which keeps it finite; no real token
    attends to it.
    """
    n_keys = mask.shape[1]
    if bool(mask.all()) and (window is None or window >= n_keys):
        return None
    query = torch.arange(n_keys - n_queries, n_keys, device=mask.device)[:, None]
    key = torch.arange(n_keys, device=mask.device)[None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    return (seen[None] & mask[:, None]) | (key == query)


def attend_within(
    q: Float[Tensor, "prompt query head d_head"],
    k: Float[Tensor, "prompt pos kv d_head"],
    v: Float[Tensor, "prompt pos kv d_head"],
    allowed: Bool[Tensor, "prompt query pos"] | None,
    *,
    scale: float,
    cap: float,
) -> Float[Tensor, "prompt query head d_head"]:
    """Mixed values of whole prompts, or of their last positions."""
    n_queries, n_pos, n_kv = q.shape[1], k.shape[1], k.shape[2]
    if allowed is None and n_queries < n_pos:
        allowed = later_hidden(n_pos, n_queries, q.device)[None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not cap:
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if allowed is None else allowed[:, None],
            is_causal=allowed is None,
            scale=scale,
            enable_gqa=n_kv < q.shape[1],
        )
        return z.transpose(1, 2)
    if allowed is None:
        allowed = later_hidden(n_pos, n_queries, q.device)[None]
    group = q.shape[1] // n_kv
    scores = cap * torch.tanh((q @ k.repeat_interleave(group, dim=1).mT) * (scale / cap))
    pattern = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)
    return (pattern @ v.repeat_interleave(group, dim=1)).transpose(1, 2)
