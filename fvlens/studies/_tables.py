"""Means over relations with their intervals, as tables of plain columns and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fvlens.studies._study import Row
from fvlens.zoo import mean_with_interval

if TYPE_CHECKING:
    import pandas as pd

Columns = Mapping[str, tuple[str, int]]
"""Key of a score -> its heading and digits."""


def means_over_relations(rows: Sequence[Row], by: Sequence[str], scores: Sequence[str]) -> "pd.DataFrame":
    """A line for each combination of ``by``, in the order of the rows: means as ``score``, with ``score_low`` and
    ``score_high`` of the 95% bootstrap interval, drawn with the seed of the rows."""
    import pandas as pd

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    lines = []
    for key, group in groups.items():
        line: dict[str, Any] = dict(zip(by, key, strict=True))
        for score in scores:
            interval = mean_with_interval([float(row[score]) for row in group], int(group[0]["seed"]))
            line |= {score: interval["mean"], f"{score}_low": interval["low"], f"{score}_high": interval["high"]}
        lines.append(line)
    return pd.DataFrame(lines)


def markdown(frame: "pd.DataFrame", labels: Mapping[str, str], columns: Columns) -> str:
    """A table of such means as Markdown, each as ``mean [low, high]``, with what it stands on below."""
    heads = [*labels.values(), *(heading for heading, _ in columns.values())]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in frame.to_dict("records"):
        cells = [str(row[key]) for key in labels]
        for key, (_, digits) in columns.items():
            mean, low, high = (f"{row[name]:.{digits}f}" for name in (key, f"{key}_low", f"{key}_high"))
            cells.append(f"{mean} [{low}, {high}]")
        lines.append("| " + " | ".join(cells) + " |")
    last = frame.iloc[0]
    below = (
        f"{last.model} (weights {last.fingerprint}), data {last.data_hash}, seed {last.seed}, fvlens {last.fvlens}, "
        f"{last.cells}."
    )
    return "\n".join([*lines, "", below])
