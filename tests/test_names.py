"""A relation's name travels: from a file or a split into prompts, vectors, titles and messages."""

import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import seeded
from evaluations import DEMONSTRATIONS

import fvlens
from fvlens.relations import Part, as_relation

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "pairs.csv"
    path.write_text("input,output\n" + "".join(f"{a},{b}\n" for a, b in DEMONSTRATIONS))
    return path


@pytest.fixture(scope="module")
def split():
    relation = fvlens.load_relation("plural")
    return dataclasses.replace(relation, pairs=relation.pairs[:20]).split(seeded())


def test_a_file_gives_its_name(tiny, file):
    tuned = fvlens.finetune(tiny, file, init="zero", layer=1, epochs=1, generator=seeded(), **QUIET)
    assert tuned.relation == tuned.vector.relation == "pairs"
    score = fvlens.evaluate(tiny, file, vector=tuned.vector, generator=seeded())
    assert score.relation == "pairs" and "pairs" in score.plot().layout.title.text
    assert "Training of pairs" in tuned.plot().layout.title.text
    other = dataclasses.replace(tuned.vector.fingerprint, weights="0" * 16, forms="")
    with pytest.raises(ValueError, match="the vector of 'pairs' was made on model"):
        dataclasses.replace(tuned.vector, fingerprint=other).check(tiny)


def test_parts_of_a_split_keep_their_relations_name(tiny, split):
    assert split.name == "plural" and as_relation(split.train).name == "plural"
    assert split.train[:3].relation == split.train[2:][:1].relation == "plural"
    assert type(split.train[0]) is fvlens.relations.Pair and split.train == tuple(split.train)
    prompts = fvlens.build_prompts(tiny, split.train[:5], n_shots=2, n_prompts=3, generator=seeded())
    assert prompts.relation == "plural"
    means = fvlens.mean_head_activations(tiny, prompts, **QUIET)
    vector = fvlens.function_vector(tiny, means, heads=[(0, 1)], layer=1)
    assert vector.relation == "plural"
    sweep = fvlens.layer_sweep(tiny, split.valid, vector, generator=seeded(), **QUIET)
    assert sweep.baseline.relation == "plural" and "plural" in sweep.plot().layout.title.text
    shown = fvlens.evaluate(tiny, split.test, setting="icl", demonstrations=split.train, n_shots=2, generator=seeded())
    assert shown.relation == "plural"
    assert fvlens.evaluate(tiny, split.test, relation="own", generator=seeded()).relation == "own"
    assert (
        fvlens.finetune(tiny, split.train[:4], init="zero", layer=1, epochs=1, generator=seeded(), **QUIET).relation
        == "plural"
    )
    how = dict(n_heads=2, n_shots=2, n_prompts=2, n_corrupted=2, layers=[1], scales=(1,), generator=seeded(), **QUIET)
    found = fvlens.find_vector(tiny, split, **how)
    assert found.vector.relation == found.means.relation == found.effects.relation == "plural"
    assert repr(found).startswith("Found(plural: ") and "plural" in found.plot().layout.title.text


def test_a_name_moves_no_number(tiny, split):
    """Prompts of the same seed are the same, random labels too, whose pool is the library's."""
    plain = dataclasses.replace(split, name="")
    made = [
        fvlens.build_prompts(
            tiny, tuple(one.train), queries=tuple(one.valid), n_shots=3, labels="random", generator=seeded()
        ).texts
        if one is plain
        else fvlens.build_prompts(
            tiny, one.train, queries=one.valid, n_shots=3, labels="random", generator=seeded()
        ).texts
        for one in (plain, split)
    ]
    assert made[0] == made[1]
    scores = [
        fvlens.evaluate(
            tiny, test, setting="shuffled", labels="random", demonstrations=train, n_shots=2, generator=seeded()
        )
        for test, train in ((tuple(split.test), tuple(split.train)), (split.test, split.train))
    ]
    assert torch.equal(scores[0].probabilities, scores[1].probabilities)
    assert [score.relation for score in scores] == ["", "plural"]


def test_a_part_is_copied_and_pickled_with_its_name(split):
    for again in (copy.copy(split.train), copy.deepcopy(split.train), pickle.loads(pickle.dumps(split.train))):
        assert isinstance(again, Part) and again == split.train and again.relation == "plural"
