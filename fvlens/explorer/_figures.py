"""Figures of the explorer, and how one that is shown becomes another one without being drawn anew."""

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fvlens import plots
from fvlens.explorer._kept import NextTokens

if TYPE_CHECKING:
    from fvlens.explorer._session import HeadView, Session

_COLOURS = {"without": plots.MUTED, "with the vector": plots.ACCENT, "with the one beside": plots.REFERENCES[0]}
_WIDTH = 560
_SELECTED = plots.REFERENCES[0]


def head_map(session: "Session") -> go.Figure:
    """Map of all heads' effects: those in the vector outlined in black, the one that is looked at in orange."""
    effects = session.chosen.effects
    assert effects is not None
    is_in = set(session.heads)
    hover = [
        ["in the vector; a click takes it out" if (i, j) in is_in else "a click puts it in" for j in range(n)]
        for i, n in enumerate([effects.aie.shape[1]] * effects.aie.shape[0])
    ]
    figure = plots.heatmap(
        effects.aie,
        stderr=effects.stderr,
        outlined=session.heads,
        title=None,
        colorbar_title=effects.score,
        outlined_label="in the vector",
        hover=hover,
    )
    if session.head is not None:
        layer, head = session.head
        figure.add_shape(
            type="rect", x0=head - 0.38, x1=head + 0.38, y0=layer - 0.38, y1=layer + 0.38, name="looked at",
            line={"color": _SELECTED, "width": 2.5},
        )  # fmt: skip
    # its note becomes a text above it, since the note is wrapped for a wider figure
    note, height = figure.layout.title.text or "", figure.layout.height - figure.layout.margin.t + 24  # pyright: ignore
    figure.layout.title = {}
    figure.update_layout(width=_WIDTH, height=height, margin={"t": 24}, clickmode="event", meta={"note": note})
    return figure


def bars(next_tokens: NextTokens, names: list[str], text: str) -> go.Figure:
    """Next-token probabilities of a prompt, a bar each without and with the vector; the first token on top."""
    words = [repr(word) for word in next_tokens.words]
    figure = go.Figure()
    for name, colour in _COLOURS.items():  # always three, so that a shown figure need not be drawn anew
        is_there = name in names
        values = next_tokens.probability[names.index(name)].tolist() if is_there else [0.0] * len(words)
        shown = list(zip(words, values, strict=True))
        figure.add_bar(
            y=list(range(len(words))), x=values, orientation="h", name=name, marker={"color": colour},
            visible=is_there, hovertext=[f"{word} {name}: {value:.4f}" for word, value in shown], hoverinfo="text",
        )  # fmt: skip
    _quiet(figure, height=max(220, 90 + 26 * len(words) * max(1, len(names) - 1)))
    figure.update_layout(
        barmode="group",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        margin={"l": 110, "r": 20, "t": 44, "b": 40},
    )
    asked = text if len(text) <= 30 else f"...{text[-27:]}"
    figure.update_xaxes(
        title=f"probability of the next token, prompt {_escaped(repr(asked))}", range=[0, 1.0], gridcolor=plots.GRID
    )
    ticks = {"tickmode": "array", "tickvals": list(range(len(words))), "ticktext": [_escaped(word) for word in words]}
    figure.update_yaxes(range=[len(words) - 0.4, -0.6], **ticks)
    return figure


def by_prompt(session: "Session", view: "HeadView") -> go.Figure:
    """A head's effect and direct effect on each prompt; the prompt that is looked at is darker."""
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.16,
        subplot_titles=["effect on the answer's probability", "direct effect on the answer's logit"],
    )  # fmt: skip
    is_measured = session.kind == "corrupted"
    direct = [] if view.direct is None else view.direct.tolist()
    for row, values in enumerate([view.effects.tolist() if is_measured else [], direct], start=1):
        colours = [plots.ACCENT if i == session.prompt else plots.MUTED for i in range(len(values))]
        figure.add_bar(
            x=list(range(len(values))), y=values, marker={"color": colours}, row=row, col=1,
            hovertext=[f"prompt {i}: {value:+.4f}" for i, value in enumerate(values)], hoverinfo="text",
        )  # fmt: skip
    _quiet(figure, height=300)
    figure.update_layout(showlegend=False, margin={"l": 60, "r": 20, "t": 28, "b": 44}, clickmode="event")
    figure.update_annotations(font={"size": 12}, x=0, xanchor="left")
    if not is_measured:
        figure.layout.annotations[0].text = "effects are measured on prompts with wrong labels"  # pyright: ignore
    figure.update_xaxes(title="prompt (click to look at it)", row=2, col=1)
    figure.update_yaxes(gridcolor=plots.GRID, zerolinecolor=plots.GREY)
    return figure


def _quiet(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        width=_WIDTH, height=height, plot_bgcolor=plots.PAPER, paper_bgcolor=plots.PAPER,
        font={"size": 12, "color": plots.INK},
    )  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def become(shown: Any, figure: go.Figure) -> None:
    """Make a shown figure look like another one of as many traces, in one message to the page."""
    with shown.batch_update():
        for old, new in zip(shown.data, figure.data, strict=True):
            for name, value in new.to_plotly_json().items():
                if name != "type":
                    old[name] = value
        for name in ("shapes", "annotations", "title", "height"):
            shown.layout[name] = figure.layout[name]
        for axis in ("xaxis", "yaxis"):
            for name in ("range", "tickvals", "ticktext", "title"):
                shown.layout[axis][name] = figure.layout[axis][name]
