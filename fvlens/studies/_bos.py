"""What a BOS token in front of prompts does to a model: exactly one against none.

For every relation and seed, once with either policy: top-1 and log-probability (nats) of the first answer token on
validation pairs, of the bare query; after ten demonstrations; under the function vector of the recipe, its heads, layer
and scale found under the same policy; and under that vector fine-tuned on 20 pairs, the epoch chosen on the same
pairs. A tokenizer's own policy is one of the two, or puts other tokens in front, which this does not measure. Values
are means over relations of the means over seeds; differences are paired, with 95% bootstrap intervals over relations.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.evaluation import evaluate
from fvlens.find import find_vector
from fvlens.models import Bos
from fvlens.prompts import get_template
from fvlens.relations import load_relation
from fvlens.studies._study import Cell, Row, Settings, Study, Value
from fvlens.studies._tables import grid, in_brackets, mean_with_interval, standing
from fvlens.training import finetune

if TYPE_CHECKING:
    import pandas as pd

RELATIONS = (
    "adjective-comparative", "antonym", "city-country", "country-capital", "first-letter", "plural", "verb-gerund",
    "verb-past",
)  # fmt: skip
"""Of all kinds, with answers that differ in their first tokens."""

POLICIES: tuple[Bos, Bos] = ("one", "none")
N_SEEDS = 2
N_VALID, N_TRAIN, EPOCHS = 20, 20, 4
RECIPE: dict[str, Any] = {"n_prompts": 16, "n_corrupted": 5, "scales": (1, 2)}
"""Less than the recipe's own, for the sake of time; and of layers a few from the middle."""

SCORES = {"top1": "top-1", "log_probability": "log-probability"}


def _cells(settings: Settings) -> list[Cell]:
    seeds = [dataclasses.replace(settings, seed=settings.seed + i) for i in range(N_SEEDS)]
    names = settings.relations or RELATIONS
    return [seed.cell(name, bos=policy) for seed in seeds for name in names for policy in POLICIES]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for each way to make the model do the task."""
    template = get_template("qa").with_bos(cell["bos"])  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(cell.seed)
    whole = load_relation(cell.relation).split(generator, valid=0.4)
    split = dataclasses.replace(whole, valid=whole.valid[:N_VALID])

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(cell.seed)

    n_layers = model.cfg.n_layers
    layers = range(n_layers * 3 // 10, n_layers * 5 // 6, max(1, n_layers // 10))
    found = find_vector(
        model, split, template=template, relation=cell.relation, layers=layers, generator=fresh(),
        progress=False, **RECIPE,
    )  # fmt: skip
    tuned = finetune(
        model, split.train[:N_TRAIN], init=found.vector, valid=split.valid, epochs=EPOCHS, template=template,
        generator=fresh(), progress=False,
    )  # fmt: skip
    asked: dict[str, dict[str, Any]] = {
        "bare query": {},
        "10-shot": {"setting": "icl", "demonstrations": split.train},
        "function vector": {"vector": found.vector},
        "fine-tuned vector": {"vector": tuned.vector},
    }
    rows: list[dict[str, Value]] = []
    for name, how in asked.items():
        scores = evaluate(model, split.valid, template=template, relation=cell.relation, generator=fresh(), **how)
        rows.append({"prompt": name, "top1": scores.top1, "log_probability": scores.answer_log_probability})
    return rows


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    """A line for each way: of all relations with intervals, and of each relation."""
    import pandas as pd

    ways, names = (list(dict.fromkeys(str(row[key]) for row in rows)) for key in ("prompt", "relation"))

    def mean(score: str, *of: str) -> float:
        """Over seeds, of a way, a relation and a policy; NaN as long as none is finished."""
        found = [float(row[score]) for row in rows if (row["prompt"], row["relation"], row["bos"]) == of]
        return sum(found) / len(found) if found else float("nan")

    both: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    for way in ways:
        line: dict[str, Any] = {"prompt": way}
        each: list[dict[str, Any]] = [{"relation": name, "prompt": way} for name in names]
        for score in SCORES:
            values = {policy: [mean(score, way, name, policy) for name in names] for policy in POLICIES}
            gains = [one - none for one, none in zip(*(values[policy] for policy in POLICIES), strict=True)]
            for policy in POLICIES:
                line[f"{score}_{policy}"] = sum(values[policy]) / len(names)
                for i, value in enumerate(values[policy]):
                    each[i][f"{score}_{policy}"] = value
            found = mean_with_interval(gains, int(rows[0]["seed"]))
            line |= {f"{score}_gain": found["mean"], f"{score}_low": found["low"], f"{score}_high": found["high"]}
        both.append(line)
        single += each
    return {"policies": pd.DataFrame(both), "relations": pd.DataFrame(single)}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    frame, single = tables["policies"], tables["relations"]
    heads = ["validation pairs", "top-1, one BOS", "none", "difference", "difference of log-probability"]
    lines = [
        [
            str(row["prompt"]), *(f"{row[f'top1_{policy}']:.3f}" for policy in POLICIES),
            *(in_brackets(row[f"{score}_gain"], row[f"{score}_low"], row[f"{score}_high"], "+.3f") for score in SCORES),
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip
    ways = [str(way) for way in frame["prompt"]]
    gains = {(row["relation"], row["prompt"]): row["top1_one"] - row["top1_none"] for row in single.to_dict("records")}
    names = list(dict.fromkeys(single["relation"]))
    by_relation = [[name, *(f"{gains[name, way]:+.2f}" for way in ways)] for name in names]
    below = "Differences of top-1 by relation, one BOS minus none:"
    parts = [grid(heads, lines), below, grid(["relation", *ways], by_relation), standing(frame)]
    return "\n\n".join(parts)


BOS = Study(
    name="bos",
    summary="one BOS token in front of prompts against none: bare, 10-shot, function vector, fine-tuned",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
)
