"""``fvlens compose`` and ``fvlens analogies`` on the embedded model, with a small basis."""

import functools
import tempfile
from pathlib import Path
from typing import Any

from matrix import seeded

import fvlens
from fvlens.relations import Analogy
from golden.values import Values, embedded, flat, ranks

BASIS = [
    "antonym", "emotion-opposite", "nature-opposite", "profession-opposite", "animal-kind", "food-kind", "plant-kind",
    "animal-french", "food-french", "verb-french", "animal-german", "food-german",
]  # fmt: skip
COMPOSE = dict(names=BASIS, start="zero", n_analogies=60, epochs=3, setting="zero_shot", seed=0)
COMPOSITES = {
    "none": dict(map="none"),
    "vectors": dict(map="none", start="vector"),
    "diagonal": dict(map="diagonal"),
    "full": dict(map="full"),
    "lowrank": dict(map="lowrank"),
    "transfer": dict(map="transfer", gate="logistic", epochs=2),
    "one-shot": dict(map="diagonal", setting="one_shot", gate="threshold"),
}
"""Composites: what differs from :data:`COMPOSE`."""
SOURCES = [("hot", "cold"), ("joy", "sorrow"), ("dog", "chien"), ("apple", "fruit"), ("wolf", "Wolf")]
ANALOGIES = dict(n=24, n_foils=3, seed=0)


@functools.cache
def composite(name: str):
    from fvlens.composition import library_composite

    settings: dict[str, Any] = {**COMPOSE, **COMPOSITES[name]}
    generator = seeded(settings.pop("seed"))
    return library_composite(embedded(), generator=generator, progress=False, **settings)


def basis(name: str) -> Values:
    from fvlens.composition import source_scores

    vectors = composite(name).basis
    found = source_scores(embedded(), vectors, [fvlens.Analogy(a, b, a, b).source_pair for a, b in SOURCES])
    return {
        "layer": [vectors.layer],
        "norms": [float(one.norm()) for one in vectors],
        "source scores": flat(found.log_probs),
    }


def composed(name: str) -> Values:
    made = composite(name)
    values: Values = {"strength": [made.strength]}
    if made.map != "none":
        values |= {
            "train loss": flat(made.history.train_loss),
            "valid loss": flat(made.history.valid_loss),
            "valid top-1": flat(made.history.valid_top1),
        }
    for a, b in SOURCES:
        found = made.explain(embedded(), a, b)
        values |= {f"{a} : {b} weights": flat(found.weights), f"{a} : {b} recognised": flat(found.recognised)}
        values[f"{a} : {b} norm"] = [float(made.vector_for(embedded(), a, b).norm())]
    return values


@functools.cache
def asked() -> list[Analogy]:
    """Analogies, near and far, through a file as the command reads it (their relations are not in it)."""
    from fvlens.composition import library_analogies
    from fvlens.relations import read_analogies

    generator = seeded(ANALOGIES["seed"])
    made = library_analogies("test", n=ANALOGIES["n"], n_foils=ANALOGIES["n_foils"], names=BASIS, generator=generator)
    lines = ["\t".join([one.a, one.b, one.c, one.d, "|".join(one.foils), one.kind or ""]) for one in made]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "analogies.tsv"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_analogies(file, format="tsv", generator=generator)


def analogies_drawn() -> Values:
    return {
        "words": [word for one in asked() for word in (one.a, one.b, one.c, one.d)],
        "kinds": [one.kind for one in asked()],
        "foils": [foil for one in asked() for foil in one.foils],
    }


@functools.cache
def analogies_of(name: str):
    """The command's evaluation: the composite from its file, every analogy in every way."""
    from fvlens.composition import CompositeMap

    with tempfile.TemporaryDirectory() as folder:
        saved = composite(name).save(Path(folder) / "composite.safetensors")
        made = CompositeMap.load(saved, model=embedded())
    return fvlens.evaluate_analogies(embedded(), asked(), made, generator=seeded(), progress=False)


def analogies_scored(name: str) -> Values:
    found = analogies_of(name)
    values: Values = {"weights": flat(found.weights)}
    for way, one in found.scored.items():
        values |= {
            f"{way} ranks": ranks(one.ranks),
            f"{way} right": [int(right) for right in one.right],
            f"{way} log-probabilities": flat(one.log_probs),
            f"{way} chosen": [None if chosen is None else int(chosen) for chosen in one.chosen],
        }
    return values


def analogies_answered() -> Values:
    from fvlens.composition import answer_analogy

    values: Values = {}
    for one in (asked()[0], asked()[-1]):
        name = f"{one.a} : {one.b} :: {one.c}"
        found = answer_analogy(embedded(), composite("transfer"), one.a, one.b, one.c)
        chosen = answer_analogy(embedded(), composite("transfer"), one.a, one.b, one.c, choices=[one.d, *one.foils])
        for way, answers in found.answers.items():
            values[f"{name}, {way}"] = [word for word, _ in answers[:3]]
            values[f"{name}, {way} probabilities"] = [chance for _, chance in answers[:3]]
        for way, answers in chosen.answers.items():
            values[f"{name}, {way} of choices"] = [word for word, _ in answers]
            values[f"{name}, {way} of choices probabilities"] = [chance for _, chance in answers]
        values[f"{name} gates"] = flat(found.gates.values())
    return values
