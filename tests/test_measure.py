"""The study ``measure``: the tables of the model card, and the bars that the shipped model must hold."""

import dataclasses
import math

import pytest
from conftest import seeded

import fvlens
import fvlens.training
from fvlens.relations import list_relations, load_relation
from fvlens.studies import STUDIES, Settings, project_root, read_measured, run_study
from fvlens.studies import _measure as measure
from fvlens.studies._measure_pages import EXCERPTS, card_of_training, whole
from fvlens.studies._study import library_data

STUDY = STUDIES["measure"]
EVERY, SEED = 14, 0
"""The bars are checked on every 14th relation with one seed; the card measures all relations with three."""
NAMES = list_relations()[::EVERY][:3]
"""Those whose cells are compared with single calls."""


def cells_of(names, seed):
    return [cell for cell in STUDY.cells(Settings(relations=tuple(names), seed=seed)) if cell.seed == seed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("measure")


@pytest.fixture(scope="module")
def found(folder):
    outcome = run_study(STUDY, cells_of(list_relations()[::EVERY], SEED), folder)
    assert outcome.failed == ()
    return outcome.tables()


@pytest.fixture(scope="module")
def card():
    return read_measured(project_root(), STUDY)


def means_of(tables):
    return tables["quantities"].set_index("quantity")["mean"]


def lows_of(tables):
    return tables["quantities"].set_index("quantity")["low"]


# --- the bars ---


def bars(tables):
    mean = means_of(tables)
    assert mean.top1_10 >= 0.95
    assert mean.top1_0 <= 0.30
    assert mean.p_permuted <= 0.5 * mean.p_10
    assert mean.fv_permuted >= 0.60
    assert mean.fv_random >= 0.80
    assert max(mean.random_vector, mean.other_relation) <= mean.top1_0 + 0.05
    assert lows_of(tables)["2 shots over 0"] > 0
    heads = tables["heads"][tables["heads"].labels == "random"]
    positive = heads["mean"].clip(lower=0)
    assert positive.max() / positive.sum() <= 0.60
    assert ((heads["mean"] > 0.02) & (heads.low > 0)).sum() >= 3


def bars_of_finetuning(tables):
    """The bars of fine-tuned vectors, from means over relations."""
    mean, low = means_of(tables), lows_of(tables)
    gap = mean.top1_10 - mean.fv_permuted
    assert mean.tuned - mean.fv_permuted >= (0.15 if gap >= 0.30 else gap / 2)
    assert mean.tuned >= 0.90 * mean.top1_10 and mean.tuned >= 0.85
    assert low["5 epochs, from the vector over from zero"] >= -0.01
    assert low["5 epochs, from the vector over from noise"] >= -0.01
    assert mean.other_tuned <= mean.top1_0 + 0.05
    assert measure.N_TRAIN == 20


@pytest.mark.slow
def test_bars_of_the_embedded_model(found):
    bars(found)
    bars_of_finetuning(found)


def test_bars_hold_in_the_card(card):
    bars(card)
    bars_of_finetuning(card)
    assert lows_of(card)["10 shots over 2"] > 0


def test_the_card_is_of_this_model_and_these_pairs(card, model):
    assert card["relations"].relation.tolist() == list_relations()
    cells = STUDY.cells(Settings())
    rows = card["rows"]
    assert rows.relation.tolist() == [cell.relation for cell in cells]
    assert rows.data_hash.tolist() == [library_data(cell) for cell in cells]
    for table in card.values():
        assert set(table.fingerprint) == {fvlens.models.fingerprint(model).weights}
        assert set(table.cells) == {f"{len(cells)} of {len(cells)} cells"}
    assert set(card["quantities"].seed) == {"0 1 2"}
    # the vectors that each relation was tried with are those of the cells
    own = [cell["others"] for cell in cells if "others" in dict(cell.varies)]
    assert rows[rows.stage == "controls"].others.tolist() == own


@pytest.mark.slow
def test_the_card_says_what_is_measured(found, card):
    ours = found["relations"].set_index("relation")
    theirs = card["relations"].set_index("relation").loc[ours.index]
    # the card averages three seeds, this run has one of them: on so few test pairs single scores move
    assert ours.n_test.tolist() == pytest.approx(theirs.n_test.tolist(), abs=5)
    for key in (
        "top1_10", "top1_0", "p_permuted", "fv_permuted", "fv_random",
        "tuned", "epochs_5_vector", "epochs_5_zero", "epochs_5_random",
    ):  # fmt: skip
        assert ours[key].mean() == pytest.approx(theirs[key].mean(), abs=0.08), key


def test_the_card_quotes_both_tables():
    text = (project_root() / "fvlens" / "zoo" / "rel-small" / "README.md").read_text(encoding="utf-8")
    for part in ("card", "card of training"):
        assert f"<!-- study measure, {part} -->\n| quantity | value [95% interval] | bar |" in text


# --- cells ---


@pytest.fixture(scope="module")
def small(found, folder):
    """Three of these relations, whose own cells are there, and cells that try two others' vectors on each."""
    own = [cell for cell in cells_of(list_relations()[::EVERY], SEED) if cell.relation in NAMES][: len(NAMES)]
    tried = [
        dataclasses.replace(
            cell, varies=(("stage", "controls"), ("others", " ".join(name for name in NAMES if name != cell.relation)))
        )
        for cell in own
    ]
    outcome = run_study(STUDY, [*own, *tried], folder)
    assert outcome.failed == ()
    return outcome, folder


def rows_of(outcome, stage):
    return {kept.cell.relation: kept.rows[0] for kept in outcome.kept if kept.cell["stage"] == stage}


def test_cells_are_a_relations_vectors_and_then_its_controls():
    names = ["country-capital", "verb-past", "antonym"]
    cells = cells_of(names, 3)
    assert [(cell.relation, cell["stage"]) for cell in cells] == [
        (name, stage) for stage in ("vectors", "controls") for name in names
    ]
    for cell in cells[3:]:
        assert set(cell["others"].split()) == set(names) - {cell.relation}
    every = {(cell.relation, cell.seed): cell for cell in STUDY.cells(Settings()) if cell["stage"] == "controls"}
    assert len(every) == 3 * len(list_relations())
    assert len({cell["others"] for cell in every.values()}) == len(every)
    for cell in every.values():
        own, others = load_relation(cell.relation), [load_relation(name) for name in cell["others"].split()]
        assert len(set(others)) == 10
        assert all(one.family != own.family and not {*one.outputs} & {*own.outputs} for one in others)


def test_relations_without_a_control_are_refused():
    text = r"study measure: none of the other relations given .* than 'antonym'; give more relations"
    with pytest.raises(ValueError, match=text):
        STUDY.cells(Settings(relations=("antonym",)))


def test_one_relation_equals_single_calls(model, small):
    outcome, _ = small
    for name in NAMES[:2]:
        row = rows_of(outcome, "vectors")[name]
        generator = seeded(SEED)
        split = load_relation(name).split(generator)
        assert row["n_test"] == len(split.test)

        def score(vector=None, pairs=split.test, **how):
            return fvlens.evaluate(model, pairs, vector=vector, generator=seeded(9), **how)

        assert row["top1_0"] == score().top1
        clean = fvlens.build_prompts(
            model, split.train, queries=split.valid, n_prompts=100, relation=name, generator=generator
        )
        means = fvlens.mean_head_activations(model, clean, progress=False)
        vectors = {}
        for labels in ("permuted", "random"):
            corrupted = fvlens.build_prompts(
                model, split.train, queries=split.valid, n_prompts=25, labels=labels, relation=name, generator=generator
            )
            effects = fvlens.indirect_effects(model, corrupted, means, progress=False)
            for layer in range(model.cfg.n_layers):
                for head in range(model.cfg.n_heads):
                    aie = float(effects.cie[:, layer, head].mean())
                    assert row[f"aie_{labels}_L{layer}H{head}"] == pytest.approx(aie, abs=2e-5)
            heads = effects.aie.flatten().argsort(descending=True, stable=True)[:10].tolist()
            heads = [divmod(place, model.cfg.n_heads) for place in heads]
            plain = fvlens.function_vector(model, means, heads=heads, layer=row[f"layer_{labels}"])
            vectors[labels] = row[f"scale_{labels}"] * plain
            assert row[f"scale_{labels}"] in fvlens.evaluation.SCALES
            assert row[f"fv_{labels}"] == score(vectors[labels]).top1
            # of all places none is better on the validation pairs
            tried = [
                score(scale * plain.at_layer(layer), split.valid).top1
                for layer in range(model.cfg.n_layers)
                for scale in fvlens.evaluation.SCALES
            ]
            assert score(vectors[labels], split.valid).top1 == max(tried)
        starts = {"vector": vectors["permuted"], "zero": 0.0 * vectors["permuted"]}
        early = seeded(SEED)
        for key, init, epochs, generator in (
            ("tuned", "vector", 20, seeded(SEED)),
            ("epochs_5_vector", "vector", 5, early),
            ("epochs_5_zero", "zero", 5, early),
        ):
            run = fvlens.training.finetune(
                model, split.train[:20], init=starts[init], valid=split.valid, epochs=epochs, generator=generator,
                progress=False,
            )  # fmt: skip
            assert row[key] == score(run.vector).top1


def test_controls_equal_single_calls(model, small):
    """The vectors that the cells kept, on every other relation's test pairs."""
    outcome, folder = small
    trained, untrained = (
        {one.relation: one for one in map(fvlens.FunctionVector.load, (folder / "parts").glob(f"*-{name}.safetensors"))}
        for name in ("fine-tuned-vector", "function-vector")
    )
    assert set(trained) == set(untrained) == set(list_relations()[::EVERY])
    assert len(list((folder / "parts").iterdir())) == 2 * len(trained)
    answers = {}
    for name in list_relations():
        for query, answer in load_relation(name):
            answers.setdefault(query, []).append(answer)
    for kept in outcome.kept[3:]:
        name, row = kept.cell.relation, kept.rows[0]
        split, own = load_relation(name).split(seeded(SEED)), rows_of(outcome, "vectors")[name]

        def score(vector, pairs=split.test):
            return fvlens.evaluate(model, pairs, vector=vector, generator=seeded(9))

        assert own["tuned"] == score(trained[name]).top1 and own["fv_random"] == score(untrained[name]).top1
        assert untrained[name].layer == own["layer_random"] and trained[name].layer == own["layer_permuted"]
        drawn = kept.cell["others"].split()
        others = [score(trained[other]) for other in drawn]
        assert row["other_tuned"] == pytest.approx(sum(one.top1 for one in others) / 2)
        moved = dataclasses.replace(untrained[drawn[0]], layer=own["layer_random"])
        assert row["other_relation"] == score(moved).top1
        known = [
            word in answers[pair.input]
            for one in others
            for word, pair in zip(one.predictions, one.queries, strict=True)
        ]
        assert row["other_answer"] == pytest.approx(sum(known) / len(known))


def test_controls_alone_give_the_numbers_of_an_undisturbed_run(small, tmp_path):
    outcome, _ = small
    (alone,) = run_study(STUDY, [outcome.kept[3].cell], tmp_path).kept
    assert alone == outcome.kept[3]
    assert len(list((tmp_path / "parts").iterdir())) == 6


def test_a_part_of_the_cells_has_tables_that_say_so(small, tmp_path):
    outcome, _ = small
    part = dataclasses.replace(outcome, kept=outcome.kept[:2])
    tables = part.tables()
    assert set(tables["quantities"].cells) == {"2 of 6 cells"}
    assert len(tables["relations"]) == 2 and len(tables["heads"]) == 64
    text = STUDY.markdown(tables)
    assert "2 of 6 cells." in text
    assert "| vector of another relation (disjoint outputs), top-1 | nan [nan, nan] |" in text
    assert "With the vectors of others" not in text
    for quote in EXCERPTS.values():
        assert "2 of 6 cells." in quote(tables)


# --- tables by hand ---


def row_of(name, seed=0, **scores):
    return {"relation": name, "seed": seed, "stage": "vectors", **scores}


def tables_of(icl, bare, untuned, tuned, other):
    early = {f"epochs_5_{init}": 0.75 for init in ("vector", "zero", "random")}
    rows = [
        row_of(name, top1_10=a, top1_0=b, fv_permuted=c, tuned=d, aie_random_L0H0=0.1, **early)
        for name, a, b, c, d in zip("ab", icl, bare, untuned, tuned, strict=True)
    ]
    rows += [
        {"relation": name, "seed": 0, "stage": "controls", "others": "c d", "other_tuned": value, "other_answer": 0.5}
        for name, value in zip("ab", other, strict=True)
    ]
    tables = STUDY.tables(rows)
    stands_on = dict(model="m", fingerprint="f", data_hash="d", seed="0", fvlens="0", cells="4 of 4 cells")
    return {name: table.assign(**stands_on) for name, table in tables.items()}


def test_table_of_fine_tuning_by_hand():
    tables = tables_of((1.0, 1.0), (0.25, 0.0), (0.75, 0.75), (1.0, 0.875), (0.25, 0.125))
    mean, low = means_of(tables), lows_of(tables)
    assert mean.tuned == 0.9375
    assert mean["fine-tuned over untuned"] == pytest.approx(0.1875)
    assert low["fine-tuned over untuned"] == pytest.approx(0.125)
    assert mean["tuned other relation over zero-shot"] == pytest.approx(0.0625)
    assert math.isnan(mean["2 shots over 0"])
    text = card_of_training(tables)
    assert "| fine-tuned vector, top-1 | 0.938 [0.875, 1.000] | at least 0.85, and 0.900 (" in text
    assert "| fine-tuned over its start, paired | +0.188 [+0.125, +0.250] | at least +0.125 (half of" in text
    assert "at most 0.175 (bare query + 0.05) |" in text
    assert (
        "With the vectors of others, 1 of the 2 relations are above their own bare query, 1 of them by more than 0.05, "
        "`b` the furthest (0.12, bare query 0.00)." in text
    )
    assert text in whole(tables)
    # where the gap to demonstrations is wide, the bar is a number of its own
    tables = tables_of((1.0, 1.0), (0.25, 0.25), (0.5, 0.5), (1.0, 0.875), (0.25, 0.125))
    text = card_of_training(tables)
    assert "at least +0.150 (0.15) |" in text
    assert "None of the 2 relations is above its own bare query" in text


def test_seeds_are_averaged_within_a_relation():
    rows = [row_of("a", 0, top1_0=0.5), row_of("a", 1, top1_0=1.0), row_of("b", 0, top1_0=0.25)]
    tables = STUDY.tables([row | {"aie_random_L0H0": 0.0} for row in rows])
    assert tables["relations"].top1_0.tolist() == [0.75, 0.25]
    assert means_of(tables).top1_0 == 0.5
    assert (lows_of(tables).top1_0, tables["quantities"].high[0]) == (0.25, 0.75)


def test_heads_by_hand():
    # two seeds of two relations, one layer of three heads
    maps = {
        ("a", 0): (0.4, 0.1, -0.2),
        ("b", 0): (0.2, 0.1, -0.2),
        ("a", 1): (0.4, 0.1, 0.0),
        ("b", 1): (0.2, 0.1, 0.0),
    }
    rows = [
        row_of(name, seed, top1_10=1.0, **{f"aie_random_L0H{head}": value for head, value in enumerate(values)})
        for (name, seed), values in maps.items()
    ]
    tables = {name: table.assign(model="m", fingerprint="f", data_hash="d", seed="0", fvlens="0", cells="4 of 4 cells")
              for name, table in STUDY.tables(rows).items()}  # fmt: skip
    heads = tables["heads"]
    assert heads["mean"].tolist() == pytest.approx([0.3, 0.1, -0.1])
    assert heads[["labels", "layer", "head"]].to_numpy().tolist() == [["random", 0, head] for head in range(3)]
    assert (heads.low[0], heads.high[0]) == pytest.approx((0.2, 0.4)) and heads.low[1] == pytest.approx(0.1)
    text = EXCERPTS["card"](tables)
    assert "| share of the top head in the summed positive AIE, random labels | 0.75 | at most 0.60 |" in text
    assert "| heads with mean AIE over 0.02 and interval over 0, random labels | 2 | at least 3 |" in text
    assert "- random labels: L0H0 0.300 [0.200, 0.400], L0H1 0.100 [0.100, 0.100]\n- permuted labels: none" in text
