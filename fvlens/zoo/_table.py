"""Means over relations with their intervals, as rows of a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fvlens.metrics import bootstrap_interval

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


def markdown(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], columns: Columns) -> str:
    """Rows as a Markdown table: labels (key -> heading) first, then each score as ``mean [low, high]``."""
    heads = [*labels.values(), *(heading for heading, _ in columns.values())]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        cells = [str(row[key]) for key in labels]
        for key, (_, digits) in columns.items():
            mean, low, high = (f"{row[key][name]:.{digits}f}" for name in ("mean", "low", "high"))
            cells.append(f"{mean} [{low}, {high}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
