"""Sets of vectors: what they hold, their files, their tables."""

import dataclasses
import itertools
import math
import re

import pytest
import torch

import fvlens
from fvlens.models import fingerprint
from fvlens.training import (
    VectorSet,
)
from fvlens.vectors import FunctionVector
from training.plain_loops import vector_of


@pytest.fixture
def some(small):
    return VectorSet(
        (
            dataclasses.replace(vector_of(small, seed=0, relation="antonym"), heads=(fvlens.Head(1, 2),)),
            dataclasses.replace(vector_of(small, seed=1, relation="country-capital"), kind="fine-tuned", template="qa"),
            dataclasses.replace(vector_of(small, seed=2, relation="my own"), seed=7, data_hash="abc"),
        )
    )


def test_vector_set_holds_its_vectors(small, some):
    assert some.names == ("antonym", "country-capital", "my own")
    assert some.categories == ("meaning", "encyclopedic", "")
    assert (len(some), some.layer, some.fingerprint) == (3, 1, fingerprint(small))
    assert torch.equal(some.matrix[1], vector_of(small, seed=1).vector)
    assert [vector.relation for vector in some] == list(some.names)
    assert some["my own"] is some[2] is some.vectors[2]
    some.check(small)


def test_vector_set_selects(some):
    assert some.select(["my own", "antonym"]).names == ("my own", "antonym")
    assert some.select(["my own", "antonym"]).categories == ("", "meaning")
    assert some.select(category="encyclopedic").names == ("country-capital",)
    assert some.select(["antonym", "country-capital"], category="meaning").names == ("antonym",)
    assert some.select().names == some.names
    with pytest.raises(
        ValueError, match="select: nothing of category 'spelling' among antonym, country-capital, my own"
    ):
        some.select(category="spelling")
    with pytest.raises(ValueError, match="no vector of 'synonym' in this set; it holds antonym, country-capital, my"):
        some.select(["synonym"])
    with pytest.raises(ValueError, match="select: expected at least one name, got none"):
        some.select([])


def test_vector_set_round_trip(small, some, tmp_path):
    file = some.save(tmp_path / "set.safetensors")
    assert file == tmp_path / "set.safetensors"
    loaded = VectorSet.load(file, model=small)
    assert loaded.categories == some.categories
    for one, other in zip(loaded, some, strict=True):
        assert torch.equal(one.vector, other.vector)
        for field in dataclasses.fields(FunctionVector):
            if field.name != "vector":
                assert getattr(one, field.name) == getattr(other, field.name)
    some.select(["antonym"]).save(file)  # replaces it
    assert VectorSet.load(file).names == ("antonym",)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.safetensors"]


def test_a_set_says_its_model_once_and_sets_of_version_0_1_are_read(some, tmp_path):
    """These held the fingerprint beside every vector."""
    from fvlens.files import read_tensors, write_tensors
    from fvlens.training._set import SET_FORMAT

    renamed = dataclasses.replace(some[1].fingerprint, name="renamed")  # the same model by another name
    some = VectorSet((some[0], dataclasses.replace(some[1], fingerprint=renamed), some[2]))
    tensors, header = read_tensors(some.save(tmp_path / "set.safetensors"), SET_FORMAT)
    assert ["fingerprint" in entry for entry in header["vectors"]] == [False, True, False]
    shared = header.pop("fingerprint")
    header["vectors"] = [{"fingerprint": shared} | entry for entry in header["vectors"]]
    for file in (tmp_path / "set.safetensors", write_tensors(tmp_path / "old", tensors, header, SET_FORMAT)):
        assert [one.fingerprint for one in VectorSet.load(file)] == [one.fingerprint for one in some]


def test_vector_set_table_and_similarity(small, some):
    table = some.to_dataframe()
    assert list(table.columns) == ["relation", "category", "kind", "layer", "dimension", "value"]
    assert len(table) == 3 * small.cfg.d_model
    row = table[(table.relation == "my own") & (table.dimension == 5)].iloc[0]
    assert row.value == float(some[2].vector[5]) and (row.category, row.kind, row.layer) == ("", "function", 1)
    for i, j in itertools.product(range(3), repeat=2):
        assert float(some.similarity()[i, j]) == pytest.approx(some[i].cosine(some[j]), abs=1e-6)
    figure = some.plot()
    assert "Cosine similarity of 3 vectors" in figure.layout.title.text


def test_vector_set_errors(small, models, some, tmp_path, unchecked):
    first = some[0]
    with pytest.raises(ValueError, match="VectorSet: expected at least one vector, got none"):
        VectorSet(())
    with pytest.raises(ValueError, match="VectorSet: two vectors are named 'antonym'; names must be unique"):
        VectorSet((first, first))
    with pytest.raises(ValueError, match="'antonym' is of layer 1, 'x' of 2; bring them together with at_layer"):
        VectorSet((first, vector_of(small, 2, relation="x")))
    with pytest.raises(ValueError, match="VectorSet: 3 vectors, but 1 categories"):
        VectorSet(some.vectors, ("one",))
    other = models("bridge-llama")
    with pytest.raises(ValueError, match="'antonym' and 'x' are of two models"):
        VectorSet((first, vector_of(other, relation="x")))
    with pytest.raises(ValueError, match="the set of 3 vectors"):
        some.check(other)
    file = some.save(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="the set of 3 vectors"):
        VectorSet.load(file, model=other)
    with pytest.raises(ValueError, match="no vector file at"):
        VectorSet.load(tmp_path / "none")
    with pytest.raises(ValueError, match="does not exist; create it first"):
        some.save(tmp_path / "absent" / "set")
    single = first.save(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="expected 'fvlens-vector-set-1'"):
        VectorSet.load(single)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda t, h: t.pop("matrix"), "KeyError: 'matrix'"),
        (lambda t, h: h.pop("vectors"), "KeyError: 'vectors'"),
        (lambda t, h: h.pop("categories"), "KeyError: 'categories'"),
        (lambda t, h: h["vectors"].pop(), "3 rows, but 2 vectors in the header"),
        (lambda t, h: h.update(vectors=[1, 2, 3]), "TypeError"),
        (lambda t, h: h.update(categories=["a"]), "3 vectors, but 1 categories"),
        (lambda t, h: h["vectors"][0].update(layer=99), "expected a layer in 0..2, got 99"),
        (lambda t, h: t.update(matrix=t["matrix"][:, :5]), "expected shape"),
        (lambda t, h: t["matrix"].fill_(math.nan), "NaN or infinite"),
    ],
)
def test_damaged_vector_sets_are_refused(some, tmp_path, damage, told, unchecked):
    from fvlens.files import read_tensors, write_tensors
    from fvlens.training._set import SET_FORMAT

    file = some.save(tmp_path / "set.safetensors")
    tensors, header = read_tensors(file, SET_FORMAT)
    damage(tensors, header)
    tensors.setdefault("other", torch.zeros(1))
    write_tensors(file, tensors, header, SET_FORMAT)
    with pytest.raises(ValueError, match=f"set.safetensors: damaged vector set \\(.*{re.escape(told)}"):
        VectorSet.load(file)
