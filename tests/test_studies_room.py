"""Studies as cells: kept one by one, run again only where needed, and always saying how many they are."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_study
import pandas as pd
import pytest
import torch
from conftest import needs_hooked
from fake_study import FAKE, SHARING
from scipy.stats import spearmanr

import fvlens
from fvlens.composition import basis_starts
from fvlens.metrics import bootstrap_interval
from fvlens.prompts import Template
from fvlens.report import _settings as report_settings
from fvlens.studies import (
    STUDIES,
    Cell,
    Settings,
    _compute,
    _start,
    measured_folder,
    pages,
    plain,
    project_root,
    read_cell,
    read_measured,
    run_study,
    write_measured,
)
from fvlens.studies import _measured as measured_module
from fvlens.studies import _screening as screening
from fvlens.studies._measured import between, quotable
from fvlens.studies._runner import _duration
from fvlens.studies._study import library_data
from fvlens.studies._tables import own_or_means

CELLS = FAKE.cells(Settings())


@pytest.fixture(autouse=True)
def mood(tmp_path, monkeypatch):
    """Folder whose files say what cells shall do, and in which cells note that they were run."""
    folder = tmp_path / "mood"
    folder.mkdir()
    monkeypatch.setenv("MOOD", str(folder))
    return folder


def ran(mood):
    """Cells that were run so far, in order."""
    file = mood / "runs"
    return file.read_text().splitlines() if file.exists() else []


def saved(outcome, folder):
    """The bytes of all tables."""
    folder.mkdir(exist_ok=True)
    return {path.name: path.read_bytes() for path in outcome.save(folder)}


@pytest.fixture
def undisturbed(tmp_path):
    """The tables of a run in one go in one process."""
    return saved(run_study(FAKE, CELLS, tmp_path / "undisturbed"), tmp_path / "undisturbed")


# --- a run ---


def test_tables_are_those_of_the_cells_and_say_what_they_stand_on(tmp_path, mood):
    said = []
    outcome = run_study(FAKE, CELLS, tmp_path / "new" / "folder", say=said.append)
    assert outcome.complete and outcome.standing == "6 of 6 cells" and outcome.failed == outcome.redone == ()
    assert ran(mood) == [str(cell) for cell in CELLS]
    assert said[0] == "1 of 6 cells: antonym, seed 0, step 1"
    assert said[1] == "about 0 s for the 5 left" and len(said) == 7
    tables = outcome.tables()
    rows = tables["rows"]
    assert rows.score.tolist() == [row["score"] for cell in CELLS for row in fake_study.run(cell, None)]
    assert rows.odd.isna().all() and rows.relation.tolist()[:3] == ["antonym", "antonym", "plural"]
    assert rows.data_hash.tolist()[::2] == [library_data(cell) for cell in CELLS]
    means = tables["means"]
    assert means.score[0] == pytest.approx(sum(len(name) ** 0.5 for name in fake_study.RELATIONS) / 3)
    assert means.score_low[0] == pytest.approx(6**0.5) and means.score_high[0] == pytest.approx(13**0.5)
    for table in tables.values():
        assert set(table.model) == {"rel-small"} and set(table.fingerprint) == {f"{9:016x}"}
        assert set(table.seed.astype(str)) == {"0"} and set(table.threads.astype(str)) == {"1"}
        assert set(table.fvlens) == {rows.fvlens[0]} and set(table.cells) == {"6 of 6 cells"}
        assert table.data_hash.str.fullmatch("[0-9a-f]{16}").all()
    assert outcome.figures()["scores"].layout.title.text == "Scores (6 of 6 cells)"
    assert FAKE.markdown(tables).splitlines()[-1].endswith("6 of 6 cells.")


def test_finished_cells_are_not_run_again(tmp_path, mood, undisturbed):
    said = []
    again = run_study(FAKE, CELLS, tmp_path / "undisturbed", say=said.append)
    assert saved(again, tmp_path / "tables") == undisturbed
    assert len(ran(mood)) == 6 and said == ["6 of 6 cells were finished before"]


def test_several_processes_give_what_one_gives(tmp_path, mood, undisturbed):
    outcome = run_study(FAKE, CELLS, tmp_path / "two", jobs=2)
    assert saved(outcome, tmp_path / "two") == undisturbed
    assert sorted(ran(mood)) == sorted(2 * [str(cell) for cell in CELLS])


def test_failed_cells_are_listed_and_the_others_run(tmp_path, mood, undisturbed):
    (mood / "plural").write_text("fail")
    folder = tmp_path / "out"
    for jobs in (1, 2):
        said = []
        outcome = run_study(FAKE, CELLS, folder, jobs=jobs, say=said.append)
        assert not outcome.complete and outcome.standing == "4 of 6 cells"
        assert [(str(cell), error) for cell, error in outcome.failed] == [
            (f"plural, seed 0, step {n}", "RuntimeError: it broke") for n in (1, 2)
        ]
        assert "failed: plural, seed 0, step 1: RuntimeError: it broke" in said
        tables = saved(outcome, folder)
        assert all(b"4 of 6 cells" in table for table in tables.values())
        assert pd.read_csv(folder / "failed.csv").error.tolist() == 2 * ["RuntimeError: it broke"]
        assert outcome.figures()["scores"].layout.title.text == "Scores (4 of 6 cells)"
        assert "4 of 6 cells." in FAKE.markdown(outcome.tables())
    (mood / "plural").unlink()
    assert saved(run_study(FAKE, CELLS, folder), folder) == undisturbed
    assert not (folder / "failed.csv").exists()


def test_a_model_that_cannot_be_loaded_fails_its_cells(tmp_path):
    cells = [Cell("missing", "plural", 0, varies=(("step", 1),)), CELLS[0]]
    outcome = run_study(FAKE, cells, tmp_path)
    assert outcome.failed == ((cells[0], "ValueError: no such model"),) and outcome.standing == "1 of 2 cells"
    nothing = run_study(FAKE, cells[:1], tmp_path)
    assert nothing.standing == "0 of 1 cell"
    with pytest.raises(ValueError, match=r"^study fake: 0 of 1 cell finished; there is no table to make"):
        nothing.tables()


def test_an_interrupted_run_keeps_what_is_finished(tmp_path, mood, undisturbed):
    (mood / "plural").write_text("interrupt")
    with pytest.warns(UserWarning, match="study fake was interrupted: 1 of 6 cells are finished"):
        outcome = run_study(FAKE, CELLS, tmp_path / "out")
    assert outcome.standing == "1 of 6 cells" and outcome.failed == ()
    assert set(outcome.tables()["means"].cells) == {"1 of 6 cells"}
    (mood / "plural").unlink()
    assert saved(run_study(FAKE, CELLS, tmp_path / "out"), tmp_path / "out") == undisturbed


def test_an_interruption_counts_what_is_finished_on_models_that_were_not_loaded_yet(tmp_path, mood, undisturbed):
    """Cells of the second model are finished, and the first model's are run again; a file that is no cell is no bar."""
    study = dataclasses.replace(FAKE, loading=("step",))
    run_study(study, CELLS, tmp_path)
    for path in list((tmp_path / "cells").iterdir()):
        if json.loads(path.read_text())["cell"]["varies"] == [["step", 1]]:
            path.unlink()
    (tmp_path / "cells" / "other.json").write_text("[]")
    (mood / "plural").write_text("interrupt")
    with pytest.warns(UserWarning, match="study fake was interrupted: 4 of 6 cells are finished"):
        stopped = run_study(study, CELLS, tmp_path)
    assert stopped.standing == "4 of 6 cells" and stopped.failed == ()
    assert [kept.cell for kept in stopped.kept] == [CELLS[0], *CELLS[3:]]


def test_a_run_that_was_killed_goes_on(tmp_path, mood, undisturbed):
    (mood / "runs").unlink()
    (mood / "plural").write_text("hang")
    code = (
        "import sys; from pathlib import Path; from fake_study import FAKE; from fvlens.studies import *\n"
        "run_study(FAKE, FAKE.cells(Settings()), Path(sys.argv[1]))"
    )
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], env=env)
    try:
        deadline = time.monotonic() + 120
        while not (mood / "hanging").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert ran(mood) == [str(CELLS[0])]
    (mood / "plural").unlink()
    assert saved(run_study(FAKE, CELLS, tmp_path / "out"), tmp_path / "out") == undisturbed
    assert ran(mood) == [str(cell) for cell in CELLS]


def test_each_model_is_loaded_once(tmp_path):
    loaded = []

    def load(cell):
        loaded.append(cell["step"])
        return FAKE.load(cell)

    study = dataclasses.replace(FAKE, load=load, loading=("step",))
    mixed = [CELLS[0], CELLS[3], CELLS[1], CELLS[4], CELLS[2], CELLS[5]]
    said = []
    outcome = run_study(study, mixed, tmp_path, say=said.append)
    assert loaded == [1, 2]
    assert [kept.cell for kept in outcome.kept] == mixed
    assert said[0] == f"1 of 6 cells: {CELLS[0]}" and said[-1] == f"6 of 6 cells: {CELLS[5]}"
    # the cells of each model are looked for when its turn has come
    said.clear()
    again = run_study(study, mixed, tmp_path, say=said.append)
    assert saved(again, tmp_path) == saved(outcome, tmp_path)
    assert said == ["3 of 6 cells were finished before", "6 of 6 cells were finished before"]
    assert loaded == [1, 2, 1, 2]


def test_threads_are_those_of_the_cell_and_only_there(tmp_path):
    seen = []

    def run(cell, model):
        seen.append(torch.get_num_threads())
        return []

    before = torch.get_num_threads()
    study = dataclasses.replace(FAKE, run=run)
    run_study(study, study.cells(Settings(threads=before + 1, relations=("plural",))), tmp_path)
    assert seen == 2 * [before + 1] and torch.get_num_threads() == before


# --- what cells share ---


def made(mood):
    """Parts that were made so far, in order."""
    file = mood / "made"
    return file.read_text().splitlines() if file.exists() else []


def test_what_cells_share_is_made_once_and_by_whoever_needs_it(tmp_path, mood):
    folder = tmp_path / "whole"
    whole = run_study(SHARING, CELLS, folder)
    assert [row["score"] for row in whole.rows()][:6] == [7**0.5, 6**0.5, 6**0.5, 13**0.5, 13**0.5, 7**0.5]
    assert made(mood) == ["antonym", "plural", "animal-german"]
    assert len(list((folder / "parts").iterdir())) == 3
    # without the cells that came first, in another order, in other processes, and with damaged parts
    tables = saved(whole, folder)
    assert saved(run_study(SHARING, CELLS, tmp_path / "two", jobs=2), tmp_path / "two") == tables
    last = run_study(SHARING, CELLS[-1:], tmp_path / "last")
    assert [row["score"] for row in last.rows()] == [row["score"] for row in whole.rows()[-2:]]
    for n, part in enumerate(sorted((folder / "parts").iterdir())):
        part.write_text("rubbish") if n else part.unlink()
    for cell in (folder / "cells").iterdir():
        cell.unlink()
    assert saved(run_study(SHARING, CELLS, folder), folder) == tables


def test_parts_of_another_model_seed_or_study_are_not_taken(tmp_path, mood):
    first = CELLS[0]
    others = [dataclasses.replace(first, model="another model"), dataclasses.replace(first, seed=1)]
    run_study(SHARING, [first, *others], tmp_path)
    assert made(mood) == 3 * ["antonym", "plural"]
    run_study(dataclasses.replace(SHARING, version=2), [first], tmp_path)
    assert made(mood) == 4 * ["antonym", "plural"]


def test_a_part_that_cannot_be_made_fails_its_cell(tmp_path, mood, monkeypatch):
    def fail(name):
        raise ValueError(f"no root of {name}")

    monkeypatch.setattr(fake_study, "make_root", fail)
    outcome = run_study(SHARING, CELLS[:1], tmp_path)
    assert outcome.failed == ((CELLS[0], "ValueError: no root of antonym"),)


# --- the hash and the files ---


def key(cell=CELLS[0], study=FAKE, data="data"):
    return cell.key(study, study.load(cell).fingerprint, data)


def test_the_hash_is_over_all_that_rows_depend_on_and_nothing_else():
    cell = CELLS[0]
    others = [
        key(dataclasses.replace(cell, relation="plural")),
        key(dataclasses.replace(cell, seed=1)),
        key(dataclasses.replace(cell, threads=2)),
        key(dataclasses.replace(cell, varies=(("step", 3),))),
        key(dataclasses.replace(cell, varies=(("stop", 1),))),
        key(dataclasses.replace(cell, model="another model")),
        key(dataclasses.replace(cell, options=(("epochs", 2),))),
        key(dataclasses.replace(cell, options=(("epochs", 3),))),
        key(dataclasses.replace(cell, loading=(("device", "cuda"),))),
        key(study=dataclasses.replace(FAKE, name="other")),
        key(study=dataclasses.replace(FAKE, version=2)),
        key(data="other data"),
    ]
    assert len({key(), *others}) == 13
    # the same model from another folder
    assert key(dataclasses.replace(cell, model="/a/folder")) == key(dataclasses.replace(cell, model="/b/folder"))
    # and the same file elsewhere, of which the hash of the data speaks
    assert key(dataclasses.replace(cell, files=(("pairs", "/a/file"),))) == key()
    # a study without options has the keys that it had before there were any
    whole = ["fake", 1, {"relation": "antonym", "seed": 0, "threads": 1, "varies": [["step", 1]]}]
    whole += [{"weights": f"{9:016x}", "dtype": "float32"}, "data"]
    text = json.dumps(whole, sort_keys=True)
    assert key() == hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Options:
    epochs: int = 3
    sizes: tuple[int, ...] = (1, 2)
    template: str | Template = "qa"


def test_options_travel_in_cells_and_tables_say_those_that_are_not_the_studys_own(tmp_path):
    own = Template("mine", "{input} is{output};", "{input} is")
    given = Options(5, (7,), own)
    seen = []

    def run(cell, model):
        seen.append(cell.chosen(Options))
        return [{"kind": "near", "score": 1.0, "odd": 0.0}]

    def cells_of(settings):
        left = plain(settings.chosen(Options), ("sizes",))
        return [settings.cell("plural", options=left, step=size) for size in settings.chosen(Options).sizes]

    study = dataclasses.replace(FAKE, cells=cells_of, run=run, options=Options)
    settings = Settings(options=given, loading=(("dtype", "bfloat16"),))
    outcome = run_study(study, study.cells(settings), tmp_path)
    assert seen == [Options(5, (1, 2), own)]  # which sizes there are is not a cell's business
    (said,) = {text for table in outcome.tables().values() for text in table.settings}
    assert said.startswith("epochs=5 template={") and said.endswith(" dtype=bfloat16") and own.query in said
    assert f", seed 0, {said}, fvlens " in study.markdown(outcome.tables())
    plainly = run_study(study, study.cells(Settings()), tmp_path)
    assert plainly.standing == "2 of 2 cells" and set(plainly.tables()["means"].settings) == {"defaults"}
    assert "defaults" not in study.markdown(plainly.tables())
    # a wider choice goes on from what is there
    assert len(seen) == 3
    run_study(study, study.cells(Settings(options=Options(sizes=(1, 2, 3)))), tmp_path)
    assert len(seen) == 4


def test_a_model_is_loaded_as_the_user_says_else_as_the_study_does(monkeypatch):
    seen = []
    monkeypatch.setattr(report_settings, "load_model", lambda name, **how: seen.append((name, how)) or fake_study)
    cell = Settings(model="some/model", loading=(("dtype", "bfloat16"), ("revision", "main"))).cell("plural")
    assert cell.load(device="cpu", dtype="float32") is fake_study
    assert seen == [("some/model", {"device": "cpu", "dtype": torch.bfloat16, "revision": "main"})]


def test_one_relation_has_its_own_interval_and_several_have_one_over_them():
    def row(name, score, kind="near"):
        found = dict(relation=name, seed=0, kind=kind, score=score, score_low=score - 1, score_high=score + 2)
        return found | dict(cost=2 * score, note=f"of {name}" if score > 1 else "")

    rows = [row("a", 1.0), row("b", 2.0), row("c", 6.0), row("a", 5.0, "far")]
    table = own_or_means(rows, ("kind",), ("score",), ("cost",), ("note",))
    near, far = table.to_dict("records")
    assert far == dict(
        kind="far", score=5.0, score_low=4.0, score_high=7.0, cost=10.0, note="of a", n_relations=1
    )  # fmt: skip
    low, high, _ = bootstrap_interval(
        torch.tensor([1.0, 2.0, 6.0]).double(), generator=torch.Generator().manual_seed(0)
    )
    assert (near["score"], near["score_low"], near["score_high"]) == pytest.approx((3.0, low, high))
    assert (near["cost"], near["note"], near["n_relations"]) == (6.0, "of b of c", 3)


def test_cells_have_the_same_names_in_any_folder(tmp_path):
    names = []
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        run_study(FAKE, CELLS, folder)
        names.append({path.name for path in (folder / "cells").iterdir()})
    assert names[0] == names[1] and len(names[0]) == 6


def test_other_library_data_is_another_cell():
    assert library_data(CELLS[0]) != library_data(CELLS[1])
    assert library_data(CELLS[0]) == library_data(CELLS[3])


DAMAGES = {
    "half a file": (lambda text, other: text[: len(text) // 2], r"\.json"),
    "another number": (
        lambda text, other: text.replace('"score": 2', '"score": 3', 1),
        r"damaged: the rows are not those that were written",
    ),
    "another cell": (lambda text, other: other, r"is the cell '[0-9a-f]{16}', expected '[0-9a-f]{16}'"),
    "another format": (lambda text, other: '{"format": "other"}', r"not a cell of a study"),
    "no rows": (lambda text, other: text.replace('"rows"', '"lines"'), r"damaged: the rows are not those"),
    "no version": (
        lambda text, other: text.replace('"fvlens"', '"version"'),
        r"damaged: expected weights, data_hash, fvlens as text",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_files_are_reported_and_run_again(damage, tmp_path, mood, undisturbed):
    change, message = DAMAGES[damage]
    folder = tmp_path / "undisturbed"
    names = [key(cell, data=library_data(cell)) + ".json" for cell in CELLS]
    path, other = (folder / "cells" / name for name in names[:2])
    path.write_text(change(path.read_text(), other.read_text()))
    with pytest.raises(ValueError, match=message):
        read_cell(path, CELLS[0], path.stem)
    (mood / "runs").unlink()
    said = []
    outcome = run_study(FAKE, CELLS, folder, say=said.append)
    assert len(outcome.redone) == 1 and re.search(message, outcome.redone[0]) and path.name in outcome.redone[0]
    assert said[0] == f"run again: {outcome.redone[0]}"
    assert ran(mood) == [str(CELLS[0])]
    assert saved(outcome, folder) == undisturbed


def test_a_cell_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file of a cell at"):
        read_cell(tmp_path / "none.json", CELLS[0], "none")


def test_rows_that_a_file_cannot_hold_fail_their_cell(tmp_path):
    study = dataclasses.replace(FAKE, run=lambda cell, model: [{"score": float("inf")}])
    outcome = run_study(study, CELLS[:1], tmp_path)
    assert "expected finite numbers" in outcome.failed[0][1]


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="threads=0; expected at least 1"):
        Settings(threads=0)
    with pytest.raises(ValueError, match="expected at least one relation, got none"):
        Settings(relations=())
    with pytest.raises(ValueError, match="expected each relation once, got plural, plural"):
        Settings(relations=("plural", "plural"))
    with pytest.raises(ValueError, match="study fake: expected at least one cell, got none"):
        run_study(FAKE, [], tmp_path)
    with pytest.raises(ValueError, match="study fake: expected each cell once"):
        run_study(FAKE, [CELLS[0], CELLS[0]], tmp_path)
    with pytest.raises(ValueError, match="jobs=0; expected at least 1"):
        run_study(FAKE, CELLS, tmp_path, jobs=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be made .*; choose another"):
        run_study(FAKE, CELLS, tmp_path / "file")


def test_remaining_time_is_said_in_fitting_units():
    assert [_duration(seconds) for seconds in (3.2, 300.0, 9000.0)] == ["3 s", "5 min", "2.5 h"]


# --- measured tables and pages ---


def project(folder, text):
    """A project with one page."""
    (folder / "fvlens" / "room").mkdir(parents=True)
    page = folder / "fvlens" / "room" / "README.md"
    page.write_text(text)
    return page


def test_measured_tables_and_pages_are_written_and_agree(tmp_path):
    root = tmp_path / "project"
    page = project(root, "before\n<!-- study fake -->\nold\n<!-- end study fake -->\nafter\n<!-- study fakes -->\n")
    outcome = run_study(FAKE, CELLS, tmp_path)
    written = write_measured(outcome, root)
    assert [path.relative_to(root).as_posix() for path in written] == [
        "assets/measured/fake/means.csv", "assets/measured/fake/rows.csv", "fvlens/room/README.md",
    ]  # fmt: skip
    text = FAKE.markdown(outcome.tables())
    assert page.read_text() == (
        f"before\n<!-- study fake -->\n{text}\n<!-- end study fake -->\nafter\n<!-- study fakes -->\n"
    )
    assert FAKE.markdown(read_measured(root, FAKE)) == text
    assert write_measured(outcome, root) == written and text in page.read_text()


def test_excerpts_stand_between_markers_of_their_own(tmp_path):
    root = tmp_path / "project"
    marks = "<!-- study sharing{0} -->\n<!-- end study sharing{0} -->\n"
    page = project(root, marks.format(", short one") + marks.format("") + marks.format(", other"))
    outcome = run_study(SHARING, CELLS, tmp_path)
    assert write_measured(outcome, root)[-1] == page
    assert page.read_text() == (
        "<!-- study sharing, short one -->\n4 means\n<!-- end study sharing, short one -->\n"
        f"<!-- study sharing -->\n{SHARING.markdown(outcome.tables())}\n<!-- end study sharing -->\n"
        + marks.format(", other")
    )
    page.write_text(marks.format(", short one"))
    assert pages(root, SHARING) == [page] and pages(root, FAKE) == []


def test_parts_of_studies_and_large_tables_are_not_kept(tmp_path, mood, monkeypatch):
    (mood / "plural").write_text("fail")
    outcome = run_study(FAKE, CELLS, tmp_path)
    with pytest.raises(ValueError, match="--write: only 4 of 6 cells are finished; pages quote whole studies"):
        write_measured(outcome, tmp_path)
    (mood / "plural").unlink()
    monkeypatch.setattr(measured_module, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"--write: the tables take [\d,]+ bytes; expected at most 1,000"):
        write_measured(run_study(FAKE, CELLS, tmp_path), tmp_path)
    assert not (tmp_path / "assets").exists()


def test_only_a_checkout_has_measured_tables(tmp_path, monkeypatch):
    assert (project_root() / "fvlens").is_dir()
    monkeypatch.setattr(measured_module, "__file__", str(tmp_path / "fvlens" / "studies" / "_measured.py"))
    with pytest.raises(ValueError, match="is no checkout of fvlens"):
        project_root()


def test_pages_quote_what_was_measured():
    root, wrong = project_root(), []
    for study in STUDIES.values():
        tables = read_measured(root, study)
        size = sum(file.stat().st_size for file in measured_folder(root, study).rglob("*") if file.is_file())
        if size > measured_module.MOST_BYTES:
            wrong.append(f"{study.name}: {size} bytes")
        if tables and not pages(root, study):
            wrong.append(f"{study.name}: quoted nowhere")
        for page in pages(root, study) if tables else []:
            for marker, text in quotable(study).items():
                quoted = between(marker).search(page.read_text(encoding="utf-8"))
                if quoted is not None and quoted.group() != text(tables) + "\n":
                    wrong.append(f"{marker}: {page}")
    assert wrong == []


# --- the studies ---


def test_every_study_goes_to_other_processes():
    for name, study in STUDIES.items():
        assert pickle.loads(pickle.dumps(study)).name == name  # as a spawned process gets it


def test_studies_are_listed_under_their_names():
    assert list(STUDIES) == [
        "universal", "screening", "precision", "start", "compute", "bos", "measure", "claims", "claims-size",
        "analogies", "compare", "training-size", "layer", "scale", "l2", "init", "sensitivity",
    ]  # fmt: skip
    several = {"measure": {3, 4, 5}, "claims": {3, 4, 5}, "analogies": {3, 4, 5}, "bos": {3, 4}}
    for name, study in STUDIES.items():
        cells = study.cells(Settings(seed=3))
        assert study.name == name and "\n" not in study.summary
        assert {cell.seed for cell in cells} == several.get(name, {3})
        assert len(cells) == len(set(cells)) >= 4


def test_the_table_of_starts_is_made_of_trainings_by_hand(model, tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(_start, "EPOCHS", 2)
    study = STUDIES["start"]
    names = ("plural", "animal-home")
    outcome = run_study(study, study.cells(Settings(relations=names)), tmp_path)
    found = outcome.tables()["starts"]
    assert list(zip(found.start, found.layer, strict=True)) == [
        ("zero", "a third up"), ("zero", "chosen"), ("function vector", "chosen"),
        ("function vector, not trained", "chosen"),
    ]  # fmt: skip

    def g():
        return torch.Generator().manual_seed(0)

    splits = {name: fvlens.relations.held_out().split(fvlens.load_relation(name)) for name in names}
    short = {name: dataclasses.replace(split, train=split.train[:20]) for name, split in splits.items()}
    starts = basis_starts(model, short, generator=g(), progress=False)
    layer = starts["plural"].layer

    def tuned(**how):
        return fvlens.finetune_many(model, short, epochs=2, generator=g(), progress=False, **how).vectors

    by_hand = [tuned(init="zero", layer=1), tuned(init="zero", layer=layer), tuned(init=starts), starts]
    for part in ("valid", "test"):
        top1 = [
            sum(
                fvlens.evaluate(model, getattr(splits[name], part), vector=one[name], generator=g()).top1
                for name in names
            )
            / 2
            for one in by_hand
        ]
        assert found[part].tolist() == pytest.approx(top1)
    cost = found.cost.tolist()
    assert cost[0] == 1 and cost[1] > 1 and cost[2] > max(1, cost[3])


@needs_hooked
def test_the_table_of_products_is_made_of_trainings_by_hand(model, tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr(_compute, "EPOCHS", 2)
    study = STUDIES["compute"]
    outcome = run_study(study, study.cells(Settings(relations=("plural",))), tmp_path)
    found = outcome.tables()["trainings"]
    assert found.products.tolist() == ["float32, other order", "bfloat16"]
    split = fvlens.load_relation("plural").split(torch.Generator().manual_seed(0))
    one, other, half = (
        fvlens.finetune(
            model, split.train[:20], init="zero", layer=1, valid=split.valid, epochs=2, progress=False,
            generator=torch.Generator().manual_seed(seed), compute=compute,
        )
        for seed, compute in ((0, None), (1, None), (0, torch.bfloat16))
    )  # fmt: skip
    assert found.cosine.tolist() == pytest.approx([one.vector.cosine(other.vector), one.vector.cosine(half.vector)])
    scored = [
        fvlens.evaluate(model, split.test, vector=tuned.vector, generator=torch.Generator().manual_seed(0))
        for tuned in (one, other, half)
    ]
    assert found.top1_float32.tolist() == [pytest.approx(scored[0].top1)] * 2
    assert found.top1.tolist() == pytest.approx([scored[1].top1, scored[2].top1])
    right = [(scores.ranks == 0).tolist() for scores in scored]
    differ = [sum(a != b for a, b in zip(right[0], row, strict=True)) / len(row) for row in right[1:]]
    assert found.differ.tolist() == pytest.approx(differ)
    losses = [tuned.history.valid_loss.tolist() for tuned in (one, other, half)]
    assert found.loss.tolist() == pytest.approx(
        [max(abs(a - b) for a, b in zip(losses[0], row, strict=True)) for row in losses[1:]]
    )


def test_the_table_of_screens_is_made_of_what_a_screen_says(model, tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "REPEATS", 1)
    study = STUDIES["screening"]
    outcome = run_study(study, study.cells(Settings(relations=("antonym",))), tmp_path)
    found = outcome.tables()["screens"]
    assert list(zip(found.screen, found.labels, strict=True)) == [
        (screen, labels) for labels in ("permuted", "random") for screen in screening.SCREENS
    ]
    g = torch.Generator().manual_seed(0)
    split = fvlens.load_relation("antonym").split(g)
    common = dict(queries=split.valid, relation="antonym", generator=g)
    means = fvlens.mean_head_activations(
        model, fvlens.build_prompts(model, split.train, n_prompts=100, **common), progress=False
    )
    corrupted = fvlens.build_prompts(model, split.train, n_prompts=25, labels="permuted", **common)
    exact = fvlens.indirect_effects(model, corrupted, means, progress=False)
    rough = fvlens.indirect_effects(model, corrupted, means, method="atp", progress=False)
    row = found.iloc[0]
    wanted = spearmanr(rough.aie.flatten().numpy(), exact.aie.flatten().numpy()).statistic
    assert row.spearman == pytest.approx(wanted, abs=1e-4)
    assert row.overlap == pytest.approx(len(set(rough.top(10)) & set(exact.top(10))) / 10)
    assert row["first"] == float(rough.top(1) == exact.top(1))
    assert row.cost > 0
    assert row.fingerprint == fvlens.models.fingerprint(model).weights


def test_files_of_cells_are_plain_json(tmp_path):
    outcome = run_study(FAKE, CELLS[:1], tmp_path)
    (file,) = (tmp_path / "cells").iterdir()
    content = json.loads(file.read_text())
    assert content["rows"][0]["odd"] is None and content["fvlens"] == outcome.kept[0].fvlens
    assert str(tmp_path) not in file.read_text()
