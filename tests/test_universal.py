"""Heads over many relations: the baseline by hand, means by numpy, which relations count, order of rows, files."""

import dataclasses
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import seeded

import fvlens
from fvlens import Relation, files, find, universal_heads
from fvlens.find import relation_effects
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import TEMPLATES, Template
from fvlens.relations import Pair
from fvlens.suffix import choose_route
from fvlens.types import Head
from fvlens.universal import UniversalHeads, carried, leaf_order, majority_baseline, read_heads
from fvlens.universal import _find as find_module

NAMES = ("antonym", "capitalised", "plural")
SMALL = dict(n_shots=4, n_prompts=6, n_corrupted=3, progress=False)
MARK = Fingerprint("made", "local", "00" * 8, 2, 3, 8, 4, 50, "float32", "LN", "one")


def always(answer="dog", n_other=0):
    """Forty words that nearly all have one answer: the majority label does it."""
    words = fvlens.load_relation("plural").inputs[:40]
    others = ("cat", "red", "big", "sun", "ten")
    return Relation("always", tuple(Pair(w, others[i % 5] if i < n_other else answer) for i, w in enumerate(words)))


@pytest.fixture(scope="session")
def found(model):
    return universal_heads(model, NAMES, 4, generator=seeded(), **SMALL)


def made(icl=(0.9, 0.5, 0.4, 0.8), majority=(0.1, 0.5, 0.6, 0.2), aie=None, n=2, **fields):
    """A result put together by hand: relations 0 and 3 count."""
    if aie is None:
        aie = np.random.default_rng(0).normal(size=(len(icl), 2, 3))
    aie = torch.tensor(np.asarray(aie), dtype=torch.float32)
    base = dict(
        n=n, relations=tuple(f"r{i}" for i in range(len(icl))), data_hashes=("",) * len(icl), aie=aie,
        prompt_stderr=aie.abs() / 10, icl_top1=torch.tensor(icl), icl_interval=torch.tensor([[x, x] for x in icl]),
        majority=torch.tensor(majority), labels="permuted", n_shots=4, n_prompts=6, n_corrupted=3, template="qa",
        path="weights", complete=True, fingerprint=MARK,
    )  # fmt: skip
    return UniversalHeads(**(base | fields))


# --- the baseline ---


@pytest.mark.parametrize(
    ("pool", "wanted", "expected"),
    [
        (["dog", "dog", "cat"], ["dog", "cat", "cow", "dog"], 2 / 4),
        (["dog", "dog", "cat"], ["cat", "cat"], 0.0),  # the commonest answer, not the best one
        (["dog", "cat", "cow"], ["cow", "cow", "dog", "hen"], 2 / 4),  # all equally common: the best of them
        (["dog", "dog", "cat", "cat", "hen"], ["hen", "hen", "cat"], 1 / 3),  # hen is not among the commonest
        ([7, 7, 3], [3, 7, 7, 7], 3 / 4),
    ],
)
def test_majority_baseline_by_hand(pool, wanted, expected):
    assert majority_baseline(pool, wanted) == pytest.approx(expected)
    assert majority_baseline(pool[::-1], wanted[::-1]) == pytest.approx(expected)


@pytest.mark.parametrize(("pool", "wanted"), [([], ["a"]), (["a"], [])])
def test_majority_baseline_refuses_nothing(pool, wanted):
    message = f"expected at least one answer in each, got {len(pool)} in pool, {len(wanted)} wanted."
    with pytest.raises(ValueError, match=re.escape(message)):
        majority_baseline(pool, wanted)


@pytest.mark.parametrize("n_other", [0, 10])
def test_majority_of_a_relation_is_that_of_its_train_pairs_on_its_valid_pairs(model, n_other):
    relation = always(n_other=n_other)
    found = universal_heads(model, [relation, "plural"], 2, generator=seeded(1), **SMALL)
    g = seeded(1)
    split = relation.split(g)
    (commonest, _), *_ = Counter(pair.output for pair in split.train).most_common()
    assert commonest == "dog"
    share = np.mean([pair.output == "dog" for pair in split.valid])
    assert found.majority[0].item() == pytest.approx(share)
    assert found.relations == ("always", "plural")
    if n_other == 0:  # nothing beats an answer that is always right
        assert share == 1
        assert found.kept.tolist() == [False, True]
        assert torch.equal(found.mean, found.aie[1])


def test_majority_counts_first_tokens_as_the_top1_does(tiny):
    """Answers that begin with the same token are one answer for a score that reads one token."""
    ids = tiny.tokenizer(" zzzq", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1  # several tokens, so all these answers begin alike
    words = fvlens.load_relation("plural").inputs[:40]
    relation = Relation("odd", tuple(Pair(word, f"zzz{word}") for word in words))
    firsts = {tiny.tokenizer(f" {pair.output}", add_special_tokens=False)["input_ids"][0] for pair in relation}
    assert len(firsts) == 1
    g = seeded()
    shared = pytest.warns(UserWarning, match="answers share their first token with another")
    with shared, pytest.raises(ValueError, match=re.escape("odd (0.00 against 1.00)")):
        universal_heads(tiny, [relation], 2, generator=g, **SMALL)


# --- the numbers ---


def test_effects_and_scores_are_those_of_the_parts(model, found):
    """The same chain from the front's functions, in the documented order of draws."""
    g = seeded()
    relations = [fvlens.load_relation(name) for name in NAMES]
    splits = [relation.split(g) for relation in relations]
    for i, (relation, split) in enumerate(zip(relations, splits, strict=True)):
        common = dict(n_shots=4, relation=relation.name, generator=g)
        score = fvlens.evaluate(model, split.valid, setting="icl", demonstrations=split.train, **common)
        clean = fvlens.build_prompts(model, split.train, queries=split.valid, n_prompts=6, **common)
        means = fvlens.mean_head_activations(model, clean, progress=False)
        bad = fvlens.build_prompts(model, split.train, queries=split.valid, n_prompts=3, labels="permuted", **common)
        cie = fvlens.indirect_effects(model, bad, means, progress=False).cie.double().numpy()
        np.testing.assert_allclose(found.aie[i], cie.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(found.prompt_stderr[i], cie.std(axis=0, ddof=1) / 3**0.5, atol=1e-6)
        right = [a == pair.output for a, pair in zip(score.predictions, split.valid, strict=True)]
        assert found.icl_top1[i].item() == pytest.approx(np.mean(right))
        np.testing.assert_allclose(found.icl_interval[i], score.interval[:2], atol=1e-6)
        assert found.data_hashes[i] == relation.data_hash
    assert found.relations == NAMES
    assert found.kept.all()
    assert (found.labels, found.n_shots, found.n_prompts, found.n_corrupted) == ("permuted", 4, 6, 3)
    assert (str(found.template), found.path, found.complete) == ("qa", choose_route(model)[0], True)
    assert found.fingerprint == fingerprint(model)


def test_what_one_relation_says_is_what_the_set_of_it_alone_holds(model):
    g = seeded(4)
    alone = universal_heads(model, ["plural"], 4, generator=seeded(4), **SMALL)
    row = carried(model, fvlens.load_relation("plural").split(g), relation="plural", generator=g, **SMALL)
    assert torch.equal(row.aie, alone.aie[0]) and torch.equal(row.prompt_stderr, alone.prompt_stderr[0])
    assert row.icl_top1 == pytest.approx(alone.icl_top1.item())
    assert row.icl_interval == pytest.approx(alone.icl_interval[0].tolist())
    assert (row.majority, row.path) == (pytest.approx(alone.majority.item()), alone.path)


def test_other_labels_and_template_reach_the_prompts(model):
    g = seeded(2)
    given = universal_heads(model, ["plural"], 2, labels="random", template="arrow", generator=g, **SMALL)
    h = seeded(2)
    split = fvlens.load_relation("plural").split(h)
    common = dict(n_shots=4, template="arrow", relation="plural", generator=h)
    fvlens.evaluate(model, split.valid, setting="icl", demonstrations=split.train, **common)
    clean = fvlens.build_prompts(model, split.train, queries=split.valid, n_prompts=6, **common)
    bad = fvlens.build_prompts(model, split.train, queries=split.valid, n_prompts=3, labels="random", **common)
    means = fvlens.mean_head_activations(model, clean, progress=False)
    expected = fvlens.indirect_effects(model, bad, means, progress=False).aie
    torch.testing.assert_close(given.aie[0], expected, rtol=0, atol=1e-6)
    assert (given.labels, str(given.template)) == ("random", "arrow")


def test_same_seed_same_bits_and_the_global_generator_is_left_alone(model, found):
    before = torch.get_rng_state()
    again = universal_heads(model, NAMES, 4, generator=seeded(), **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.aie, found.aie)
    relations = [fvlens.load_relation(name) for name in NAMES]  # relations are as good as their names
    third = universal_heads(model, relations, 4, generator=seeded(1), **SMALL)
    assert not torch.equal(third.aie, found.aie)
    assert third.relations == found.relations


def test_mean_error_and_heads_follow_from_the_relations_that_count():
    result = made()
    assert result.kept.tolist() == [True, False, False, True]  # equal to the baseline is not above it
    rows = result.aie.double().numpy()[[0, 3]]
    np.testing.assert_allclose(result.mean, rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(result.stderr, rows.std(axis=0, ddof=1) / 2**0.5, atol=1e-6)
    order = np.argsort(-rows.mean(axis=0).ravel(), kind="stable")
    for n in (1, 2, 6):
        heads = dataclasses.replace(result, n=n).heads
        assert heads == [Head(int(i) // 3, int(i) % 3) for i in order[:n]]
        assert all(isinstance(head, Head) for head in heads)


def test_heads_that_do_not_help_on_average_are_announced():
    result = made()
    n_helping = int((result.mean > 0).sum())
    assert n_helping < 6
    every = dataclasses.replace(result, n=6)
    assert every.caution.startswith(f"{6 - n_helping} of the 6 heads have a mean AIE of 0 or less (L")
    assert f"as only {n_helping} heads have a positive one" in every.caution
    assert all(str(head) in every.caution for head in every.heads[n_helping:][:5])
    if n_helping:
        assert dataclasses.replace(result, n=n_helping).caution == ""


def test_one_relation_has_no_error():
    result = made(icl=(0.9,), majority=(0.1,))
    assert torch.equal(result.mean, result.aie[0])
    assert result.stderr.isnan().all()


def test_dataframe_has_one_row_a_relation_and_head():
    result = made()
    frame = result.to_dataframe()
    assert len(frame) == 4 * 2 * 3
    row = frame[(frame.relation == "r3") & (frame.layer == 1) & (frame["head"] == 2)]
    assert row.aie.item() == result.aie[3, 1, 2].item()
    assert row.stderr.item() == result.prompt_stderr[3, 1, 2].item()
    assert row.icl_top1.item() == pytest.approx(0.8)
    assert row.majority.item() == pytest.approx(0.2)
    assert frame.groupby("relation").kept.first().tolist() == [True, False, False, True]


def test_repr_is_one_line(found):
    assert re.fullmatch(r"UniversalHeads\(4 heads: (L\dH\d(, )?){4}; 3 of 3 relations, permuted labels\)", repr(found))


def test_how_effects_are_computed_is_passed_on(tiny, monkeypatch):
    seen = []
    original = find.indirect_effects

    def spy(*args, **given):
        seen.append(given)
        return original(*args, **given)

    monkeypatch.setattr(find, "indirect_effects", spy)
    g = seeded()
    split = fvlens.load_relation("plural").split(g)
    _, effects = relation_effects(tiny, split, relation="plural", labels="random", path="naive", generator=g, **SMALL)
    assert seen == [{"progress": False, "path": "naive"}]
    assert (effects.path, effects.labels, len(effects.cie)) == ("naive", "random", 3)


# --- the order of rows and the figure ---


def test_leaf_order_is_a_permutation_that_keeps_equal_rows_together():
    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.normal(size=(30, 7)), dtype=torch.float32)
    rows[21] = rows[4]
    order = leaf_order(rows)
    assert sorted(order) == list(range(30))
    assert abs(order.index(4) - order.index(21)) == 1
    far = rows + 100 * (torch.arange(30) % 2)[:, None]  # two groups far apart stay apart
    parity = [i % 2 for i in leaf_order(far)]
    assert sum(a != b for a, b in pairwise(parity)) == 1

    def walk(order):
        return sum(float((rows[a] - rows[b]).norm()) for a, b in pairwise(order))

    assert walk(order) < 0.9 * walk(list(range(30)))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_leaf_order_of_few_rows(n):
    assert sorted(leaf_order(torch.zeros(n, 3))) == list(range(n))


def test_plot_shows_the_effects_by_relation_and_head():
    result = made()
    trace = (figure := result.plot(n_columns=5)).data[0]
    heads = list(figure.layout.xaxis.ticktext)
    mean = result.aie[[0, 3]].mean(dim=0)
    order = mean.flatten().argsort(descending=True).tolist()
    assert heads == [f"L{i // 3}H{i % 3}" for i in order[:5]]
    names = [re.sub(r"<[^>]*>|× ", "", text) for text in figure.layout.yaxis.ticktext]
    assert sorted(names) == ["r0", "r1", "r2", "r3"]
    assert ["×" in text for text in figure.layout.yaxis.ticktext] == [name in ("r1", "r2") for name in names]
    for row, name in enumerate(names):
        for column, head in enumerate(order[:5]):
            expected = result.aie[int(name[1])].flatten()[head].item()
            assert trace.z[row][column] == pytest.approx(expected)
    row = names.index("r2")
    assert "4-shot top-1 0.40, majority label 0.60" in trace.hovertext[row][0]
    assert "± " in trace.hovertext[row][0]
    assert "permuted labels, made" in figure.layout.title.text


def test_plot_shows_three_times_the_set_but_not_too_much(found):
    n_columns = lambda result: len(result.plot().layout.xaxis.ticktext)  # noqa: E731
    assert n_columns(made(n=1)) == 3
    assert n_columns(made(n=3)) == 6  # all there are
    assert n_columns(found) == 12
    wide = dataclasses.replace(MARK, n_layers=10, n_heads=10)
    aie = np.random.default_rng(0).normal(size=(2, 10, 10))
    assert n_columns(made((0.9, 0.9), (0.0, 0.0), aie, n=20, fingerprint=wide)) == 48
    assert n_columns(made((0.9, 0.9), (0.0, 0.0), aie, n=60, fingerprint=wide)) == 60
    with pytest.raises(ValueError, match=re.escape("plot: n_columns: expected 1 to 6 (all heads), got 7.")):
        made().plot(n_columns=7)


# --- interruption ---


def test_an_interruption_keeps_what_is_finished(model, found, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["relation"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return relation_effects(*args, **kwargs)

    monkeypatch.setattr(find_module, "relation_effects", interrupted)
    with pytest.warns(UserWarning, match="universal_heads was interrupted: 2 of 3 relations are finished"):
        part = universal_heads(model, NAMES, 4, generator=seeded(), **SMALL)
    assert not part.complete
    assert part.relations == NAMES[:2]
    assert torch.equal(part.aie, found.aie[:2])
    calls[:] = ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        universal_heads(model, NAMES, 4, generator=seeded(), **SMALL)


def test_a_relation_with_some_of_its_prompts_does_not_count_as_finished(model, monkeypatch):
    original = find.indirect_effects
    monkeypatch.setattr(
        find, "indirect_effects", lambda *a, **k: dataclasses.replace(original(*a, **k), complete=False)
    )
    with pytest.raises(KeyboardInterrupt):
        universal_heads(model, NAMES, 4, generator=seeded(), **SMALL)


# --- refusals ---


@pytest.mark.parametrize(
    ("relations", "n", "more", "message"),
    [
        ([], 2, {}, "expected at least one relation, got none; see fvlens.list_relations()."),
        ("antonym", 2, {}, "expected a sequence of relations, got a single one; put it into a list."),
        (["antonim"], 2, {}, "no relation named 'antonim'"),
        (["plural", "antonym", "plural"], 2, {}, "two relations are named 'plural'; names must be unique"),
        (["plural"], 0, {}, "universal_heads: n: expected 1 to 12 (all heads), got 0."),
        (["plural"], 13, {}, "universal_heads: n: expected 1 to 12 (all heads), got 13."),
        (["plural"], 2, {"labels": "true"}, "universal_heads: labels='true'; expected one of permuted, random."),
        (["plural"], 2, {"template": "nosuch"}, "no template named 'nosuch'"),
        (["plural"], 2, {"n_shots": 0}, "universal_heads: n_shots: expected at least 1, got 0."),
        (["plural"], 2, {"n_prompts": 0}, "universal_heads: n_prompts: expected at least 1, got 0."),
        (["plural"], 2, {"n_corrupted": 1}, "universal_heads: n_corrupted: expected at least 2, got 1."),
        (["antonym"], 2, {"n_shots": 99}, "relation 'antonym' is too small: 99 demonstrations wanted, but only 76"),
        (["plural"], 2, {}, "the model beats the majority label on none of the 1 relations, among them plural (0.00"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(unchecked, tiny, relations, n, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        universal_heads(tiny, relations, n, generator=seeded(), **(SMALL | more))


def test_a_relation_too_small_to_split_is_refused_before_anything_runs(tiny):
    five = Relation("five", tuple(Pair(f"a{i}", f"b{i}") for i in range(5)))
    with pytest.raises(ValueError, match=re.escape("split: expected a relation of at least 6 pairs, got 5 in 'five'")):
        universal_heads(tiny, ["plural", five], 2, generator=seeded(), **SMALL)


# --- files ---


def test_a_saved_set_comes_back_as_it_was(model, found, tmp_path):
    path = found.save(tmp_path / "heads.json")
    assert list(tmp_path.iterdir()) == [path]
    for loaded in (UniversalHeads.load(path), UniversalHeads.load(str(path), model=model)):
        for field in dataclasses.fields(found):
            before, after = getattr(found, field.name), getattr(loaded, field.name)
            same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
            assert same, field.name
        assert loaded.heads == found.heads
    assert json.loads(path.read_text())["heads"] == [list(head) for head in found.heads]


def test_saving_replaces_a_file_at_once(found, tmp_path, monkeypatch):
    path = tmp_path / "heads.json"
    path.write_text("old")

    def broken(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files._write.os, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            found.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"save: folder .*none does not exist; create it first\."):
        found.save(tmp_path / "none" / "heads.json")


def change(**fields):
    return lambda content: content | fields


def without(name):
    return lambda content: {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: [1, 2], "not written by fvlens (format None, expected 'fvlens-heads-1')."),
        (change(format="other"), "not written by fvlens (format 'other', expected 'fvlens-heads-1')."),
        (without("aie"), "the field 'aie' is missing."),
        (without("majority"), "the field 'majority' is missing."),
        (change(n="2"), "damaged field 'n' (expected int, got str)."),
        (change(n=True), "damaged field 'n' (expected int, got bool)."),
        (change(complete=1), "damaged field 'complete' (expected bool, got int)."),
        (change(n=7), "n: expected 1 to 6 (all heads), got 7."),
        (change(relations=["r0", 1, "r2", "r3"]), "damaged field 'relations' (expected a list of texts)."),
        (change(relations=["r0"]), "aie: expected shape (1, 2, 3), got (4, 2, 3)."),
        (change(data_hashes=["x"]), "expected one data hash a relation, got 1 for 4 relations."),
        (change(aie=[[0.1], [0.2, 0.3]]), "damaged field 'aie' ("),
        (change(aie="text"), "damaged field 'aie' ("),
        (change(icl_top1=[0.5, 0.5]), "icl_top1: expected shape (4,), got (2,)."),
        (change(majority=[0.1, 0.1, 0.1, 1e39]), "majority holds NaN or infinite values."),
        (change(majority=[1.0] * 4), "the model beats the majority label on none of the 4 relations"),
        (change(fingerprint={"name": "x"}), "damaged field 'fingerprint' (fingerprint: expected the fields"),
        (
            change(majority=[0.1, 0.5, 0.6, True]),
            "'majority' (numbers: expected a finite number, got True",
        ),
        (change(majority=[0.1, 0.5, 0.6, -0.1]), "majority: expected numbers of at least 0, got -0.1."),
        (change(icl_top1=[0.9, 0.5, 0.4, 1.5]), "icl_top1: expected shares of at most 1, got 1.5."),
        (change(relations=["r0", "r0", "r2", "r3"]), "expected each relation once, got r0, r0, r2, r3."),
        (change(labels="wrong"), "labels='wrong'; expected one of permuted, random."),
        (change(n_shots=0), "n_shots: expected at least 1, got 0."),
        (change(heads=[[0, 0], [0, 1]]), "the heads do not follow from the effects beside them"),
    ],
)
def test_damaged_files_are_refused(unchecked, tmp_path, damage, message):
    path = made().save(tmp_path / "heads.json")
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        UniversalHeads.load(path)
    assert str(error.value).startswith("heads.json: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "heads.json: not a JSON file, or a truncated one ("),
        (b'{"format": "fvlens-heads-1", "n"', "heads.json: not a JSON file, or a truncated one ("),
        (b"\xff\xfe\x00", "heads.json: not a JSON file, or a truncated one ("),
        (b"[NaN]", "heads.json: not a JSON file, or a truncated one (NaN is not a number)."),
        (b"[" * 100_000, "heads.json: not a JSON file, or a truncated one ("),
    ],
)
def test_files_that_are_no_json_are_refused(tiny, tmp_path, data, message):
    path = tmp_path / "heads.json"
    path.write_bytes(data)
    for read in (UniversalHeads.load, lambda path: read_heads(path, tiny)):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(path)


def test_missing_files_and_folders_are_refused(tiny, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        message = re.escape(f"no file of heads at {path}.")
        with pytest.raises(ValueError, match=message):
            UniversalHeads.load(path)
        with pytest.raises(ValueError, match=message):
            read_heads(path, tiny)


def test_a_set_of_a_part_of_the_relations_says_so_in_its_file_and_when_it_is_read(tiny, tmp_path):
    mark = fingerprint(tiny)
    aie = np.random.default_rng(0).normal(size=(4, mark.n_layers, mark.n_heads))
    part = made(aie=aie, complete=False, fingerprint=mark)
    path = part.save(tmp_path / "heads.json")
    assert json.loads(path.read_text())["complete"] is False
    said = r"heads\.json: the search for these heads was interrupted after 4 relations, .* find them again"
    with pytest.warns(UserWarning, match=said):
        assert not UniversalHeads.load(path).complete
    with pytest.warns(UserWarning, match=said):
        given = read_heads(path, tiny)
    assert "; the search for these heads was interrupted after 4 relations" in given.note
    assert set(part.to_dataframe()["complete"]) == {False} and "complete" not in made().to_dataframe()
    assert "interrupted" in part.plot().layout.title.text
    assert made().remark == ""


def test_a_set_of_another_model_is_refused(tiny, found, tmp_path):
    path = found.save(tmp_path / "heads.json")
    message = "heads.json: the heads were found on model 'rel-small', not on this one (file / model: weights: "
    with pytest.raises(ValueError, match=re.escape(message)):
        UniversalHeads.load(path, model=tiny)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_heads(path, tiny)


def test_heads_are_read_from_a_set_and_from_plain_lists(model, tiny, found, tmp_path):
    given = read_heads(found.save(tmp_path / "heads.json"), model)
    assert list(given.heads) == found.heads
    assert given.path == str(tmp_path / "heads.json")
    assert given.note == "universal heads of this model, 3 relations, permuted labels"
    hashes = {given.hash}
    for content in ([[2, 3], [0, 1]], {"heads": [[2, 3], [0, 1]]}, {"heads": [[2, 3], [0, 1]], "model": "x"}):
        (tmp_path / "plain.json").write_text(json.dumps(content))
        plain = read_heads(str(tmp_path / "plain.json"), tiny)
        assert plain.heads == (Head(2, 3), Head(0, 1))
        assert plain.note == "a plain list; it does not say which model the heads are of"
        hashes.add(plain.hash)
    assert len(hashes) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in hashes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected [[layer, head], ...], an object with such a list under"),
        ({}, "or a file written by `fvlens universal`; got {}."),
        ({"heads": 3}, 'got {"heads": 3}.'),
        (7, "got 7."),
        ([[0, 1], [3, 0]], "heads: L3H0 does not exist: the model has layers 0..2 and heads 0..3."),
        ([[0, 1], [0, 1]], "heads: L0H1 is listed twice; give each head once."),
        ([[0, 1.5]], "heads: expected (layer, head) pairs of integers, got [0, 1.5]; by name a head is 'L1H2'."),
        ([[0, 1, 0.3]], "heads: expected (layer, head) pairs of integers, got [0, 1, 0.3]; by name a head is 'L1H2'."),
        (["L0"], "heads: expected (layer, head) pairs of integers, got 'L0'; by name a head is 'L1H2'."),
        ({"format": "other", "heads": [[0, 1]]}, "not written by fvlens (format 'other'"),
    ],
)
def test_lists_that_do_not_fit_are_refused(unchecked, tiny, tmp_path, content, message):
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_heads(path, tiny)
    assert str(error.value).startswith("plain.json: ")


def test_an_own_template_survives_the_file(tmp_path):
    own = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs:\n")
    path = made(template=own).save(tmp_path / "heads.json")
    assert UniversalHeads.load(path).template == own
    content = json.loads(path.read_text())
    assert (content["template"], content["template_text"]) == ("mine", own.to_json())
    del content["template_text"]  # as fvlens 0.1 wrote it
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"heads.json: damaged field 'template' \(no template named 'mine'; "):
        UniversalHeads.load(path)
    path.write_text(json.dumps(content | {"template": "arrow"}))
    assert UniversalHeads.load(path).template == TEMPLATES["arrow"]
