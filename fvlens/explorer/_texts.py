"""Texts of the explorer: tokens coloured by attention, small tables, what is said of a vector; all is escaped."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fvlens.attribution import LogitLens
from fvlens.showing import named
from fvlens.vectors import FunctionVector

if TYPE_CHECKING:
    from fvlens.explorer._session import HeadView, Session

_COLOUR = "0, 114, 178"
"""Okabe and Ito's blue, as the figures have it."""


def attention_html(words: Sequence[str], attention: Float[Tensor, " pos"]) -> str:
    """A prompt's tokens, each the darker the more attention the last token gives to it; hover for the share.

    Example:
        >>> import torch
        >>> attention_html(["a", "<b>"], torch.tensor([0.0, 1.0])).count("&lt;b&gt;")
        1
    """
    most = max(float(attention.max()), 1e-9)
    ends = "\n\n" if "\n\n" in "".join(words) else "\n"  # a line of text a demonstration
    spans, so_far = [], ""
    for word, share in zip(words, attention.tolist(), strict=True):
        so_far += word
        depth = share / most
        colour = "#fff" if depth > 0.6 else "#222"
        shown = html.escape(word).replace("\n", "⏎")
        spans.append(
            f'<span class="fvlens-token" data-share="{share:.4f}" title="{share:.1%} of the attention" '
            f'style="background:rgba({_COLOUR},{depth:.3f});color:{colour};white-space:pre">{shown}</span>'
            + "<br>"
            * so_far.endswith(ends)
        )
    return (
        '<div class="fvlens-prompt" style="font-family:monospace;line-height:1.5;background:#fff;padding:4px">'
        f"{''.join(spans)}</div>"
    )


def rows_html(rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A small table, its first row the headings."""
    heading, *body = rows

    def row(cells: Sequence[object], tag: str) -> str:
        style = "text-align:left;padding:1px 10px 1px 0;vertical-align:top"
        return "<tr>" + "".join(f'<{tag} style="{style}">{html.escape(str(c))}</{tag}>' for c in cells) + "</tr>"

    above = f"<div><b>{html.escape(caption)}</b></div>" if caption else ""
    lines = "".join([row(heading, "th"), *(row(cells, "td") for cells in body)])
    return f'{above}<table style="line-height:1.35">{lines}</table>'


def lens_html(lens: LogitLens, prompt: int) -> str:
    """What each layer would say at the last token of a prompt, its best token and the answer's probability."""
    rows: list[tuple[object, ...]] = [("layer", "would say", "probability", "of the answer")]
    for i, layer in reversed(list(enumerate(lens.layers))):
        best, chance = lens.top_tokens[i, prompt, -1, 0], lens.top_probability[i, prompt, -1, 0]
        own = lens.probability[i, prompt, -1]
        rows.append((layer, repr(lens.word(int(best))), f"{float(chance):.3f}", f"{float(own):.3f}"))
    return rows_html(rows, "What each layer would say (logit lens)")


def decoded_html(view: "HeadView") -> str:
    """The tokens that a head's mean output points to."""
    rows = [("token", "logit"), *((repr(word), f"{value:+.2f}") for word, value in view.decoded)]
    return rows_html(rows, f"What the mean of {view.head} decodes to")


def caption_html(session: "Session", note: str) -> str:
    """What the map shows; its note is one of plotly's texts, which are escaped."""
    effects = session.chosen.effects
    assert effects is not None
    outlined = f"{note.replace('<br>', ' ')}; orange" if note else "Orange"
    return (
        f"<div style='line-height:1.4'><b>Effect of each head, {html.escape(named(effects.relation))}</b> "
        f"({len(effects.cie)} prompts with {effects.labels} labels). {outlined}: looked at. "
        "A click puts a head in or out.</div>"
    )


def vector_line(vector: FunctionVector | None) -> str:
    """Which heads are in the vector."""
    if vector is None:
        return "<i>No head is in the vector: click one on the map.</i>"
    heads = ", ".join(map(str, vector.heads))
    return (
        f'<span class="fvlens-heads">{len(vector.heads)} heads in the vector: {heads}; norm {vector.norm():.2f}</span>'
    )


def compared_html(session: "Session") -> str:
    """The vector and the one beside it: where they come from, what they point to, how alike they are."""
    pair = {"the vector": session.vector, "beside": session.beside}
    known = {name: vector for name, vector in pair.items() if vector is not None}
    if session.beside is None:
        return "<i>No vector is kept beside. Keep this one, or load one, and go on: both are shown then.</i>"
    rows: list[tuple[object, ...]] = [("", *known)]
    rows.append(("pairs", *(named(vector.relation) for vector in known.values())))
    rows.append(("after layer", *(vector.layer for vector in known.values())))
    rows.append(("heads", *(", ".join(map(str, vector.heads)) for vector in known.values())))
    rows.append(("norm", *(f"{vector.norm():.2f}" for vector in known.values())))
    decoded = (vector.decode(session.model, 6) for vector in known.values())
    rows.append(("decodes to", *(" ".join(word.strip() or repr(word) for word, _ in own) for own in decoded)))
    if len(known) == 2 and all(vector.norm() for vector in known.values()):
        one, other = known.values()
        shared = len(set(one.heads) & set(other.heads))
        rows.append(("cosine", f"{one.cosine(other):.3f}"))
        rows.append(("heads in both", shared))
    return rows_html([(*row, *[""] * (len(rows[0]) - len(row))) for row in rows], "Two vectors side by side")
