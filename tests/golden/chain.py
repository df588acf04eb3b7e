"""The façade step by step, heads, layer and scale given: does not move when the choice of one of them does."""

import functools
from typing import Any

import torch
from matrix import seeded

import fvlens
from golden.composites import BASIS
from golden.values import Values, curves, embedded, flat, scores

CHAIN = dict(relation="antonym", heads=[[1, 0], [1, 3], [2, 1], [2, 6], [3, 2]], layer=1, scale=1.5, n_prompts=40,
             n_corrupted=20, seed=0, epochs=3)  # fmt: skip


@functools.cache
def chain_split():
    return fvlens.load_relation("antonym").split(seeded())


@functools.cache
def chain_prompts():
    split, generator = chain_split(), seeded()
    given: dict[str, Any] = dict(queries=split.valid, relation="antonym", generator=generator)
    clean = fvlens.build_prompts(embedded(), split.train, n_prompts=CHAIN["n_prompts"], **given)
    labels = ("permuted", "deranged", "random")
    corrupted = {
        name: fvlens.build_prompts(embedded(), split.train, n_prompts=CHAIN["n_corrupted"], labels=name, **given)
        for name in labels
    }
    return clean, corrupted


@functools.cache
def chain_means():
    return fvlens.mean_head_activations(embedded(), chain_prompts()[0], progress=False)


@functools.cache
def chain_vector():
    return fvlens.function_vector(embedded(), chain_means(), heads=CHAIN["heads"], layer=CHAIN["layer"])


def chain_drawn() -> Values:
    clean, corrupted = chain_prompts()
    values: Values = {"clean tokens": flat(clean.tokens[:2]), "clean answers": flat(clean.answer_tokens)}
    for name, made in corrupted.items():
        values |= {f"{name} tokens": flat(made.tokens[:2]), f"{name} answers": flat(made.answer_tokens)}
    return values


def chain_averaged() -> Values:
    labels = fvlens.mean_head_activations(
        embedded(), chain_prompts()[0], positions="demonstration_label", progress=False
    )
    return {"last token": flat(chain_means().z), "demonstrations' labels": flat(labels.z)}


def chain_cie() -> Values:
    values: Values = {}
    for name, made in chain_prompts()[1].items():
        found = fvlens.indirect_effects(embedded(), made, chain_means(), progress=False)
        values |= {f"{name} cie": flat(found.cie), f"{name} baseline": flat(found.baseline)}
    return values


def chain_scored() -> Values:
    model, split, vector, scale = embedded(), chain_split(), chain_vector(), CHAIN["scale"]
    distributed = fvlens.distributed_vector(model, chain_means(), heads=CHAIN["heads"])
    values: Values = {"vector": flat(vector.vector)}
    for name, given in {
        "bare": dict(),
        "vector": dict(vector=vector),
        "scaled": dict(vector=vector, scale=scale),
        "arrow": dict(vector=vector, template="arrow"),
        "distributed": dict(vector=distributed),
        "icl": dict(setting="icl", demonstrations=split.train),
        "shuffled": dict(setting="shuffled", demonstrations=split.train),
        "shuffled, vector": dict(setting="shuffled", demonstrations=split.train, labels="random", vector=vector),
    }.items():
        found = fvlens.evaluate(model, split.test, generator=seeded(), **given)
        values |= scores(name, found, texts=True)
        values[f"{name} interval"] = [found.interval.low, found.interval.high]
    return values


def chain_swept() -> Values:
    model, split = embedded(), chain_split()
    values: Values = {}
    for scale in (1.0, CHAIN["scale"]):
        sweep = fvlens.layer_sweep(model, split.valid, chain_vector(), scale=scale, generator=seeded(), progress=False)
        for layer, found in zip(sweep.layers, sweep.evaluations, strict=True):
            values |= scores(f"scale {scale}, layer {layer}", found)
        values[f"scale {scale} best layer"] = [sweep.best_layer]
    counts = fvlens.head_count_sweep(
        model, split.valid, chain_means(), CHAIN["heads"], CHAIN["layer"], generator=seeded(), progress=False
    )
    for count, found in zip(counts.counts, counts.evaluations, strict=True):
        values |= scores(f"{count} heads", found)
    return values


def chain_controlled() -> Values:
    split = chain_split()
    table = fvlens.controls(
        embedded(), split.test, chain_vector(), demonstrations=split.train, means=chain_means(), n_random=2,
        generator=seeded(), progress=False,
    )  # fmt: skip
    return {
        key: value
        for row in table.rows
        for i, found in enumerate(row.evaluations)
        for key, value in scores(f"{row.name} {i}", found).items()
    }


def chain_written() -> Values:
    model, split = embedded(), chain_split()
    values: Values = {}
    for name, vector in {"bare": None, "vector": chain_vector()}.items():
        found = fvlens.generate_answers(model, split.test, vector=vector, max_new_tokens=2, generator=seeded())
        values[f"{name} texts"] = list(found.raw_texts)
    kept = fvlens.filter_correct(model, split.test, demonstrations=split.train, n_shots=2, generator=seeded())
    return values | {"filter set": [pair.input for pair in kept]}


def chain_ablated() -> Values:
    """Probabilities of the answers of clean prompts without some heads."""
    model, clean = embedded(), chain_prompts()[0]
    values: Values = {}
    for name, off in {"two heads off": CHAIN["heads"][:2], "five off": CHAIN["heads"]}.items():
        with torch.no_grad(), fvlens.ablate(model, off, value="zero"):
            logits = model(clean.tokens, attention_mask=clean.attention_mask)[:, -1]
        answers = clean.answer_tokens[:, :1]
        values[name] = flat(logits.softmax(dim=-1).gather(1, answers))
    return values


def chain_trained() -> Values:
    model, split = embedded(), chain_split()
    given: dict[str, Any] = dict(valid=split.valid, epochs=CHAIN["epochs"], progress=False)
    values: Values = {}
    distributed = fvlens.distributed_vector(model, chain_means(), heads=CHAIN["heads"])
    for name, settings in {
        "from vector": dict(init=chain_vector()),
        "from zero": dict(init="zero", layer=CHAIN["layer"]),
        "distributed": dict(init=distributed),
        "perplexity, l2": dict(init=chain_vector(), loss="perplexity", l2=1e-3, anchor="init", schedule="constant"),
    }.items():
        tuned = fvlens.finetune(model, split.train[:20], generator=seeded(), **{**given, **settings})
        values |= curves(name, tuned)
        values |= scores(name, fvlens.evaluate(model, split.test, vector=tuned.vector, generator=seeded()))
    many = fvlens.finetune_many(
        model, BASIS[:3], init="zero", layer=CHAIN["layer"], epochs=CHAIN["epochs"], generator=seeded(), progress=False
    )
    for run in many:
        values |= curves(f"many, {run.relation}", run)
    return values
