"""Two runs side by side, from their files."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import seeded
from runs import TINY, bootstrap

import fvlens
from fvlens.report import compare_runs, run_relation, write_run
from fvlens.report._diff import WAYS
from fvlens.report._run_tables import ANSWERS_FILE


@pytest.fixture(scope="module")
def folders(tiny, tiny_result, tmp_path_factory):
    """A run, and one of the same relation and seed with fewer heads and another scale."""
    import dataclasses

    folder = tmp_path_factory.mktemp("runs")
    write_run(tiny_result, folder / "one")
    options = dataclasses.replace(TINY, n_heads=2, scale=2.0)
    other = run_relation(tiny, tiny_result.relation, options=options, model_name="tiny", progress=False)
    write_run(other, folder / "two")
    return folder / "one", folder / "two"


def shares(folder, what):
    """Of each query with its answer, the share of vectors under which it is right."""
    found = {}
    with (folder / ANSWERS_FILE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["what"] == what:
                found.setdefault((row["query"], row["answer"]), []).append(row["right"] == "True")
    return {asked: float(np.mean(values)) for asked, values in found.items()}


def test_scores_are_those_of_the_tables_with_paired_intervals(folders):
    found = compare_runs(*folders, generator=seeded())
    assert {one.way for one in found.scores} >= {"bare query", "function vector", "random vectors", "random heads"}
    names = {text: name for name, text in WAYS.items()}
    for one in found.scores:
        first, second = (shares(folder, names[one.way]) for folder in folders)
        assert one.first == pytest.approx(np.mean(list(first.values())))
        assert one.second == pytest.approx(np.mean(list(second.values())))
        each = np.array([second[asked] - first[asked] for asked in first])
        assert one.n == len(each) == len(first)
        assert one.difference.mean == pytest.approx(each.mean())
        np.testing.assert_allclose(one.difference.interval[:2], bootstrap(each), atol=0.06)
    frame = found.to_dataframe()
    assert list(frame.way) == [one.way for one in found.scores]
    assert list(frame.difference) == [one.difference.mean for one in found.scores]


def test_heads_and_settings_are_put_side_by_side(folders):
    found = compare_runs(*folders, generator=seeded())
    first, second = (json.loads((folder / "results.json").read_text())["heads"] for folder in folders)
    for one in found.heads:
        for place, aie, heads in ((one.first, one.first_aie, first), (one.second, one.second_aie, second)):
            if place is None:
                assert aie is None and list(one.head) not in [row[:2] for row in heads]
            else:
                assert heads[place - 1][:3] == [*one.head, aie]
    assert len(found.heads) == len({tuple(row[:2]) for row in [*first, *second]})
    both = [one.first is not None and one.second is not None for one in found.heads]
    assert both == sorted(both, reverse=True)
    changed = {one.name: (one.old, one.new) for one in found.settings}
    assert changed["options.n_heads"] == (TINY.n_heads, 2) and changed["options.scale"] == (TINY.scale, 2.0)
    assert set(changed) <= {"options.n_heads", "options.scale", "model"}


def test_a_run_is_as_itself(folders):
    found = compare_runs(folders[0], folders[0], generator=seeded())
    assert found.settings == () and all(one.first == one.second for one in found.heads)
    assert all(one.difference.mean == 0 and one.difference.interval[:2] == (0, 0) for one in found.scores)


def test_queries_that_only_one_run_has_are_left_out(folders, tmp_path):
    def bare(change):
        """The bare queries of a run whose rows were changed, beside those of the run itself."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folders[0], folder)
        with (folder / ANSWERS_FILE).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with (folder / ANSWERS_FILE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(filter(None, map(change, rows)))
        found = compare_runs(folders[0], folder, generator=seeded()).scores
        return next(one for one in found if one.way == "bare query")

    whole = shares(folders[0], "no_vector")
    gone = next(iter(whole))
    one = bare(lambda row: None if (row["query"], row["answer"]) == gone else row)
    assert one.n == len(whole) - 1
    one = bare(lambda row: row | {"answer": row["answer"] + "x"})
    assert (one.n, one.difference) == (0, None) and one.first == one.second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got no column what, query, answer, right"),
        ("what,query,answer\n", "got no column right"),
        (
            'what,query,answer,right\nicl,"a,b',
            r"expected the table of answers that `fvlens run` writes \(unexpected end",
        ),
        ("what,query,answer,right\nicl,a,b,maybe\n", "got 'maybe' under right in line 2"),
    ],
)
def test_answers_that_are_none_are_refused(folders, tmp_path, text, message):
    shutil.copytree(folders[0], tmp_path / "odd")
    (tmp_path / "odd" / ANSWERS_FILE).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        compare_runs(folders[0], tmp_path / "odd", generator=seeded())
    assert str(tmp_path / "odd" / ANSWERS_FILE) in str(error.value)
    (tmp_path / "odd" / ANSWERS_FILE).unlink()
    with pytest.raises(ValueError, match=r"answers\.csv"):
        compare_runs(folders[0], tmp_path / "odd", generator=seeded())


def test_the_command_shows_all_three(call, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = call("diff", *folders, "--out", tmp_path / "scores.csv")
    assert code == 0 and "second minus first, on the test queries that both runs have" in err
    for text in (
        "options.n_heads",
        "place, first",
        "function vector",
        "random heads",
        f"wrote {tmp_path / 'scores.csv'}",
    ):
        assert text in out
    found = fvlens.report.compare_runs(*folders, generator=seeded())
    low, high, _ = found.scores[-1].difference.interval
    assert f"{found.scores[-1].difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]" in out
    assert (tmp_path / "scores.csv").read_text().splitlines()[0] == "way,first,second,n,difference,low,high"
    code, out, _ = call("diff", folders[0], folders[0])
    assert "The runs were made of the same." in out
