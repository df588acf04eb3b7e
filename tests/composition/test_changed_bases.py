"""Composite vectors of changed bases."""

import dataclasses
import re

import pytest
import torch
from conftest import seeded

from composition.whole_passes import NAMES
from fvlens import VectorSet
from fvlens.composition import (
    CompositeMap,
    basis_study,
    evaluate_analogies,
)
from fvlens.composition._sensitivity import _noise
from fvlens.relations import load_relation


def test_noise_that_joins_a_basis_is_as_long_as_the_basis_is_on_average(basis):
    unlike = VectorSet(tuple((i + 1.0) * one for i, one in enumerate(basis)))
    joined, _ = _noise(unlike, 0.5, seeded())
    norms = [one.norm() for one in unlike]
    added = joined.vectors[len(unlike) :]
    assert len(added) == round(0.5 * len(unlike)) and max(norms) > 1.5 * min(norms)
    assert [one.norm() for one in added] == pytest.approx([sum(norms) / len(norms)] * len(added), rel=1e-5)


@pytest.fixture(scope="module")
def study(model, real):
    return basis_study(model, *real, drop=(0.4,), noise=(0.4,), n_repeats=2, generator=seeded(4), progress=False)


def test_a_study_covers_every_change_and_its_figures_are_those_of_plain_evaluations(model, real, study):
    made, asked = real
    wanted = ["full basis", "40% dropped", "near-duplicates merged", "40% noise added", "own family removed"]
    assert [one.name for one in study.changes] == [*wanted, "own domain removed"]
    assert [one.n_basis for one in study.changes[:4]] == [5, 3, 5, 7]
    options = dict(settings=["zero_shot"], controls=["own vector"], generator=seeded(), progress=False)
    full = evaluate_analogies(model, asked, made, **options)
    assert study["full basis"].top1 == full.top1("composite, zero-shot") > 0.3
    assert study.references == {name: full.top1(f"{name}, zero-shot") for name in ("unsteered", "own vector")}
    without, sizes = [], []
    for one in asked:
        family = load_relation(one.target_relation).family
        left = [name for name in NAMES if load_relation(name).family != family]
        sizes.append(len(left))
        found = evaluate_analogies(model, [one], CompositeMap.plain(made.basis.select(left)), **options)
        without.append(found.top1("composite, zero-shot"))
    removed = study["own family removed"]
    assert removed.top1 == pytest.approx(sum(without) / len(asked))
    assert removed.difference.mean == pytest.approx(removed.top1 - study["full basis"].top1)
    assert removed.n_basis == pytest.approx(sum(sizes) / len(sizes))
    assert removed.top1 < study["full basis"].top1


def test_weights_are_stable_where_softmax_makes_them_so(study):
    """Without a map, what is left keeps its proportions; noise takes some of the mass."""
    for name in ("40% dropped", "own family removed", "own domain removed", "full basis", "near-duplicates merged"):
        assert study[name].stability == pytest.approx(1, abs=1e-4)
    assert 0 < study["40% noise added"].stability < 1


def test_duplicates_become_their_mean(basis):
    from fvlens.composition._sensitivity import _merge, _overlap

    twin = dataclasses.replace(basis[1], vector=3 * basis[1].vector, relation="twin")
    merged, target = _merge(VectorSet((*basis, twin)), 0.99)
    assert merged.names == NAMES
    torch.testing.assert_close(merged[1].vector, 2 * basis[1].vector)
    torch.testing.assert_close(merged[0].vector, basis[0].vector)
    weights = torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.1, 0.4]])
    torch.testing.assert_close(weights @ target, torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.1]]))
    half = torch.tensor([[0.5, 0.5]])
    assert _overlap(2 * half, torch.tensor([[0.9, 0.1]])).item() == pytest.approx(0.6)
    assert _overlap(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0]])).item() == pytest.approx(0.5)


def test_a_map_is_trained_anew_for_every_changed_basis(tiny, fitted, train, test_set):
    found = basis_study(
        tiny, fitted, test_set, fit=train, drop=(0.2,), merge=None, noise=(), remove=(), n_repeats=1, epochs=1,
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert [one.name for one in found.changes] == ["full basis", "20% dropped"]
    assert found["20% dropped"].stability < 0.999
    with pytest.raises(ValueError, match="took part in making the composite"):
        basis_study(tiny, fitted, train, fit=train, generator=seeded(), progress=False)


def test_a_study_as_table_and_figure(study):
    table = study.to_dataframe()
    assert list(table["change"]) == [one.name for one in study.changes]
    assert table["diff_low"].iloc[1] <= table["difference"].iloc[1] <= table["diff_high"].iloc[1]
    figure = study.plot()
    assert {"full basis (5)", "own vector"} <= set(re.findall(r"full basis \(5\)|own vector", str(figure.layout)))
    assert list(figure.data[0].x) == pytest.approx(list(table["top1"]))
    with pytest.raises(ValueError, match="no change 'half'; there are full basis, 40% dropped"):
        study["half"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": (1.0,)}, "expected shares of drop between 0 and 1, got 1.0"),
        ({"noise": (0.0,)}, "expected shares of noise above 0, got 0.0"),
        ({"merge": 2.0}, "expected merge, a cosine, in -1..1, got 2.0"),
        ({"remove": ("word",)}, "remove='word'; expected family or domain"),
        ({"n_repeats": 0}, "expected n_repeats of at least 1, got 0"),
    ],
)
def test_bad_studies_are_refused(tiny, basis, test_set, unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        basis_study(tiny, CompositeMap.plain(basis), test_set, generator=seeded(), **change)


def test_a_study_of_a_map_wants_analogies(tiny, fitted, test_set):
    with pytest.raises(ValueError, match="a map of shape 'full' is trained anew, which needs fit analogies"):
        basis_study(tiny, fitted, test_set, generator=seeded())
