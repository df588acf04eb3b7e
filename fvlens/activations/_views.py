"""What a reader sees of a cache: a tidy table, and figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations._cache import ActivationCache
from fvlens.activations._sites import SITES
from fvlens.prompts import TokenClass

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

_ROW_BYTES = 80
"""Bytes that a row of the table takes: up to ten columns."""


def word(cache: ActivationCache, prompt: int, column: int) -> str:
    """Text of one token, line breaks made visible; its id if the text is not known."""
    token = int(cache.prompts.tokens[prompt, column])
    return cache.words.get(token, str(token)).replace("\n", "↵")


def table(cache: ActivationCache, sites: Sequence[str]) -> "pd.DataFrame":
    """One row a number; see :meth:`ActivationCache.to_dataframe`."""
    import pandas as pd

    n_numbers = sum(torch.Size(cache.shape(site)).numel() for site in sites)
    if n_numbers * _ROW_BYTES > cache.max_memory:
        raise ValueError(
            f"to_dataframe: a table of {n_numbers} rows would take about {n_numbers * _ROW_BYTES} bytes, above "
            f"max_memory={cache.max_memory}; select sites, layers or prompts first."
        )
    frames = [_site_table(cache, site) for site in sites]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def _site_table(cache: ActivationCache, site: str) -> "pd.DataFrame":
    import pandas as pd

    axes, pos = cache.axes(site), 2 + SITES[site].pos_axis
    values = torch.stack([cache[site, layer] for layer in cache.layers])
    over = [1] * values.ndim
    over[1], over[pos] = cache.mask.shape
    real = cache.mask.reshape(over).expand_as(values)
    index = dict(zip(axes, real.nonzero(as_tuple=True), strict=True))  # in the order of the numbers
    prompt, place = index["prompt"], index[axes[pos]]
    column, n_pos = cache.columns[prompt, place], cache.prompts.tokens.shape[1]
    texts = {  # each token's text once
        (i, int(c)): word(cache, i, int(c)) for i in range(len(cache)) for c in cache.columns[i][cache.mask[i]]
    }
    kinds = cache.prompts.token_classes[prompt, column].tolist()
    columns: dict[str, object] = {"site": site, "layer": torch.tensor(cache.layers)[index["layer"]].numpy()}
    for axis in axes[1:]:
        found = {axes[pos]: column - n_pos, "key_pos": index.get("key_pos", column) - n_pos}.get(axis, index[axis])
        columns[axis] = found.numpy()
    columns["token"] = [texts[pair] for pair in zip(prompt.tolist(), column.tolist(), strict=True)]
    columns["token_class"] = [TokenClass(kind).name.lower() for kind in kinds]
    columns["value"] = values[real].float().numpy()
    return pd.DataFrame(columns)


# --- figures ---


def figure(cache: ActivationCache, site: str, layer: int | None, head: int | None, prompt: int | None) -> "Figure":
    """A figure of one site; see :meth:`ActivationCache.plot`."""
    if prompt is not None and not 0 <= prompt < len(cache):
        raise ValueError(f"plot: expected a prompt in 0..{len(cache) - 1}, got {prompt}.")
    if site == "pattern":
        return _attention(cache, cache.layers[0] if layer is None else layer, head or 0, prompt or 0)
    if layer is not None or head is not None:
        raise ValueError(f"plot: layer= and head= choose one pattern, and {site!r} is none; select layers instead.")
    if SITES[site].head_axis is not None:
        return _head_norms(cache, site, prompt)
    return _norms(cache, site) if prompt is None else _token_norms(cache, site, prompt)


def _attention(cache: ActivationCache, layer: int, head: int, prompt: int) -> "Figure":
    from fvlens import plots

    n_heads = cache.store.shapes["pattern"][0]
    if not 0 <= head < n_heads:
        raise ValueError(f"plot: expected a head in 0..{n_heads - 1}, got {head}.")
    pattern = cache.select(prompts=[prompt])["pattern", layer][0, head]
    queries, keys = cache.mask[prompt], cache.prompts.attention_mask[prompt].bool()
    return plots.shares(
        pattern[queries][:, keys].float(),
        [word(cache, prompt, int(column)) for column in cache.columns[prompt][queries]],
        [word(cache, prompt, int(column)) for column in keys.nonzero().flatten()],
        title=f"Attention of L{layer}H{head}, prompt {prompt}",
    )


def _norm_sums(cache: ActivationCache, site: str) -> Float[Tensor, " layer *head"]:
    """Mean norm over the kept tokens, of each layer, and of each head where the site has heads."""
    found = []
    for layer in cache.layers:
        sums = [block.float().norm(dim=-1).sum(dim=(0, 1)) for _, block in cache.blocks(site, layer)]  # 0 at padding
        found.append(torch.stack(sums).sum(dim=0) / cache.mask.sum())
    return torch.stack(found)


def _head_norms(cache: ActivationCache, site: str, prompt: int | None) -> "Figure":
    from fvlens import plots

    norms = _norm_sums(cache if prompt is None else cache.select(prompts=[prompt]), site)
    every = torch.full((cache.layers[-1] + 1, norms.shape[1]), torch.nan)  # layers that were not kept stay blank
    every[list(cache.layers)] = norms
    where = f"{len(cache)} prompts" if prompt is None else f"prompt {prompt}"
    return plots.heatmap(every, title=f"Mean norm of {site}, {where}", colorbar_title="norm")


def _norms(cache: ActivationCache, site: str) -> "Figure":
    from fvlens import plots

    title = f"Mean norm of {site}, {len(cache)} prompts"
    return plots.line_sweep(
        list(cache.layers), _norm_sums(cache, site), x_title="Layer", y_title=f"Norm of {site}", title=title
    )


def _token_norms(cache: ActivationCache, site: str, prompt: int) -> "Figure":
    from fvlens import plots

    real = cache.mask[prompt]
    one = cache.select(prompts=[prompt])
    norms = torch.stack([one[site, layer][0][real].float().norm(dim=-1) for layer in cache.layers])
    return plots.shares(
        norms,
        [f"layer {layer}" for layer in cache.layers],
        [word(cache, prompt, int(column)) for column in cache.columns[prompt][real]],
        title=f"Norm of {site}, prompt {prompt}",
        colorbar_title="norm",
    )
