"""What pages quote of the study ``claims``, and its figure."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fvlens.studies._claims_tables import CATEGORY_ROWS, FIRST, ROWS, tables
from fvlens.studies._study import Row
from fvlens.studies._tables import grid, in_brackets, standing

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PICTURE = "assets/claims.png"
"""Where ``--write`` keeps the figure, as the first page sees it."""

FRONT = ("bare", "icl", "permuted", "fv", "tuned", "random", "random_heads", "other")
"""Rows of the first page; the others are beside the study."""

_CATEGORY_HEADS = {
    "bare": "bare", "icl": "10 demonstrations", "fv": "function vector", "tuned": "fine-tuned",
    "tuned_best": "fine-tuned, best layer", "zero_best": "from zero, best layer",
}  # fmt: skip


def _score(line: Mapping[str, Any], key: str, form: str) -> str:
    value = line[key]
    if value != value:
        return ""
    return in_brackets(value, line[f"{key}_low"], line[f"{key}_high"], form)


def _lines(found: "Mapping[str, pd.DataFrame]", name: str) -> list[dict[Any, Any]]:
    return found[name].to_dict("records")


def _n(found: "Mapping[str, pd.DataFrame]", name: str) -> int:
    return int(found[name]["n_relations"].iloc[0])


def main_table(found: "Mapping[str, pd.DataFrame]", rows: Collection[str] = tuple(ROWS)) -> str:
    """Every row, or those of these keys, first token and whole answer."""
    lines = [
        [ROWS[line["row"]], _score(line, "top1", ".2f"), _score(line, "exact", ".2f")]
        for line in _lines(found, "means")
        if line["row"] in rows
    ]
    return grid(["", "first token, top-1 [95%]", "whole answer, exact [95%]"], lines)


def bars(found: "Mapping[str, pd.DataFrame]") -> str:
    """What was claimed, what was measured, and whether it holds."""
    lines = [[line["claim"], measured, line["bar"], line["holds"]] for line, measured in _bars(found)]
    return grid(["claim", "measured [95%]", "bar", "holds"], lines)


def _bars(found: "Mapping[str, pd.DataFrame]") -> Iterator[tuple[dict[Any, Any], str]]:
    """The lines of the bars, each with what was measured in words; empty if nothing was."""
    for line in _lines(found, "bars"):
        value = line["value"]
        form = ".2f" if line["ratio"] else "+.3f"
        yield line, in_brackets(value, line["low"], line["high"], form) if value == value else ""


def verdict(found: "Mapping[str, pd.DataFrame]") -> str:
    """How many of the bars hold, and what was measured where one does not."""
    judged = [(line, measured) for line, measured in _bars(found) if line["holds"] in ("yes", "no")]
    broken = [f"{line['claim']}, {measured}, {line['bar']}" for line, measured in judged if line["holds"] == "no"]
    text = f"Of the {len(judged)} bars that were set beforehand {len(judged) - len(broken)} hold"
    return f"{text}. Not: {'; '.join(broken)}." if broken else f"{text}."


def differences(found: "Mapping[str, pd.DataFrame]") -> str:
    """All paired differences."""
    lines = [
        [line["difference"], _score(line, "top1", "+.3f"), _score(line, "exact", "+.3f")]
        for line in _lines(found, "differences")
    ]
    return grid(["difference, paired", "first token [95%]", "whole answer [95%]"], lines)


def categories(found: "Mapping[str, pd.DataFrame]") -> str:
    """Top-1 by category."""
    lines = [
        [
            line["category"], f"{line['n_relations']:.0f}", *(f"{line[key]:.2f}" for key in CATEGORY_ROWS),
            _score(line, "gain", "+.2f"),
        ]
        for line in _lines(found, "categories")
    ]  # fmt: skip
    heads = [_CATEGORY_HEADS[key] for key in CATEGORY_ROWS]
    return grid(["category", "relations", *heads, "fine-tuned over function vector [95%]"], lines)


def exact_table(found: "Mapping[str, pd.DataFrame]") -> str:
    """Relations whose answers share first tokens, by the whole answer alone."""
    lines = [[ROWS[line["row"]], _score(line, "exact", ".2f")] for line in _lines(found, "exact")]
    return grid(["", "whole answer, exact [95%]"], lines)


def _over(found: "Mapping[str, pd.DataFrame]", n: int) -> str:
    seeds = str(found["relations"]["seed"].iloc[0]).split()
    seeds_said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {' '.join(seeds)}"
    return f"Means over {n} relations, {seeds_said}, query words unseen; 95% bootstrap intervals over relations."


def whole(found: "Mapping[str, pd.DataFrame]") -> str:
    """All tables."""
    n, n_exact = _n(found, "means"), _n(found, "exact")
    parts = []
    if n:
        parts += [
            f"Answers differ in their first token. {_over(found, n)}", main_table(found), bars(found),
            differences(found), categories(found),
        ]  # fmt: skip
    if n_exact:
        parts += [
            f"Answers share first tokens, so that only the whole answer counts. {_over(found, n_exact)}",
            exact_table(found),
        ]  # fmt: skip
    return "\n\n".join([*parts, standing(found["relations"])])


def evidence(found: "Mapping[str, pd.DataFrame]") -> str:
    """The first page's: figure, the rows that it needs, and which bars hold."""
    alt = "Every relation a dot: top-1 of its function vector against that of its fine-tuned vector"
    return "\n\n".join(
        [
            f"![{alt}]({PICTURE})", f"{_over(found, _n(found, 'means'))} {verdict(found)}", main_table(found, FRONT),
            standing(found["relations"]),
        ]
    )  # fmt: skip


EXCERPTS: "dict[str, Callable[[Mapping[str, pd.DataFrame]], str]]" = {"evidence": evidence}
"""By the name that stands in the marker."""


def figures(rows: Sequence[Row]) -> "dict[str, go.Figure]":
    """A dot a relation whose answers differ in their first token: untuned against fine-tuned, with what 10
    demonstrations give as a ring above the same place."""
    from fvlens import plots

    frame = tables(rows)["relations"].sort_values(["category", "relation"])
    found = [line for line in frame.to_dict("records") if line["group"] == FIRST]
    if not found:
        return {}
    values = {key: [line[key] for line in found] for key in ("relation", "category", "fv", "tuned", "icl")}
    figure = plots.dots(
        values["fv"],
        values["tuned"],
        values["relation"],
        groups=values["category"],
        rings=("10 demonstrations", values["icl"]),
        x_title="Function vector, top-1",
        y_title="Fine-tuned on 20 pairs, top-1",
        title=f"Fine-tuned against untuned vectors: {len(found)} relations",
        note="A dot a relation, unseen words. Rings: its 10 demonstrations. Above the diagonal, training helps",
        references={
            "10-shot, mean": sum(values["icl"]) / len(found),
            "fine-tuned, mean": sum(values["tuned"]) / len(found),
        },
    )
    return {"claims": figure}
