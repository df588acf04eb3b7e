"""Measure the gradient screens against the exact effects: ``python -m fvlens.zoo.screening [--every N] [--out FILE]``.

For every relation: task means over 100 clean prompts, and the effects of all heads on 25 prompts with permuted and 25
with random labels, exactly and by each screen, on the same prompts. Agreement is with the exact map; cost is a screen's
time over that of the exact effects, the shortest of a few runs of each. Values are means over relations, with 95%
bootstrap intervals over relations.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fvlens.activations import mean_head_activations
from fvlens.attribution import IndirectEffects, indirect_effects
from fvlens.files import write_json
from fvlens.find import RANKINGS
from fvlens.models import load_model
from fvlens.prompts import build_prompts
from fvlens.relations import list_relations, load_relation
from fvlens.zoo._table import markdown, mean_with_interval

SCREENS: dict[str, dict[str, Any]] = {
    "atp": {"method": "atp"},
    "atp, recheck 16": {"method": "atp", "recheck": 16},
    "ig, 8 steps": {"method": "ig", "n_steps": 8},
    "lrp": {"method": "lrp"},
}
COLUMNS = {
    "spearman": ("Spearman with exact", 2),
    "overlap": ("top 10 shared", 2),
    "first": ("best head first", 2),
    "cost": ("time over exact", 2),
}
"""Key of a score -> its heading and digits."""


def measure_relation(model: Any, name: str, seed: int, *, repeats: int = 3) -> dict[tuple[str, str], dict[str, float]]:
    """Scores of each screen on one relation, by (screen, labels)."""
    generator = torch.Generator().manual_seed(seed)
    split = load_relation(name).split(generator)
    shared: dict[str, Any] = {"queries": split.valid, "relation": name, "generator": generator}
    clean = build_prompts(model, split.train, n_prompts=100, **shared)
    means = mean_head_activations(model, clean, progress=False)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for labels in RANKINGS:
        corrupted = build_prompts(model, split.train, n_prompts=25, labels=labels, **shared)

        def run(**settings: Any) -> IndirectEffects:
            return indirect_effects(model, corrupted, means, progress=False, **settings)  # noqa: B023 (called at once)

        exact, exact_seconds = _timed(run, repeats)
        for screen, settings in SCREENS.items():
            effects, seconds = _timed(lambda settings=settings: run(**settings), repeats)
            quality = effects.compare(exact, n_resamples=10, generator=torch.Generator().manual_seed(seed))
            found[screen, labels] = {
                "spearman": quality.spearman,
                "overlap": quality.overlap if quality.overlap_rechecked is None else quality.overlap_rechecked,
                "first": float(effects.ranking[0] == exact.ranking[0]),
                "cost": seconds / exact_seconds,
            }
    return found


def _timed(run: Callable[[], IndirectEffects], repeats: int) -> tuple[IndirectEffects, float]:
    """What ``run`` gives, and the shortest of its times."""

    def once() -> tuple[float, IndirectEffects]:
        began = time.process_time()
        found = run()
        return time.process_time() - began, found

    runs = [once() for _ in range(repeats)]
    return runs[0][1], min(seconds for seconds, _ in runs)


def measure(model: Any, names: Sequence[str], seed: int, *, repeats: int = 3, progress: bool = True) -> dict[str, Any]:
    """The whole table: a row a screen and kind of labels, with mean and interval of each of ``COLUMNS``."""
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name in tqdm(names, desc="measuring", disable=not progress):
        for key, found in measure_relation(model, name, seed, repeats=repeats).items():
            scores.setdefault(key, []).append(found)
    rows = []
    for (screen, labels), found in scores.items():
        means = {key: mean_with_interval([one[key] for one in found], seed) for key in COLUMNS}
        rows.append({"screen": screen, "labels": labels, **means})
    return {"relations": list(names), "seed": seed, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fvlens.zoo.screening", description=__doc__)
    parser.add_argument("--model", default="rel-small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relations", nargs="+", default=None, help="only these relations")
    parser.add_argument("--every", type=int, default=8, help="only every Nth relation")
    parser.add_argument("--out", type=Path, default=None, help="write the table to this JSON file")
    args = parser.parse_args(argv)
    names = args.relations or list_relations()[:: args.every]
    found = measure(load_model(args.model, device="cpu"), names, args.seed)
    if args.out is not None:
        write_json(args.out, found, indent=1, null_for_nan=True)
    tqdm.write(markdown(found["rows"], {"screen": "screen", "labels": "labels"}, COLUMNS))


if __name__ == "__main__":
    main()
