"""fvlens.zoo.analogies: the test analogies' levels, and the table against evaluations made one by one."""

import json

import pytest
import torch

from fvlens.composition import evaluate_analogies
from fvlens.relations import held_out, load_relation
from fvlens.zoo import analogies as zoo_analogies

NAMES = ["body-part", "tool-part", "vehicle-part", "animal-french", "tool-french", "plant-part"]


def test_the_levels_are_those_of_the_held_out_file():
    division = held_out()
    drawn = zoo_analogies.drawn_tests(60, 0)
    assert tuple(drawn) == zoo_analogies.LEVELS
    for level, asked in drawn.items():
        assert len(asked) == 60
        for one in asked:
            source, target = load_relation(one.source_relation), load_relation(one.target_relation)
            assert one.target_pair in division.split(target).test and one.source_pair in division.split(source).test
            assert (target.family in division.families) == (level == "far (iii)")
            assert (source.name == target.name) == (level == "near")
            if level in ("far (i)", "far (ii)"):
                held = (source.domain, target.domain) in division.domain_pairs[target.family]
                assert held == (level == "far (ii)")


@pytest.mark.slow
def test_the_table_is_that_of_single_evaluations(model, tmp_path, capsys, monkeypatch):
    whole = zoo_analogies.measure
    monkeypatch.setattr(zoo_analogies, "measure", lambda *given, **options: whole(*given, names=NAMES, **options))
    monkeypatch.setattr(zoo_analogies, "MAPS", ("none", "diagonal"))
    file = tmp_path / "found.json"
    zoo_analogies.main(["--seeds", "0", "1", "--n-test", "6", "--n-fit", "8", "--epochs", "1", "--out", str(file)])
    found = json.loads(file.read_text())
    assert found["seeds"] == [0, 1] and len(found["rows"]) == 8
    drawn = zoo_analogies.drawn_tests(6, 0)
    for row in found["rows"]:
        plain = evaluate_analogies(model, drawn[row["level"]], generator=torch.Generator(), progress=False)
        assert row["unsteered"]["mean"] == pytest.approx(plain.top1(f"unsteered, {row['setting']}"))
        gain = row["composite - unsteered"]
        assert gain["mean"] == pytest.approx(row["composite"]["mean"] - row["unsteered"]["mean"])
        assert gain["low"] <= gain["mean"] <= gain["high"]
        shown = {one[key] for one in found["relations"] for key in ("heaviest", "nearest") if key in one}
        assert shown <= set(NAMES)
    pooled = [row for row in found["rows"] if row["level"] in ("far (i)", "far (ii)") and row["setting"] == "one-shot"]
    assert sum(one["n"] for one in found["families"]) == sum(row["n"] for row in pooled) == 12
    for key in ("unsteered", "composite", "composite - unsteered"):
        by_family = sum(one["n"] * one[key]["mean"] for one in found["families"])
        assert by_family == pytest.approx(sum(row["n"] * row[key]["mean"] for row in pooled))
    gains = [one["composite - unsteered"]["mean"] for one in found["families"]]
    assert gains == sorted(gains, reverse=True)
    text = capsys.readouterr().out
    assert "| family, far (i) and (ii), one-shot | n |" in text
    assert text.count("| far (ii) | one-shot | 6 |") == 2 and "gated composite - unsteered" in text
