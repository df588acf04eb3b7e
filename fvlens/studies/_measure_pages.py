"""What pages quote of the study ``measure``: a text each, from its tables."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fvlens.find import RANKINGS
from fvlens.studies._tables import grid, in_brackets, standing

if TYPE_CHECKING:
    import pandas as pd

CLEAR_AIE = 0.02
"""Heads with a larger mean effect are named."""

_PAIRED = "paired"


class _Quantities:
    """The table of quantities, by name; NaN for one that is not measured yet."""

    def __init__(self, tables: "Mapping[str, pd.DataFrame]") -> None:
        self.frame = tables["quantities"]
        self._rows = {row["quantity"]: row for row in self.frame.to_dict("records")}

    def mean(self, key: str) -> float:
        return float(self._rows[key]["mean"]) if key in self._rows else float("nan")

    def text(self, key: str, form: str) -> str:
        row = self._rows.get(key) or dict.fromkeys(("mean", "low", "high"), float("nan"))
        return in_brackets(row["mean"], row["low"], row["high"], form)


def _with_bars(found: _Quantities, lines: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    """Quantity, mean with interval, and bar; differences with their sign."""
    return [[label, found.text(key, "+.3f" if label.endswith(_PAIRED) else ".3f"), bar] for label, key, bar in lines]


_HEADS = ("quantity", "value [95% interval]", "bar")


def card(tables: "Mapping[str, pd.DataFrame]") -> str:
    """The first table of the model card, with its bars, and the list of heads below it."""
    found, heads = _Quantities(tables), tables["heads"].to_dict("records")
    lines = [
        ("10 demonstrations, top-1", "top1_10", "at least 0.95"),
        ("2 demonstrations, top-1", "top1_2", ""),
        ("bare query, top-1", "top1_0", "at most 0.30"),
        ("10 demonstrations over 2, paired", "10 shots over 2", "lower bound over 0"),
        ("2 demonstrations over none, paired", "2 shots over 0", "lower bound over 0"),
        ("probability of the answer, 10 clean demonstrations", "p_10", ""),
        ("the same, labels permuted", "p_permuted", "at most half of clean"),
        ("the same, labels random", "p_random", ""),
        ("top-1, labels permuted", "top1_permuted", ""),
        ("top-1, labels random", "top1_random", ""),
        ("function vector, heads by permuted labels, bare query, top-1", "fv_permuted", "at least 0.60"),
        ("the same vector at scale 1, top-1", "fv_permuted_scale_1", ""),
        ("function vector, heads by random labels, bare query, top-1", "fv_random", "at least 0.80"),
        ("the same vector at scale 1, top-1", "fv_random_scale_1", ""),
        ("10 random vectors of the same norm, top-1", "random_vector", "at most bare query + 0.05"),
        ("vector of another relation (disjoint outputs), top-1", "other_relation", "at most bare query + 0.05"),
        ("random vector over bare query, paired", "random vector over zero-shot", ""),
        ("other relation over bare query, paired", "other relation over zero-shot", ""),
    ]  # fmt: skip
    positive = [max(0.0, row["mean"]) for row in heads if row["labels"] == "random"]
    share = max(positive) / sum(positive) if any(positive) else float("nan")
    n_clear = sum(row["labels"] == "random" and row["mean"] > CLEAR_AIE and row["low"] > 0 for row in heads)
    of_heads = [
        ["share of the top head in the summed positive AIE, random labels", f"{share:.2f}", "at most 0.60"],
        [f"heads with mean AIE over {CLEAR_AIE} and interval over 0, random labels", str(n_clear), "at least 3"],
    ]
    named = [f"Heads whose AIE exceeds {CLEAR_AIE}, mean over relations [95% interval]:", ""]
    for labels in reversed(RANKINGS):
        clear = [row for row in heads if row["labels"] == labels and row["mean"] > CLEAR_AIE]
        each = [
            f"L{row['layer']}H{row['head']} {in_brackets(row['mean'], row['low'], row['high'], '.3f')}"
            for row in sorted(clear, key=lambda row: -row["mean"])
        ]
        named.append(f"- {labels} labels: {', '.join(each) or 'none'}")
    table = grid(_HEADS, [*_with_bars(found, lines), *of_heads])
    return "\n\n".join([table, standing(found.frame), "\n".join(named)])


def card_of_training(tables: "Mapping[str, pd.DataFrame]") -> str:
    """The table of fine-tuning in the model card, with its bars."""
    found = _Quantities(tables)
    bare, gap = found.mean("top1_0"), found.mean("10 shots over untuned")
    gain, why = (0.15, "0.15") if gap >= 0.30 else (gap / 2, "half of what 10 demonstrations have over the start")
    best = f"at least 0.85, and {0.9 * found.mean('top1_10'):.3f} (0.90 of 10 demonstrations)"
    early = "lower bound at least -0.01"
    lines = [
        ("fine-tuned vector, top-1", "tuned", best),
        ("the vector it starts from, top-1", "fv_permuted", ""),
        ("fine-tuned over its start, paired", "fine-tuned over untuned", f"at least {gain:+.3f} ({why})"),
        ("5 epochs from the function vector, top-1", "epochs_5_vector", ""),
        ("5 epochs from zero, top-1", "epochs_5_zero", ""),
        ("5 epochs from noise of the same norm, top-1", "epochs_5_random", ""),
        ("5 epochs, from the vector over from zero, paired", "5 epochs, from the vector over from zero", early),
        ("5 epochs, from the vector over from noise, paired", "5 epochs, from the vector over from noise", early),
        (
            "fine-tuned vector of another relation (disjoint outputs), top-1",
            "other_tuned",
            f"at most {bare + 0.05:.3f} (bare query + 0.05)",
        ),
        ("the same over the bare query, paired", "tuned other relation over zero-shot", ""),
        ("the same, answers of any library relation to the query", "other_answer", ""),
    ]
    return "\n\n".join([grid(_HEADS, _with_bars(found, lines)), standing(found.frame), *_furthest(tables)])


def _furthest(tables: "Mapping[str, pd.DataFrame]") -> list[str]:
    """How many relations the vectors of others help; nothing before that was measured."""
    frame = tables["relations"]
    if "other_tuned" not in frame:
        return []
    frame = frame[frame.other_tuned.notna() & frame.top1_0.notna()]
    gains = frame.other_tuned - frame.top1_0
    above = int((gains > 0).sum())
    if not above:
        return [f"None of the {len(frame)} relations is above its own bare query with the vectors of others."]
    most = frame.loc[gains.idxmax()]
    return [
        f"With the vectors of others, {above} of the {len(frame)} relations are above their own bare query, "
        f"{int((gains > 0.05).sum())} of them by more than 0.05, `{most.relation}` the furthest "
        f"({most.other_tuned:.2f}, bare query {most.top1_0:.2f})."
    ]


def _plain(lines: Sequence[tuple[str, str]], tables: "Mapping[str, pd.DataFrame]") -> str:
    """A table of top-1 alone."""
    found = _Quantities(tables)
    rows = [[label, found.text(key, "+.3f" if label.endswith(_PAIRED) else ".3f")] for label, key in lines]
    return "\n\n".join([grid(("", "top-1 [95% interval over relations]"), rows), standing(found.frame)])


EXCERPTS: "dict[str, Callable[[Mapping[str, pd.DataFrame]], str]]" = {
    "card": card,
    "card of training": card_of_training,
    "evidence": partial(
        _plain,
        [
            ("10 clean demonstrations", "top1_10"),
            ("10 demonstrations, labels permuted", "top1_permuted"),
            ("bare query", "top1_0"),
            ("function vector, 10 heads ranked on permuted labels", "fv_permuted"),
            ("the same, fine-tuned on 20 pairs", "tuned"),
            ("random vectors of the same norm", "random_vector"),
            ("vector of another relation", "other_relation"),
        ],
    ),
    "evaluation": partial(
        _plain,
        [
            ("10 clean demonstrations", "top1_10"),
            ("2 clean demonstrations", "top1_2"),
            ("10 demonstrations, labels permuted", "top1_permuted"),
            ("10 demonstrations, labels random", "top1_random"),
            ("bare query", "top1_0"),
            ("function vector, 10 heads ranked on permuted labels", "fv_permuted"),
            ("the same at scale 1", "fv_permuted_scale_1"),
            ("function vector, 10 heads ranked on random labels", "fv_random"),
            ("the same at scale 1", "fv_random_scale_1"),
            ("random vectors of the same norm", "random_vector"),
            ("vector of another relation", "other_relation"),
        ],
    ),
    "training": partial(
        _plain,
        [
            ("bare query", "top1_0"),
            ("function vector", "fv_permuted"),
            ("fine-tuned vector", "tuned"),
            ("fine-tuned over function vector, paired", "fine-tuned over untuned"),
            ("after 5 epochs from the function vector", "epochs_5_vector"),
            ("after 5 epochs from zero", "epochs_5_zero"),
            ("after 5 epochs from noise of the vector's norm", "epochs_5_random"),
            ("fine-tuned vectors of other relations with disjoint outputs", "other_tuned"),
        ],
    ),
}
"""By the name that stands in the marker."""


def whole(tables: "Mapping[str, pd.DataFrame]") -> str:
    """Both tables of the model card."""
    return f"{card(tables)}\n\n{card_of_training(tables)}"
