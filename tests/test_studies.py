"""Studies of trained vectors: every point against a training and an evaluation made one by one."""

import dataclasses
import itertools
import re

import pytest
import torch
from conftest import seeded

import fvlens
from fvlens.evaluation import evaluate
from fvlens.finetuning import (
    STUDIES,
    Point,
    Settings,
    Study,
    finetune,
    init_study,
    l2_study,
    layer_study,
    scale_study,
    training_size_study,
)
from fvlens.finetuning import _studies as studies_module
from fvlens.finetuning._training import Training
from fvlens.metrics import Interval, bootstrap_interval
from fvlens.models import fingerprint
from fvlens.relations import Split
from fvlens.vectors import FunctionVector, random_vector_like

FAST = Settings(epochs=2, lr=3.0)


@pytest.fixture(scope="module")
def split():
    whole = fvlens.load_relation("antonym").split(seeded())
    return Split(whole.train[:14], whole.valid[:8], whole.test[:10], "both")


@pytest.fixture(scope="module")
def start(model):
    values = 3 * torch.randn(model.cfg.d_model, generator=seeded(5))
    return FunctionVector(values, 1, (), "antonym", fingerprint(model))


def drawn(split, n_seeds, g):
    """The training pairs of each seed, all of them in its order: the first thing a study draws."""
    orders = [torch.randperm(len(split.train), generator=g).tolist() for _ in range(n_seeds)]
    return [tuple(split.train[i] for i in order) for order in orders]


def trained(model, pairs, start, valid, settings, g):
    """One training by ``finetune``, whose own test compares it with plain loops."""
    how = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return finetune(model, pairs, init=start, valid=valid, generator=g, progress=False, **how)


def hits(model, pairs, vector, scale=1.0):
    return evaluate(model, pairs, vector=vector, scale=scale, generator=seeded()).correct.float()


def at(study, line, x):
    (point,) = [point for point in study.line(line) if point.x == x]
    return point


def agrees(point, per_seed, vectors, g):
    """Top-1 is the mean over words and seeds; the interval is that of the words; the norm is that of the vectors."""
    words = torch.stack(per_seed).mean(dim=0)
    assert point.top1 == pytest.approx(float(words.mean()), abs=1e-6)
    assert point.interval == bootstrap_interval(words, generator=g)
    assert point.norm == pytest.approx(sum(v.norm() for v in vectors) / len(vectors), rel=1e-5)


def lacking(model, split, start):
    return {
        "untuned vector": pytest.approx(float(hits(model, split.test, start).mean())),
        "no vector": pytest.approx(float(hits(model, split.test, None).mean())),
    }


def zero_of(start):
    return dataclasses.replace(start, vector=torch.zeros_like(start.vector))


def test_training_size(model, split, start):
    study = training_size_study(
        model, split, init=start, sizes=(10, 1, 99), n_seeds=2, settings=FAST, generator=seeded(), progress=False
    )
    g = seeded()
    pairs = drawn(split, 2, g)
    assert [point.x for point in study.line("test pairs")] == [1, 10]  # 99 are not there
    for size in (1, 10):
        # 20 pairs take 4 steps an epoch: 8 steps in all
        settings = dataclasses.replace(FAST, epochs={1: 8, 10: 4}[size])
        for first, behind in ((start, ""), (zero_of(start), ", from zero")):
            vectors = [trained(model, own[:size], first, (), settings, g).vector for own in pairs]
            tested = [hits(model, split.test, vector) for vector in vectors]
            agrees(at(study, f"test pairs{behind}", size), tested, vectors, g)
            seen = torch.stack([hits(model, own[:size], v).mean() for own, v in zip(pairs, vectors, strict=True)])
            point = at(study, f"training pairs{behind}", size)
            assert point.top1 == pytest.approx(float(seen.mean()), abs=1e-6)
            assert point.interval == bootstrap_interval(seen, generator=g)
            assert point.norm == at(study, f"test pairs{behind}", size).norm
    assert study.log_x and study.n_train is None and (study.n_seeds, study.n_test) == (2, 10)
    assert study.references == lacking(model, split, start)


def test_layers(model, split, start):
    study = layer_study(
        model, split, init=start, layers=(2, 0), n_train=5, n_seeds=2, settings=FAST, generator=seeded(), progress=False
    )
    g = seeded()
    pairs = drawn(split, 2, g)
    apart = torch.Generator().set_state(g.get_state())  # intervals are drawn as if there had been no training
    for layer in (0, 2):
        there = start.at_layer(layer)
        vectors = [trained(model, own[:5], there, split.valid, FAST, g).vector for own in pairs]
        agrees(at(study, "fine-tuned", layer), [hits(model, split.test, v) for v in vectors], vectors, apart)
        agrees(at(study, "untuned", layer), [hits(model, split.test, there)], [start], apart)
    assert study.references == {"no vector": lacking(model, split, start)["no vector"]}
    assert study.lines == ("fine-tuned", "untuned") and study.n_train == 5 and not study.log_x
    everywhere = layer_study(
        model, split, init=start, n_train=2, n_seeds=1, settings=FAST, generator=seeded(), progress=False
    )
    assert [point.x for point in everywhere.line("untuned")] == list(range(model.cfg.n_layers))


def test_scales(model, split, start):
    study = scale_study(
        model, split, init=start, scales=(2, 0, 0.5), n_train=5, n_seeds=2, settings=FAST, generator=seeded(),
        progress=False,
    )  # fmt: skip
    g = seeded()
    vectors = [trained(model, own[:5], start, split.valid, FAST, g).vector for own in drawn(split, 2, g)]
    for scale in (0, 0.5, 2):
        found = [hits(model, split.test, vector, scale=scale) for vector in vectors]
        agrees(at(study, "fine-tuned", scale), found, [scale * vector for vector in vectors], g)
        agrees(at(study, "untuned", scale), [hits(model, split.test, start, scale=scale)], [scale * start], g)
    assert at(study, "untuned", 0).top1 == study.references["no vector"]


def test_l2(model, split, start):
    study = l2_study(
        model, split, init=start, weights=(0.1, 0), n_train=5, n_seeds=2, settings=FAST, generator=seeded(),
        progress=False,
    )  # fmt: skip
    g = seeded()
    pairs = drawn(split, 2, g)
    for l2, (anchor, line) in itertools.product((0, 0.1), (("zero", "to zero"), ("init", "to the start"))):
        settings = dataclasses.replace(FAST, l2=float(l2), anchor=anchor)
        vectors = [trained(model, own[:5], start, split.valid, settings, g).vector for own in pairs]
        agrees(at(study, line, l2), [hits(model, split.test, v) for v in vectors], vectors, g)
    assert study.references == lacking(model, split, start)
    figure = study.plot()
    assert figure.layout.xaxis.type == "log" and all(0 not in trace.x for trace in figure.data)
    one = l2_study(
        model, split, init=start, weights=(0.1,), anchors=("init",), n_train=2, n_seeds=1, settings=FAST,
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert one.lines == ("to the start",)


def test_starts(model, split, start):
    study = init_study(
        model, split, init=start, n_train=5, n_seeds=2, settings=dataclasses.replace(FAST, patience=1),
        generator=seeded(), progress=False,
    )  # fmt: skip
    g = seeded()
    pairs = drawn(split, 2, g)
    starts = {
        "function vector": [start] * 2,
        "zero": [zero_of(start)] * 2,
        "noise": [random_vector_like(start, g) for _ in range(2)],
    }
    order = g.get_state()
    for part, behind in ((split.test, ""), (split.valid, ", validation")):
        for name, firsts in starts.items():
            again = torch.Generator()
            again.set_state(order)  # the same order of the pairs for every start
            runs = [trained(model, own[:5], first, part, FAST, again) for own, first in zip(pairs, firsts, strict=True)]
            for epoch in range(3):
                seen = torch.stack([run.history.valid_top1[epoch] for run in runs])
                point = at(study, f"{name}{behind}", epoch)
                assert point.top1 == pytest.approx(float(seen.mean()), abs=1e-6)
                assert point.interval == bootstrap_interval(seen, generator=g)
                norms = [float(run.history.norm[epoch]) for run in runs]
                assert point.norm == pytest.approx(sum(norms) / 2, rel=1e-5, abs=1e-6)
    assert at(study, "noise", 0).norm == pytest.approx(start.norm(), rel=1e-5)
    assert at(study, "function vector", 0).top1 == study.references["untuned vector"]
    assert len(study.line("zero")) == 3  # a patience does not cut the curves
    drawn_lines = {trace.name for trace in study.plot().data if trace.showlegend is None}
    assert drawn_lines == {"function vector", "zero", "noise"}
    assert {trace.name for trace in study.plot(["zero", "zero, validation"]).data if trace.showlegend is None} == {
        "zero", "zero, validation",
    }  # fmt: skip


def test_a_relation_is_split_and_names_the_study(model, start):
    study = scale_study(
        model, fvlens.load_relation("plural"), init=start, scales=(1,), n_train=2, n_seeds=1, settings=FAST,
        generator=seeded(), progress=False,
    )  # fmt: skip
    split = fvlens.load_relation("plural").split(seeded())
    assert study.relation == "plural" and study.n_test == len(split.test)
    assert study.references["no vector"] == pytest.approx(float(hits(model, split.test, None).mean()))
    sized = training_size_study(
        model, fvlens.load_relation("plural"), init=start, sizes=(1,), n_seeds=1, settings=FAST, relation="mine",
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert sized.relation == "mine"
    assert sized.n_test == len(fvlens.load_relation("plural").split(seeded(), train=0.7).test) < study.n_test


def test_same_bits_and_global_randomness_untouched(model, split, start):
    before = torch.get_rng_state()
    settings = dict(init=start, scales=(0.5, 1), n_train=3, n_seeds=2, settings=FAST, progress=False)
    one, two, three = (scale_study(model, split, generator=seeded(seed), **settings) for seed in (0, 0, 1))
    assert one == two != three
    assert torch.equal(torch.get_rng_state(), before)


def by_hand(**changes):
    def point(line, x, top1):
        return Point(line, x, top1, Interval(top1 - 0.1, top1 + 0.1, 0.95), 2.0)

    points = (point("a", 10, 0.5), point("a", 1, 0.25), point("b", 1, 0.125), point("b", 10, 0.75))
    fields = dict(
        name="study", relation="antonym", title="Title", x_title="Pairs", points=points, references={"none": 0.3},
        intervals="over words", n_seeds=2, n_train=20, n_test=9, log_x=True,
    )  # fmt: skip
    return Study(**(fields | changes))


def test_table_holds_every_point():
    table = by_hand().to_dataframe()
    assert list(table.columns) == ["study", "relation", "line", "x", "top1", "low", "high", "norm", "n_seeds"]
    assert table.line.tolist() == ["a", "a", "b", "b"] and table.x.tolist() == [1, 10, 1, 10]
    assert table.top1.tolist() == [0.25, 0.5, 0.125, 0.75]
    assert table.low.tolist() == pytest.approx([0.15, 0.4, 0.025, 0.65])
    assert table.high.tolist() == pytest.approx([0.35, 0.6, 0.225, 0.85])
    assert set(table.study) == {"study"} and set(table.n_seeds) == {2}


def test_figure_shows_every_point():
    figure = by_hand().plot()
    lines = {trace.name: trace for trace in figure.data if trace.showlegend is None}
    assert list(lines["a"].x) == [1, 10] and list(lines["a"].y) == [0.25, 0.5]
    assert list(lines["b"].y) == [0.125, 0.75] and figure.layout.xaxis.type == "log"
    assert [shape.y0 for shape in figure.layout.shapes] == [0.3]
    assert figure.layout.title.text == "Title: antonym"
    assert figure.layout.title.subtitle.text == "2 seeds. Bands: over words"
    alone = by_hand(relation="", n_seeds=1).plot()
    assert alone.layout.title.text == "Title" and alone.layout.title.subtitle.text == "1 seed. Bands: over words"


def test_a_line_that_is_not_there():
    with pytest.raises(ValueError, match="no line 'c' in this study; there are a, b"):
        by_hand().line("c")


# --- interruption and progress ---


def interrupt_at(monkeypatch, n):
    """Ctrl-C in the n-th training."""
    count = itertools.count(1)
    own = studies_module.finetune_many

    def train(*args, **kwargs):
        if next(count) == n:
            monkeypatch.setattr(Training, "one_epoch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        return own(*args, **kwargs)

    monkeypatch.setattr(studies_module, "finetune_many", train)


def test_interruption_keeps_the_points_that_are_finished(model, split, start, monkeypatch):
    settings = dict(init=start, layers=(0, 1, 2), n_train=2, n_seeds=1, settings=FAST, progress=False)
    whole = layer_study(model, split, generator=seeded(), **settings)
    assert whole.complete
    interrupt_at(monkeypatch, 3)
    with pytest.warns(UserWarning, match="the study was interrupted: 2 of 3 layers are done") as caught:
        part = layer_study(model, split, generator=seeded(), **settings)
    assert len(caught) == 1  # and the training does not say it again
    assert not part.complete and part.points == whole.points[:4]


def test_interruption_before_the_first_point_passes_on(model, split, start, monkeypatch):
    interrupt_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        layer_study(model, split, init=start, n_train=2, n_seeds=1, settings=FAST, generator=seeded(), progress=False)


def test_the_bar_counts_the_values(model, split, start, monkeypatch):
    bars = []

    class Bar(studies_module.tqdm):
        def __init__(self, values, **settings):
            bars.append((list(values), settings))
            super().__init__(values, **settings)

    monkeypatch.setattr(studies_module, "tqdm", Bar)
    settings = dict(init=start, layers=(0, 1), n_train=2, n_seeds=1, settings=FAST, generator=seeded())
    layer_study(model, split, progress=False, **settings)
    layer_study(model, split, **settings)
    assert [(values, options["desc"], options["disable"]) for values, options in bars] == [
        ([0, 1], "layers", True), ([0, 1], "layers", False),
    ]  # fmt: skip


# --- errors ---


@pytest.mark.parametrize(
    "study, change, message",
    [
        (training_size_study, dict(sizes=()), "training_size_study: expected at least one of sizes, got none."),
        (training_size_study, dict(sizes=(0, 1)), "training_size_study: expected sizes in 1..14, the training pairs,"),
        (
            training_size_study,
            dict(sizes=(50,)),
            "training_size_study: expected sizes in 1..14, the training pairs, go",
        ),
        (layer_study, dict(layers=()), "layer_study: expected at least one of layers, got none."),
        (layer_study, dict(layers=(9,)), "expected a layer in 0..3, got 9"),
        (scale_study, dict(scales=()), "scale_study: expected at least one of scales, got none."),
        (l2_study, dict(weights=()), "l2_study: expected at least one of weights, got none."),
        (l2_study, dict(weights=(-1.0,)), "finetune: expected l2 of 0 or more, got -1.0."),
        (init_study, dict(n_seeds=0), "study: expected n_seeds of at least 1, got 0."),
    ],
)
def test_bad_settings_are_refused(model, split, start, unchecked, study, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        study(model, split, **({"init": start, "generator": seeded(), "progress": False} | change))


def test_a_split_needs_training_and_test_pairs(model, split, start):
    for empty in ("train", "test"):
        with pytest.raises(ValueError, match="study: expected a split with training and test pairs, got none of one"):
            scale_study(model, dataclasses.replace(split, **{empty: ()}), init=start, generator=seeded())


def test_every_study_has_its_name():
    assert list(STUDIES) == ["training-size", "layer", "scale", "l2", "init"]
    assert len(set(STUDIES.values())) == 5
