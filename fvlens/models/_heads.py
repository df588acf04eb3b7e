"""Before heads are believed: the sum of what they write against what attention adds, on every model that is loaded."""

import contextlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.types import is_bridge

_Z = "blocks.{}.attn.hook_z"
_ADDED, _ADDED_BRIDGE = "blocks.{}.hook_attn_out", "blocks.{}.attn.hook_out"


def head_writes(model: Any, tokens: Int[Tensor, "batch pos"]) -> float | None:
    """How far the sum of all heads' writes plus the bias is from what attention adds to the residual stream.

    The largest difference over all layers and tokens, ``|sum_h z_h @ W_O[h] + b_O - attn_out|``, over the largest
    ``|attn_out|``; 0 is what every method here stands on.

    Args:
        model: the model, of either class.
        tokens: a few tokens to run it on.

    Returns:
        The share; None where a norm follows attention, as in Gemma 2, so that the parts do not add up to what is
        added, or where the class shows no heads.
    """
    kept: dict[str, Tensor] = {}

    def keeping(name: str) -> Any:
        def keep(activation: Tensor, hook: Any) -> Tensor:
            kept[name] = activation.detach().float().cpu()
            return activation

        return name, keep

    layers = range(model.cfg.n_layers)
    added = _ADDED_BRIDGE if is_bridge(model) else _ADDED
    names = [name.format(layer) for layer in layers for name in (_Z, added)]
    if any(name not in model.hook_dict for name in names) or any(_norm_follows(block) for block in model.blocks):
        return None
    device = next(model.parameters()).device
    with torch.inference_mode(), model.hooks(fwd_hooks=[keeping(name) for name in names]):
        model(tokens.to(device))
    largest, apart = 0.0, 0.0
    for layer, block in zip(layers, model.blocks, strict=True):
        z, written = kept.get(_Z.format(layer)), kept.get(added.format(layer))
        if z is None or written is None:  # a hook that never fires
            return None
        largest = max(largest, float(written.abs().max()))
        apart = max(apart, float((_sum_of_heads(block.attn, z) - written).abs().max()))
    return apart / largest if largest else apart


def _norm_follows(block: Any) -> bool:
    """Whether a norm stands between attention and the residual stream."""
    with contextlib.suppress(AttributeError):
        return block.ln1_post is not None
    return False


def _sum_of_heads(attention: Any, z: Float[Tensor, "*axes"]) -> Float[Tensor, "batch pos d_model"]:
    weight = attention.W_O.detach().float().cpu().flatten(0, 1)
    bias = getattr(attention, "b_O", None)
    total = z.flatten(2) @ weight  # a bridge may give the heads side by side
    return total if bias is None else total + bias.detach().float().cpu()
