"""``fvlens run``, ``heads``, ``compare`` and ``universal`` on the embedded model."""

import functools

from matrix import seeded

import fvlens
from golden.values import Values, curves, embedded, flat, heads, scores

# --- fvlens run antonym ---

RUN = dict(seed=0, both_labels=True, n_random=3, n_others=2, epochs=4)


@functools.cache
def antonym_run():
    from fvlens.report import RunOptions, run_relation

    return run_relation(embedded(), fvlens.load_relation("antonym"), options=RunOptions(**RUN), progress=False)


def run_split() -> Values:
    split = antonym_run().split
    return {part: [pair.input for pair in getattr(split, part)] for part in ("train", "valid", "test")}


def run_aie() -> Values:
    values: Values = {}
    for labels, found in antonym_run().effects.items():
        values |= {
            f"{labels} aie": flat(found.aie),
            f"{labels} standard error": flat(found.stderr),
            f"{labels} baseline": flat(found.baseline),
        }
    return values


def run_heads() -> Values:
    return {labels: heads(list(vector.heads)) for labels, vector in antonym_run().vectors.items()}


def run_sweep() -> Values:
    values: Values = {}
    for labels, both in antonym_run().sweeps.items():
        sweep = both.at_scale(1)
        for layer, found in zip(sweep.layers, sweep.evaluations, strict=True):
            values |= scores(f"{labels}, layer {layer}", found)
        values |= {f"{labels} top-1": flat(sweep.top1)}
        values |= scores(f"{labels}, no vector", sweep.baseline)
    return values


def run_choice() -> Values:
    values: Values = {}
    for labels, vector in antonym_run().vectors.items():
        sweep = antonym_run().sweeps[labels]
        values |= {f"{labels} layer": [vector.layer], f"{labels} scale": [sweep.best_scale]}
        for layer in sweep.layers:
            for scale in sweep.scales:
                cell = sweep.at(layer, scale)
                values[f"{labels}, layer {layer}, scale {scale:g}"] = [cell.top1, cell.probability]
    return values


def run_vector() -> Values:
    found = antonym_run()
    words, logits = zip(*found.decoded, strict=True)
    values: Values = {f"{labels} vector": flat(vector.vector) for labels, vector in found.vectors.items()}
    return values | {"decoded": list(words), "decoded logits": list(logits)}


def run_answers() -> Values:
    found = antonym_run()
    asked = {"icl": found.icl, "shuffled": found.shuffled, "bare": found.zero_shot}
    return {key: value for name, one in asked.items() for key, value in scores(name, one, texts=True).items()}


def run_steered() -> Values:
    found = antonym_run().steered.items()
    return {key: value for labels, one in found for key, value in scores(labels, one, texts=True).items()}


def run_controls() -> Values:
    values: Values = {"others": list(antonym_run().others)}
    for row in antonym_run().controls.rows:
        values[f"{row.name} difference"] = [float(row.difference[0])]
        if row.kind in ("random_vector", "random_heads", "other_relation"):
            for i, found in enumerate(row.evaluations):
                values |= scores(f"{row.name} {i}", found)
    return values


def run_tuned() -> Values:
    tuned = antonym_run().tuned
    assert tuned is not None
    values = curves("training", tuned.run) | scores("tuned", tuned.evaluation, texts=True)
    for name, other in zip(antonym_run().others, tuned.others, strict=True):
        values |= scores(f"tuned on {name}", other)
    return values


def run_summary() -> Values:
    from fvlens.report import results_json

    numbers = results_json(antonym_run())
    return {name: [value] for name, value in numbers.items() if name.endswith("top1") and name != "intervals"}


def run_intervals() -> Values:
    from fvlens.report import results_json

    intervals = results_json(antonym_run())["intervals"]
    return {name: flat(ends) for name, ends in intervals.items() if isinstance(ends, list)}


# --- fvlens heads antonym ---

HEADS = dict(seed=0)
SCREENS = dict(n_steps=4, recheck=6)


@functools.cache
def antonym_heads(method: str, labels: str):
    from fvlens.find import relation_effects

    generator = seeded(HEADS["seed"])
    relation = fvlens.load_relation("antonym")
    split = relation.split(generator)
    how = {} if method == "exact" else {"recheck": SCREENS["recheck"]}
    if method == "ig":
        how["n_steps"] = SCREENS["n_steps"]
    return relation_effects(
        embedded(), split, relation=relation.name, labels=labels, generator=generator, method=method, progress=False,
        **how,
    )[1]  # fmt: skip


def ranked_heads(method: str, labels: str) -> Values:
    found = antonym_heads(method, labels)
    values: Values = {
        "score": flat(found.aie),
        "standard error": flat(found.stderr),
        "top 10": heads(found.ranking[:10]),
    }
    if found.recheck is not None:
        values |= {"rechecked": heads(list(found.recheck.heads)), "exact effects": flat(found.recheck.aie)}
    return values


# --- fvlens compare antonym ---

COMPARE = dict(seed=0, n_prompts=50, n_unrelated=40, epochs=3)
METHODS = (
    "bare", "demonstrations", "function-vector", "activation-addition", "tuned-from-vector", "tuned-from-zero",
    "soft-prompt-1", "soft-prompt-8", "lora-1",
)  # fmt: skip
"""The table's rows, in their order."""


@functools.cache
def antonym_compared():
    from fvlens.training import compare

    return compare(embedded(), "antonym", progress=False, **COMPARE)


def compared_choice() -> Values:
    found = antonym_compared()
    return {
        "layer": [found.layer],
        "scale": [found.scale],
        "pairs": [found.n_train, found.n_valid, found.n_test],
        "rows": [len(found.rows)],
    }


def compared_row(place: int) -> Values:
    row = antonym_compared().rows[place]
    return {
        "trained numbers": [row.n_trainable],
        **scores("test", row.evaluation),
        "top-1 and interval": [row.evaluation.top1, row.evaluation.interval.low, row.evaluation.interval.high],
        "divergences": flat(row.collateral.divergences),
    }


# --- fvlens universal ---

UNIVERSAL = dict(relations=["antonym", "plural", "animal-young"], n=10, n_prompts=50, seed=0)


@functools.cache
def universal_found():
    return fvlens.universal_heads(
        embedded(), UNIVERSAL["relations"], UNIVERSAL["n"], n_prompts=UNIVERSAL["n_prompts"], generator=seeded(),
        progress=False,
    )  # fmt: skip


def universal_effects() -> Values:
    found = universal_found()
    return {
        "aie": flat(found.aie),
        "standard error over prompts": flat(found.prompt_stderr),
        "mean": flat(found.mean),
        "standard error": flat(found.stderr),
    }


def universal_chosen() -> Values:
    found = universal_found()
    return {
        "heads": heads(found.heads),
        "kept": [int(kept) for kept in found.kept],
        "icl top-1": flat(found.icl_top1),
        "majority": flat(found.majority),
    }
