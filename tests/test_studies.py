"""Studies of trained vectors: every point against a training and an evaluation made one by one."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import seeded

import fvlens
from fvlens.evaluation import evaluate
from fvlens.find import find_vector
from fvlens.metrics import bootstrap_interval
from fvlens.models import fingerprint
from fvlens.relations import Split
from fvlens.studies import STUDIES, run_study
from fvlens.studies import Settings as StudySettings
from fvlens.studies import _lab as lab_module
from fvlens.studies._lab import Axis, Lab
from fvlens.studies._trained import (
    TRAINED,
    InitOptions,
    L2Options,
    LayerOptions,
    ScaleOptions,
    SizeOptions,
    at_l2,
    at_layer,
    at_scales,
    at_size,
    from_start,
)
from fvlens.training import Settings, finetune
from fvlens.training._loop import Training
from fvlens.vectors import FunctionVector, random_vector_like

FAST = Settings(epochs=2, lr=3.0)
FEW = dict(n_prompts=4, n_corrupted=2, n_heads=2, epochs=1, n_seeds=1)


@pytest.fixture(scope="module")
def split():
    whole = fvlens.load_relation("antonym").split(seeded())
    return Split(whole.train[:14], whole.valid[:8], whole.test[:10], "both")


@pytest.fixture(scope="module")
def start(model):
    values = 3 * torch.randn(model.cfg.d_model, generator=seeded(5))
    return FunctionVector(values, 1, (), "antonym", fingerprint(model))


@pytest.fixture
def lab(model, split, start):
    def made(n_train=5, training=FAST):
        return Lab(model, split, start, n_seeds=2, n_train=n_train, training=training, generator=seeded(), seed=7)

    return made


def drawn(split, n_seeds, g):
    """The training pairs of each seed, all of them in its order: the first thing a study draws."""
    orders = [torch.randperm(len(split.train), generator=g).tolist() for _ in range(n_seeds)]
    return [tuple(split.train[i] for i in order) for order in orders]


def trained(model, pairs, start, valid, settings, g):
    """One training by ``finetune``, whose own test compares it with plain loops."""
    return finetune(model, pairs, init=start, valid=valid, settings=settings, generator=g, progress=False)


def again(g):
    """A generator that draws what ``g`` will draw: all trainings of a lab draw the same."""
    return torch.Generator().set_state(g.get_state())


def hits(model, pairs, vector, scale=1.0):
    return evaluate(model, pairs, vector=vector, scale=scale, generator=seeded()).correct.float()


def at(rows, line, x):
    (row,) = [row for row in rows if (row["line"], row["x"]) == (line, x)]
    return row


def has_interval(row, values):
    low, high, _ = bootstrap_interval(values, generator=seeded(7))
    assert (row["top1_low"], row["top1_high"]) == (low, high)


def agrees(row, per_seed, vectors):
    """Top-1 is the mean over words and seeds; the interval is that of the words; the norm is that of the vectors."""
    words = torch.stack(per_seed).mean(dim=0)
    assert row["top1"] == pytest.approx(float(words.mean()), abs=1e-6)
    has_interval(row, words)
    assert row["norm"] == pytest.approx(sum(v.norm() for v in vectors) / len(vectors), rel=1e-5)


def zero_of(start):
    return dataclasses.replace(start, vector=torch.zeros_like(start.vector))


def test_rows_say_what_they_are_to_be_compared_with(model, split, start, lab):
    rows = at_scales(lab(), [0.0, 1.0])
    untuned, bare = (float(hits(model, split.test, vector).mean()) for vector in (start, None))
    for row in rows:
        assert row["untuned"] == pytest.approx(untuned) and row["bare"] == pytest.approx(bare)
        assert (row["n_seeds"], row["n_test"]) == (2, 10)
    assert at(rows, "untuned", 0.0)["top1"] == pytest.approx(bare)
    assert at(rows, "untuned", 1.0)["top1"] == pytest.approx(untuned)


def test_training_size(model, split, start, lab):
    g = seeded()
    pairs = drawn(split, 2, g)
    for size in (1, 10):
        rows = at_size(lab(None), size)
        # 20 pairs take 4 steps an epoch: 8 steps in all
        settings = dataclasses.replace(FAST, epochs={1: 8, 10: 4}[size])
        for first, behind in ((start, ""), (zero_of(start), ", from zero")):
            h = again(g)
            vectors = [trained(model, own[:size], first, (), settings, h).vector for own in pairs]
            agrees(at(rows, f"test pairs{behind}", size), [hits(model, split.test, v) for v in vectors], vectors)
            seen = torch.stack([hits(model, own[:size], v).mean() for own, v in zip(pairs, vectors, strict=True)])
            row = at(rows, f"training pairs{behind}", size)
            assert row["top1"] == pytest.approx(float(seen.mean()), abs=1e-6)
            has_interval(row, seen)
            assert row["norm"] == at(rows, f"test pairs{behind}", size)["norm"]


def test_layers(model, split, start, lab):
    g = seeded()
    pairs = drawn(split, 2, g)
    for layer in (0, 2):
        rows, there, h = at_layer(lab(), layer), start.at_layer(layer), again(g)
        vectors = [trained(model, own[:5], there, split.valid, FAST, h).vector for own in pairs]
        agrees(at(rows, "fine-tuned", layer), [hits(model, split.test, v) for v in vectors], vectors)
        agrees(at(rows, "untuned", layer), [hits(model, split.test, there)], [start])


def test_scales(model, split, start, lab):
    rows = at_scales(lab(), [0.0, 0.5, 2.0])
    g = seeded()
    vectors = [trained(model, own[:5], start, split.valid, FAST, g).vector for own in drawn(split, 2, g)]
    for scale in (0.0, 0.5, 2.0):
        found = [hits(model, split.test, vector, scale=scale) for vector in vectors]
        agrees(at(rows, "fine-tuned", scale), found, [scale * vector for vector in vectors])
        agrees(at(rows, "untuned", scale), [hits(model, split.test, start, scale=scale)], [scale * start])


def test_l2(model, split, start, lab):
    g = seeded()
    pairs = drawn(split, 2, g)
    for l2, (anchor, line) in itertools.product((0.0, 0.1), (("zero", "to zero"), ("init", "to the start"))):
        settings, h = dataclasses.replace(FAST, l2=l2, anchor=anchor), again(g)
        vectors = [trained(model, own[:5], start, split.valid, settings, h).vector for own in pairs]
        agrees(at(at_l2(lab(), l2), line, l2), [hits(model, split.test, v) for v in vectors], vectors)


def test_starts(model, split, start, lab):
    patient = lab(training=dataclasses.replace(FAST, patience=1))
    g = seeded()
    pairs = drawn(split, 2, g)
    h = again(g)
    starts = {
        "function vector": [start] * 2,
        "zero": [zero_of(start)] * 2,
        "noise": [random_vector_like(start, h) for _ in range(2)],
    }
    for name, firsts in starts.items():
        rows = from_start(patient, name)
        for part, behind in ((split.test, ""), (split.valid, ", validation")):
            h = again(g)  # the same order of the pairs for every start
            runs = [trained(model, own[:5], first, part, FAST, h) for own, first in zip(pairs, firsts, strict=True)]
            for epoch in range(3):  # a patience does not cut the curves
                seen = torch.stack([run.history.valid_top1[epoch] for run in runs])
                row = at(rows, f"{name}{behind}", epoch)
                assert row["top1"] == pytest.approx(float(seen.mean()), abs=1e-6)
                has_interval(row, seen)
                norms = [float(run.history.norm[epoch]) for run in runs]
                assert row["norm"] == pytest.approx(sum(norms) / 2, rel=1e-5, abs=1e-6)
        if name == "noise":
            assert at(rows, "noise", 0)["norm"] == pytest.approx(start.norm(), rel=1e-5)
        if name == "function vector":
            assert at(rows, "function vector", 0)["top1"] == pytest.approx(rows[0]["untuned"])


def test_no_more_pairs_are_trained_on_than_there_are(model, split, start):
    g = seeded()
    made = Lab(model, split, start, n_seeds=1, n_train=99, training=FAST, generator=g)
    assert made.n_train == 14 and sorted(made.drawn[0]) == sorted(split.train)


def test_same_bits_and_global_randomness_untouched(lab):
    before = torch.get_rng_state()
    assert at_layer(lab(3), 1) == at_layer(lab(3), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_needs_training_and_test_pairs(model, split, start):
    for empty in ("train", "test"):
        with pytest.raises(ValueError, match="study: expected a split with training and test pairs, got none of one"):
            Lab(
                model, dataclasses.replace(split, **{empty: ()}), start, n_seeds=1, training=FAST, generator=seeded()
            )  # fmt: skip


# --- cells ---


def cells(name, **options):
    study = STUDIES[name]
    return study.cells(StudySettings(relations=("plural", "antonym"), options=study.options(**options), seed=3))


def test_a_cell_is_a_relation_and_a_place_on_the_axis():
    places = {
        name: [cell.varies for cell in cells(name, **options) if cell.relation == "antonym"]
        for name, options in {
            "training-size": dict(sizes=(5, 1, 999)), "layer": dict(layers=(2, 0)), "scale": dict(scales=(2.0, 0.5)),
            "l2": dict(weights=(0.1, 0.0)), "init": {},
        }.items()
    }  # fmt: skip
    assert places == {
        "training-size": [(("size", 1),), (("size", 5),)],  # 999 pairs are not there
        "layer": [(("at", 0),), (("at", 2),)],
        "scale": [(("scales", "[0.5, 2.0]"),)],
        "l2": [(("l2", 0.0),), (("l2", 0.1),)],
        "init": [(("start", start),) for start in ("function vector", "zero", "noise")],
    }
    assert [cell.varies for cell in cells("layer")] == 2 * [(("at", layer),) for layer in range(4)]
    assert [study.name for study in TRAINED] == list(places)


def test_options_are_in_a_cell_but_for_those_that_choose_cells():
    (cell, *_) = cells("layer", layers=(1,), n_train=3)
    assert dict(cell.options)["n_train"] == 3 and "layers" not in dict(cell.options)
    assert cell.chosen(LayerOptions) == LayerOptions(n_train=3)
    (other, *_) = cells("layer", layers=(1, 2), n_train=3)
    assert other == cell  # asked for with other layers, it is the same cell


def by_hand(model, *, train, layer=None, scaled=True, seed=3):
    """Where a relation's trainings start."""
    g = seeded(seed)
    part = fvlens.load_relation("plural").split(g, train=train)
    found = find_vector(
        model, part, n_prompts=4, n_corrupted=2, n_heads=2, layers=None if layer is None else [layer],
        relation="plural", generator=g, progress=False,
    )  # fmt: skip
    vector = found.vector if scaled else found.unscaled
    made = Lab(model, part, vector, n_seeds=1, n_train=3, training=Settings(epochs=1), generator=g, seed=seed)
    return made, found


def ran(name, folder, **options):
    study = STUDIES[name]
    few = FEW | options
    settings = StudySettings(relations=("plural",), options=study.options(**few), seed=3)
    return run_study(study, study.cells(settings), folder)


@pytest.mark.parametrize(
    ("name", "options", "start", "run"),
    [
        ("training-size", dict(sizes=(2,)), dict(train=0.7), lambda lab: at_size(lab, 2)),
        ("layer", dict(layers=(1,), n_train=3), dict(train=0.45), lambda lab: at_layer(lab, 1)),
        (
            "scale", dict(scales=(1.0, 2.0), n_train=3, layer=0), dict(train=0.45, layer=0, scaled=False),
            lambda lab: at_scales(lab, [1.0, 2.0]),
        ),
        ("l2", dict(weights=(0.1,), n_train=3, layer=1), dict(train=0.45, layer=1), lambda lab: at_l2(lab, 0.1)),
    ],
)  # fmt: skip
def test_trainings_start_from_the_relations_function_vector(model, tmp_path, name, options, start, run):
    lab, found = by_hand(model, **start)
    rows = ran(name, tmp_path, **options).rows()
    wanted = run(lab)
    assert [{key: row[key] for key in wanted[0]} for row in rows] == wanted
    assert {row["start_layer"] for row in rows} == {found.layer}
    assert {row["start_scale"] for row in rows} == {found.scale}


def test_cells_of_a_relation_share_their_start(tmp_path, monkeypatch):
    asked = []
    own = lab_module.find_vector

    def counted(*args, **how):
        asked.append(how["relation"])
        return own(*args, **how)

    monkeypatch.setattr(lab_module, "find_vector", counted)
    whole = ran("layer", tmp_path / "whole", layers=(0, 1, 2), n_train=2)
    assert asked == ["plural"]
    # cell by cell, each with a model of its own, it is the same
    for layer in (2, 1, 0):
        ran("layer", tmp_path / "parts", layers=(layer,), n_train=2)
    again = ran("layer", tmp_path / "parts", layers=(0, 1, 2), n_train=2)
    assert asked == 4 * ["plural"] and again.rows() == whole.rows()


def test_an_interruption_keeps_the_cells_that_are_finished(tmp_path, monkeypatch):
    whole = ran("layer", tmp_path / "whole", layers=(0, 1, 2), n_train=2)
    count = itertools.count(1)
    own = lab_module.finetune_many

    def train(*args, **kwargs):
        if next(count) == 3:
            monkeypatch.setattr(Training, "one_epoch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lab_module, "finetune_many", train)
        with pytest.warns(UserWarning, match="study layer was interrupted: 2 of 3 cells are finished") as caught:
            part = ran("layer", tmp_path / "out", layers=(0, 1, 2), n_train=2)
    assert len(caught) == 1  # and the training does not say it again
    assert part.standing == "2 of 3 cells" and part.rows() == whole.rows()[:4]
    monkeypatch.undo()
    assert ran("layer", tmp_path / "out", layers=(0, 1, 2), n_train=2).rows() == whole.rows()


# --- table and figure ---


def rows_by_hand(relations=("antonym",), **changes):
    def row(relation, line, x, top1):
        fixed = dict(norm=2.0, untuned=0.4, bare=0.3, n_seeds=2, n_test=9, caution="", seed=0)
        found = dict(line=line, x=x, top1=top1, top1_low=top1 - 0.1, top1_high=top1 + 0.1)
        return dict(relation=relation) | found | fixed | changes

    lines = (("a", 10, 0.5), ("a", 1, 0.25), ("b", 1, 0.125), ("b", 10, 0.75))
    return [row(name, line, x, top1 + 0.1 * i) for i, name in enumerate(relations) for line, x, top1 in lines]


AXIS = Axis("study", "Title", "Pairs", over="words", references=("bare",), log_x=True)


def test_table_holds_every_point():
    table = AXIS.tables(rows_by_hand())["study"]
    assert table.line.tolist() == ["a", "a", "b", "b"] and table.x.tolist() == [1, 10, 1, 10]
    assert table.top1.tolist() == [0.25, 0.5, 0.125, 0.75]
    assert table.top1_low.tolist() == pytest.approx([0.15, 0.4, 0.025, 0.65])
    assert table.top1_high.tolist() == pytest.approx([0.35, 0.6, 0.225, 0.85])
    assert set(table.norm) == {2.0} and set(table.n_relations) == {1}


def test_over_several_relations_the_table_has_means():
    table = AXIS.tables(rows_by_hand(("antonym", "plural", "animal-german")))["study"]
    assert table.top1.tolist() == pytest.approx([0.35, 0.6, 0.225, 0.85])
    values = np.array([0.25, 0.35, 0.45])
    low, high, _ = bootstrap_interval(torch.tensor(values), generator=seeded())
    assert (table.top1_low[0], table.top1_high[0]) == pytest.approx((low, high))
    assert set(table.n_relations) == {3}
    assert AXIS.figures(rows_by_hand(("antonym", "plural")))["study"].layout.title.text == "Title: 2 relations"


def test_figure_shows_every_point():
    figure = AXIS.figures(rows_by_hand())["study"]
    lines = {trace.name: trace for trace in figure.data if trace.showlegend is None}
    assert list(lines["a"].x) == [1, 10] and list(lines["a"].y) == [0.25, 0.5]
    assert list(lines["b"].y) == [0.125, 0.75] and figure.layout.xaxis.type == "log"
    assert [shape.y0 for shape in figure.layout.shapes] == [0.3]
    assert figure.layout.title.text == "Title: antonym"
    assert figure.layout.title.subtitle.text == "2 seeds. Bands: 95% bootstrap over words"
    assert AXIS.figures(rows_by_hand(n_seeds=1))["study"].layout.title.subtitle.text.startswith("1 seed. Bands: ")


def test_figure_leaves_out_validation_pairs_and_zero_on_a_logarithmic_axis():
    rows = rows_by_hand() + [row | {"line": f"{row['line']}, validation"} for row in rows_by_hand()]
    rows += [row | {"x": 0} for row in rows_by_hand()[1:3]]
    drawn_lines = {trace.name: list(trace.x) for trace in AXIS.figures(rows)["study"].data if trace.showlegend is None}
    assert drawn_lines == {"a": [1, 10], "b": [1, 10]}
    assert AXIS.figures([row | {"x": 0} for row in rows_by_hand()[1:3]]) == {}


def test_page_has_a_row_a_place_and_says_what_it_is():
    frame = AXIS.tables(rows_by_hand(caution="Take fewer heads."))["study"].assign(
        model="m", fingerprint="f", data_hash="d", seed="0", fvlens="1", cells="2 of 2 cells", settings="epochs=1"
    )
    assert AXIS.markdown({"study": frame}).splitlines() == [
        "| Pairs | a | b |",
        "| --- | --- | --- |",
        "| 1 | 0.250 [0.150, 0.350] | 0.125 [0.025, 0.225] |",
        "| 10 | 0.500 [0.400, 0.600] | 0.750 [0.650, 0.850] |",
        "",
        "Top-1; no vector 0.300. Intervals: 95% bootstrap over words. Take fewer heads.",
        "",
        "m (weights f), data d, seed 0, epochs=1, fvlens 1, 2 of 2 cells.",
    ]
    third = [row | {"line": "c"} for row in rows_by_hand()[:1]]
    lines = AXIS.markdown({"study": AXIS.tables(rows_by_hand() + third)["study"].assign(**frame.iloc[0][7:])})
    assert "| 1 | 0.250 | 0.125 |  |" in lines and "| 10 | 0.500 | 0.750 | 0.500 |" in lines


# --- errors ---


@pytest.mark.parametrize(
    "kind, change, message",
    [
        (SizeOptions, dict(sizes=()), "sizes: expected numbers of at least 1, got none."),
        (SizeOptions, dict(sizes=(0, 1)), "sizes: expected numbers of at least 1, got 0, 1."),
        (ScaleOptions, dict(scales=()), "scales: expected at least one, got none."),
        (L2Options, dict(weights=()), "weights: expected numbers of at least 0, got none."),
        (L2Options, dict(weights=(-1.0,)), "weights: expected numbers of at least 0, got -1.0."),
        (InitOptions, dict(n_seeds=0), "n_seeds: expected at least 1, got 0."),
        (InitOptions, dict(n_train=0), "n_train: expected at least 1, got 0."),
        (LayerOptions, dict(epochs=0), "epochs: expected at least 1, got 0."),
        (LayerOptions, dict(n_corrupted=1), "n_corrupted: expected at least 2, got 1"),
    ],
)
def test_bad_options_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**change)


def test_sizes_and_layers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected sizes in 1\.\.\d+, the training pairs of plural, got 999"):
        cells("training-size", sizes=(999,))
    outcome = ran("layer", tmp_path, layers=(9,), n_train=2)
    assert "expected a layer in 0..3, got 9" in outcome.failed[0][1]
