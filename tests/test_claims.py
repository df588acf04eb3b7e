"""The study ``claims``: its cells, every number by single calls, tables and bars from their rows, pictures, sizes."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import seeded

import fvlens
from fvlens.prompts import check_pairs
from fvlens.relations import list_relations, load_relation
from fvlens.studies import STUDIES, Settings, read_measured, root_for, run_study, write_measured
from fvlens.studies import _claims as claims
from fvlens.studies import _claims_size as claims_size
from fvlens.studies import _measured as measured_module
from fvlens.studies._claims_size import ClaimsSizeOptions
from fvlens.studies._claims_tables import BARS, DIFFERENCES, ROWS, Bar, tables
from fvlens.studies._tables import ratio_with_interval
from fvlens.vectors import random_vector_like

STUDY, SIZES = STUDIES["claims"], STUDIES["claims-size"]
NAMES = ("antonym", "verb-past")
FEW = dict(n_shots=3, n_prompts=6, n_corrupted=2, n_heads=2)
OPTIONS = claims.ClaimsOptions(**FEW, n_train=6, epochs=2, layers=(1, 2), n_random=2, n_seeds=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two relations on the embedded model."""
    folder = tmp_path_factory.mktemp("claims")
    outcome = run_study(STUDY, STUDY.cells(Settings(relations=NAMES, seed=3, options=OPTIONS)), folder)
    assert outcome.failed == ()
    return outcome, folder


# --- cells ---


def test_cells_are_half_of_the_relations_whose_first_tokens_tell_and_some_of_the_others(model, monkeypatch):
    every = list_relations()[:100]
    told = set(every[::10])  # as if these ten shared first tokens
    monkeypatch.setattr(
        claims,
        "by_group",
        lambda model, names: {"first token": [n for n in every if n not in told], "exact": every[::10]},
    )
    cells = STUDY.cells(Settings(options=claims.ClaimsOptions(n_exact=3)))
    first = [name for name in every if name not in told][::2]
    assert len(first) == 45
    assert [cell.seed for cell in cells] == [seed for seed in (0, 1, 2) for _ in range(48)]
    for seed in (0, 1, 2):
        own = [cell for cell in cells if cell.seed == seed]
        assert [cell.relation for cell in own if cell["group"] == "first token"] == first
        assert [cell.relation for cell in own[45:]] == [every[0], every[30], every[60]]
    for cell in cells:
        own, other = load_relation(cell.relation), load_relation(cell["control"])
        assert own.family != other.family and not {*own.outputs} & {*other.outputs}
    # a wider choice goes on from what is there
    more = STUDY.cells(Settings(options=claims.ClaimsOptions(n_exact=3, n_seeds=1)))
    assert more == cells[:48]


def test_a_relation_is_of_the_group_that_its_answers_tokens_say(tiny):
    names = list_relations()[:12]
    groups = claims.by_group(tiny, names)
    shares = {name: check_pairs(name, tiny, generator=seeded()).answers for name in names}
    assert groups["first token"] == [name for name in names if shares[name].n_first_tokens == shares[name].n]
    assert sorted(groups["first token"] + groups["exact"]) == names


def test_so_many_are_taken_that_there_are_enough():
    names = [f"r{i}" for i in range(101)]
    assert claims.half_of(names) == names[::2] and claims.half_of(names[:84]) == names[:84:2]
    assert len(claims.half_of(names[:60])) == 42 and claims.half_of(names[:30]) == names[:30]
    assert claims.spaced(names[:67], 10) == [names[i] for i in (0, 6, 13, 20, 26, 33, 40, 46, 53, 60)]
    assert claims.spaced([], 10) == []


def test_the_other_relation_is_the_nearest_before_that_cannot_be_right_by_its_answers():
    # country-capital and city-capital have a family, and country-capital and city-country outputs, in common
    others = claims.others_of(["antonym", "city-capital", "country-capital", "verb-past"])
    assert others == {
        "antonym": "verb-past", "city-capital": "antonym", "country-capital": "antonym", "verb-past": "country-capital",
    }  # fmt: skip
    alone = claims.others_of(["antonym"])["antonym"]
    assert load_relation(alone).family != "opposite"


def test_vectors_are_trained_at_layers_that_are_fixed_beforehand(small):
    assert claims.layers_of(30) == [9, 12, 15, 18, 21]
    assert claims.layers_of(4) == [1, 2, 3] and claims.layers_of(1) == [0]
    outcome, _ = small
    assert {kept.cell["layers"] for kept in outcome.kept} == {"1 2"}


# --- rows ---


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_equals_single_calls(place, small, model):
    outcome, _ = small
    kept = outcome.kept[place]
    name, seed, row = kept.cell.relation, kept.cell.seed, kept.rows[0]
    assert (name, seed) == (NAMES[place], 3)
    assert kept.cell["control"] == NAMES[1 - NAMES.index(name)]

    def found_of(relation):
        g = seeded(seed)
        split = load_relation(relation).split(g)
        return fvlens.find_vector(model, split, generator=g, progress=False, **FEW), g

    found, g = found_of(name)
    split, scale = found.split, found.scale
    assert (row["n_train"], row["n_valid"], row["n_test"]) == (6, len(split.valid), len(split.test))
    assert (row["layer"], row["scale"]) == (found.layer, scale)

    def agrees(key, *vectors, **how):
        state = g.get_state()
        scores = []
        for vector in vectors:
            g.set_state(state)
            scores.append(fvlens.evaluate(model, split.test, vector=vector, generator=g, **how))
        g.set_state(state)
        assert row[key] == pytest.approx(sum(one.top1 for one in scores) / len(scores)), key
        assert row[f"{key}_exact"] == pytest.approx(sum(one.exact for one in scores) / len(scores)), key

    shown = dict(demonstrations=split.train, n_shots=3)
    agrees("bare", None)
    agrees("icl", None, setting="icl", **shown)
    agrees("permuted", None, setting="shuffled", **shown)
    agrees("fv", found.vector)
    tried = [
        (layer, fvlens.evaluate(model, split.valid, vector=found.unscaled.at_layer(layer), generator=seeded()))
        for layer in range(model.cfg.n_layers)
    ]
    best, _ = max(tried, key=lambda one: (one[1].top1, one[1].probability))
    agrees("fv_scale_1", found.unscaled.at_layer(best))
    other = found_of(kept.cell["control"])[0]
    agrees("other", scale * other.unscaled.at_layer(found.layer))

    # both starts, one after the other, from the same generator at each layer
    starts = {"tuned": found.vector, "zero": 0.0 * found.vector}
    runs = {start: {} for start in starts}
    for layer in sorted({found.layer, 1, 2}):
        order = seeded(seed)
        for start, init in starts.items():
            runs[start][layer] = fvlens.finetune(
                model, split.train[:6], init=init, layer=layer, valid=split.valid, epochs=2, generator=order,
                progress=False,
            )  # fmt: skip
    for start, by_layer in runs.items():
        chosen = row[f"{start}_layer"]
        valid = {
            layer: fvlens.evaluate(model, split.valid, vector=run.vector, generator=seeded()).top1
            for layer, run in by_layer.items()
        }
        assert valid[chosen] == max(valid.values())
        agrees(start, by_layer[found.layer].vector)
        agrees(f"{start}_best", by_layer[chosen].vector)

    # drawn behind the prompts: random vectors, then sets of other heads
    fvlens.build_prompts(model, split.test, n_shots=0, generator=g)
    noise = [scale * random_vector_like(found.unscaled, g) for _ in range(2)]
    rest = [
        (layer, head)
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
        if (layer, head) not in {tuple(one) for one in found.heads}
    ]
    sets = [[rest[i] for i in torch.randperm(len(rest), generator=g)[:2].tolist()] for _ in range(2)]
    agrees("random", *noise)
    agrees(
        "random_heads",
        *(scale * fvlens.function_vector(model, found.means, heads=own, layer=found.layer) for own in sets),
    )


def test_the_best_layer_is_of_the_best_top1_then_of_the_lowest_loss(unchecked):
    def run(top1, loss):
        history = dataclasses.make_dataclass("History", ["valid_top1", "valid_loss"])
        kept = dataclasses.make_dataclass("Run", ["history", "best_epoch"])
        return kept(history(torch.tensor([0.0, top1]), torch.tensor([9.0, loss])), 1)

    assert claims.best_layer({3: run(0.5, 2.0), 5: run(0.75, 4.0), 7: run(0.75, 3.0), 9: run(0.75, 3.0)}) == 7


def test_a_run_goes_on_from_its_cells_and_a_cell_alone_gives_the_same(small, tmp_path):
    outcome, folder = small
    said = []
    again = run_study(STUDY, [kept.cell for kept in outcome.kept], folder, say=said.append)
    assert again.kept == outcome.kept and said == ["2 of 2 cells were finished before"]
    last = run_study(STUDY, [outcome.kept[1].cell], tmp_path)
    assert last.kept == (outcome.kept[1],)
    assert len(list((tmp_path / "parts").iterdir())) == 2


# --- tables ---


def row_of(name, seed=0, group="first token", **scores):
    zeros = {f"{key}{end}": 0.0 for key in ROWS for end in ("", "_exact")}
    return {"relation": name, "seed": seed, "group": group, "layer": 9} | zeros | scores


def boot(values, n=2000):
    """Ends of a percentile interval, drawn otherwise than ours."""
    values = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(n, len(values)))
    return np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])


@pytest.fixture(scope="module")
def many():
    """Rows of thirty relations and two seeds, and of five whose answers share first tokens."""
    rng = np.random.default_rng(1)
    keys = [f"{key}{end}" for key in ROWS for end in ("", "_exact")]
    return [
        row_of(name, seed, group, **{key: float(rng.random()) for key in keys})
        for group, names in (("first token", list_relations()[:30]), ("exact", list_relations()[30:35]))
        for name in names
        for seed in (0, 1)
    ]


def test_tables_are_means_over_seeds_then_relations(many):
    found = tables(many)

    def values(key, group="first token"):
        own = {}
        for row in many:
            if row["group"] == group:
                own.setdefault(row["relation"], []).append(row[key])
        return np.array([np.mean(one) for one in own.values()])

    for line in found["means"].to_dict("records"):
        assert line["n_relations"] == 30
        for score, key in (("top1", line["row"]), ("exact", f"{line['row']}_exact")):
            assert line[score] == pytest.approx(values(key).mean())
            assert (line[f"{score}_low"], line[f"{score}_high"]) == pytest.approx(boot(values(key)), abs=0.02)
    for line in found["differences"].to_dict("records"):
        a, b = DIFFERENCES[line["difference"]]
        assert line["top1"] == pytest.approx((values(a) - values(b)).mean())
        assert (line["top1_low"], line["top1_high"]) == pytest.approx(boot(values(a) - values(b)), abs=0.02)
        assert line["exact"] == pytest.approx((values(f"{a}_exact") - values(f"{b}_exact")).mean())
    for line in found["exact"].to_dict("records"):
        assert line["n_relations"] == 5
        assert line["exact"] == pytest.approx(values(f"{line['row']}_exact", "exact").mean())
    assert found["exact"]["row"].tolist() == found["means"]["row"].tolist() == list(ROWS)
    relations = found["relations"].set_index("relation")
    assert relations.layer.tolist() == [9.0] * 35 and "seed" not in relations and "group" in relations
    assert relations.tuned[:30].tolist() == pytest.approx(values("tuned").tolist())
    for line in found["categories"].to_dict("records"):
        own = [name for name in relations.index[:30] if load_relation(name).category == line["category"]]
        assert line["n_relations"] == len(own)
        part = relations.loc[own]
        assert line["tuned"] == pytest.approx(part.tuned.mean())
        assert line["gain"] == pytest.approx((part.tuned - part.fv).mean())
        assert (line["gain_low"], line["gain_high"]) == pytest.approx(boot(part.tuned - part.fv), abs=0.05)
    assert found["categories"].n_relations.sum() == 30


def test_tables_of_a_run_are_those_of_its_rows(small):
    outcome, _ = small
    found = outcome.tables()
    rows = found["rows"]
    assert set(rows.group) == {"first token"} and set(rows.cells) == {"2 of 2 cells"} and set(rows.seed) == {"3"}
    means = found["means"].set_index("row")
    for key in ROWS:
        by_relation = rows.groupby("relation")[key].mean()
        assert means.top1[key] == pytest.approx(by_relation.mean())
    text = STUDY.markdown(found)
    assert f"| bare query | {means.top1['bare']:.2f} [" in text and text.endswith("2 of 2 cells.")
    assert "Means over 2 relations, seed 3, query words unseen" in text
    assert "share first tokens" not in text  # there are no such relations here


def bars_of(**scores):
    """Verdicts over relations that all have these scores."""
    base = dict(bare=0.1, icl=0.8, fv=0.3, tuned=0.75, tuned_best=0.75, random=0.1, other=0.1)
    rows = [row_of(name, **base | scores) for name in list_relations()[:5]]
    return [line["holds"] for line in tables(rows)["bars"].to_dict("records")]


def test_bars_hold_up_to_their_numbers_and_no_further():
    assert bars_of() == ["yes"] * 6
    assert bars_of(tuned=0.5, fv=0.25)[0] == "yes" and bars_of(tuned=0.5, fv=0.31)[0] == "no"
    assert bars_of(tuned=0.71) == ["yes", "yes", "no", "yes", "yes", "yes"]
    assert bars_of(tuned=0.73, tuned_best=0.71) == ["yes", "yes", "yes", "no", "yes", "yes"]
    assert bars_of(random=0.119, other=0.121)[4:] == ["yes", "no"]
    assert bars_of(random=0.13, other=0.0)[4:] == ["no", "yes"]
    # a mean that is large enough is not enough where its lower bound is not
    uneven = [row_of(name, icl=0.5, tuned=1.0 * (i < 2)) for i, name in enumerate(list_relations()[:8])]
    first = tables(uneven)["bars"].to_dict("records")[0]
    assert first["value"] == 0.25 and first["low"] < 0.12 and first["holds"] == "no"
    assert (BARS[0].least, BARS[0].low, BARS[2].least, BARS[4].most, BARS[5].most) == (0.20, 0.12, 0.90, 0.02, 0.02)
    assert BARS[0].text == "at least +0.20, lower bound over +0.12" and BARS[2].text == "at least 0.90"
    assert not Bar("", "a", "b", most=1.0).holds(float("nan"), float("nan"))


def test_a_ratio_of_means_has_the_interval_of_pairs():
    rng = np.random.default_rng(2)
    below = rng.random(40) + 0.5
    above = 0.9 * below + 0.05 * rng.random(40)
    found = ratio_with_interval(above.tolist(), below.tolist(), 0)
    assert found["mean"] == pytest.approx(above.sum() / below.sum())
    drawn = rng.integers(40, size=(4000, 40))
    ends = np.quantile(above[drawn].mean(axis=1) / below[drawn].mean(axis=1), [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx(ends, abs=1e-3)
    same = ratio_with_interval([0.5, 1.0], [0.5, 1.0], 0)
    assert set(same.values()) == {1.0}
    assert all(np.isnan(one) for one in ratio_with_interval([1.0], [0.0], 0).values())


# --- figure and pages ---


def test_the_figure_has_a_dot_and_a_ring_a_relation(small):
    outcome, _ = small
    figure = outcome.figures()["claims"]
    relations = outcome.tables()["relations"].set_index("relation")
    rings, *groups = figure.data
    assert rings.name == "10 demonstrations"
    for mark in figure.data:
        for text, x, y in zip(mark.hovertext, mark.x, mark.y, strict=True):
            name = text.split("<br>")[0]
            assert x == pytest.approx(relations.fv[name])
            assert y == pytest.approx(relations.icl[name] if mark is rings else relations.tuned[name])
    assert sum(len(mark.x) for mark in groups) == len(rings.x) == 2
    assert {mark.name for mark in groups} == {load_relation(name).category for name in NAMES}
    assert figure.layout.title.text == "Fine-tuned against untuned vectors: 2 relations (2 of 2 cells)"
    assert STUDY.figures([row_of("antonym", group="exact")]) == {}


def test_write_keeps_tables_and_picture_and_fills_the_first_page(small, tmp_path, monkeypatch):
    outcome, _ = small
    root = tmp_path / "project"
    (root / "assets").mkdir(parents=True)
    page = root / "README.md"
    page.write_text("<!-- study claims, evidence -->\n<!-- end study claims, evidence -->\n")
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", lambda figure, **how: repr(sorted(how)).encode())
    written = [path.relative_to(root).as_posix() for path in write_measured(outcome, root)]
    tables_of = ("means", "differences", "bars", "categories", "exact", "relations", "rows")
    assert written == [*(f"assets/measured/claims/{name}.csv" for name in tables_of), "assets/claims.png", "README.md"]
    assert (root / "assets" / "claims.png").read_bytes() == b"['format', 'scale']"
    text = page.read_text()
    assert "](assets/claims.png)\n" in text and STUDY.excerpts["evidence"](read_measured(root, STUDY)) in text
    assert "| random vectors of the norm | " in text and "2 of 2 cells." in text
    frame = read_measured(root, STUDY)["bars"]
    broken = frame[frame.holds == "no"]
    assert f"Of the 6 bars that were set beforehand {6 - len(broken)} hold" in text
    assert all(claim in text for claim in broken.claim) and "fine-tuned from zero" not in text


def test_what_draws_pictures_is_asked_for_before_the_work(monkeypatch):
    monkeypatch.setattr(measured_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--write: pages show a figure of the study claims, and kaleido, .* pip install"
    ):
        root_for(STUDY)
    assert root_for(STUDIES["start"]) == measured_module.project_root()


# --- sizes ---


def test_sizes_are_measured_on_twelve_relations_that_have_them(model, monkeypatch):
    told = [name for name in list_relations() if len(load_relation(name)) > 52]
    monkeypatch.setattr(claims_size, "by_group", lambda model, names: {"first token": told})
    monkeypatch.setattr(claims_size, "half_of", lambda names: names[::2])
    cells = SIZES.cells(Settings())
    names = list(dict.fromkeys(cell.relation for cell in cells))
    assert len(names) == 12 and len(cells) == 12 * 6
    claimed = [name in told[::2] for name in names]
    assert claimed == sorted(claimed, reverse=True) and True in claimed
    assert {cell["size"] for cell in cells} == {1, 2, 5, 10, 20, 40}
    assert all(len(load_relation(name).split(seeded(), train=0.7).train) >= 40 for name in names)
    assert SIZES.options().n_seeds == 5
    few = SIZES.cells(Settings(relations=("plural",), options=ClaimsSizeOptions(sizes=(2, 3))))
    assert [(cell.relation, cell["size"]) for cell in few] == [("plural", 2), ("plural", 3)]
