"""``fvlens study`` over the library: the list, a run and its files, what is refused, and how failures end it."""

import re

import pandas as pd
import pytest
from fake_study import FAKE

import fvlens.studies
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
    assert [name for name, _ in lines][:6] == [
        "screening", "precision", "start", "compute", "fake", "training-size RELATION",
    ]  # fmt: skip
    assert lines[4][1] == "a study of nothing" and all(summary for _, summary in lines)


def test_a_study_prints_and_writes_its_tables(call, tmp_path):
    folder = tmp_path / "out"
    code, out, _ = call(
        "study", "fake", "--relations", "plural", "--relations", "antonym", "--seed", 2, "--out", folder
    )
    settings = Settings(relations=("plural", "antonym"), seed=2)
    outcome = run_study(FAKE, FAKE.cells(settings), tmp_path / "by hand")
    assert code == 0 and FAKE.markdown(outcome.tables()) in out and "4 of 4 cells" in out
    assert sorted(file.name for file in folder.iterdir()) == ["cells", "means.csv", "rows.csv", "scores.html"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "means.csv")[["score"]], outcome.tables()["means"][["score"]])
    assert "4 of 4 cells" in (folder / "scores.html").read_text(encoding="utf-8")


def test_failures_are_listed_and_end_the_command(call, refused, mood, tmp_path):
    (mood / "plural").write_text("fail")
    code, out, _ = call("study", "fake", "--out", tmp_path / "out", "--jobs", 1)
    assert code == 1 and "4 of 6 cells." in out
    assert "failed: plural, seed 0, step 2: RuntimeError: it broke" in out
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
    monkeypatch.setattr(fvlens.studies, "project_root", lambda: root)
    code, out, _ = call("study", "fake", "--out", tmp_path / "out", "--write")
    assert code == 0 and "6 of 6 cells." in (root / "README.md").read_text()
    assert f"wrote {root / 'assets' / 'measured' / 'fake' / 'means.csv'}" in out


def test_options_of_other_studies_are_refused(refused, tmp_path):
    assert refused("study", "fake", "--n-heads", 3, "--dtype", "bfloat16") == (
        "fvlens: --dtype, --n-heads: study fake does not take this; leave it out."
    )
    assert "--epochs" in refused("study", "fake", "--epochs", 3)
    assert "study fake measures over the library; name relations with --relations" in refused("study", "fake", "plural")
    assert "--relations, --jobs, --write: study layer does not take this; leave it out." in refused(
        "study", "layer", "plural", "--jobs", 2, "--write", "--relations", "plural"
    )
    assert "study layer: expected the name of a relation" in refused("study", "layer")
    assert (
        "no study named 'nothing'; expected one of screening, precision, start, compute, fake, training-size"
        in refused("study", "nothing")
    )
    assert "nosuch" in refused("study", "fake", "--relations", "nosuch", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
