"""Tables of the study ``claims``: means over relations, paired differences, bars, categories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlens.relations import load_relation
from fvlens.studies._study import Row
from fvlens.studies._tables import mean_with_interval, ratio_with_interval, seed_means

if TYPE_CHECKING:
    import pandas as pd

FIRST, EXACT = "first token", "exact"
"""Groups of relations: those whose answers differ in their first token, and those of which only ``exact`` tells."""

ROWS = {
    "bare": "bare query",
    "icl": "10 demonstrations",
    "permuted": "10 demonstrations, labels permuted",
    "fv": "function vector, layer and scale chosen",
    "fv_scale_1": "function vector at scale 1, layer chosen",
    "tuned": "fine-tuned from the function vector, at its layer",
    "tuned_best": "fine-tuned from the function vector, at the best layer",
    "zero": "fine-tuned from zero, at the function vector's layer",
    "zero_best": "fine-tuned from zero, at the best layer",
    "random": "random vectors of the norm",
    "random_heads": "vectors of random heads",
    "other": "vector of another relation",
}
"""Key of a score -> what it is of; ``KEY_exact`` is the same of whole answers."""

DIFFERENCES = {
    "function vector over bare query": ("fv", "bare"),
    "chosen scale over scale 1": ("fv", "fv_scale_1"),
    "fine-tuned over function vector": ("tuned", "fv"),
    "fine-tuned at the best layer over function vector": ("tuned_best", "fv"),
    "fine-tuned over 10 demonstrations": ("tuned", "icl"),
    "fine-tuned at the best layer over 10 demonstrations": ("tuned_best", "icl"),
    "start: from the vector over from zero, at the vector's layer": ("tuned", "zero"),
    "start: from the vector over from zero, each at its best layer": ("tuned_best", "zero_best"),
    "layer: best over the vector's, from the vector": ("tuned_best", "tuned"),
    "layer: best over the vector's, from zero": ("zero_best", "zero"),
    "10 demonstrations over permuted ones": ("icl", "permuted"),
    "random vectors over bare query": ("random", "bare"),
    "random heads over bare query": ("random_heads", "bare"),
    "another relation's vector over bare query": ("other", "bare"),
}
"""Paired, within a relation."""

CATEGORY_ROWS = ("bare", "icl", "fv", "tuned", "tuned_best", "zero_best")


@dataclass(frozen=True, slots=True)
class Bar:
    """What a claim must reach, in means over relations.

    Attributes:
        claim: what is compared.
        a, b: keys of the two scores.
        ratio: their means' ratio is meant, not their difference.
        least, most: of the value.
        low: what the lower bound of the interval must exceed.
    """

    claim: str
    a: str
    b: str
    ratio: bool = False
    least: float | None = None
    most: float | None = None
    low: float | None = None

    @property
    def text(self) -> str:
        """The bar in words."""
        form = ".2f" if self.ratio else "+.2f"
        said = [f"at least {self.least:{form}}"] if self.least is not None else []
        said += [f"at most {self.most:{form}}"] if self.most is not None else []
        said += [f"lower bound over {self.low:{form}}"] if self.low is not None else []
        return ", ".join(said)

    def holds(self, value: float, low: float) -> bool:
        """Whether it is reached; a number that is missing reaches nothing."""
        return (
            value == value
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.low is None or low > self.low)
        )


BARS = (
    Bar("fine-tuned over function vector, paired", "tuned", "fv", least=0.20, low=0.12),
    Bar("the same, fine-tuned at its best layer", "tuned_best", "fv", least=0.20, low=0.12),
    Bar("fine-tuned over 10 demonstrations, ratio of means", "tuned", "icl", ratio=True, least=0.90),
    Bar("the same, fine-tuned at its best layer", "tuned_best", "icl", ratio=True, least=0.90),
    Bar("random vectors over bare query, paired", "random", "bare", most=0.02),
    Bar("another relation's vector over bare query, paired", "other", "bare", most=0.02),
)

_SEED = 0
"""Of all intervals."""

_ENDS = ("", "_low", "_high")
"""Of a mean and its interval."""


def tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    """Of relations whose answers differ in their first token ``means``, ``differences``, ``bars`` and ``categories``,
    of the others ``exact``, of all ``relations``. Means are over seeds first, then over relations."""
    import pandas as pd

    groups = {str(row["relation"]): str(row["group"]) for row in rows}
    scores = seed_means(rows)
    first = [found for name, found in scores.items() if groups[name] == FIRST]
    others = [found for name, found in scores.items() if groups[name] != FIRST]

    def column(of: Sequence[Mapping[str, float]], key: str) -> list[float]:
        return [found[key] for found in of]

    def mean(prefix: str, values: Sequence[float]) -> dict[str, Any]:
        found = mean_with_interval(values, _SEED)
        return {prefix: found["mean"], f"{prefix}_low": found["low"], f"{prefix}_high": found["high"]}

    def paired(a: str, b: str) -> list[float]:
        return [found[a] - found[b] for found in first]

    def barred(bar: Bar) -> dict[str, Any]:
        if bar.ratio:
            found = ratio_with_interval(column(first, bar.a), column(first, bar.b), _SEED)
        else:
            found = mean_with_interval(paired(bar.a, bar.b), _SEED)
        value, low, high = found["mean"], found["low"], found["high"]
        holds = "yes" if bar.holds(value, low) else "no"
        return {"claim": bar.claim, "ratio": bar.ratio, "value": value, "low": low, "high": high, "bar": bar.text,
                "holds": holds}  # fmt: skip

    means = [
        {"row": key, **mean("top1", column(first, key)), **mean("exact", column(first, f"{key}_exact")),
         "n_relations": len(first)}
        for key in ROWS
    ]  # fmt: skip
    differences = [
        {"difference": name, **mean("top1", paired(a, b)), **mean("exact", paired(f"{a}_exact", f"{b}_exact"))}
        for name, (a, b) in DIFFERENCES.items()
    ]
    exact = [{"row": key, **mean("exact", column(others, f"{key}_exact")), "n_relations": len(others)} for key in ROWS]
    relations = [
        {"relation": name, "group": groups[name], "category": load_relation(name).category or "own", **found}
        for name, found in scores.items()
    ]
    frame = pd.DataFrame(relations)
    by_category = []
    for category, part in frame[frame.group == FIRST].groupby("category"):
        line = {"category": category, "n_relations": len(part)}
        for key in CATEGORY_ROWS:
            line |= mean(key, part[key].tolist())
        by_category.append(line | mean("gain", (part["tuned"] - part["fv"]).tolist()))
    columns = ["category", "n_relations", *(f"{key}{end}" for key in (*CATEGORY_ROWS, "gain") for end in _ENDS)]
    return {
        "means": pd.DataFrame(means),
        "differences": pd.DataFrame(differences),
        "bars": pd.DataFrame([barred(bar) for bar in BARS]),
        "categories": pd.DataFrame(by_category, columns=columns),
        "exact": pd.DataFrame(exact),
        "relations": frame,
    }
