"""Running prompts once, by whichever class holds the model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.interventions import hooked, resid_hook, resid_pre_hook, z_hook
from fvlens.suffix._hooked import passes, run_cached, run_weights
from fvlens.suffix._layout import laid_out
from fvlens.suffix._memory import copy_fits
from fvlens.suffix._reader import open_reader
from fvlens.suffix._routes import Route, why_not_weights
from fvlens.suffix._run import SuffixRun
from fvlens.types import is_bridge


def run_prefix(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    attention_mask: Int[Tensor, "prompt pos"],
    *,
    n_suffix: int = 1,
    path: Route = "weights",
    from_layer: int = 0,
    keep_z: bool = True,
    copied: bool | None = None,
    compute: torch.dtype | None = None,
) -> SuffixRun:
    """Run prompts once and keep what suffixes under edits need.

    Args:
        model: the model.
        tokens: prompts, left-padded, with the answer's tokens (all but the last) appended where several are scored.
        attention_mask: 1 for real tokens, 0 for padding.
        n_suffix: number of last positions that edits may change.
        path: ``"weights"`` or ``"kv"``.
        from_layer: the lowest layer that a suffix will start at; less is kept the higher it is (``"weights"`` only).
        keep_z: keep the heads' outputs, which variants need that join inside a block (``"weights"`` only).
        copied: lay the weights out in a second copy (``"weights"`` only); by default where it fits the memory.
        compute: precision of products (``"weights"`` only); None for the model's own.

    Raises:
        ValueError: ``n_suffix`` is not between 1 and the number of positions.
    """
    n_pos = tokens.shape[1]
    if not 1 <= n_suffix <= n_pos:
        raise ValueError(f"run_prefix: expected n_suffix between 1 and {n_pos} (the prompt length), got {n_suffix}.")
    device = next(model.parameters()).device
    tokens, attention_mask = tokens.to(device), attention_mask.to(device)
    if is_bridge(model):
        from fvlens.suffix._bridge import run_bridge  # not before it is needed: transformers loads with it

        return run_bridge(model, tokens, attention_mask, n_suffix)
    if path == "kv":
        return run_cached(model, tokens, attention_mask, n_suffix)
    with torch.no_grad():
        copied = copy_fits(model, compute=compute) if copied is None else copied
        layout = laid_out(model, compute=compute, copied=copied)
        return run_weights(model, layout, tokens, attention_mask, n_suffix, from_layer, keep_z)


def watch_prompts(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    attention_mask: Int[Tensor, "prompt pos"],
    seers: Mapping[str, Callable[[Float[Tensor, "prompt pos *axes"]], None]],
) -> None:
    """Run whole prompts once and show activations to functions, one a hook name.

    Over the laid-out weights where these are exact and have what is asked for (residual streams and heads' z), which is
    faster; else through the model's own forward, under hooks.

    Args:
        model: the model.
        tokens: prompts, left-padded.
        attention_mask: 1 for real tokens, 0 for padding.
        seers: hook name -> function, which must not change the activation, nor keep it.
    """
    names = {z_hook(i): (i, "z") for i in range(model.cfg.n_layers)}
    names |= {resid_hook(i): (i, "after") for i in range(model.cfg.n_layers)}
    names |= {resid_pre_hook(i): (i, "before") for i in range(model.cfg.n_layers)}
    with torch.no_grad():
        if why_not_weights(model) is not None or not set(seers) <= set(names):
            with hooked(model, seers):
                open_reader(model, len(tokens), keep=False).read(tokens, attention_mask, n_read=1)
            return
        asked: dict[int, list[tuple[str, Callable[[Tensor], None]]]] = {}
        for name, see in seers.items():
            layer, what = names[name]
            asked.setdefault(layer, []).append((what, see))
        layout = laid_out(model, copied=copy_fits(model))
        for passed in passes(model, layout, tokens, attention_mask, tokens.shape[1]):
            for what, see in asked.get(passed.layer, ()):
                see(getattr(passed, what))
            if passed.layer >= max(asked):
                break
