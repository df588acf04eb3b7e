"""Suffixes with a vector added, many times over weights that do not change: what a training step runs.

With few pairs most of a step is the fixed cost of its operations, not their arithmetic. So what the steps share is laid
out once: the weights of queries, keys and values as one product (the class rearranges its own anew at each call), kept
keys and values of all layers as one tensor, masks, and one operation of torch's where the class takes several for the
same values (layer norm, tanh GELU, attention of one variant).
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fvlens.suffix._run import SuffixRun, is_half

_COPIED = 16 * 1024 * 1024
"""Numbers of an unembedding that is small enough to keep a copy, laid out as its product takes it fastest."""


class SteeredSuffix(abc.ABC):
    """Logits of kept prompts with a vector added after one layer, at the first suffix position; differentiable."""

    @abc.abstractmethod
    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        """Logits of some prompts (in this order) at each suffix position, with one vector for all or one for each."""


def _added(after: Tensor, vectors: Tensor) -> Tensor:
    """Residual streams ``[row suffix d_model]`` with the vectors added at the first position, rounded once."""
    if after.shape[1] == 1 and after.dtype == vectors.dtype:
        return after + vectors[..., None, :]
    first = (after[:, 0] + vectors).to(after.dtype)[:, None]
    return torch.cat([first, after[:, 1:]], dim=1)


def steered_resid(
    run: SuffixRun, layer: int, vector: Float[Tensor, "*prompt d_model"]
) -> Float[Tensor, "prompt 1 suffix d_model"]:
    """Final residual stream with a vector added after ``layer`` at the first suffix position (differentiable).

    Args:
        run: prompts that were run once.
        layer: the vector is added after this layer.
        vector: one vector for all prompts, or one for each.
    """
    return run.continue_from(layer + 1, _added(run.resid_after(layer), vector)[:, None])


class GeneralSteps(SteeredSuffix):
    """By the run's own blocks, whatever they are."""

    def __init__(self, run: SuffixRun, layer: int) -> None:
        self.run, self.layer = run, layer

    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        run = self.run.select(rows)
        return run.logits(steered_resid(run, self.layer, vectors)[:, 0])


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a HookedTransformer, laid out.

    Attributes:
        block: the block itself.
        weight, bias: of queries, keys and values in one, rows in that order.
        weight_out: of the attention's output.
        ln1, ln2, mlp: the block's own, or fewer operations for the same values.
        allowed: which keys a suffix position attends to; None if it is every one.
    """

    block: Any
    weight: Float[Tensor, "row d_model"]
    bias: Float[Tensor, " row"]
    weight_out: Float[Tensor, "z d_model"]
    ln1: Callable[[Tensor], Tensor]
    ln2: Callable[[Tensor], Tensor] | None
    mlp: Callable[[Tensor], Tensor] | None
    allowed: Bool[Tensor, "prompt 1 suffix key"] | None


class WeightsSteps(SteeredSuffix):
    """By the weights of a HookedTransformer. Keeps a rearranged copy of the upper layers' attention weights.

    Args:
        run: a run over the weights, of a model whose attention scores are not capped.
        layer: the vector is added after this layer.
        allowed: which keys the suffix positions of all prompts attend to, in an attention module.
    """

    def __init__(self, run: SuffixRun, layer: int, allowed: Callable[[Any], Bool[Tensor, "prompt suffix key"]]) -> None:
        cfg = run.model.cfg
        self.run, self.cfg = run, cfg
        self.after = run.resid_after(layer)
        upper = range(layer + 1, cfg.n_layers)
        self.blocks = [_laid_out(run.model.blocks[i], allowed) for i in upper]
        kept = [torch.cat([run.keys[i], run.values[i]], dim=2).transpose(1, 2) for i in upper]
        self.kept = torch.stack(kept, dim=1) if kept else None  # [prompt layer 2*kv_head prefix d_head]
        self.final = _norm(run.model.ln_final) if cfg.normalization_type is not None else lambda x: x
        unembed = run.model.unembed
        self.weight, self.bias = unembed.W_U.detach().T, unembed.b_U.detach()
        if self.weight.numel() <= _COPIED:
            self.weight = self.weight.contiguous()
        self.is_plain = not (is_half(self.weight.dtype) or (cfg.output_logits_soft_cap or 0) > 0)

    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        rows = rows.to(self.after.device)
        after = _added(self.after[rows], vectors)
        resid = after.flatten(0, 1)  # most operations are cheaper on two axes
        kept = () if self.kept is None else self.kept[rows].unbind(1)
        for block, keys_values in zip(self.blocks, kept, strict=True):
            resid = self._through(block, resid, keys_values, rows)
        logits = F.linear(self.final(resid), self.weight, self.bias) if self.is_plain else self.run.logits(resid)
        return logits.view(*after.shape[:2], -1)

    def _through(self, laid: _Block, resid: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
        attn_out = self._attention(laid, laid.ln1(resid), kept, rows)
        if self.cfg.use_normalization_before_and_after:
            attn_out = _on_three_axes(laid.block.ln1_post)(attn_out)
        middle = resid + attn_out
        if laid.ln2 is None or laid.mlp is None:
            return middle
        return middle + laid.mlp(laid.ln2(resid if self.cfg.parallel_attn_mlp else middle))

    def _attention(
        self, laid: _Block, x: Float[Tensor, "row_suffix d_model"], kept: Tensor, rows: Tensor
    ) -> Float[Tensor, "row_suffix d_model"]:
        attn = laid.block.attn
        n_rows, n_kv, d_head = kept.shape[0], kept.shape[1] // 2, kept.shape[3]
        n_suffix = x.shape[0] // n_rows
        heads = self._heads(attn, F.linear(x, laid.weight, laid.bias).view(n_rows, n_suffix, -1, d_head), n_kv, rows)
        n_heads = heads.shape[1] - 2 * n_kv
        q, fresh = heads.split([n_heads, 2 * n_kv], dim=1)
        keys, values = torch.cat([kept, fresh], dim=2).split(n_kv, dim=1)
        z = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=None if laid.allowed is None else laid.allowed[rows],
            scale=1 / attn.attn_scale,
            enable_gqa=n_kv < n_heads,
        )
        return F.linear(z.transpose(1, 2).reshape(len(x), -1), laid.weight_out, attn.b_O)

    def _heads(
        self, attn: Any, together: Float[Tensor, "row suffix heads d_head"], n_kv: int, rows: Tensor
    ) -> Float[Tensor, "row heads suffix d_head"]:
        """Queries, keys and values, normed and rotated where the model does so."""
        rotary = self.cfg.positional_embedding_type == "rotary"
        if rotary or self.cfg.use_qk_norm:
            q, k, v = together.split([together.shape[2] - 2 * n_kv, n_kv, n_kv], dim=2)
            if self.cfg.use_qk_norm:
                q, k = attn._apply_qk_norm(q, attn.q_norm), attn._apply_qk_norm(k, attn.k_norm)
            if rotary:
                mask = self.run.attention_mask[rows]
                offset = mask.shape[1] - self.run.n_suffix
                q, k = attn.apply_rotary(q, offset, mask), attn.apply_rotary(k, offset, mask)
            together = torch.cat([q, k, v], dim=2)
        return together.transpose(1, 2)


def _laid_out(block: Any, allowed: Callable[[Any], Tensor]) -> _Block:
    attn = block.attn
    own = "_" if attn.cfg.n_key_value_heads is not None else ""  # without it, a copy for each query head
    names = [("", "Q"), (own, "K"), (own, "V")]
    weights = [getattr(attn, f"{mark}W_{name}").detach() for mark, name in names]
    biases = [getattr(attn, f"{mark}b_{name}").detach() for mark, name in names]
    mask = allowed(attn)
    has_mlp = not block.cfg.attn_only
    return _Block(
        block=block,
        weight=torch.cat([einops.rearrange(w, "head d_model d_head -> (head d_head) d_model") for w in weights]),
        bias=torch.cat([b.flatten() for b in biases]),
        weight_out=attn.W_O.detach().flatten(0, 1).T,
        ln1=_norm(block.ln1),
        ln2=_norm(block.ln2) if has_mlp else None,
        mlp=_mlp(block) if has_mlp else None,
        allowed=None if bool(mask.all()) else mask[:, None],
    )


def _on_three_axes(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A module of the class's own, which takes ``[batch pos d_model]``, for two axes."""
    return lambda x: module(x[None])[0]


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    from transformer_lens.components.layer_norm import LayerNorm

    if type(norm) is not LayerNorm or is_half(norm.w.dtype):
        return _on_three_axes(norm)
    weight, bias, shape, eps = norm.w.detach(), norm.b.detach(), norm.w.shape, norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


def _mlp(block: Any) -> Callable[[Tensor], Tensor]:
    from transformer_lens.components.mlps.mlp import MLP
    from transformer_lens.utilities.activation_functions import gelu_new

    mlp = block.mlp
    plain = type(mlp) is MLP and getattr(mlp, "ln", None) is None and not block.cfg.use_normalization_before_and_after
    if not plain or is_half(mlp.W_in.dtype):
        return _on_three_axes(block.apply_mlp)
    act = partial(F.gelu, approximate="tanh") if mlp.act_fn is gelu_new else mlp.act_fn
    w_in, b_in, w_out, b_out = (t.detach() for t in (mlp.W_in, mlp.b_in, mlp.W_out, mlp.b_out))
    return lambda x: torch.addmm(b_out, act(torch.addmm(b_in, x, w_in)), w_out)
