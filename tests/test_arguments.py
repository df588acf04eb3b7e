"""Every argument of every public function, of a wrong kind or a size beyond reason: an error of ours that names it."""

import dataclasses
import inspect
import math
import types

import pytest
import torch
from composition.whole_passes import NAMES, parts
from conftest import random_model, seeded
from evaluations import DEMONSTRATIONS, PAIRS, made_vector
from transformers import GPT2Config, GPT2LMHeadModel

import fvlens
from fvlens.arguments import MOST, check_arguments
from fvlens.relations import make_analogies

QUIET = {"progress": False}
MODEL = random_model()
VECTOR = made_vector(MODEL)
PROMPTS = fvlens.build_prompts(MODEL, DEMONSTRATIONS, n_shots=2, n_prompts=4, generator=seeded(3))
MEANS = fvlens.mean_head_activations(MODEL, PROMPTS, **QUIET)
BASIS = fvlens.VectorSet(tuple(made_vector(MODEL, seed=i, relation=name) for i, name in enumerate(NAMES)))
ANALOGIES = make_analogies(parts(10, 20), kind="far", n=3, generator=seeded(2))
ASKED = dict(model=MODEL, pairs=PAIRS, generator=seeded())

CALLS = {
    "ablate": dict(model=MODEL, heads=[(0, 1)]),
    "activation_cache": dict(model=MODEL, prompts=PROMPTS),
    "build_prompts": dict(model=MODEL, pairs=DEMONSTRATIONS, n_shots=1, generator=seeded()),
    "controls": dict(**ASKED, vector=VECTOR, means=MEANS, demonstrations=DEMONSTRATIONS, n_shots=1),
    "distributed_vector": dict(model=MODEL, means=MEANS, heads=[(0, 1)]),
    "evaluate": dict(**ASKED, vector=VECTOR),
    "evaluate_analogies": dict(model=MODEL, analogies=ANALOGIES, generator=seeded()),
    "explore": dict(model=MODEL),
    "filter_correct": dict(**ASKED, n_shots=1),
    "find_vector": dict(**ASKED, n_shots=1),
    "finetune": dict(**ASKED, init=VECTOR),
    "finetune_many": dict(model=MODEL, relations={"a": PAIRS}, init="zero", layer=1, generator=seeded()),
    "fingerprint": dict(model=MODEL),
    "fit_composite": dict(model=MODEL, basis=BASIS, analogies=ANALOGIES, generator=seeded()),
    "function_vector": dict(model=MODEL, means=MEANS, heads=[(0, 1)], layer=1),
    "generate_answers": dict(**ASKED),
    "head_count_sweep": dict(**ASKED, means=MEANS, ranking=[(0, 1)], layer=1),
    "indirect_effects": dict(model=MODEL, prompts=PROMPTS, means=MEANS),
    "inject": dict(model=MODEL, steering=VECTOR),
    "layer_sweep": dict(**ASKED, vector=VECTOR),
    "load_model": dict(name_or_path="rel-small"),
    "load_relation": dict(name="antonym"),
    "mean_head_activations": dict(model=MODEL, prompts=PROMPTS),
    "random_vector_like": dict(vector=VECTOR, generator=seeded()),
    "universal_heads": dict(model=MODEL, relations=["antonym"], n=1, generator=seeded()),
    # values
    "Analogy": dict(a="a", b="b", c="c", d="d"),
    "DistributedVector": dict(values=MEANS.z, heads=(), relation="a", fingerprint=VECTOR.fingerprint),
    "FunctionVector": dict(vector=VECTOR.vector, layer=1, heads=(), relation="a", fingerprint=VECTOR.fingerprint),
    "Relation": dict(name="a", pairs=PAIRS),
    "TrainableVector": dict(init=VECTOR),
    "VectorSet": dict(vectors=(VECTOR,)),
}
"""What each public name is called with, rightly."""

NOT_CALLED = {"ActivationCache", "Head", "list_relations"}
"""A cache is made by a function; a head is a pair of whatever it is given, and checked where it is used."""

NUMBERS = ("3", None, True, math.nan)
WRONG = {
    "model": (3, "rel-small", None, PAIRS),
    "generator": (0, None, "0", torch.tensor(0)),
    "prompts": (None, 3, "hot", PAIRS),
    "means": (None, 3, VECTOR, MEANS.z),
    "heads": (3, "L0H1", [3], [None], torch.tensor(math.nan), [(0, 1, 2)], [(0, 99)]),
    "ranking": (3, "L0H1", [None]),
    "pairs": (None, 3, True, math.nan, MODEL, [None], [("a",)], torch.tensor(math.nan)),
    "queries": (3, MODEL, [None]),
    "demonstrations": (3, MODEL, [None]),
    "analogies": (3, "hot", [None], PAIRS),
    "vector": (3, "antonym", PAIRS),
    "steering": (None, 3, VECTOR.vector),
    "others": (3, [None], "antonym"),
    "basis": (None, 3, (VECTOR,)),
    "init": (None, 3),
    "scale": NUMBERS,
    "alpha": NUMBERS,
    "layer": ("1", True, math.nan, 99, -1),
    "layers": (1.5, "1", ["1"], [True], torch.tensor(math.nan), [99], []),
    "counts": (1.5, "1", ["1"], [0]),
    "scales": (1.0, "1", ["1"], [math.nan], []),
    "n": ("3", None, 0, 10**9),
    "n_prompts": ("3", True, 1.5, 0, 10**9),
    "n_shots": ("3", None, True, -1, 10**9),
    "n_corrupted": ("3", None, True, -1, 10**9),
    "n_heads": ("3", None, True, 0, 10**9),
    "n_random": ("3", None, True, -1, 10**9),
    "n_train": ("3", True, 10**9),
    "n_steps": ("3", None, True, 0, 10**9),
    "recheck": ("3", True, -1, 10**9),
    "epochs": ("3", None, True, 0, 10**9),
    "max_new_tokens": ("3", None, True, 0, 10**9),
    "batch_size": ("3", True, 1.5, 0, -1),
    "max_memory": ("3", True, 1.5),
    "n_devices": ("1", True, 0),
    "seed": ("3", True, 1.5),
    "l2": ("3", None, math.nan, -1.0),
    "lr": ("3", True, math.nan, 0.0),
    "patience": ("3", True, 0),
    "labels": (3, "nonsense"),
    "setting": (3, "nonsense"),
    "template": (3, "nonsense"),
    "positions": (1.5, "nonsense"),
    "method": (3, None, "nonsense"),
    "answer": (3, None, "nonsense"),
    "path": (3, "nonsense"),
    "map": (3, None, "nonsense"),
    "rule": (3, None, "nonsense"),
    "scores": (3, None, "nonsense"),
    "loss": (3, None, "nonsense"),
    "anchor": (3, None, "nonsense"),
    "schedule": (3, None, "nonsense"),
    "backend": (3, "nonsense"),
    "device": (3.5, "nonsense"),
    "dtype": ("float32", 32),
    "compute": ("float32", 16),
    "progress": (None, 1, "no"),
    "check": (None, 1, "no"),
    "every_new_token": (None, 1, "no"),
    "allow_leak": (None, 1, "no"),
    "learn_strength": (None, 1, "no"),
    "trust": (None, 1, "yes"),
    "complete": (None, 1, "yes"),
    "name": (3, None),
    "relation": (3, True, PAIRS),
    "relations": (3, None, MODEL),
    "revision": (3, True),
    "name_or_path": (3, None, True),
    "fingerprint": (None, "rel-small"),
    "vectors": (3, (3,), ()),
    "values": (None, MEANS.z[:1]),
    "kind": (3, "nonsense"),
}
"""By the name of an argument, what it is not."""

ALSO = {
    ("layer_sweep", "vector"): (VECTOR.vector,), ("controls", "vector"): (None, VECTOR.vector),
    ("TrainableVector", "layer"): ("1", True, -1),
    **dict.fromkeys([("controls", "means"), ("find_vector", "means")], (3, VECTOR, MEANS.z)),
}  # fmt: skip
RIGHT = {
    # what is wrong for one function and right for another
    ("finetune", "vector"), ("find_vector", "pairs"), ("FunctionVector", "kind"), ("DistributedVector", "kind"),
    ("Relation", "name"), ("activation_cache", "positions"), ("FunctionVector", "vector"),
    ("fit_composite", "epochs"), ("explore", "relation"),
    ("fit_composite", "l2"),
    ("Relation", "path"), ("TrainableVector", "layer"), ("TrainableVector", "device"),
    ("controls", "means"), ("find_vector", "means"),
}  # fmt: skip


def arguments(name):
    """The names of what a public name takes, collected keywords too."""
    found = getattr(fvlens, name)
    target = found.__init__ if inspect.isclass(found) and not dataclasses.is_dataclass(found) else found
    target = inspect.unwrap(target)
    names = []
    for key, parameter in inspect.signature(found).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.append(key)
        else:
            names += list(inspect.get_annotations(target, eval_str=True)[key].__args__[0].__annotations__)
    return names


def wrong():
    """Function, argument and wrong value, all of them."""
    for name in CALLS:
        for argument in arguments(name):
            known = () if (name, argument) in RIGHT else WRONG.get(argument, ())
            for value in (*known, *ALSO.get((name, argument), ())):
                yield name, argument, value


def refusal(name, argument, value):
    """What a call with one wrong argument says; None if it is an error of somebody else, or none."""
    given = CALLS[name] | {argument: value}
    if "setting" in arguments(name) and argument in ("n_shots", "demonstrations", "labels", "pool"):
        given = dict(setting="shuffled", demonstrations=DEMONSTRATIONS, n_shots=1) | given
    try:
        made = getattr(fvlens, name)(**given)
        if name in ("inject", "ablate"):
            with made:
                pass
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"!{type(error).__name__}: {error}"
    return None


def test_every_public_name_is_called():
    assert set(CALLS) | NOT_CALLED == set(fvlens.__all__)
    known = {argument for name in CALLS for argument in arguments(name)}
    assert set(WRONG) <= known, set(WRONG) - known


def test_a_wrong_argument_is_an_error_of_ours_that_names_it(unchecked):
    bad = []
    for name, argument, value in wrong():
        said = refusal(name, argument, value)
        shown = (
            f"{name}({argument}={value if isinstance(value, int | float | str | type(None)) else type(value).__name__})"
        )
        if said is None:
            bad.append(f"{shown}: accepted")
        elif said.startswith("!") or argument.removesuffix("s") not in said:
            bad.append(f"{shown}: {said[:120]}")
    assert bad == []


def test_more_demonstrations_than_fit_the_context(tiny):
    pairs = [(f"word{i}", f"other{i}") for i in range(80)]
    with pytest.raises(ValueError, match=r"context .* 160|160 .* context"):
        fvlens.build_prompts(tiny, pairs, n_shots=79, n_prompts=1, generator=seeded())


def test_a_plain_hugging_face_model_is_told_where_to_go(unchecked):
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, n_positions=8))
    with pytest.raises(ValueError, match=r"evaluate: model: .* a plain Hugging Face model; save it with"):
        fvlens.evaluate(plain, PAIRS, generator=seeded())


class Elsewhere(torch.Generator):
    """A generator that says that it is on another device."""

    device = torch.device("cuda")


def test_a_generator_on_another_device(unchecked):
    with pytest.raises(ValueError, match=r"evaluate: generator: expected a generator on the CPU, .* got one on cuda"):
        fvlens.evaluate(MODEL, PAIRS, generator=Elsewhere())


def test_kinds_are_told_apart():
    def function(a: int, b: float | None, c: bool, d: str, e: "types.NoneType | list[int]") -> None:
        """Nothing."""

    check_arguments(function, dict(a=1, b=None, c=True, d="x", e=[1]))
    check_arguments(function, dict(a=1, b=2, c=False, d="", e=None))
    for given, message in (
        (dict(a=1.0), "function: a: expected a whole number, got 1.0"),
        (dict(a=True), "function: a: expected a whole number, got True"),
        (dict(b=math.inf), "function: b: expected a finite number or None, got inf"),
        (dict(b=10**400), "function: b: expected a finite number or None, got 1000"),
        (dict(c=1), "function: c: expected true or false, got 1"),
        (dict(d=b"x"), "function: d: expected a text, got a bytes"),
        (dict(e=[1.5]), r"function: e: expected None or a list of whole numbers, got \[1\.5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_arguments(function, given)
    assert MOST == 10**6
