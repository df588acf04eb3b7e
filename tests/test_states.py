"""Every public function in every state that torch or the model may be in: the same numbers, or a sentence; restored."""

import contextlib
import dataclasses

import pytest
import torch
from composition.whole_passes import NAMES, parts
from conftest import HAS_HOOKED, random_model, seeded
from evaluations import DEMONSTRATIONS, PAIRS, made_vector

import fvlens
from fvlens.composition import CompositeMap
from fvlens.relations import Split, make_analogies

QUIET = {"progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:filter_correct. the model answers none")


@pytest.fixture(scope="module")
def made():
    """A model of its own, and what the functions take."""
    model = random_model()
    vector = made_vector(model)
    prompts = fvlens.build_prompts(model, DEMONSTRATIONS, n_shots=2, n_prompts=4, generator=seeded(3))
    means = fvlens.mean_head_activations(model, prompts, **QUIET)
    basis = fvlens.VectorSet(tuple(made_vector(model, seed=i, relation=name) for i, name in enumerate(NAMES)))
    analogies = make_analogies(parts(10, 20), kind="far", n=3, generator=seeded(2))
    split = Split(DEMONSTRATIONS[:4], DEMONSTRATIONS[4:], PAIRS[:3], "both")
    return model, vector, prompts, means, basis, analogies, split


def injected(model, vector, prompts):
    with torch.no_grad(), fvlens.inject(model, vector):
        return model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]


def ablated(model, prompts):
    with torch.no_grad(), fvlens.ablate(model, [(0, 1)]):
        return model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]


def calls(made):
    """Name of each public function -> a small call of it, and what of its result is compared."""
    model, vector, prompts, means, basis, analogies, split = made
    relation = fvlens.load_relation("antonym")
    few = dataclasses.replace(relation, pairs=relation.pairs[:12])
    find = dict(n_heads=2, n_shots=1, n_prompts=2, n_corrupted=2, layers=[1], scales=(1,), **QUIET)
    how = dict(epochs=1, **QUIET)
    return {
        "ActivationCache": lambda: fvlens.activation_cache(model, prompts, sites=("z",), **QUIET).mean("z"),
        "Analogy": lambda: fvlens.Analogy("a", "b", "c", "d"),
        "DistributedVector": lambda: fvlens.DistributedVector(
            means.z, (fvlens.Head(0, 1),), "made", means.fingerprint
        ).values,
        "FunctionVector": lambda: (2.0 * vector - vector).vector,
        "Head": lambda: fvlens.Head(1, 2),
        "Relation": lambda: few.split(seeded()),
        "TrainableVector": lambda: fvlens.TrainableVector(vector).to_vector(vector).vector,
        "VectorSet": lambda: basis.similarity(),
        "ablate": lambda: ablated(model, prompts),
        "activation_cache": lambda: fvlens.activation_cache(model, prompts, sites=("z",), **QUIET)["z"],
        "build_prompts": lambda: fvlens.build_prompts(
            model, DEMONSTRATIONS, n_shots=2, n_prompts=3, generator=seeded()
        ).tokens,
        "controls": lambda: [
            row.top1
            for row in fvlens.controls(
                model, PAIRS, vector, n_random=1, demonstrations=DEMONSTRATIONS, n_shots=1, generator=seeded(), **QUIET
            ).rows
        ],
        "distributed_vector": lambda: fvlens.distributed_vector(model, means, heads=[(0, 1)]).values,
        "evaluate": lambda: fvlens.evaluate(model, PAIRS, vector=vector, generator=seeded()).probabilities,
        "evaluate_analogies": lambda: fvlens.evaluate_analogies(
            model, analogies, CompositeMap.plain(basis), settings=["zero_shot"], controls=[], generator=seeded(),
            **QUIET,
        ).weights,
        "explore": lambda: len(fvlens.explore(model).children),
        "filter_correct": lambda: fvlens.filter_correct(model, PAIRS, n_shots=0, generator=seeded()),
        "find_vector": lambda: fvlens.find_vector(model, split, generator=seeded(), **find).vector.vector,
        "finetune": lambda: fvlens.finetune(model, PAIRS, init=vector, generator=seeded(), **how).vector.vector,
        "finetune_many": lambda: fvlens.finetune_many(
            model, {"one": split}, init="zero", layer=1, generator=seeded(), **how
        ).vectors.matrix,
        "fingerprint": lambda: fvlens.fingerprint(model),
        "fit_composite": lambda: fvlens.fit_composite(model, basis, analogies, generator=seeded(), **how).matrix,
        "function_vector": lambda: fvlens.function_vector(model, means, heads=[(0, 1)], layer=1).vector,
        "generate_answers": lambda: fvlens.generate_answers(model, PAIRS, vector=vector, generator=seeded()).raw_texts,
        "head_count_sweep": lambda: fvlens.head_count_sweep(
            model, PAIRS, means, [(0, 1), (1, 0)], 1, generator=seeded(), **QUIET
        ).probability,
        "indirect_effects": lambda: fvlens.indirect_effects(model, prompts, means, **QUIET).cie,
        "inject": lambda: injected(model, vector, prompts),
        "layer_sweep": lambda: fvlens.layer_sweep(model, PAIRS, vector, generator=seeded(), **QUIET).probability,
        "list_relations": lambda: fvlens.list_relations(),
        "load_model": None,  # below
        "load_relation": lambda: fvlens.load_relation("antonym"),
        "mean_head_activations": lambda: fvlens.mean_head_activations(model, prompts, **QUIET).z,
        "random_vector_like": lambda: fvlens.random_vector_like(vector, seeded()).vector,
        "universal_heads": lambda: None,  # what it runs is mean_head_activations and indirect_effects
    }  # fmt: skip


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def marked(model, *, training=None, grad=None):
    """The model in another mode, checked after, and put back."""
    modes = {part: part.training for part in model.modules()}
    flags = {part: part.requires_grad for part in model.parameters()}
    if training is not None:
        model.train(training)
    if grad is not None:
        model.requires_grad_(grad)
    now = {part: part.training for part in model.modules()}, {part: part.requires_grad for part in model.parameters()}
    try:
        yield
        after = {part: part.training for part in model.modules()}, {p: p.requires_grad for p in model.parameters()}
        assert after[0] == now[0] and {id(p): f for p, f in after[1].items()} == {id(p): f for p, f in now[1].items()}
    finally:
        for part, mode in modes.items():
            part.training = mode
        for part, flag in flags.items():
            part.requires_grad_(flag)


STATES = {
    "inference_mode": lambda model: torch.inference_mode(),
    "no_grad": lambda model: torch.no_grad(),
    "set_grad_enabled(False)": lambda model: torch.set_grad_enabled(False),
    "train mode": lambda model: marked(model, training=True),
    "no parameter takes gradients": lambda model: marked(model, grad=False),
    "every parameter takes gradients": lambda model: marked(model, grad=True),
}
DTYPES = [torch.float64, torch.bfloat16]
TRAINS = {"finetune", "finetune_many", "fit_composite"}
TAKE_NO_MODEL = {
    "Analogy", "DistributedVector", "FunctionVector", "Head", "Relation", "TrainableVector", "VectorSet",
    "list_relations", "load_relation",
}  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    return one == other


@pytest.fixture(scope="module")
def plain(made):
    """What every function gives in the ordinary state."""
    return {name: call() for name, call in calls(made).items() if call is not None}


def test_every_public_name_is_here(made):
    assert set(calls(made)) == set(fvlens.__all__)


@pytest.mark.parametrize("state", STATES)
def test_numbers_are_the_same_or_a_sentence_says_why_not(made, plain, state):
    model = made[0]
    for name, call in calls(made).items():
        if call is None:
            continue
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with STATES[state](model):
            if state == "inference_mode" and name in TRAINS:
                with pytest.raises(
                    ValueError, match=rf"{name}: gradients cannot be taken under torch.inference_mode\(\)"
                ):
                    call()
            else:
                found = call()
                assert same(plain[name], found.clone() if isinstance(found, torch.Tensor) else found), (name, state)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_default_precision_is_refused_by_what_makes_numbers(made, plain, dtype):
    message = f"torch's default precision is {dtype}, in which numbers would be made"
    for name, call in calls(made).items():
        if name in TAKE_NO_MODEL:
            with default(dtype):
                assert same(plain[name], call()), name
        elif name not in ("load_model", "universal_heads"):
            with default(dtype), pytest.raises(ValueError, match=message):
                call()
    with default(dtype), pytest.raises(ValueError, match=f"load_model: {message}"):
        fvlens.load_model("rel-small", device="cpu")
    with default(dtype), pytest.raises(ValueError, match=f"universal_heads: {message}"):
        fvlens.universal_heads(made[0], ["antonym"], 1, generator=seeded())


class Dropping(torch.nn.Module):
    """A part that drops out activations, as Hugging Face's modules have some."""

    def __init__(self):
        super().__init__()
        self.attn_dropout = torch.nn.Dropout(0.1)


RUNS = {
    "ActivationCache", "activation_cache", "controls", "evaluate", "evaluate_analogies", "filter_correct",
    "find_vector", "generate_answers", "head_count_sweep", "indirect_effects", "layer_sweep", "mean_head_activations",
}  # fmt: skip


@pytest.mark.skipif(not HAS_HOOKED, reason="a part is added to a HookedTransformer")
def test_a_model_that_drops_out_activations_is_refused(made, plain):
    model = made[0]
    model.add_module("dropping", Dropping())
    try:
        with marked(model, training=True):
            for name, call in calls(made).items():
                if name in RUNS:
                    with pytest.raises(
                        ValueError, match=r"in train mode and drops out .* \(Dropout\), .* call model.eval\(\)"
                    ):
                        call()
                elif name in TRAINS:  # they put it into evaluation mode, and back
                    assert same(plain[name], call()), name
        model.eval()
        assert same(plain["evaluate"], calls(made)["evaluate"]())
    finally:
        del model.dropping


def test_a_model_loaded_in_inference_mode_is_not_trained_through(made):
    with torch.inference_mode():
        model = random_model()
    vector = made[1]
    assert same(
        fvlens.evaluate(made[0], PAIRS, vector=vector, generator=seeded()).probabilities,
        fvlens.evaluate(model, PAIRS, vector=vector, generator=seeded()).probabilities,
    )
    with pytest.raises(ValueError, match=r"finetune: the model was loaded or changed under torch.inference_mode\(\)"):
        fvlens.finetune(model, PAIRS, init=vector, generator=seeded(), **QUIET)
