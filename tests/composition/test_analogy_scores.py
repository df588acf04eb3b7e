"""Analogies scored under composite vectors, with controls and leaks; composites of the library, and single answers."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import seeded
from torch.nn import functional as F

from composition.whole_passes import NAMES, naive_log_prob
from fvlens import VectorSet, evaluate, fingerprint, inject
from fvlens.activations import mean_head_activations
from fvlens.attribution import indirect_effects
from fvlens.composition import (
    CONTROLS,
    AnalogyEvaluation,
    Scored,
    Seen,
    _starts,
    answer_analogy,
    evaluate_analogies,
    fit_composite,
    leaks,
    library_analogies,
    library_composite,
    mcnemar,
    source_scores,
)
from fvlens.evaluation import SCALES
from fvlens.prompts import build_prompts, render_prompts
from fvlens.relations import Analogy, Pair, held_out, load_relation, make_analogies
from fvlens.training import finetune_many
from fvlens.vectors import FunctionVector, function_vector


def test_a_library_composite_from_zero_acts_a_third_of_the_way_up(model):
    """On a model where a third is not a half."""
    assert model.cfg.n_layers == 4
    how = dict(names=SMALL, map="none", start="zero", n_train=2, epochs=1, generator=seeded(), progress=False)
    assert library_composite(model, **how).basis.layer == 1


def test_a_basis_starts_from_function_vectors(model, unchecked, monkeypatch):
    """Of the same pairs, heads ranked on some, at the layer that is best for these together, each with its best scale
    there; every step by the façade."""
    monkeypatch.setattr(_starts, "N_RANKED", 2)
    names, g = ["animal-home", "plural", "country-capital"], seeded(3)
    splits = {name: held_out().split(load_relation(name)) for name in names}
    short = {name: dataclasses.replace(split, train=split.train[:6]) for name, split in splits.items()}

    def prompts(name, n_prompts, labels="true"):
        return build_prompts(
            model, short[name].train, queries=short[name].valid, n_prompts=n_prompts, n_shots=6, labels=labels,
            template="arrow", generator=g,
        )  # fmt: skip

    means, effects = {}, []
    for name in (names[0], names[2]):
        means[name] = mean_head_activations(model, prompts(name, 20), progress=False)
        effects.append(indirect_effects(model, prompts(name, 10, "permuted"), means[name], progress=False).aie)
    means[names[1]] = mean_head_activations(model, prompts(names[1], 20), progress=False)
    best = torch.stack(effects).mean(dim=0).flatten().argsort(descending=True)[:10].tolist()
    heads = [divmod(i, model.cfg.n_heads) for i in best]

    scores = {}  # by relation, layer and scale
    for name, layer, scale in itertools.product(names, range(model.cfg.n_layers), SCALES):
        vector = function_vector(model, means[name], heads=heads, layer=layer) * scale
        found = evaluate(model, short[name].valid, vector=vector, template="arrow", generator=seeded())
        scores[name, layer, scale] = (found.top1, found.probability, -abs(scale - 1))

    def at(name, layer):
        return max(SCALES, key=lambda scale: scores[name, layer, scale])

    def together(layer):
        return sum(scores[name, layer, at(name, layer)][0] for name in (names[0], names[2]))

    layer = max(range(model.cfg.n_layers), key=together)
    starts = {name: function_vector(model, means[name], heads=heads, layer=layer) * at(name, layer) for name in names}
    how = dict(epochs=1, template="arrow", progress=False)
    expected = finetune_many(model, short, init=starts, generator=g, **how).vectors
    made = library_composite(model, names=names, n_train=6, generator=seeded(3), **how).basis
    assert made.layer == layer and len({float(one.norm()) for one in starts.values()}) == 3
    assert made.names == expected.names
    torch.testing.assert_close(made.matrix, expected.matrix, rtol=0, atol=1e-5)
    again = library_composite(model, names=names[:1], layer=0, n_train=6, generator=seeded(3), **how)
    assert again.basis.layer == 0
    zero = finetune_many(model, short, init="zero", layer=model.cfg.n_layers // 3, generator=seeded(3), **how).vectors
    made = library_composite(model, names=names, start="zero", n_train=6, generator=seeded(3), **how).basis
    torch.testing.assert_close(made.matrix, zero.matrix, rtol=0, atol=0)
    with pytest.raises(ValueError, match="library_composite: start='random'; expected one of zero, vector"):
        library_composite(model, names=names, start="random", generator=seeded())


# Evaluation


def test_every_way_is_what_whole_passes_give(tiny, basis, fitted, test_set):
    found = evaluate_analogies(tiny, test_set, fitted, generator=seeded(), progress=False)
    assert set(found.scored) == {
        f"{way}, {label}"
        for way in ("unsteered", "composite", "uniform", "best single", "random", "own vector")
        for label in ("zero-shot", "one-shot")
    }
    scores = source_scores(tiny, basis, [one.source_pair for one in test_set]).log_probs
    for i, one in enumerate(test_set[:4]):
        vectors = {
            "unsteered": torch.zeros(tiny.cfg.d_model),
            "composite": fitted.vector_for(tiny, one.a, one.b).vector,
            "uniform": basis.matrix.mean(dim=0),
            "best single": basis.matrix[scores[i].argmax()],
            "own vector": basis[one.target_relation].vector,
        }
        for way, vector in vectors.items():
            for label, shown in (("zero-shot", ()), ("one-shot", (one.source_pair,))):
                way_scored = found[f"{way}, {label}"]
                log_prob, logits = naive_log_prob(tiny, one.target_pair, shown, vector.double())
                wanted = render_prompts(tiny, [one.target_pair], [shown], n_shots=len(shown)).answer_tokens[0, 0]
                assert way_scored.log_probs[i].item() == pytest.approx(log_prob, rel=1e-4)
                assert int(way_scored.ranks[i]) == int((logits > logits[wanted]).sum())
                assert bool(way_scored.right[i]) == (int(way_scored.ranks[i]) == 0)
                foils = [naive_log_prob(tiny, Pair(one.c, f), shown, vector.double())[0] for f in one.foils]
                assert way_scored.chosen[i] == (log_prob > max(foils))


def test_random_vectors_have_the_composites_length(tiny, fitted, test_set):
    from fvlens.composition._evaluate import _vectors

    scores = source_scores(tiny, fitted.basis, [one.source_pair for one in test_set]).log_probs
    given = _vectors(test_set, fitted, scores, CONTROLS, seeded())
    torch.testing.assert_close(given["random"].norm(dim=1), given["composite"].norm(dim=1))
    assert F.cosine_similarity(given["random"], given["composite"]).abs().max() < 0.9


def test_alternatives_count_as_right_and_pairs_can_be_foils(tiny):
    query = Pair("tree", "branch")
    _, logits = naive_log_prob(tiny, query, (), 0.0)
    best = tiny.tokenizer.decode([int(logits.argmax())]).strip()
    one = Analogy("hand", "finger", *query)
    two = dataclasses.replace(one, alternatives=(best,), foils=(Pair("tree", "leaf"), Pair("cat", "dog")))
    found = evaluate_analogies(tiny, [one, two], settings=["zero_shot"], generator=seeded(), progress=False)
    way = found["unsteered, zero-shot"]
    assert way.right.tolist() == [False, True] and way.ranks[0] == way.ranks[1] > 0
    own, leaf, dog = (naive_log_prob(tiny, Pair(*p), (), 0.0)[0] for p in (query, ("tree", "leaf"), ("cat", "dog")))
    assert way.chosen == (None, own > max(leaf, dog))


def test_demonstrations_make_a_few_shot_way(tiny, test_set):
    pairs = {name: load_relation(name).pairs for name in NAMES}
    found = evaluate_analogies(
        tiny, test_set, settings=[], demonstrations=pairs, n_shots=3, generator=seeded(), progress=False
    )
    assert list(found.scored) == ["unsteered, 3-shot"]
    short = {name: load_relation(name).pairs[:2] for name in NAMES}
    with pytest.raises(ValueError, match=r"3 demonstrations of '.*' wanted for .* but there are [12]"):
        evaluate_analogies(tiny, test_set, demonstrations=short, n_shots=3, generator=seeded(), progress=False)


def test_an_own_vector_is_scored_only_where_it_is_in_the_basis(tiny, fitted):
    near = make_analogies([load_relation("clothing-body")], kind="near", n=3, generator=seeded())
    found = evaluate_analogies(tiny, near, fitted, generator=seeded(), progress=False)
    assert "own vector, zero-shot" not in found.scored and "uniform, one-shot" in found.scored


def test_a_leak_is_refused_unless_allowed(tiny, fitted, train, test_set):
    one = train[0]
    reverse = Analogy(one.b, one.a.upper(), "unseen", "word")
    assert leaks(fitted.seen, test_set) == []
    assert leaks(fitted.seen, [one])[:1] == [f"the pair {one.a} : {one.b}"]
    assert leaks(fitted.seen, [reverse]) == [f"the pair {one.b} : {one.a.upper()}, reversed"]
    assert f"the relation {test_set[0].source_relation}" in leaks(fitted.seen, test_set, unseen="relations")
    for analogies, options in (([one], {}), ([reverse], {}), (test_set, {"unseen": "relations"})):
        with pytest.raises(ValueError, match=r"leaks, the first: .* took part in making the composite"):
            evaluate_analogies(tiny, analogies, fitted, generator=seeded(), progress=False, **options)
    evaluate_analogies(tiny, [one], fitted, allow_leak=True, generator=seeded(), progress=False)


def test_pairs_of_the_basis_are_known_to_the_leak_check(tiny, basis, train, unchecked):
    fit = fit_composite(
        tiny, basis, train, map="none", basis_pairs=[("knee", "cap")], generator=seeded(), progress=False
    )
    assert leaks(fit.seen, [Analogy("knee", "cap", "x", "y")]) == ["the pair knee : cap"]
    assert fit.seen.relations == {*NAMES}
    with pytest.raises(ValueError, match="unseen='words'; expected pairs or relations"):
        leaks(Seen(), train, unseen="words")


def test_bad_requests_are_refused(tiny, test_set, unchecked):
    with pytest.raises(ValueError, match="expected at least one analogy, got none"):
        evaluate_analogies(tiny, [], generator=seeded())
    with pytest.raises(ValueError, match="setting 'icl'; expected some of zero_shot, one_shot"):
        evaluate_analogies(tiny, test_set, settings=["icl"], generator=seeded())
    with pytest.raises(ValueError, match="control 'zero'; expected some of uniform, best single"):
        evaluate_analogies(tiny, test_set, controls=["zero"], generator=seeded())


# Results


def scored(name, right):
    right = torch.tensor(right)
    return Scored(name, (~right).long(), right, torch.zeros(len(right)), (True,) * len(right))


def test_mcnemar_is_the_exact_binomial_test(unchecked):
    a = torch.tensor([True] * 9 + [False] * 2 + [True] * 5)
    b = torch.tensor([False] * 9 + [True] * 2 + [True] * 5)
    p_value, one, two = mcnemar(a, b)
    assert (one, two) == (9, 2)
    assert p_value == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert mcnemar(a, a) == (1.0, 0, 0)
    with pytest.raises(ValueError, match="expected two of one length, got 3 and 2"):
        mcnemar(a[:3], b[:2])


def test_results_are_summed_by_kind_and_compared_in_pairs():
    analogies = tuple(Analogy("a", "b", "c", "d", kind=kind) for kind in ("near", "near", "far", "far"))
    found = AnalogyEvaluation(
        analogies, {"x": scored("x", [True, True, True, False]), "y": scored("y", [True, True, False, False])}
    )
    assert (found.top1("x"), found.top1("x", kind="far"), found.top1("y", kind="far")) == (0.75, 0.5, 0)
    far = found.compare("x", "y", kind="far")
    assert far.difference.mean == 0.5 and (far.only_first, far.only_second) == (1, 0) and far.p_value == 1
    assert found.compare("x", "y").difference.mean == 0.25
    frame = found.summary().set_index(["kind", "way"])
    assert frame.loc[("near", "y"), "top1"] == 1 and frame.loc[("far", "x"), "mean_rank"] == 0.5
    assert len(found.to_dataframe()) == 8 and found.choice("x") == 1
    low, high, _ = found.interval("x")
    assert low <= 0.75 <= high
    figure = found.plot(kind="far")
    assert list(figure.layout.yaxis.ticktext) == ["x", "y"] and figure.layout.title.text == "Far analogies"
    assert found.plot().layout.title.text == "Analogies"
    with pytest.raises(ValueError, match="no way 'z'; there are x, y"):
        found["z"]
    alone = AnalogyEvaluation(analogies[:2], {"x": scored("x", [True, True])})
    with pytest.raises(ValueError, match="no analogy of kind 'far' among these 2"):
        alone.top1("x", kind="far")


def test_an_injected_composite_acts_like_any_vector(tiny, fitted):
    vector = fitted.vector_for(tiny, "hand", "finger")
    prompts = render_prompts(tiny, [Pair("tree", "branch")], [()], n_shots=0)
    with torch.no_grad(), inject(tiny, vector):
        steered = tiny(prompts.tokens)[0, -1]
    _, expected = naive_log_prob(tiny, Pair("tree", "branch"), (), vector.vector.double())
    torch.testing.assert_close(steered, expected)


# From the library, and single answers

SMALL = ("body-part", "tool-part", "vehicle-part")


@pytest.fixture(scope="module")
def small(tiny):
    return library_composite(
        tiny, names=SMALL, map="diagonal", gate="learned", setting="one_shot", n_analogies=20, epochs=1,
        generator=seeded(), progress=False,
    )  # fmt: skip


def test_a_library_composite_has_seen_no_test_pair(tiny, small):
    assert small.basis.names == SMALL and small.basis.layer == tiny.cfg.n_layers // 3
    assert small.map == "diagonal" and small.gate("one_shot") is not None and small.gate("zero_shot") is None
    division = held_out()
    for name in SMALL:
        split = division.split(load_relation(name))
        assert {tuple(pair) for pair in split.train[:20]} <= small.seen.pairs
        assert not {tuple(pair) for pair in split.test} & small.seen.pairs
    test_set = library_analogies("test", n=12, names=SMALL, generator=seeded())
    assert leaks(small.seen, test_set) == []
    again = library_composite(
        tiny, names=SMALL, map="diagonal", gate="learned", setting="one_shot", n_analogies=20, epochs=1,
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert torch.equal(again.basis.matrix, small.basis.matrix) and again.gates == small.gates


def test_library_analogies_are_half_near_half_far_and_of_their_part(unchecked):
    made = library_analogies("valid", n=40, generator=seeded())
    assert [one.kind for one in made] == ["near"] * 20 + ["far"] * 20
    for kind in ("near", "far"):
        assert [one.kind for one in library_analogies("valid", n=7, kind=kind, generator=seeded())] == [kind] * 7
    with pytest.raises(ValueError, match="kind='both'; expected near, far or None"):
        library_analogies("valid", n=7, kind="both", generator=seeded())
    division = held_out()
    for one in made:
        valid = division.split(load_relation(one.target_relation)).valid
        assert one.target_pair in valid
        if one.kind == "far":
            source, target = load_relation(one.source_relation), load_relation(one.target_relation)
            assert (source.domain, target.domain) not in division.domain_pairs[source.family]
    test_parts = library_analogies("test", n=500, generator=seeded())
    fitted = {
        tuple(pair)
        for name in division.relations()
        for part in ("train", "valid")
        for pair in getattr(division.split(load_relation(name)), part)
    }
    assert leaks(Seen(pairs=frozenset(fitted)), test_parts) == []
    with pytest.raises(ValueError, match="part='all'; expected train, valid or test"):
        library_analogies("all", n=4, generator=seeded())


def test_answers_are_those_of_whole_passes(tiny, small):
    found = answer_analogy(tiny, small, "hand", "finger", "tree")
    vector = small.vector_for(tiny, "hand", "finger").vector
    for name, shown, added in (
        ("unsteered, zero-shot", [], torch.zeros_like(vector)),
        ("composite, one-shot", [Pair("hand", "finger")], vector),
        ("gated composite, one-shot", [Pair("hand", "finger")], found.gates["one_shot"] * vector),
    ):
        logits = naive_log_prob(tiny, Pair("tree", "x"), shown, added, layer=small.basis.layer)[1]
        best = logits.float().softmax(-1).max()
        word, chance = found.answers[name][0]
        assert chance == pytest.approx(float(best), abs=1e-5)
        assert word == tiny.tokenizer.decode([int(logits.argmax())]).strip()
    assert found.answer == found.answers["gated composite, one-shot"][0][0]
    assert found.explanation.names == SMALL


def test_choices_are_ranked_by_their_likelihood(tiny, small):
    words = ["branch", "forest", "root"]
    found = answer_analogy(tiny, small, "hand", "finger", "tree", choices=words).answers["unsteered, one-shot"]
    logs = torch.tensor([
        naive_log_prob(tiny, Pair("tree", word), [Pair("hand", "finger")], torch.zeros(tiny.cfg.d_model))[0]
        for word in words
    ])  # fmt: skip
    assert dict(found) == pytest.approx(dict(zip(words, logs.softmax(0).tolist(), strict=True)), abs=1e-5)
    assert [chance for _, chance in found] == sorted((chance for _, chance in found), reverse=True)
    with pytest.raises(ValueError, match="expected at least two different choices"):
        answer_analogy(tiny, small, "hand", "finger", "tree", choices=["branch"])


def test_relations_that_gain_come_first_with_their_weights(model, real):
    made, asked = real
    found = evaluate_analogies(model, asked, made, generator=seeded(), progress=False)
    ways = ("own vector, zero-shot", "unsteered, zero-shot")
    table = found.by_relation(*ways)
    assert table["gain"].is_monotonic_decreasing and table["n"].sum() == len(asked) and table["gain"].iloc[0] > 0
    row = table.iloc[0]
    own = [i for i, one in enumerate(asked) if one.target_relation == row["relation"]]
    assert row[ways[0]] == pytest.approx(found[ways[0]].right[own].double().mean().item())
    mean = torch.stack([made.weights(model, asked[i].a, asked[i].b) for i in own]).mean(dim=0)
    assert row["heaviest"] == NAMES[int(mean.argmax())]
    assert row["weight"] == pytest.approx(float(mean.max()), abs=1e-5)
    assert row["own_weight"] == pytest.approx(float(mean[NAMES.index(row["relation"])]), abs=1e-5)


# Ties


def test_of_two_equal_logits_the_smaller_id_is_right(tied):
    """In scores, in the choice of the best epoch, in gates and in answers."""
    from fvlens.composition._fit_gate import _hits
    from fvlens.composition._queries import Queries

    mark = fingerprint(tied)
    made = [FunctionVector(torch.randn(32, generator=seeded(i)), 0, (), name, mark) for i, name in enumerate("ab")]
    vectors = VectorSet(tuple(made))
    known = [Analogy("icy", "cold", "hot", "cold"), Analogy("tiny", "small", "big", "small")]
    other = dataclasses.replace(known[1], alternatives=("cold",))
    found = evaluate_analogies(tied, [*known, other], settings=["zero_shot"], generator=seeded(), progress=False)
    way = found["unsteered, zero-shot"]
    assert way.ranks.tolist() == [0, 1, 1]
    assert way.right.tolist() == [True, False, True]

    queries = Queries(tied, [one.target_pair for one in known], layer=0)
    assert _hits(tied, queries, torch.zeros(2, 32)).tolist() == [True, False]

    fit = fit_composite(tied, vectors, known[:1], map="full", valid=known, epochs=1, generator=seeded(), progress=False)
    assert list(fit.history.valid_top1) == [0.5, 0.5]

    answers = answer_analogy(tied, fit, "icy", "cold", "big", n=2).answers["unsteered, zero-shot"]
    assert [word for word, _ in answers] == ["cold", "small"] and answers[0][1] == answers[1][1]
