"""Means over relations with their intervals, as tables of plain columns and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.metrics import bootstrap_interval
from fvlens.studies._study import DEFAULTS, Row

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLES = 2000
"""Of a ratio."""

Columns = Mapping[str, tuple[str, int]]
"""Key of a score -> its heading and digits."""


def mean_with_interval(values: Sequence[float], seed: int) -> dict[str, float]:
    """Mean and 95% bootstrap interval of the finite values; NaN if there are none."""
    found = torch.tensor(values, dtype=torch.float64)
    found = found[found.isfinite()]
    if not len(found):
        return dict.fromkeys(("mean", "low", "high"), float("nan"))
    interval = bootstrap_interval(found, generator=torch.Generator().manual_seed(seed))
    return {"mean": float(found.mean()), "low": interval.low, "high": interval.high}


def ratio_with_interval(a: Sequence[float], b: Sequence[float], seed: int) -> dict[str, float]:
    """Ratio of the means of two paired scores, and its 95% bootstrap interval over pairs; NaN without any, or where the
    mean below is 0."""
    above, below = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    if not len(above) or float(below.sum()) == 0:
        return dict.fromkeys(("mean", "low", "high"), float("nan"))
    drawn = torch.randint(len(above), (_RESAMPLES, len(above)), generator=torch.Generator().manual_seed(seed))
    ratios = above[drawn].sum(dim=1) / below[drawn].sum(dim=1)
    low, high = ratios[ratios.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(above.sum() / below.sum()), "low": low, "high": high}


def seed_means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each relation every number's mean over the seeds that are there; texts are no numbers."""
    collected: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        own = collected.setdefault(str(row["relation"]), {})
        for key, value in row.items():
            if key != "seed" and not isinstance(value, str):
                own.setdefault(key, []).append(float(value))
    return {name: {key: sum(found) / len(found) for key, found in own.items()} for name, own in collected.items()}


def means_over_relations(rows: Sequence[Row], by: Sequence[str], scores: Sequence[str]) -> "pd.DataFrame":
    """A line for each combination of ``by``, in the order of the rows: means as ``score``, with ``score_low`` and
    ``score_high`` of the 95% bootstrap interval, drawn with the seed of the rows."""
    import pandas as pd

    lines = []
    for key, group in _grouped(rows, by).items():
        line: dict[str, Any] = dict(zip(by, key, strict=True))
        for score in scores:
            interval = mean_with_interval([float(row[score]) for row in group], int(group[0]["seed"]))
            line |= {score: interval["mean"], f"{score}_low": interval["low"], f"{score}_high": interval["high"]}
        lines.append(line)
    return pd.DataFrame(lines)


def own_or_means(
    rows: Sequence[Row], by: Sequence[str], scores: Sequence[str], others: Sequence[str] = (), texts: Sequence[str] = ()
) -> "pd.DataFrame":
    """Like :func:`means_over_relations`, but of one relation its own scores and intervals, which the rows have as
    ``score_low`` and ``score_high``.

    Args:
        rows: all rows.
        by, scores: as there.
        others: columns whose means have no interval.
        texts: columns of which each different value is kept.

    Returns:
        A line for each combination of ``by``; ``n_relations`` says how many rows are behind it.
    """
    import pandas as pd

    lines = []
    for key, group in _grouped(rows, by).items():
        line: dict[str, Any] = dict(zip(by, key, strict=True))
        for score in scores:
            names = (score, f"{score}_low", f"{score}_high")
            if len(group) == 1:
                line |= {name: group[0][name] for name in names}
            else:
                interval = mean_with_interval([float(row[score]) for row in group], int(group[0]["seed"]))
                line |= dict(zip(names, (interval["mean"], interval["low"], interval["high"]), strict=True))
        line |= {name: sum(float(row[name]) for row in group) / len(group) for name in others}
        line |= {name: " ".join(dict.fromkeys(str(row[name]) for row in group if row[name])) for name in texts}
        lines.append(line | {"n_relations": len(group)})
    return pd.DataFrame(lines)


def _grouped(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return groups


def markdown(frame: "pd.DataFrame", labels: Mapping[str, str], columns: Columns) -> str:
    """:func:`means_grid`, with what it stands on below."""
    return "\n\n".join([means_grid(frame, labels, columns), standing(frame)])


def means_grid(frame: "pd.DataFrame", labels: Mapping[str, str], columns: Columns) -> str:
    """A table of such means as Markdown, each as ``mean [low, high]`` where it has an interval."""
    lines = []
    for row in frame.to_dict("records"):
        means = (
            in_brackets(row[key], row[f"{key}_low"], row[f"{key}_high"], f".{digits}f")
            if f"{key}_low" in row
            else f"{row[key]:.{digits}f}"
            for key, (_, digits) in columns.items()
        )
        lines.append([*(str(row[key]) for key in labels), *means])
    heads = [*labels.values(), *(heading for heading, _ in columns.values())]
    return grid(heads, lines)


def grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


def in_brackets(mean: float, low: float, high: float, form: str) -> str:
    """``mean [low, high]``, each in the form given."""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def standing(frame: "pd.DataFrame") -> str:
    """What a table stands on, as a sentence."""
    last = frame.iloc[0]
    settings = last.get("settings", DEFAULTS)
    changed = "" if settings == DEFAULTS else f", {settings}"
    return (
        f"{last.model} (weights {last.fingerprint}), data {last.data_hash}, seed {last.seed}{changed}, "
        f"fvlens {last.fvlens}, {last.cells}."
    )
