"""One of every result of long work, small, on a random-weight model: for tests that walk over all of them."""

import functools
import warnings

from composition.whole_passes import NAMES, parts
from conftest import random_model, seeded
from evaluations import DEMONSTRATIONS, PAIRS, made_vector

import fvlens
from fvlens import scoring
from fvlens.attribution import attention_patterns, direct_effects, logit_lens
from fvlens.composition import CompositeMap, basis_study
from fvlens.evaluation import layer_scale_sweep
from fvlens.relations import Split, make_analogies
from fvlens.training import Collateral, compare, few_shot, lora, soft_prompt

QUIET = {"progress": False}


@functools.cache
def tiny_model():
    return random_model()


@functools.cache
def prompts():
    return fvlens.build_prompts(tiny_model(), DEMONSTRATIONS, n_shots=2, n_prompts=5, generator=seeded(3))


@functools.cache
def results():
    """Every result, by the name of its class, and where one class has several kinds by the kind too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of heads that do not help, on a model without sense
        return _results()


def _results():
    model, clean, g = tiny_model(), prompts(), seeded()
    vector = made_vector(model)
    means = fvlens.mean_head_activations(model, clean, **QUIET)
    shuffled = fvlens.build_prompts(
        model, DEMONSTRATIONS, n_shots=2, n_prompts=3, labels="permuted", generator=seeded(1)
    )
    split = Split(DEMONSTRATIONS[:4], DEMONSTRATIONS[4:], PAIRS[:3], "both")
    how = dict(n_heads=2, n_shots=2, n_prompts=4, n_corrupted=3, generator=g, **QUIET)
    basis = fvlens.VectorSet(tuple(made_vector(model, seed=i, relation=name) for i, name in enumerate(NAMES)))
    analogies = make_analogies(parts(10, 20), kind="far", n=4, generator=seeded(2), n_foils=2)
    composite = CompositeMap.plain(basis)
    trained = dict(epochs=1, generator=g, **QUIET)
    rechecked = fvlens.indirect_effects(model, shuffled, means, method="atp", recheck=3, **QUIET)
    found = [
        means,
        ("IndirectEffects", fvlens.indirect_effects(model, shuffled, means, **QUIET)),
        ("IndirectEffects, rechecked", rechecked),
        direct_effects(model, shuffled, **QUIET),
        attention_patterns(model, shuffled, [(0, 1), (1, 2)], right="query", **QUIET),
        ("AttentionPatterns, full", attention_patterns(model, clean, [(1, 0)], full=True, **QUIET)),
        logit_lens(model, shuffled, positions=None, k=2, **QUIET),
        fvlens.evaluate(model, PAIRS, vector=vector, generator=g),
        ("Evaluation, bare", fvlens.evaluate(model, PAIRS, generator=g)),
        fvlens.generate_answers(model, PAIRS, vector=vector, generator=g),
        fvlens.layer_sweep(model, PAIRS, vector, generator=g, **QUIET),
        fvlens.head_count_sweep(model, PAIRS, means, [(0, 1), (1, 2)], 1, generator=g, **QUIET),
        layer_scale_sweep(model, PAIRS, vector, scales=(1, 2), generator=g, **QUIET),
        fvlens.controls(
            model, PAIRS, vector, others=[made_vector(model, seed=5, relation="other")], means=means, n_random=2,
            demonstrations=DEMONSTRATIONS, n_shots=2, generator=g, **QUIET,
        ),
        fvlens.find_vector(model, split, relation="made", **how),
        fvlens.finetune(model, PAIRS[:4], init=vector, valid=PAIRS[4:], **trained),
        fvlens.finetune_many(
            model, {"one": split, "two": split}, init="zero", layer=1, epochs=1, generator=g, **QUIET
        ),
        soft_prompt(model, PAIRS[:4], n_tokens=2, **trained),
        ("Baseline, LoRA", lora(model, PAIRS[:4], rank=1, **trained)),
        ("Baseline, untrained", few_shot(DEMONSTRATIONS, n_shots=2, generator=g)),
        scoring.score(model, clean, [None, vector]),
        fvlens.evaluate_analogies(
            model, analogies, composite, settings=["zero_shot"], controls=["own vector"], generator=g, **QUIET
        ),
        basis_study(model, composite, analogies, drop=(0.4,), noise=(), remove=(), n_repeats=1, generator=g, **QUIET),
    ]  # fmt: skip
    named = dict(one if isinstance(one, tuple) else (type(one).__name__, one) for one in found)
    comparison = compare(
        model, "country-capital", n_train=4, n_heads=2, n_shots=1, n_prompts=2, n_corrupted=2, n_soft=(1,),
        n_unrelated=3, epochs=1, layer=1, **QUIET,
    )  # fmt: skip
    collateral = comparison.rows[2].collateral
    assert isinstance(collateral, Collateral)
    return named | {"Comparison": comparison, "Collateral": collateral}
