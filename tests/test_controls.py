"""The table of controls, against single evaluations and scores written by hand."""

import dataclasses

import pytest
import torch
from conftest import seeded
from evaluations import DEMONSTRATIONS, PAIRS, interrupted_after, made_vector, same, says_that_it_is_a_part

from fvlens import scoring
from fvlens.evaluation import (
    _controls,
    controls,
    evaluate,
)

pytestmark = pytest.mark.usefixtures("no_trace")

# --- controls ---


@pytest.fixture
def drawn(monkeypatch):
    """Every random vector and every vector of random heads that controls makes."""
    made = {"random": [], "heads": []}
    for key, name in (("random", "random_vector_like"), ("heads", "function_vector")):
        real = getattr(_controls, name)

        def recording(*args, key=key, real=real, **kwargs):
            made[key].append(real(*args, **kwargs))
            return made[key][-1]

        monkeypatch.setattr(_controls, name, recording)
    return made


def test_rows_of_controls_equal_single_evaluations(tiny, means, drawn):
    vector = made_vector(tiny, layer=1, norm=15.0)
    others = [made_vector(tiny, layer=0, seed=8, relation="one"), made_vector(tiny, layer=2, seed=9, relation="two")]
    icl = dict(demonstrations=DEMONSTRATIONS, n_shots=3)
    table = controls(
        tiny,
        PAIRS,
        vector,
        others=others,
        means=means,
        n_random=4,
        scale=2.0,
        generator=seeded(8),
        progress=False,
        **icl,
    )
    assert table.complete
    assert [(row.kind, len(row.evaluations)) for row in table.rows] == [
        ("no_vector", 1), ("vector", 1), ("random_vector", 4), ("random_heads", 4), ("other_relation", 1),
        ("other_relation", 1), ("icl", 1), ("shuffled", 1),
    ]  # fmt: skip
    bare, steered, pushed, some_heads, one, two, shown, shuffled = table.rows

    def single(**kwargs):
        return evaluate(tiny, PAIRS, scale=2.0, generator=seeded(8), **kwargs)

    assert same(bare.evaluations[0], single())
    assert same(steered.evaluations[0], single(vector=vector))
    assert len(drawn["random"]) == len(drawn["heads"]) == 4
    for found, made in zip(pushed.evaluations, drawn["random"], strict=True):
        assert same(found, single(vector=made))
        assert made.norm() == pytest.approx(15.0, rel=1e-5)
        assert made.layer == 1
    assert all(abs(a.cosine(b)) < 0.9 for a in drawn["random"] for b in drawn["random"] if a is not b)
    for found, made in zip(some_heads.evaluations, drawn["heads"], strict=True):
        assert same(found, single(vector=made))
        assert len(set(made.heads)) == len(vector.heads) == 3
        assert not set(made.heads) & set(vector.heads)
        assert made.layer == 1
    assert len({made.heads for made in drawn["heads"]}) > 1
    for row, other in ((one, others[0]), (two, others[1])):
        assert row.name == f"vector of {other.relation}"
        assert same(row.evaluations[0], single(vector=other.at_layer(1)))
    assert same(shown.evaluations[0], single(setting="icl", **icl))
    assert same(shuffled.evaluations[0], single(setting="shuffled", **icl))


def test_differences_of_controls_are_paired_with_the_vector(tiny, means, monkeypatch):
    """Means, pooling and the sign of the difference, on scores written by hand."""
    n = len(PAIRS)
    right = {
        None: [0, 0, 0, 1, 0, 0, 0, 0],
        "function": [1, 1, 1, 1, 0, 1, 1, 0],
        "random": [0, 1, 0, 0, 0, 0, 0, 0],
        "one": [1, 0, 0, 0, 0, 0, 0, 0],
        "two": [1, 1, 0, 0, 0, 0, 0, 1],
        "icl": [1] * 8,
        "shuffled": [0] * 8,
    }

    def key_of(prompts, vector):
        if prompts.n_shots:
            return "icl" if prompts.labels == "true" else "shuffled"
        if vector is None:
            return None
        return vector.relation if vector.relation in ("one", "two") else vector.kind

    def fixed(model, prompts, changes, **options):
        hits = torch.tensor([right[key_of(prompts, change)] for change in changes])
        real = scoring.score(model, prompts, changes, **options)
        return dataclasses.replace(real, ranks=1 - hits)

    monkeypatch.setattr(_controls, "score", fixed)
    others = [made_vector(tiny, relation="one"), made_vector(tiny, relation="two")]
    table = controls(
        tiny, PAIRS, made_vector(tiny), others=others, n_random=3, demonstrations=DEMONSTRATIONS, n_shots=2,
        generator=seeded(1), progress=False,
    )  # fmt: skip
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [
        "no vector", "the vector", "random vectors, same norm", "vector of one", "vector of two",
        "2 demonstrations, true labels", "2 demonstrations, permuted labels",
    ]  # fmt: skip
    expected = {"no vector": 1, "the vector": 6, "vector of one": 1, "vector of two": 3}
    for name, hits in expected.items():
        assert rows[name].top1 == hits / n
        assert rows[name].difference.mean == (hits - 6) / n
        low, high, _ = rows[name].difference.interval
        assert low <= rows[name].difference.mean <= high
    assert rows["the vector"].difference.interval[:2] == (0, 0)
    assert rows["2 demonstrations, true labels"].difference.mean == 2 / n
    top1, interval = table.summary("other_relation")
    assert top1 == 2 / n
    assert interval.low <= top1 <= interval.high
    pooled = next(row for row in table.pooled if row.kind == "other_relation")
    assert pooled.scores.tolist() == [1, 0.5, 0, 0, 0, 0, 0, 0.5]
    assert pooled.difference.mean == (2 - 6) / n
    assert table.summary("vector") == (6 / n, rows["the vector"].interval)
    assert [row.kind for row in table.pooled] == [
        "no_vector", "vector", "random_vector", "other_relation", "icl", "shuffled",
    ]  # fmt: skip


def test_controls_as_a_table_and_a_figure(tiny, means):
    table = controls(
        tiny, PAIRS, made_vector(tiny, norm=20.0), others=[made_vector(tiny, seed=5, relation="b<i>r")], means=means,
        n_random=3, demonstrations=DEMONSTRATIONS, n_shots=2, labels="deranged", generator=seeded(1), progress=False,
    )  # fmt: skip
    frame = table.to_dataframe()
    assert frame["control"].tolist() == [row.name for row in table.rows]
    assert frame["n_vectors"].tolist() == [1, 1, 3, 3, 1, 1, 1]
    assert frame["top1"].tolist() == [row.top1 for row in table.rows]
    assert frame["difference_high"].tolist() == [row.difference.interval.high for row in table.rows]
    assert frame["probability"].tolist() == [
        pytest.approx(sum(one.probability for one in row.evaluations) / len(row.evaluations)) for row in table.rows
    ]
    assert frame["mean_rank"].tolist() == [
        pytest.approx(sum(one.mean_rank for one in row.evaluations) / len(row.evaluations)) for row in table.rows
    ]
    single = table.to_dataframe(single=True)
    assert single["top1"].tolist() == [one.top1 for row in table.rows for one in row.evaluations]
    assert single.groupby("control", sort=False)["top1"].mean().tolist() == pytest.approx(frame["top1"].tolist())
    assert table.rows[-1].name == "2 demonstrations, deranged labels"
    figure = table.plot()
    assert list(figure.data[0].x) == [row.top1 for row in table.rows]
    colours = figure.data[0].marker.color
    assert [colour != colours[0] for colour in colours] == [row.kind == "vector" for row in table.rows]


def test_controls_in_another_setting(tiny):
    kwargs = dict(setting="icl", demonstrations=DEMONSTRATIONS, n_shots=3)
    table = controls(tiny, PAIRS, made_vector(tiny), n_random=1, generator=seeded(8), progress=False, **kwargs)
    vector = next(row for row in table.rows if row.kind == "vector")
    assert same(vector.evaluations[0], evaluate(tiny, PAIRS, vector=made_vector(tiny), generator=seeded(8), **kwargs))
    assert [row.kind for row in table.rows] == ["no_vector", "vector", "random_vector", "icl", "shuffled"]


def test_interrupted_controls_keep_what_is_finished(tiny, monkeypatch):
    def table():
        return controls(
            tiny, PAIRS, made_vector(tiny), n_random=3, demonstrations=DEMONSTRATIONS, n_shots=2, generator=seeded(),
            batch_size=2, progress=False,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.warns(UserWarning, match=r"controls was interrupted: \d of 8 queries are finished"):
            found = table()
    assert [row.kind for row in found.rows] == ["no_vector", "vector", "random_vector"]
    assert not found.complete
    says_that_it_is_a_part(found)
    assert not found.to_dataframe(single=True).complete.any()
    assert 0 < found.rows[0].evaluations[0].n < len(PAIRS)
    counted = []
    real = scoring._suffix.run_prefix
    with monkeypatch.context() as patch:
        patch.setattr(scoring._suffix, "run_prefix", lambda *a, **k: counted.append(1) or real(*a, **k))
        table()
    with monkeypatch.context() as patch:
        interrupted_after(len(counted) - 1, patch)  # in the last row, of corrupted demonstrations
        with pytest.warns(UserWarning, match=r"controls was interrupted: 4 of 5 rows are finished"):
            found = table()
    assert [row.kind for row in found.rows] == ["no_vector", "vector", "random_vector", "icl"]
    assert not found.complete


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_random": 0}, r"expected n_random of at least 1, got 0; 10 is usual"),
        ({"demonstrations": None}, r"controls: setting='icl' needs demonstrations, got None"),
        ({"heads": ()}, r"the vector names 0 heads, and the model has 12 others; pass means=None"),
        ({"heads": [(i // 4, i % 4) for i in range(7)]}, r"the vector names 7 heads, and the model has 5 others"),
    ],
)
def test_bad_controls_are_refused(tiny, means, settings, message):
    vector = made_vector(tiny, heads=settings.pop("heads", ((0, 0),)))
    kwargs = {"demonstrations": DEMONSTRATIONS, "n_shots": 2, "means": means, **settings}
    with pytest.raises(ValueError, match=message):
        controls(tiny, PAIRS, vector, generator=seeded(), progress=False, **kwargs)


def test_a_missing_kind_is_refused(tiny):
    table = controls(
        tiny, PAIRS, made_vector(tiny), n_random=1, demonstrations=DEMONSTRATIONS, n_shots=2, generator=seeded(),
        progress=False,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"no row of kind 'other_relation'; this table has no_vector, vector, random_v"
    ):
        table.summary("other_relation")
