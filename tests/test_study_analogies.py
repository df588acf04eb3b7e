"""The study ``analogies``: the test analogies' levels, and the tables against evaluations made one by one."""

import dataclasses

import pytest
import torch
from conftest import seeded

from fvlens.composition import CompositeMap, evaluate_analogies, library_composite
from fvlens.relations import held_out, load_relation
from fvlens.studies import STUDIES, Settings, run_study
from fvlens.studies import _analogies as study_analogies
from fvlens.studies import _analogies_tables as analogies_tables
from fvlens.studies._analogies import AnalogiesOptions

STUDY = STUDIES["analogies"]
NAMES = ("body-part", "tool-part", "vehicle-part", "animal-french", "tool-french", "plant-part")
SMALL = AnalogiesOptions(n_seeds=2, n_test=6, n_fit=8, epochs=1)
CELLS = STUDY.cells(Settings(relations=NAMES, options=SMALL))


def test_the_levels_are_those_of_the_held_out_file():
    division = held_out()
    drawn = study_analogies.drawn_tests(60, 0)
    assert tuple(drawn) == analogies_tables.LEVELS
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


def test_cells_are_a_seed_and_a_prompt():
    prompts = ("zero_shot", "one_shot")
    assert [(cell.seed, cell.varies) for cell in STUDY.cells(Settings(seed=2))] == [
        (seed, (("prompt", prompt),)) for seed in (2, 3, 4) for prompt in prompts
    ]
    assert CELLS[1].varies == (("prompt", "one_shot"), ("basis", " ".join(NAMES)))
    assert str(CELLS[1]) == f"seed 0, prompt one_shot, basis {' '.join(NAMES)}"
    assert [cell.seed for cell in CELLS] == [0, 0, 1, 1]


def test_a_cell_names_the_options_that_are_not_the_default():
    """Cells of the defaults have the names that they had before there were options."""
    assert CELLS[0].options == (("n_test", 6), ("n_fit", 8), ("epochs", 1))
    assert CELLS[0].chosen(AnalogiesOptions) == AnalogiesOptions(n_test=6, n_fit=8, epochs=1)
    assert {cell.options for cell in STUDY.cells(Settings(options=AnalogiesOptions(n_seeds=7)))} == {()}
    for name, least in {"n_seeds": 1, "n_test": 2, "n_fit": 4, "epochs": 1}.items():
        AnalogiesOptions(**{name: least})
        with pytest.raises(ValueError, match=f"{name}: expected at least {least}, got {least - 1}"):
            AnalogiesOptions(**{name: least - 1})


def test_another_division_is_other_data(monkeypatch):
    before, other = STUDY.data_hash(CELLS[0]), held_out()
    other.domain_pairs.popitem()
    monkeypatch.setattr(study_analogies, "held_out", lambda: other)
    assert STUDY.data_hash(CELLS[0]) != before


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two seeds with a small basis, two maps and few analogies."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        for module in (study_analogies, analogies_tables):
            patch.setattr(module, "MAPS", ("none", "diagonal"))
        outcome = run_study(STUDY, CELLS, folder)
        assert outcome.failed == ()
        yield outcome, folder


def lines_of(tables, **where):
    """The lines with these values, by way and what it is over."""
    frame = tables["ways"]
    for key, value in where.items():
        frame = frame[frame[key] == value]
    return {(line["way"], line["over"]): line for line in frame.to_dict("records")}


@pytest.mark.slow
def test_the_table_is_that_of_single_evaluations(model, small):
    outcome, _ = small
    tables = outcome.tables()
    assert set(tables["ways"].seed) == {"0 1"} and set(tables["ways"].cells) == {"4 of 4 cells"}
    drawn = study_analogies.drawn_tests(6, 0)
    for level, asked in drawn.items():
        plain = evaluate_analogies(model, asked, generator=torch.Generator(), progress=False)
        for prompt in ("zero_shot", "one_shot"):
            lines = lines_of(tables, level=level, prompt=prompt)
            assert {line["n"] for line in lines.values()} == {6}
            unsteered, composite = lines["unsteered", ""], lines["composite", ""]
            assert unsteered["mean"] == pytest.approx(plain.top1(f"unsteered, {prompt.replace('_', '-')}"))
            gain = lines["composite", "unsteered"]
            assert gain["mean"] == pytest.approx(composite["mean"] - unsteered["mean"])
            assert gain["low"] <= gain["mean"] <= gain["high"]
            over = {way for first, way in lines if first == "composite"} - {""}
            assert over == {way for way, other in lines if not other} - {"composite"}
            # the composite is the map of the best validation score, seed by seed
            maps = tables["maps"][tables["maps"].prompt == prompt]
            assert maps[maps.chosen].valid_top1.tolist() == maps.groupby("of_seed").valid_top1.max().tolist()
            chosen = set(maps[maps.chosen]["map"])
            if len(chosen) == 1:
                assert composite["mean"] == lines[f"map {chosen.pop()}", ""]["mean"]


@pytest.mark.slow
def test_a_seeds_ways_are_those_of_its_basis(model, small):
    """The basis that the cells kept, with no map, solves what they say; it is the one that is trained from scratch."""
    outcome, folder = small
    parts = sorted((folder / "parts").iterdir())
    assert len(parts) == 2
    bases = [CompositeMap.load(path, model=model) for path in parts]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the cell is run
    again = library_composite(model, names=list(NAMES), generator=seeded(1), progress=False)
    torch.set_num_threads(threads)
    (kept,) = [basis for basis in bases if torch.equal(basis.basis.matrix, again.basis.matrix)]
    assert kept.seen == again.seen
    for prompt in ("zero_shot", "one_shot"):
        rows = [
            row
            for row in outcome.rows()
            if (row["seed"], row["prompt"], row["of"]) == (1, prompt, "ways") and row["level"] == "near"
        ]
        found = evaluate_analogies(
            model,
            study_analogies.drawn_tests(6, 0)["near"],
            again,
            settings=[prompt],
            generator=seeded(),
            progress=False,
        )
        label = prompt.replace("_", "-")
        for way in ("map none", "uniform", "best single"):
            name = "composite" if way == "map none" else way
            solved = "".join(row[way] for row in rows)
            assert solved.count("x") == int(found[f"{name}, {label}"].right.sum()) and len(solved) == 6


@pytest.mark.slow
def test_families_and_targets_add_up(small):
    outcome, _ = small
    tables = outcome.tables()
    targets = tables["targets"]
    shown = {name for key in ("heaviest", "nearest") for names in targets[key] for name in names.split()}
    assert shown and shown <= set(NAMES)
    pooled = [lines_of(tables, level=level, prompt="one_shot") for level in ("far (i)", "far (ii)")]
    families = tables["families"]
    alone = families[(families.way == "unsteered") & (families.over == "")]
    assert alone.n.sum() == 12
    for way, over in (("unsteered", ""), ("composite", ""), ("composite", "unsteered")):
        lines = families[(families.way == way) & (families.over == over)]
        by_family = (lines.n * lines["mean"]).sum()
        assert by_family == pytest.approx(sum(6 * level[way, over]["mean"] for level in pooled))
    gains = families[(families.way == "gated composite") & (families.over == "unsteered")]["mean"].tolist()
    assert gains == sorted(gains, reverse=True)
    for (level, prompt), group in targets.groupby(["level", "prompt"]):
        assert group.n.sum() == 6
        gain = lines_of(tables, level=level, prompt=prompt)["composite", "unsteered"]["mean"]
        assert (group.n * group.gain).sum() == pytest.approx(6 * gain)


@pytest.mark.slow
def test_cells_started_again_and_parts_of_a_study(small, tmp_path):
    """A cell alone trains the basis that it would have been given, and its tables say that they are of one cell."""
    outcome, _ = small
    alone = run_study(STUDY, CELLS[1:2], tmp_path)
    assert alone.kept[0] == outcome.kept[1]
    text = STUDY.markdown(alone.tables())
    assert "bare query" not in text and text.count("1 of 1 cell.") == 4
    first = dataclasses.replace(outcome, kept=outcome.kept[2:3])
    assert "No cell of the one-shot prompt is finished." in STUDY.markdown(first.tables())


@pytest.mark.slow
def test_pages_have_every_level(small):
    outcome, _ = small
    text = STUDY.markdown(outcome.tables())
    assert "| family, far (i) and (ii), one-shot | n |" in text
    assert "| far (ii) | one-shot | 6 |" in text and "with the gate over unsteered" in text
    assert "| map | near, bare query | far (i), bare query |" in text
    for line in text.splitlines():
        # targets of families outside the basis have no vector of their own
        if line.startswith(("| far (iii) | bare query | ", "| far (iii) | one-shot | ")):
            assert "| - |" in line


# --- tables by hand ---


def row_of(seed, family, **solved):
    where = {"relation": "", "seed": seed, "prompt": "one_shot", "of": "ways", "level": "far (i)", "family": family}
    return where | {"n": len(solved["unsteered"])} | solved


def test_seeds_are_averaged_analogy_by_analogy():
    rows = [
        row_of(0, "a", unsteered="x.", composite="xx", **{"gated composite": "xx", "own vector": "x."}),
        row_of(0, "b", unsteered="..", composite="x.", **{"gated composite": ".."}),
        row_of(1, "a", unsteered="..", composite="x.", **{"gated composite": "xx", "own vector": "xx"}),
        row_of(1, "b", unsteered="..", composite="..", **{"gated composite": "x."}),
        {
            "relation": "",
            "seed": 0,
            "prompt": "one_shot",
            "of": "map",
            "map": "none",
            "valid_top1": 0.5,
            "chosen": True,
        },
    ]
    tables = STUDY.tables(rows)
    lines = lines_of(tables, level="far (i)", prompt="one_shot")
    assert lines["unsteered", ""]["mean"] == 0.5 / 4 and lines["unsteered", ""]["n"] == 4
    assert lines["composite", ""]["mean"] == (1 + 0.5 + 0.5 + 0) / 4
    assert lines["gated composite", "unsteered"]["mean"] == (0.5 + 1 + 0.5 + 0) / 4
    assert ("own vector", "") not in lines  # it is there for one family only
    families = tables["families"]
    assert families.family.unique().tolist() == ["a", "b"]
    of_a = families[(families.family == "a") & (families.over == "")].set_index("way")
    assert of_a["mean"]["own vector"] == 0.75 and of_a.n["composite"] == 2
    assert families[(families.family == "b")].way.unique().tolist() == ["unsteered", "composite", "gated composite"]
    assert tables["targets"].empty
