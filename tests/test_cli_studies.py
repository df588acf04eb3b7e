"""``fvlens study``: the list, options of each, a run and its files, what is refused, and how failures end it."""

import dataclasses
import json
import re

import pandas as pd
import pytest
import torch
from fake_study import FAKE

import fvlens.studies
from fvlens.cli._options import field_docs
from fvlens.cli._studies import study_settings
from fvlens.prompts import Template
from fvlens.studies import STUDIES, Settings, run_study


@pytest.fixture(autouse=True)
def mood(tmp_path, monkeypatch):
    """The fake study is one of the table, and notes its cells in this folder."""
    folder = tmp_path / "mood"
    folder.mkdir()
    monkeypatch.setenv("MOOD", str(folder))
    monkeypatch.setitem(STUDIES, "fake", FAKE)
    return folder


def test_studies_are_listed_a_line_each(call):
    code, out, err = call("study")
    lines = [re.split(" {2,}", line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [name for name, _ in lines] == list(STUDIES)
    assert [summary for _, summary in lines] == [study.summary for study in STUDIES.values()]


def test_every_study_has_a_command_with_its_own_options(call):
    for name, study in STUDIES.items():
        code, out, err = call("study", name, "--help")
        assert (code, err) == (0, "")
        options = set(re.findall(r"^  --([\w-]+)", out, re.MULTILINE))
        own = () if study.options is None else dataclasses.fields(study.options)
        names = {"relations", "out", "seed", "jobs", "threads", "write", "kept", "quiet", "help", "model", *study.takes}
        assert options == names | {field.name.replace("_", "-") for field in own}, name
        assert study.summary[1:] in re.sub(r"\s+", " ", out)


@pytest.mark.parametrize("study", [study for study in STUDIES.values() if study.options], ids=lambda study: study.name)
def test_every_option_of_a_study_is_explained(study):
    assert list(field_docs(study.options)) == [field.name for field in dataclasses.fields(study.options)]
    assert all(field_docs(study.options).values())


def test_a_study_prints_and_writes_its_tables(call, tmp_path):
    folder = tmp_path / "out"
    code, out, _ = call(
        "study", "fake", "--relations", "plural", "--relations", "antonym", "--seed", 2, "--out", folder
    )
    settings = Settings(relations=("plural", "antonym"), seed=2)
    outcome = run_study(FAKE, FAKE.cells(settings), tmp_path / "by hand")
    assert code == 0 and FAKE.markdown(outcome.tables()) in out and "4 of 4 cells" in out
    assert sorted(file.name for file in folder.iterdir()) == [
        "cells", "fake.md", "means.csv", "rows.csv", "scores.html",
    ]  # fmt: skip
    assert (folder / "fake.md").read_text() == FAKE.markdown(outcome.tables()) + "\n"
    pd.testing.assert_frame_equal(pd.read_csv(folder / "means.csv")[["score"]], outcome.tables()["means"][["score"]])
    assert "4 of 4 cells" in (folder / "scores.html").read_text(encoding="utf-8")


def test_failures_are_listed_and_end_the_command(call, refused, mood, tmp_path):
    (mood / "plural").write_text("fail")
    code, out, err = call("study", "fake", "--out", tmp_path / "out", "--jobs", 1)
    assert code == 1 and "4 of 6 cells." in out
    assert "failed: plural, seed 0, step 2: RuntimeError: it broke\n" in err and "failed: " not in out
    code, _, err = call("study", "fake", "--relations", "plural", "--out", tmp_path / "none")
    assert code == 2 and "study fake: 0 of 2 cells finished; the first error is RuntimeError: it broke" in err


def test_an_interrupted_study_of_cells_writes_what_is_finished(call, mood, tmp_path):
    (mood / "plural").write_text("interrupt")
    with pytest.warns(UserWarning, match="study fake was interrupted: 1 of 6 cells are finished"):
        code, out, _ = call("study", "fake", "--out", tmp_path / "out")
    assert code == 130 and "1 of 6 cells." in out
    assert set(pd.read_csv(tmp_path / "out" / "means.csv").cells) == {"1 of 6 cells"}


def test_write_keeps_the_tables_with_the_project(call, tmp_path, monkeypatch):
    root = tmp_path / "project"
    root.mkdir()
    (root / "README.md").write_text("<!-- study fake -->\n<!-- end study fake -->\n")
    monkeypatch.setattr(fvlens.studies, "root_for", lambda study: root)
    code, out, _ = call("study", "fake", "--out", tmp_path / "out", "--write")
    assert code == 0 and "6 of 6 cells." in (root / "README.md").read_text()
    assert f"wrote {root / 'assets' / 'measured' / 'fake' / 'means.csv'}" in out


def test_a_study_goes_on_from_the_cells_that_the_project_keeps(call, mood, refused, tmp_path, monkeypatch):
    root = tmp_path / "project"
    cells = root / "assets" / "measured" / "fake" / "cells"
    monkeypatch.setattr(fvlens.studies._measured, "project_root", lambda: root)
    err = refused("study", "fake", "--out", tmp_path / "out", "--kept")
    assert err == "fvlens: --kept: the project keeps no cells of the study fake; leave --kept out."
    call("study", "fake", "--out", tmp_path / "first")
    cells.mkdir(parents=True)
    for file in sorted((tmp_path / "first" / "cells").iterdir())[:4]:
        (cells / file.name).write_bytes(file.read_bytes())
    (mood / "runs").unlink()
    code, out, err = call("study", "fake", "--out", tmp_path / "second", "--kept")
    assert code == 0 and "4 finished cells were taken from the project" in err and "6 of 6 cells." in out
    assert len((mood / "runs").read_text().splitlines()) == 2
    assert (tmp_path / "second" / "means.csv").read_bytes() == (tmp_path / "first" / "means.csv").read_bytes()


def test_relations_can_be_named_in_one_go(call, mood, tmp_path):
    code, out, err = call("study", "fake", "plural", "antonym", "--out", tmp_path / "out", "--quiet")
    assert (code, err) == (0, "") and "of 4 cells:" not in out
    assert (mood / "runs").read_text().splitlines()[:2] == ["plural, seed 0, step 1", "antonym, seed 0, step 1"]


def test_what_a_study_does_not_take_is_refused(refused, tmp_path):
    assert "No such option: --n-heads" in refused("study", "fake", "--n-heads", 3)
    assert "No such option: --dtype" in refused("study", "precision", "--dtype", "bfloat16")
    assert refused("study", "nothing") == f"fvlens: no study named 'nothing'; expected one of {', '.join(STUDIES)}."
    assert "nosuch" in refused("study", "fake", "--relations", "nosuch", "--out", tmp_path / "out")
    assert "--n-train: expected at least 1, got 0." in refused("study", "layer", "plural", "--n-train", 0)
    assert not (tmp_path / "out").exists()
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; give a folder" in refused("study", "fake", "--out", file)


@pytest.mark.parametrize("name", ["compare", "sensitivity", "analogies", "universal", "precision"])
def test_an_adapters_base_and_trust_reach_the_model_and_no_file(monkeypatch, name):
    study, seen = STUDIES[name], []
    monkeypatch.setattr("fvlens.report._settings.load_model", lambda model, **how: seen.append((model, how)))
    given = {"model": "an/adapter", "device": "cpu", "base": "some/base", "trust": True}
    settings = study_settings(study, given, {}, relations=None, seed=0, threads=1)
    cell = study.cells(settings)[0]
    assert cell.load() is None and seen == [
        ("an/adapter", {"device": "cpu", "base": "some/base", "trust": True})
    ]  # fmt: skip
    without = dataclasses.replace(cell, loading=(("device", "cpu"),))
    assert cell.recorded() == dataclasses.asdict(without) and "base" not in json.dumps(cell.recorded()["loading"])
    assert cell.key(study, {"weights": "x"}, "data") == without.key(study, {"weights": "x"}, "data")


# --- studies of trained vectors ---

FEW = ("--n-prompts", 8, "--n-heads", 4, "--n-seeds", 1, "--epochs", 1, "--seed", 3, "--quiet")


def test_a_study_of_trained_vectors_prints_and_writes_its_points(call, tmp_path):
    study, folder = STUDIES["layer"], tmp_path / "new" / "folder"
    given = ("--layers", 2, "--layers", 0, "--n-train", 3)
    code, out, err = call("study", "layer", "plural", "--out", folder, *given, *FEW)
    assert (code, err) == (0, ""), err
    options = study.options(n_prompts=8, n_heads=4, n_seeds=1, epochs=1, layers=(0, 2), n_train=3)
    settings = Settings(relations=("plural",), options=options, seed=3)
    expected = run_study(study, study.cells(settings), tmp_path / "by hand").tables()["layer"]
    for x in (0, 2):
        tuned, untuned = (
            f"{at.top1:.3f} [{at.top1_low:.3f}, {at.top1_high:.3f}]"
            for line in ("fine-tuned", "untuned")
            for at in expected.itertuples()
            if (at.line, at.x) == (line, x)
        )
        assert f"| {x} | {tuned} | {untuned} |" in out
    assert f"Top-1; no vector {expected.bare[0]:.3f}. Intervals: 95% bootstrap over test words" in out
    assert "seed 3, n_prompts=8 n_heads=4 epochs=1 n_seeds=1 n_train=3, fvlens" in out
    table = pd.read_csv(folder / "layer.csv")
    assert table.top1.tolist() == pytest.approx(expected.top1.tolist())
    assert set(table.settings) == {"n_prompts=8 n_heads=4 epochs=1 n_seeds=1 n_train=3"}
    assert set(table.cells) == {"2 of 2 cells"}
    assert "Layer of the vector: plural" in (folder / "layer.html").read_text(encoding="utf-8")
    # what is there is not done again
    code, out, err = call("study", "layer", "plural", "--out", folder, *given, *FEW[:-1])
    assert code == 0 and "2 of 2 cells were finished before" in err


def test_loading_and_templates_reach_the_cells(call, tmp_path):
    own = Template("mine", "{input} is{output};", "{input} is")
    (tmp_path / "own.json").write_text(json.dumps(own.to_json()))
    given = ("--layers", 1, "--n-train", 2, "--template", tmp_path / "own.json", "--dtype", "bfloat16")
    code, out, err = call("study", "layer", "plural", "--out", tmp_path / "out", *given, *FEW)
    assert (code, err) == (0, "") and "dtype=bfloat16" in out and "{input} is{output};" in out
    (file,) = (tmp_path / "out" / "cells").iterdir()
    content = json.loads(file.read_text())
    half = fvlens.load_model("rel-small", device="cpu", dtype=torch.bfloat16)
    assert content["weights"] == fvlens.fingerprint(half).weights
    assert content["cell"]["loading"] == [["dtype", "bfloat16"]]
    study = STUDIES["layer"]
    options = study.options(n_prompts=8, n_heads=4, n_seeds=1, epochs=1, layers=(1,), n_train=2, template=own)
    settings = Settings(relations=("plural",), options=options, seed=3, loading=(("dtype", "bfloat16"),))
    (cell,) = study.cells(settings)
    assert cell.chosen(study.options).template == own and asdict_of(cell) == content["cell"]


def asdict_of(cell):
    return json.loads(json.dumps(dataclasses.asdict(cell)))
