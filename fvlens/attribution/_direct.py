"""Direct effects: what each part of a model writes straight to the answer's logit, past everything above it.

In three steps. The residual stream behind the last block is a sum: the embedding, every head's and every MLP's write,
biases. The final norm, its scale held at the value it has on that prompt, and the unembedding are linear in it. So the
logit difference between answer and foil is a sum with one term a part: the part's write times one direction of the
residual stream, which is that of the unembedding taken back through the frozen norm. Where a norm follows attention, a
head's write is taken through that one, frozen too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.activations import ActivationCache, activation_cache
from fvlens.arguments import check_arguments
from fvlens.attribution._contrast import Contrast, contrast
from fvlens.attribution._direct_effects import DirectEffects
from fvlens.attribution._frozen import FrozenNorm, applied, freeze
from fvlens.models import fingerprint
from fvlens.prompts import Prompts
from fvlens.suffix import has_hooks, read_out_slices

_TOLERANCE = 1e-4
"""Of the sum, relative to the parts' own sizes where these are above 1."""


def direct_effects(
    model: Any,
    prompts: Prompts,
    *,
    foil: str | Sequence[str] | Int[Tensor, "prompt foil"] = "answers",
    batch_size: int | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> DirectEffects:
    """Signed direct effect of every head, every MLP, the embedding and the biases on the answer's logit.

    On a prompt with last residual stream x, answer y and foils F, with ``d = W_U[:, y] - mean over F of W_U[:, f]``:

        ``logit(y) - mean over F of logit(f) = sum over parts of part . g + constants``,  ``g = C^T (gain * d) / s(x)``

    where the final norm is ``gain * C x / s(x) + bias`` (C takes the mean away in a LayerNorm, nothing in an RMSNorm)
    and its scale s(x) is frozen at its value on that prompt. A head's part is ``z @ W_O``, without b_O. All at the last
    token. The parts add up to the logit difference, which is checked on every prompt. Where logits are capped (Gemma 2)
    it is the difference before the cap, which changes no order. [Definition: methods of the field; the answer's first
    token, and the default foil, are our choices.]

    A direct effect says what a part writes, not what would happen without it: parts above it may read it, and the norm
    would have another scale.

    Args:
        model: the model, which nothing may be steering.
        prompts: the prompts.
        foil: the wrong answers whose mean logit is taken away: ``"answers"``, the other answers of these prompts, as
            many as differ in their first token; ``"vocabulary"``, all other tokens; words, the same for all prompts
            (each its first token, behind a space); or token ids for each prompt. A prompt's own answer is left out.
        batch_size: prompts run together; by default chosen from what memory is free.
        max_memory: bytes for activations, as of :func:`~fvlens.activation_cache`.
        progress: show a progress bar.

    Returns:
        :class:`DirectEffects`, in logits: positive pushes towards the answer.

    Raises:
        ValueError: a foil that is unknown, empty, or no token of the model; a prompt to which no foil is left;
            something steers the model; or the parts do not add up, with the reason: heads that attention does not add
            as they are, a final norm of another kind, logits that are no product of it.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.attribution import direct_effects
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=4, generator=g)
        >>> effects = direct_effects(model, prompts, progress=False)
        >>> torch.allclose(effects.sum, effects.total, atol=1e-4)
        True

    References:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; arXiv:2606.07560.
    """
    check_arguments(direct_effects, locals(), runs=True)
    if has_hooks(model):
        raise ValueError(
            "direct_effects: something acts on the model (an open inject or ablate block, or a hook), so that its "
            "parts do not add up; leave the block first."
        )
    against = contrast(model, prompts, foil)
    sites = ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"]
    if getattr(model.cfg, "attn_only", False):
        sites.remove("mlp_out")
    cache = activation_cache(
        model,
        prompts,
        sites=sites,
        positions="last",
        batch_size=batch_size,
        max_memory=max_memory,
        progress=progress,
    )
    found, first = [], 0
    for some in cache:
        found.append(_parts(model, some, against.rows(slice(first, first + len(some)))))
        first += len(some)
    heads, mlps, others, total, scale = (torch.cat(columns).float() for columns in zip(*found, strict=True))
    used = [i for i, name in enumerate(_OTHERS) if name == "embedding" or bool((others[:, i] != 0).any())]
    return DirectEffects(
        heads=heads,
        mlps=mlps,
        others=others[:, used],
        other_names=tuple(_OTHERS[i] for i in used),
        total=total,
        scale=scale,
        answers=against.answers,
        foil=against.name,
        n_foils=against.n_foils,
        logit_cap=_cap(model),
        relation=prompts.relation,
        labels=prompts.labels,
        template=prompts.template,
        n_shots=prompts.n_shots,
        data_hash=prompts.data_hash,
        fingerprint=fingerprint(model),
    )


_OTHERS = ("embedding", "positions", "attention biases", "final norm's bias", "unembedding's bias")

_Parts = tuple[
    Float[Tensor, "prompt layer head"],
    Float[Tensor, "prompt layer"],
    Float[Tensor, "prompt other"],
    Float[Tensor, " prompt"],
    Float[Tensor, " prompt"],
]


def _parts(model: Any, cache: ActivationCache, against: Contrast) -> _Parts:
    """Effects of heads, MLPs and the rest, the logit difference, and the final scale, of prompts that fit memory."""
    n, n_layers, n_heads = len(cache), model.cfg.n_layers, model.cfg.n_heads
    last = cache["resid_post", n_layers - 1][:, 0].double()
    final = freeze(_final_norm(model), last)
    g = final.back(against.direction)
    heads, mlps = torch.zeros(n, n_layers, n_heads).double(), torch.zeros(n, n_layers).double()
    attention = torch.zeros(n).double()
    for layer in range(n_layers):
        z = cache["z", layer][:, 0].double()
        weight, bias = _output(model, layer)
        norm = _behind_attention(model, layer, z, cache["attn_out", layer][:, 0].double())
        along = g if norm is None else norm.back(g)
        heads[:, layer] = torch.einsum("phd,hdm,pm->ph", z, weight, along)
        attention += along @ bias + (0 if norm is None else g @ norm.bias)
        if "mlp_out" in cache:
            mlps[:, layer] = (cache["mlp_out", layer][:, 0].double() * g).sum(dim=-1)
    embedding, positions = _embedded(model, cache)
    others = torch.stack(
        [
            (embedding * g).sum(dim=-1),
            (positions * g).sum(dim=-1),
            attention,
            against.direction @ final.bias,
            against.bias,
        ],
        dim=-1,
    )
    total = _difference(model, last, against)
    _check_sum(model, heads, mlps, others, total)
    return heads, mlps, others, total, final.scale


def _output(model: Any, layer: int) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"]]:
    """Output projection of a layer's attention, and its bias."""
    attention = model.blocks[layer].attn
    weight, bias = attention.W_O.detach().double().cpu(), getattr(attention, "b_O", None)
    return weight, weight.new_zeros(weight.shape[-1]) if bias is None else bias.detach().double().cpu()


def _behind_attention(
    model: Any, layer: int, z: Float[Tensor, "prompt head d_head"], added: Float[Tensor, "prompt d_model"]
) -> FrozenNorm | None:
    """The norm between what a layer's heads write and what attention adds, frozen; None if these are the same.

    Raises:
        ValueError: something else stands between them.
    """
    weight, bias = _output(model, layer)
    written = z.flatten(1) @ weight.flatten(0, 1) + bias
    slack = _slack(model) * float(added.abs().max())
    if float((written - added).abs().max()) <= slack:
        return None
    block = model.blocks[layer]
    for name in ("ln1_post", "ln1"):  # Gemma 2; OLMo 2 in HookedTransformer
        norm = getattr(block, name, None)
        if norm is not None and float((applied(norm, written) - added).abs().max()) <= slack:
            return freeze(norm, written)
    raise ValueError(
        f"direct_effects: what attention adds in layer {layer} is not the sum of its heads' writes, nor a norm of it "
        f"(off by {float((written - added).abs().max()):.2g} of {float(added.abs().max()):.2g}), so that this model's "
        "heads have no direct effects."
    )


def _embedded(model: Any, cache: ActivationCache) -> tuple[Float[Tensor, "prompt d_model"], ...]:
    """What the first block is given at the last token: of the token, and of its position where that is added."""
    start = cache["resid_pre", 0][:, 0].double()
    learned = getattr(model.cfg, "positional_embedding_type", None) == "standard" and hasattr(model, "pos_embed")
    if not learned:
        return start, torch.zeros_like(start)
    token = model.W_E.detach()[cache.prompts.tokens[:, -1].to(model.W_E.device)].double().cpu()
    return token, start - token


def _final_norm(model: Any) -> Any:
    return getattr(model, "ln_final", None) or torch.nn.Identity()  # a HookedTransformer without norms has none


def _cap(model: Any) -> float | None:
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def _difference(model: Any, last: Float[Tensor, "prompt d_model"], against: Contrast) -> Float[Tensor, " prompt"]:
    """The logit difference, before logits are capped, by the model's own final norm.

    Raises:
        ValueError: logits found like this are not those of the model.
    """
    logits = applied(_final_norm(model), last) @ against.columns + against.biases
    device, cap = next(model.parameters()).device, _cap(model)
    shown = logits if cap is None else cap * torch.tanh(logits / cap)
    own = torch.zeros(len(last), len(against.tokens)).double()
    with torch.no_grad():
        for rows, found in read_out_slices(model, last.to(device, model.cfg.dtype)):
            own[rows] = found[:, against.tokens.to(found.device)].double().cpu()
    apart = float((shown[:, : len(against.tokens)] - own).abs().max())
    if not apart <= _slack(model) * max(1.0, float(own.abs().max())):
        raise ValueError(
            f"direct_effects: the model's logits are not its final norm times its unembedding (off by {apart:.2g}), so "
            "that nothing of them adds up."
        )
    return (against.weights * logits).sum(dim=-1)


def _slack(model: Any) -> float:
    """What a sum may be off by, relative to its parts: more in half precision, where the model itself rounds."""
    return max(_TOLERANCE, 8 * torch.finfo(model.cfg.dtype).eps)


def _check_sum(
    model: Any,
    heads: Float[Tensor, "prompt layer head"],
    mlps: Float[Tensor, "prompt layer"],
    others: Float[Tensor, "prompt other"],
    total: Float[Tensor, " prompt"],
) -> None:
    """Refuse parts that are not all of it."""
    parts = torch.cat([heads.flatten(1), mlps, others], dim=1)
    gap = (parts.sum(dim=1) - total).abs()
    if not bool((gap <= _slack(model) * parts.abs().sum(dim=1).clamp(min=1)).all()):
        raise ValueError(
            f"direct_effects: the parts add up to something else than the logit difference (off by "
            f"{float(gap.max()):.2g}): this model's final norm is neither a LayerNorm nor an RMSNorm, or it adds "
            "something that is no head, MLP or bias."
        )
