"""Tables and pages of the study ``analogies``."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fvlens.composition import MAPS
from fvlens.metrics import paired_difference
from fvlens.studies._study import Row
from fvlens.studies._tables import grid, in_brackets, mean_with_interval, standing

if TYPE_CHECKING:
    import pandas as pd

WAYS, TARGETS = "ways", "targets"
"""What a row is of."""

LEVELS = ("near", "far (i)", "far (ii)", "far (iii)")
PROMPTS = {"zero_shot": "bare query", "one_shot": "one-shot"}
"""Settings and their names on pages."""

COMPOSITES = ("composite", "gated composite")
CONTROLS = ("uniform", "best single", "random", "own vector")
UNSTEERED = "unsteered"
BY_FAMILY = (UNSTEERED, *COMPOSITES, "own vector")
"""Ways that are shown family by family."""

Solved = dict[tuple[str, str, str, str], Tensor]
"""(prompt, level, family, way) -> share of seeds that solve each analogy."""


def tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    """``ways`` and ``families``: a line a way, alone or ``over`` another; ``maps`` a seed, and ``targets``."""
    import pandas as pd

    solved = _solved(rows)
    made = {"ways": pd.DataFrame(_ways(solved)), "families": pd.DataFrame(_families(solved))}
    maps = [
        {key: row[key] for key in ("prompt", "map", "valid_top1", "chosen")} | {"of_seed": row["seed"]}
        for row in rows
        if row["of"] == "map"
    ]
    return {**made, "maps": pd.DataFrame(maps), "targets": pd.DataFrame(_targets(rows))}


def _solved(rows: Sequence[Row]) -> Solved:
    """What is solved, as means over the seeds that are there."""
    found: dict[tuple[str, str, str, str], list[Tensor]] = {}
    named = ("of", "relation", "seed", "prompt", "basis", "level", "family", "n")
    for row in rows:
        if row["of"] != WAYS:
            continue
        where = (str(row["prompt"]), str(row["level"]), str(row["family"]))
        for way, text in row.items():
            if way not in named:
                values = torch.tensor([mark == "x" for mark in str(text)], dtype=torch.float64)
                found.setdefault((*where, way), []).append(values)
    return {key: torch.stack(values).mean(dim=0) for key, values in found.items()}


def _pooled(solved: Solved, prompt: str, levels: Sequence[str], family: str | None = None) -> dict[str, Tensor]:
    """Of each way the analogies of some levels (and one family), one behind the other."""
    parts: dict[str, list[Tensor]] = {}
    for (of, level, family_of, way), values in solved.items():
        if of == prompt and level in levels and family in (None, family_of):
            parts.setdefault(way, []).append(values)
    whole = {way: torch.cat(values) for way, values in parts.items()}
    n = max((len(values) for values in whole.values()), default=0)
    # a way that is not there for all of them has no mean to set beside the others
    return {way: values for way, values in whole.items() if len(values) == n}


def _lines(where: dict[str, Any], ways: Mapping[str, Tensor], firsts: Sequence[str]) -> list[dict[str, Any]]:
    """A line a way, and for each of ``firsts`` one over every other way."""
    n = {"n": len(next(iter(ways.values())))}
    lines = [where | n | {"way": way, "over": ""} | mean_with_interval(v.tolist(), 0) for way, v in ways.items()]
    for first in firsts:
        for way, values in ways.items():
            if first in ways and way != first:
                lines.append(where | n | {"way": first, "over": way} | _difference(ways[first], values))
    return lines


def _difference(first: Tensor, second: Tensor) -> dict[str, float]:
    """Mean of the paired differences, with its interval."""
    mean, (low, high, _) = paired_difference(first, second, generator=torch.Generator().manual_seed(0))
    return {"mean": mean, "low": low, "high": high}


def _ways(solved: Solved) -> list[dict[str, Any]]:
    lines = []
    for level in LEVELS:
        for prompt in PROMPTS:
            ways = _pooled(solved, prompt, [level])
            if ways:
                lines += _lines({"level": level, "prompt": prompt}, ways, COMPOSITES)
    return lines


def _families(solved: Solved) -> list[dict[str, Any]]:
    """Far analogies of fitted families in the one-shot prompt, the family with the largest gain first."""
    far = ("far (i)", "far (ii)")
    blocks = []
    for family in dict.fromkeys(key[2] for key in solved if key[0] == "one_shot" and key[1] in far):
        ways = _pooled(solved, "one_shot", far, family)
        chosen = {way: values for way, values in ways.items() if way in BY_FAMILY}
        lines = _lines({"family": family}, chosen, COMPOSITES)
        kept = [line for line in lines if line["over"] in ("", UNSTEERED)]
        gain = next(line["mean"] for line in kept if line["way"] == COMPOSITES[1] and line["over"])
        blocks.append((gain, kept))
    return [line for _, lines in sorted(blocks, key=lambda block: -block[0]) for line in lines]


def _targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line a target relation: means over seeds; the heaviest and the nearest relation of each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["of"] == TARGETS:
            groups.setdefault((row["level"], row["prompt"], row["relation"]), []).append(row)
    lines = []
    for (level, prompt, relation), group in groups.items():
        line: dict[str, Any] = {"level": level, "prompt": prompt, "relation": relation, "n": group[0]["n"]}
        for key in ("composite", UNSTEERED, "gain", "weight", "own_weight", "cosine"):
            values = [float(row[key]) for row in group if key in row]
            line[key] = sum(values) / len(values) if values else float("nan")
        for key in ("heaviest", "nearest"):
            line[key] = " ".join(dict.fromkeys(str(row[key]) for row in group if key in row))
        lines.append(line)
    return lines


# --- pages ---


class _Found:
    """A table of ways, with one of its lines at hand."""

    def __init__(self, frame: "pd.DataFrame", *labels: str) -> None:
        self.frame, self.labels = frame, labels
        records = frame.fillna({"over": ""}).to_dict("records")  # nothing comes back out of a file as missing
        self._lines = {(*(row[key] for key in labels), row["way"], row["over"]): row for row in records}
        self.groups = {tuple(row[key] for key in labels): row["n"] for row in records}

    def text(self, group: tuple[Any, ...], way: str, over: str = "", *, form: str, alone: bool = False) -> str:
        """``mean [low, high]``, or the mean ``alone``; a dash where there is none."""
        row = self._lines.get((*group, way, over))
        if row is None:
            return "-"
        mean, low, high = (float(row[key]) for key in ("mean", "low", "high"))
        return f"{mean:{form}}" if alone else in_brackets(mean, low, high, form)


def where_it_works(tables: "Mapping[str, pd.DataFrame]") -> str:
    """Every level and prompt: the ways' top-1, and what the composite gains, without the gate and with it."""
    found = _Found(tables["ways"], "level", "prompt")
    ways = (UNSTEERED, COMPOSITES[0], *CONTROLS)
    lines = [
        [
            level,
            PROMPTS[prompt],
            *(found.text((level, prompt), way, form=".2f", alone=True) for way in ways),
            *(found.text((level, prompt), way, UNSTEERED, form="+.3f") for way in COMPOSITES),
        ]
        for level, prompt in found.groups
    ]
    heads = ("analogies", "prompt", *ways, "composite over unsteered", "with the gate over unsteered")
    return "\n\n".join([grid(heads, lines), standing(found.frame)])


def by_map(tables: "Mapping[str, pd.DataFrame]") -> str:
    """All maps on the levels whose families are in the basis, and which of them validation prefers."""
    found = _Found(tables["ways"], "level", "prompt")
    groups = [(level, prompt) for prompt in PROMPTS for level in LEVELS[:3] if (level, prompt) in found.groups]
    lines = [[map, *(found.text(at, f"map {map}", form=".2f", alone=True) for at in groups)] for map in MAPS]
    heads = ("map", *(f"{level}, {PROMPTS[prompt]}" for level, prompt in groups))
    chosen = tables["maps"][tables["maps"].chosen]
    said = [
        f"{' or '.join(dict.fromkeys(chosen['map'][chosen.prompt == prompt]))} for the {label}"
        for prompt, label in (("zero_shot", "bare query"), ("one_shot", "one-shot prompt"))
        if prompt in set(chosen.prompt)
    ]
    return "\n\n".join([grid(heads, lines), f"Validation prefers {', '.join(said)}.", standing(found.frame)])


def by_family(tables: "Mapping[str, pd.DataFrame]") -> str:
    """Far analogies in the one-shot prompt, family by family; nothing before they were asked."""
    if tables["families"].empty:
        return "No cell of the one-shot prompt is finished."
    found = _Found(tables["families"], "family")
    lines = [
        [
            str(family),
            str(n),
            *(found.text((family,), way, form=".2f") for way in BY_FAMILY),
            *(found.text((family,), way, UNSTEERED, form="+.2f") for way in COMPOSITES),
        ]
        for (family,), n in found.groups.items()
    ]
    over = [f"{way} over {UNSTEERED}" for way in COMPOSITES]
    heads = ("family, far (i) and (ii), one-shot", "n", *BY_FAMILY, *over)
    return "\n\n".join([grid(heads, lines), standing(found.frame)])


def differences(tables: "Mapping[str, pd.DataFrame]") -> str:
    """The composite over every control."""
    found = _Found(tables["ways"], "level", "prompt")
    pairs = [(COMPOSITES[0], way) for way in (UNSTEERED, *CONTROLS)] + [(COMPOSITES[1], UNSTEERED)]
    lines = [
        [level, PROMPTS[prompt], str(n), *(found.text((level, prompt), *pair, form="+.3f") for pair in pairs)]
        for (level, prompt), n in found.groups.items()
    ]
    heads = ("analogies", "prompt", "n", *(f"{first} over {second}" for first, second in pairs))
    return "\n\n".join([grid(heads, lines), standing(found.frame)])


EXCERPTS: "dict[str, Callable[[Mapping[str, pd.DataFrame]], str]]" = {
    "where it works": where_it_works,
    "maps": by_map,
    "families": by_family,
}
"""By the name that stands in the marker."""


def whole(tables: "Mapping[str, pd.DataFrame]") -> str:
    """All tables, one behind the other."""
    return "\n\n".join(text(tables) for text in (where_it_works, differences, by_map, by_family))
