"""Sweeps over layers, scales and numbers of heads, against single evaluations."""

import dataclasses
import warnings

import pytest
import torch
from conftest import seeded
from evaluations import DEMONSTRATIONS, PAIRS, interrupted_after, made_vector, same, says_that_it_is_a_part

from fvlens.evaluation import (
    Evaluation,
    LayerScaleSweep,
    _sweeps,
    evaluate,
    head_count_sweep,
    layer_scale_sweep,
    layer_sweep,
)
from fvlens.metrics import Interval
from fvlens.prompts import TEMPLATES, AnswerTokens
from fvlens.relations import Pair
from fvlens.types import Head
from fvlens.vectors import distributed_vector, function_vector

pytestmark = pytest.mark.usefixtures("no_trace")

# --- sweeps ---


@pytest.mark.parametrize("setting", ["zero_shot", "shuffled"])
def test_layer_sweep_equals_single_evaluations(tiny, setting):
    vector = made_vector(tiny, norm=20.0)
    kwargs = dict(setting=setting, demonstrations=DEMONSTRATIONS, n_shots=3, scale=1.5)
    sweep = layer_sweep(tiny, PAIRS, vector, generator=seeded(8), progress=False, **kwargs)
    assert sweep.layers == (0, 1, 2)
    assert sweep.complete
    for layer, one in zip(sweep.layers, sweep.evaluations, strict=True):
        assert same(one, evaluate(tiny, PAIRS, vector=vector.at_layer(layer), generator=seeded(8), **kwargs))
    assert same(sweep.baseline, evaluate(tiny, PAIRS, generator=seeded(8), **kwargs))
    assert sweep.top1.tolist() == pytest.approx([one.top1 for one in sweep.evaluations])
    assert sweep.probability.tolist() == pytest.approx([one.probability for one in sweep.evaluations])
    assert sweep.intervals == tuple(one.interval for one in sweep.evaluations)


def test_layer_sweep_takes_a_vector_for_each_layer(tiny):
    vectors = {2: made_vector(tiny, layer=2, seed=2), 0: made_vector(tiny, layer=0, seed=1)}
    sweep = layer_sweep(tiny, PAIRS, vectors, generator=seeded(8), progress=False)
    assert sweep.layers == (0, 2)
    for layer, one in zip(sweep.layers, sweep.evaluations, strict=True):
        assert same(one, evaluate(tiny, PAIRS, vector=vectors[layer], generator=seeded(8)))
    assert layer_sweep(tiny, PAIRS, vectors, layers=[2], generator=seeded(8), progress=False).layers == (2,)


def test_layer_and_scale_sweep_equals_single_evaluations(tiny):
    vector = made_vector(tiny, norm=20.0)
    kwargs = dict(setting="icl", demonstrations=DEMONSTRATIONS, n_shots=3)
    sweep = layer_scale_sweep(tiny, PAIRS, vector, scales=(2, 0.5, 2), generator=seeded(8), progress=False, **kwargs)
    assert (sweep.layers, sweep.scales, sweep.complete) == ((0, 1, 2), (0.5, 2.0), True)
    for i, layer in enumerate(sweep.layers):
        for j, scale in enumerate(sweep.scales):
            there = vector.at_layer(layer)
            one = evaluate(tiny, PAIRS, vector=there, scale=scale, generator=seeded(8), **kwargs)
            assert same(sweep.at(layer, scale), one) and sweep.at(layer, scale).scale == scale
            assert float(sweep.top1[i, j]) == pytest.approx(one.top1)
            assert float(sweep.probability[i, j]) == pytest.approx(one.probability)
            assert sweep.intervals[i][j] == one.interval
    assert same(sweep.baseline, evaluate(tiny, PAIRS, generator=seeded(8), **kwargs))
    by_layer = layer_sweep(tiny, PAIRS, vector, scale=2, generator=seeded(8), progress=False, **kwargs)
    at_two = sweep.at_scale(2)
    assert at_two.best_layer == by_layer.best_layer
    assert all(map(same, at_two.evaluations, by_layer.evaluations))
    mapped = {layer: vector.at_layer(layer) for layer in (2, 0)}
    few = layer_scale_sweep(tiny, PAIRS, mapped, scales=[2], generator=seeded(8), progress=False, **kwargs)
    assert few.layers == (0, 2) and same(few.at(2, 2), sweep.at(2, 2))


def test_layer_and_scale_sweep_asks_all_cells_in_one_go(tiny, monkeypatch):
    seen = []
    own = _sweeps.score

    def watched(model, prompts, changes, **options):
        seen.append((len(changes), options["scales"]))
        return own(model, prompts, changes, **options)

    monkeypatch.setattr(_sweeps, "score", watched)
    layer_scale_sweep(tiny, PAIRS, made_vector(tiny), scales=(1, 3), generator=seeded(), progress=False)
    assert seen == [(7, [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0])]


def test_the_best_layer_and_scale_has_the_largest_top1_then_probability_then_is_nearest_to_scale_one():
    low, sure, unsure = scored([0, 3, 3], 0.9), scored([0, 0, 3], 0.6), scored([0, 0, 3], 0.5)

    def place(*rows):
        return LayerScaleSweep((4, 5), (0.5, 1.0, 1.5), rows, low, True).best_place

    assert place((low, low, unsure), (sure, low, low)) == (5, 0.5)
    assert place((low, low, low), (low, low, unsure)) == (5, 1.5)
    assert place((sure, low, low), (low, sure, low)) == (5, 1.0)  # the scale first
    assert place((low, sure, low), (low, sure, low)) == (4, 1.0)  # then the layer
    assert place((low, low, low), (sure, low, sure)) == (5, 0.5)  # then the smaller of two that are as near
    whole = LayerScaleSweep((4, 5), (0.5, 1.0, 1.5), ((low, sure, low), (low, low, low)), low, True)
    assert whole.best is sure and (whole.best_layer, whole.best_scale) == (4, 1.0)
    with pytest.raises(
        ValueError, match=r"visited layers \[4, 5\] and scales \[0.5, 1.0, 1.5\], not layer 4 with scale 2"
    ):
        whole.at_scale(2)


def test_an_interrupted_layer_and_scale_sweep_keeps_finished_queries(tiny, monkeypatch):
    own = _sweeps.score

    def cut(*args, **options):
        found = own(*args, **options)
        parts = {name: getattr(found, name)[:, :2] for name in ("ranks", "first", "rest", "best", "exact")}
        return dataclasses.replace(found, prompts=found.prompts[:2], complete=False, **parts)

    whole = layer_scale_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), progress=False)
    monkeypatch.setattr(_sweeps, "score", cut)
    part = layer_scale_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), progress=False)
    assert not part.complete and part.best.n == 2 and not part.at_scale(1).complete
    assert torch.equal(part.at(1, 2).ranks, whole.at(1, 2).ranks[:2])
    says_that_it_is_a_part(part)
    says_that_it_is_a_part(part.at_scale(1))


def scored(ranks, probability):
    n = len(ranks)
    return Evaluation(
        setting="zero_shot", relation="r", queries=(Pair("a", "b"),) * n, predictions=("b",) * n,
        ranks=torch.tensor(ranks), probabilities=torch.full((n,), probability), log_probabilities=torch.zeros(n),
        interval=Interval(0.1, 0.9, 0.95), template=TEMPLATES["qa"], n_shots=0, labels="true", scale=1.0,
        vector_kind=None, vector_relation=None, vector_layer=None, model_name="m", fingerprint=None, data_hash="",
        path="naive", batch_size=1, weights=None, compute=None, whole=torch.tensor(ranks) == 0,
        answers=AnswerTokens(n=1, n_one_token=1, n_first_tokens=1, n_sharing=0),
    )  # fmt: skip


def test_the_best_has_the_largest_top1_then_the_largest_probability_then_comes_first():
    low, sure, unsure = scored([0, 3, 3], 0.9), scored([0, 0, 3], 0.6), scored([0, 0, 3], 0.5)
    rest = dict(baseline=low, complete=True)

    def best_layer(*evaluations):
        return _sweeps.LayerSweep(layers=(4, 5, 6), evaluations=evaluations, **rest).best_layer

    assert best_layer(low, unsure, sure) == 6
    assert best_layer(low, sure, unsure) == 5
    assert best_layer(sure, low, sure) == 4
    counts = _sweeps.HeadCountSweep(
        counts=(1, 5, 10), evaluations=(low, sure, sure), ranking=(Head(0, 0),), layer=1, **rest
    )
    assert counts.best_count == 5


def test_sweeps_as_tables_and_figures(tiny, means):
    by_layer = layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), progress=False)
    by_count = head_count_sweep(tiny, PAIRS, means, [(0, 1), (2, 2), (1, 0)], 1, generator=seeded(), progress=False)
    for sweep, name, x, marked in (
        (by_layer, "layer", by_layer.layers, by_layer.best_layer),
        (by_count, "n_heads", by_count.counts, by_count.best_count),
    ):
        table = sweep.to_dataframe()
        assert table[name].tolist() == list(x)
        assert table["top1"].tolist() == [one.top1 for one in sweep.evaluations]
        assert table["high"].tolist() == [one.interval.high for one in sweep.evaluations]
        assert table["log_probability"].tolist() == [one.answer_log_probability for one in sweep.evaluations]
        figure = sweep.plot()
        assert list(figure.data[-1].x) == list(x)
        assert list(figure.data[-1].y) == [one.top1 for one in sweep.evaluations]
        assert any("no vector" in note.text for note in figure.layout.annotations)
        assert any(note.x == marked and "best" in note.text for note in figure.layout.annotations)


def test_head_count_sweep_equals_single_evaluations(tiny, means):
    ranking = [(2, 1), (0, 3), (1, 1), (1, 0), (0, 0), (2, 2)]
    sweep = head_count_sweep(tiny, PAIRS, means, ranking, 1, generator=seeded(8), scale=4.0, progress=False)
    assert sweep.counts == (1, 2, 3, 5)
    assert sweep.ranking == tuple(Head(*head) for head in ranking)
    assert sweep.layer == 1
    for count, one in zip(sweep.counts, sweep.evaluations, strict=True):
        vector = function_vector(tiny, means, heads=ranking[:count], layer=1)
        assert same(one, evaluate(tiny, PAIRS, vector=vector, scale=4.0, generator=seeded(8)))
    assert same(sweep.baseline, evaluate(tiny, PAIRS, scale=4.0, generator=seeded(8)))
    some = head_count_sweep(tiny, PAIRS, means, ranking, 1, counts=[6, 2], generator=seeded(8), progress=False)
    assert some.counts == (2, 6)


def test_an_interrupted_sweep_keeps_the_finished_queries(tiny, means, monkeypatch):
    options = dict(batch_size=2, progress=False)
    whole = layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), **options)
    n_runs, done = 0, []
    while True:
        with monkeypatch.context() as patch:
            interrupted_after(n_runs, patch)
            if n_runs == 0:
                with pytest.raises(KeyboardInterrupt):
                    layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), **options)
            else:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    part = layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), **options)
                if part.complete:
                    break
                n = part.baseline.n
                assert [str(one.message) for one in caught] == [
                    f"layer sweep was interrupted: {n} of {len(PAIRS)} queries are finished."
                ]
                assert part.layers == whole.layers
                places = [PAIRS.index(pair) for pair in part.baseline.queries]
                assert places == sorted(places)
                for some, every in zip(part.evaluations, whole.evaluations, strict=True):
                    assert some.queries == part.baseline.queries
                    torch.testing.assert_close(some.log_probabilities, every.log_probabilities[places])
                done.append(n)
        n_runs += 1
    assert done == sorted(set(done))
    assert len(done) >= 3
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        with pytest.warns(UserWarning, match=r"head-count sweep was interrupted: \d of 8 queries are finished"):
            part = head_count_sweep(tiny, PAIRS, means, [(0, 0), (1, 1)], 1, generator=seeded(), **options)
    assert part.counts == (1, 2)
    assert not part.complete
    says_that_it_is_a_part(part)
    assert "complete" not in whole.to_dataframe() and "interrupted" not in whole.plot().layout.title.text


@pytest.mark.parametrize(
    ("vector", "layers", "message"),
    [
        ("function", [], r"expected at least one layer, got none"),
        (
            "function",
            [1, 3],
            r"no vector for layer 3; the model has layers 0\.\.2, and there are vectors for \[0, 1, 2\]",
        ),
        ("map", [0, 1], r"no vector for layer 1; .* there are vectors for \[0\]"),
        ("outside", None, r"no vector for layer 7; the model has layers 0\.\.2"),
        ("distributed", None, "expected a FunctionVector or a mapping, got a DistributedVector"),
    ],
)
def test_bad_layers_are_refused(tiny, means, unchecked, vector, layers, message):
    one = made_vector(tiny)
    given = {
        "function": one,
        "map": {0: one},
        "outside": {7: one},
        "distributed": distributed_vector(tiny, means, heads=[(0, 0)]),
    }[vector]
    with pytest.raises(ValueError, match=message):
        layer_sweep(tiny, PAIRS, given, layers=layers, generator=seeded(), progress=False)


@pytest.mark.parametrize(
    ("ranking", "counts", "message"),
    [
        ([], None, r"expected a ranking of at least one head, got none"),
        ([(0, 0), (1, 1)], [], r"expected counts in 1\.\.2 \(the ranking's length\), got \[\]"),
        ([(0, 0), (1, 1)], [0, 1], r"expected counts in 1\.\.2 .* got \[0, 1\]"),
        ([(0, 0), (1, 1)], [3], r"expected counts in 1\.\.2 .* got \[3\]"),
        ([(0, 9)], None, r"L0H9 does not exist"),
    ],
)
def test_bad_counts_are_refused(tiny, means, ranking, counts, message):
    with pytest.raises(ValueError, match=message):
        head_count_sweep(tiny, PAIRS, means, ranking, 1, counts=counts, generator=seeded(), progress=False)
