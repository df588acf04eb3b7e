"""``fvlens study``: what it prints and writes."""

import itertools
import re

import pandas as pd
import pytest
from conftest import seeded

import fvlens
from fvlens.evaluation import copied, layer_scale_sweep
from fvlens.find import relation_effects
from fvlens.training import STUDIES, Settings

FEW = ("--n-prompts", 8, "--n-heads", 4, "--n-seeds", 1, "--epochs", 1, "--quiet")


def study_by_hand(model, name, *, train, layer, **settings):
    """The same study by the library's own functions."""
    g = seeded(3)
    split = fvlens.load_relation("plural").split(g, train=train)
    means, effects = relation_effects(
        model, split, relation="plural", labels="permuted", n_prompts=8, generator=g, progress=False
    )
    vector = fvlens.function_vector(model, means, heads=effects.top(4), layer=0)
    sweep = layer_scale_sweep(
        model, split.valid, vector, layers=None if layer is None else [layer], generator=copied(g), progress=False
    )
    vector = vector.at_layer(sweep.best_layer)
    if name != "scale":  # there the factor is what is studied
        vector = vector * sweep.best_scale
    return STUDIES[name](
        model, split, init=vector, n_seeds=1, settings=Settings(epochs=1), relation="plural", generator=g,
        progress=False, **settings,
    ), sweep.best_scale  # fmt: skip


def test_study_prints_and_writes_the_points(call, model, tmp_path):
    folder = tmp_path / "new" / "folder"
    code, out, err = call("study", "layer", "plural", "--out", folder, "--n-train", 3, "--seed", 3, *FEW)
    assert (code, err) == (0, "")
    expected, scale = study_by_hand(model, "layer", train=0.45, layer=None, n_train=3)
    for x in range(model.cfg.n_layers):
        tuned, untuned = (
            f"{at.top1:.3f} [{at.interval.low:.3f}, {at.interval.high:.3f}]"
            for line in ("fine-tuned", "untuned")
            for at in expected.line(line)
            if at.x == x
        )
        assert re.search(rf"^ {x} +{re.escape(tuned)} +{re.escape(untuned)} *$", out, re.MULTILINE)
    assert f", times {scale:g}, 1 seed, {expected.n_test} test pairs; no vector" in out
    assert f"; no vector {expected.references['no vector']:.3f}; inter" in out
    assert pd.read_csv(folder / "study-layer.csv").top1.tolist() == pytest.approx(expected.to_dataframe().top1.tolist())
    assert sorted(file.name for file in folder.iterdir()) == ["study-layer.csv", "study-layer.html"]
    assert "Layer of the vector: plural" in (folder / "study-layer.html").read_text()


def test_training_size_study_splits_for_many_training_pairs(call, model, tmp_path):
    code, out, _ = call("study", "training-size", "plural", "--out", tmp_path, "--layer", 1, "--seed", 3, *FEW)
    assert code == 0
    expected, scale = study_by_hand(model, "training-size", train=0.7, layer=1)
    told = f"top-1 of plural on rel-small, vector after layer 1, times {scale:g}, 1 seed, {expected.n_test} test pairs"
    assert told in out
    table = pd.read_csv(tmp_path / "study-training-size.csv")
    assert table.top1.tolist() == pytest.approx(expected.to_dataframe().top1.tolist())
    assert f"untuned vector {expected.references['untuned vector']:.3f}" in out


def test_scale_study_multiplies_the_vector_itself(call, model, tmp_path):
    code, out, _ = call("study", "scale", "plural", "--out", tmp_path, "--layer", 1, "--seed", 3, "--n-train", 2, *FEW)
    assert code == 0
    expected, _ = study_by_hand(model, "scale", train=0.45, layer=1, n_train=2)
    assert f"vector after layer 1, 1 seed, {expected.n_test} test pairs" in out
    table = pd.read_csv(tmp_path / "study-scale.csv")
    assert table.top1.tolist() == pytest.approx(expected.to_dataframe().top1.tolist())
    assert table.norm.tolist() == pytest.approx(expected.to_dataframe().norm.tolist())


def test_study_refuses(refused, tmp_path):
    assert refused("study", "size", "plural") == (
        "fvlens: no study named 'size'; expected one of screening, precision, start, compute, training-size, layer, "
        "scale, l2, init."
    )
    assert "--n-train: the number of training pairs is what this study varies; leave it out." in refused(
        "study", "training-size", "plural", "--n-train", 5
    )
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; give a folder" in refused("study", "layer", "plural", "--out", file)


def test_an_interrupted_study_writes_what_is_finished(call, model, tmp_path, monkeypatch):
    own = fvlens.training._studies.finetune_many
    count = itertools.count()

    def train(*args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(fvlens.training._studies, "finetune_many", train)
    with pytest.warns(UserWarning, match="the study was interrupted: 2 of 4 layers are done"):
        code, _, _ = call("study", "layer", "plural", "--out", tmp_path, "--n-train", 2, "--layer", 0, *FEW)
    assert code == 130
    table = pd.read_csv(tmp_path / "study-layer.csv")
    assert sorted(set(table.x)) == [0, 1] and not table.complete.any()
    assert "interrupted: a part" in (tmp_path / "study-layer.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))
