"""Direct effects: a map of heads with the MLPs beside them, and the rest of the sum in words."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._figure import drawn
from fvlens.plots._input import Number, as_matrix, standard_errors
from fvlens.plots._maps import head_map, heads_in_words
from fvlens.plots._scale import CLIP, joined, scale_reach
from fvlens.plots._style import look, whole_ticks
from fvlens.types import HeadLike, as_heads


@drawn
def direct_map(
    heads: Float[Tensor, "layer head"],
    mlps: Float[Tensor, " layer"],
    others: Mapping[str, Number],
    *,
    total: Number,
    stderr: tuple[Float[Tensor, "layer head"], Float[Tensor, " layer"]] | None = None,
    outlined: Sequence[HeadLike] = (),
    title: str | None = "Direct effects",
    colorbar_title: str = "logits",
    zmax: Number | None = None,
    clip: Number | None = CLIP,
) -> go.Figure:
    """Map of what each head and each MLP writes to a logit difference, layer 0 at the bottom; the rest is in words.

    Args:
        heads: the number of each head.
        mlps: the number of each layer's MLP, in a column of its own behind the heads.
        others: the parts that have no layer, by name; they stand under the title.
        total: what all parts add up to.
        stderr: standard errors of heads and of MLPs, shown in the hover text.
        outlined: heads that get a black outline.
        title: figure title.
        colorbar_title: unit, beside the scale and in the hover text.
        zmax, clip: where the scale ends, as in :func:`heatmap`.

    Returns:
        The figure, on a diverging scale centred at 0.

    Raises:
        ValueError: a number is not finite; heads and MLPs have different layers; a standard error is negative or does
            not fit; an outlined head does not exist or is listed twice.

    Example:
        >>> import torch
        >>> from fvlens.plots import direct_map
        >>> figure = direct_map(torch.tensor([[0.5, -1.0]]), torch.tensor([2.0]), {"embedding": 0.25}, total=1.75)
        >>> figure.data[0].hovertext[0][3]
        'MLP 0<br>logits: +2'
        >>> figure.layout.title.subtitle.text
        'Sum of all parts +1.75: embedding +0.25'
    """
    n_layers, n_heads = heads.shape
    if len(mlps) != n_layers or heads.numel() == 0:
        raise ValueError(
            f"direct_map: expected heads and MLPs of as many layers, got {tuple(heads.shape)} and {tuple(mlps.shape)}."
        )

    # an empty column parts the MLPs from the heads
    def beside(of_heads: Tensor, of_mlps: Tensor) -> Tensor:
        return as_matrix(torch.cat([of_heads, torch.full((n_layers, 1), torch.nan), of_mlps[:, None]], dim=1))

    z = beside(heads.detach().cpu().float(), mlps.detach().cpu().float())
    numbers = [*heads.flatten().tolist(), *mlps.tolist(), *others.values(), total]
    if not bool(torch.tensor(numbers).isfinite().all()):
        raise ValueError("direct_map: expected finite numbers, got NaN or infinity among them.")
    errors = None if stderr is None else standard_errors("direct_map", beside(*stderr), z, may_be_nan=True)

    def text(layer: int, column: int) -> str:
        if column == n_heads:
            return ""
        name = f"L{layer}H{column}" if column < n_heads else f"MLP {layer}"
        line = f"{name}<br>{colorbar_title}: {z[layer, column].item():+.4g}"
        if errors is not None and not bool(errors[layer, column].isnan()):
            line += f" ± {errors[layer, column].item():.2g} (standard error)"
        return line

    reach = scale_reach("direct_map", z, zmax=zmax, clip=clip)
    parts = ", ".join(f"{name} {value:+.2f}" for name, value in others.items())
    summed = f"Sum of all parts {total:+.2f}" + (f": {parts}" if parts else "")
    named = as_heads(outlined, n_layers, n_heads)
    figure = head_map(
        z,
        [[text(layer, column) for column in range(n_heads + 2)] for layer in range(n_layers)],
        reach,
        named,
        title=title,
        note=joined(summed, f"outlined: the largest of heads ({len(outlined)})" if outlined else "", reach.note),
        colorbar_title=colorbar_title,
        alt=f"{heads_in_words(z[:, :n_heads], named, colorbar_title)}, with {n_layers} MLPs beside them. {summed}",
    )
    ticks = whole_ticks(n_heads, 20 if look().width == "page" else 8)["dtick"]
    places = [*range(0, n_heads, ticks), n_heads + 1]
    return figure.update_xaxes(
        tickmode="array", tickvals=places, ticktext=[*map(str, places[:-1]), "MLP"],
    )  # fmt: skip
