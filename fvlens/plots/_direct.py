"""Direct effects: a map of heads with the MLPs beside them, and the rest of the sum in words."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._input import Number, as_matrix, standard_errors
from fvlens.plots._maps import grid, outline
from fvlens.plots._style import around, layout, whole_ticks
from fvlens.types import HeadLike, as_heads


def direct_map(
    heads: Float[Tensor, "layer head"],
    mlps: Float[Tensor, " layer"],
    others: Mapping[str, Number],
    *,
    total: Number,
    stderr: tuple[Float[Tensor, "layer head"], Float[Tensor, " layer"]] | None = None,
    outlined: Sequence[HeadLike] = (),
    title: str = "Direct effects",
    colorbar_title: str = "logits",
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

    Returns:
        The figure, on a diverging scale centred at 0 that reaches the largest absolute value.

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

    cell = max(9.0, min(44.0, 420 / n_layers))
    figure = grid(
        z,
        [[text(layer, column) for column in range(n_heads + 2)] for layer in range(n_layers)],
        limit=z.nan_to_num().abs().max().item() or 1.0,
        colorbar={"title": colorbar_title, "nticks": max(3, min(7, round(cell * n_layers / 30)))},
    )
    for head in as_heads(outlined, n_layers, n_heads):
        outline(figure, head)
    note = f"Sum of all parts {total:+.2f}"
    if others:
        note += ": " + ", ".join(f"{name} {value:+.2f}" for name, value in others.items())
    if outlined:
        note += f"; outlined: the largest of heads ({len(outlined)})"
    figure.update_layout(**layout(title, height=round(150 + cell * n_layers), note=note))
    ticks = whole_ticks(n_heads, 20)["dtick"]
    places = [*range(0, n_heads, ticks), n_heads + 1]
    figure.update_xaxes(
        title="Head", range=around(n_heads + 2, 550), showgrid=False, tickvals=places,
        ticktext=[*map(str, places[:-1]), "MLP"],
    )  # fmt: skip
    figure.update_yaxes(
        title="Layer", range=around(n_layers, cell * n_layers), showgrid=False,
        **whole_ticks(n_layers, round(cell * n_layers / 18)),
    )  # fmt: skip
    return figure
