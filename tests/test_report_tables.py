"""The tables beside a run's page: every head, every effect, every answer, as the run's own numbers have them."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from runs import Page

from fvlens.report import ANSWERS_FILE, EFFECTS_FILE, HEADS_FILE, results_json, write_report, write_run


@pytest.fixture(scope="module")
def folder(tiny_result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_run(tiny_result, folder)
    return folder


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_head_with_its_error(tiny_result, folder):
    found = rows(folder / HEADS_FILE)
    assert list(found[0]) == ["labels", "layer", "head", "aie", "stderr", "low", "high", "place", "in_vector"]
    ((labels, effects),) = tiny_result.effects.items()
    cie = effects.cie.double().numpy()
    assert len(found) == cie.shape[1] * cie.shape[2] == 12
    for row in found:
        own = cie[:, int(row["layer"]), int(row["head"])]
        error = own.std(ddof=1) / math.sqrt(len(own))
        assert row["labels"] == labels
        assert float(row["aie"]) == pytest.approx(own.mean(), abs=1e-8, rel=1e-4)
        assert float(row["stderr"]) == pytest.approx(error, abs=1e-8, rel=1e-4)
        assert float(row["high"]) - float(row["aie"]) == pytest.approx(1.96 * error, rel=1e-3, abs=1e-8)
        assert float(row["aie"]) - float(row["low"]) == pytest.approx(1.96 * error, rel=1e-3, abs=1e-8)
    order = sorted(found, key=lambda row: int(row["place"]))
    assert [int(row["place"]) for row in order] == list(range(1, 13))
    assert all(float(a["aie"]) >= float(b["aie"]) for a, b in itertools.pairwise(order))
    chosen = {(int(row["layer"]), int(row["head"])) for row in found if row["in_vector"] == "True"}
    assert chosen == {tuple(head) for head in tiny_result.vector.heads} and len(chosen) == 3


def test_every_effect_of_every_prompt(tiny_result, folder):
    found = rows(folder / EFFECTS_FILE)
    effects = tiny_result.effects["permuted"]
    assert list(found[0]) == ["labels", "prompt", "layer", "head", "cie", "baseline"]
    assert len(found) == effects.cie.numel()
    read = np.zeros(tuple(effects.cie.shape))
    for row in found:
        read[int(row["prompt"]), int(row["layer"]), int(row["head"])] = float(row["cie"])
    np.testing.assert_allclose(read, effects.cie.numpy(), rtol=1e-6)
    baseline = [float(row["baseline"]) for row in found if row["layer"] == row["head"] == "0"]
    assert baseline == pytest.approx(effects.baseline.tolist(), rel=1e-6)


def test_every_answer_under_every_vector_and_control(tiny_result, folder):
    found = rows(folder / ANSWERS_FILE)
    parts = {}
    for row in found:
        parts.setdefault((row["what"], int(row["run"])), []).append(row)
    control = {(row.kind, i): one for row in tiny_result.controls.rows for i, one in enumerate(row.evaluations)}
    scores = {**control, ("fine_tuned", 0): tiny_result.tuned.evaluation}
    if tiny_result.scale != 1:
        scores["scale_one", 0] = tiny_result.at_scale_one
    assert {what for what, _ in parts} >= {"no_vector", "vector", "icl", "random_vector", "random_heads", "fine_tuned"}
    assert set(parts) == set(scores)
    pairs = [tuple(pair) for pair in tiny_result.split.test]
    for key, own in parts.items():
        assert [(row["query"], row["answer"]) for row in own] == pairs
        assert [row["predicted"] for row in own] == list(scores[key].predictions)
        assert [int(row["rank"]) for row in own] == scores[key].ranks.tolist()
        assert [row["right"] == "True" for row in own] == [rank == 0 for rank in scores[key].ranks.tolist()]
        assert [float(row["probability"]) for row in own] == pytest.approx(scores[key].probabilities.tolist(), rel=1e-6)
    assert {row["layer"] for row in parts["no_vector", 0]} == {""}
    assert {int(row["layer"]) for row in parts["vector", 0]} == {tiny_result.vector.layer}


def test_page_and_numbers_name_them_and_bytes_stay(tiny_result, given, folder, tmp_path):
    files = {"heads": HEADS_FILE, "effects": EFFECTS_FILE, "answers": ANSWERS_FILE}
    assert json.loads((folder / "results.json").read_text())["tables"] == files
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f'<a href="{file}">{file}</a>' in page for file in files.values())
    assert "All numbers" in Page(page).texts["h2"]
    write_run(tiny_result, tmp_path)
    for file in files.values():
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    # heads from a file have no effects, and those of an earlier run go
    write_run(given, tmp_path)
    assert {file.name for file in tmp_path.glob("*.csv")} == {ANSWERS_FILE}
    assert results_json(given)["tables"] == {"heads": None, "effects": None, "answers": ANSWERS_FILE}
    assert HEADS_FILE not in write_report(tmp_path / "report.html", given).read_text(encoding="utf-8")
