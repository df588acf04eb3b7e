"""Composite vectors: rules, source scores, the map's training, explanations, evaluation with controls, leaks."""

import dataclasses
import functools
import json
import math
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import brentq, minimize
from torch.nn import functional as F

from fvlens import VectorSet, fingerprint, inject
from fvlens.composition import (
    CONTROLS,
    MAPS,
    RULES,
    SIGNALS,
    AnalogyEvaluation,
    CompositeMap,
    Gate,
    Scored,
    Seen,
    answer_analogy,
    basis_study,
    best_single_weights,
    default_rank,
    entmax_weights,
    evaluate_analogies,
    fit_composite,
    fit_gate,
    gate_signals,
    leaks,
    library_analogies,
    library_composite,
    mcnemar,
    softmax_weights,
    source_scores,
    sparsemax_weights,
    top_k_weights,
    uniform_weights,
    weights_by,
)
from fvlens.composition._affine import distinct, recognition
from fvlens.composition._gate import GATE_FORMAT
from fvlens.composition._map import MAP_FORMAT
from fvlens.composition._sensitivity import _noise
from fvlens.files import read_tensors, write_tensors
from fvlens.find import find_vector
from fvlens.prompts import TEMPLATES, Template, render_prompts
from fvlens.relations import Analogy, Pair, held_out, load_relation, make_analogies
from fvlens.training import Training, finetune_many
from fvlens.vectors import FunctionVector

NAMES = ("body-part", "tool-part", "vehicle-part", "animal-french", "tool-french")
LAYER = 0


@pytest.fixture(scope="module")
def tiny():
    return random_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def basis(tiny):
    g = seeded(3)
    mark = fingerprint(tiny)
    return VectorSet(
        tuple(FunctionVector(2 * torch.randn(tiny.cfg.d_model, generator=g), LAYER, (), name, mark) for name in NAMES)
    )


def parts(start, end):
    return [dataclasses.replace(load_relation(name), pairs=load_relation(name).pairs[start:end]) for name in NAMES]


@pytest.fixture(scope="module")
def train():
    return make_analogies(parts(0, 10), kind="far", n=24, generator=seeded(1))


@pytest.fixture(scope="module")
def test_set():
    return make_analogies(parts(10, 20), kind="far", n=10, generator=seeded(2), n_foils=2)


@pytest.fixture(scope="module")
def fitted(tiny, basis, train):
    return fit_composite(tiny, basis, train, map="full", epochs=3, generator=seeded(), progress=False)


# Rules

rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


@given(scores=rows)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("rule", [*RULES])
def test_weights_are_a_distribution_and_keep_the_order(rule, scores):
    scores = torch.tensor(scores, dtype=torch.float64)
    if rule == "top_k" and len(scores) < 5:
        return
    weights = weights_by(rule, scores)
    assert bool((weights >= 0).all())
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    order = scores.argsort(descending=True).tolist()
    assert all(weights[i] >= weights[j] - 1e-12 for i, j in pairwise(order) if scores[i] > scores[j])


@given(scores=rows)
@settings(max_examples=60, deadline=None)
def test_sparsemax_and_entmax_meet_their_conditions(scores):
    """Both are ``max(s - t, 0)`` to a power with the one t that makes the sum 1, found here by bisection."""
    scores = torch.tensor(scores, dtype=torch.float64)
    for rule, at in (
        (sparsemax_weights, lambda t: (scores - t).clamp(min=0)),
        (entmax_weights, lambda t: (scores / 2 - t).clamp(min=0) ** 2),
    ):
        threshold = brentq(lambda t, at=at: float(at(t).sum()) - 1, -30.0, 30.0)
        torch.testing.assert_close(rule(scores), at(threshold), rtol=0, atol=1e-7)


def test_rules_by_hand():
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(uniform_weights(scores), torch.full((2, 3), 1 / 3))
    assert best_single_weights(scores)[0].tolist() == [1, 0, 0]
    two = top_k_weights(scores, k=2)[0]
    assert two[1] == 0 and two[0] / two[2] == pytest.approx(math.e, rel=1e-5)
    assert sparsemax_weights(scores)[0].tolist() == [1, 0, 0]  # a lead of 1 takes all
    torch.testing.assert_close(softmax_weights(scores), scores.softmax(-1))


@pytest.mark.parametrize("rule", ["softmax", "sparsemax", "entmax", "top_k"])
def test_rules_have_gradients(rule):
    scores = torch.randn(3, 7, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: weights_by(rule, s), scores)


def test_bad_rules_are_refused(unchecked):
    with pytest.raises(ValueError, match="no rule named 'hard'; expected one of softmax, sparsemax"):
        weights_by("hard", torch.zeros(3))
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"expected k in 1..3 \(the size of the basis\), got {k}"):
            top_k_weights(torch.zeros(3), k=k)


# Source scores


def naive_log_prob(model, query, shown, vector, layer=LAYER):
    """Mean log-probability per token of the answer by whole passes under hooks, one token after another."""
    prompts = render_prompts(model, [query], [shown], n_shots=len(shown))
    answer = prompts.answer_tokens[0].tolist()
    tokens, total, last = prompts.tokens, 0.0, prompts.tokens.shape[1] - 1
    logits = []
    for token in answer:

        def add(resid, hook):
            resid = resid.clone()
            resid[:, last] += vector
            return resid

        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            logits.append(model(tokens)[0, -1])
        total += logits[-1].log_softmax(-1)[token].item()
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    return total / len(answer), logits[0]


def test_source_scores_are_those_of_whole_passes(tiny, basis):
    pairs = [Pair("hand", "finger"), Pair("hammer", "unforeseeable handle"), Pair("hand", "finger")]
    found = source_scores(tiny, basis, pairs)
    assert found.log_probs.shape == (3, len(basis))
    for i, pair in enumerate(pairs):
        assert found.unsteered[i].item() == pytest.approx(naive_log_prob(tiny, pair, (), 0.0)[0], rel=1e-5)
        for k, vector in enumerate(basis):
            assert found.log_probs[i, k].item() == pytest.approx(
                naive_log_prob(tiny, pair, (), vector.vector.double())[0], rel=1e-5
            )
    assert torch.equal(found.log_probs[0], found.log_probs[2])


@pytest.mark.parametrize("path", ["kv", "naive"])
def test_source_scores_are_the_same_by_every_path(tiny, basis, path):
    pairs = load_relation("body-part").pairs[:3]
    fast = source_scores(tiny, basis, pairs)
    slow = source_scores(tiny, basis, pairs, path=path)
    torch.testing.assert_close(fast.log_probs, slow.log_probs)
    torch.testing.assert_close(fast.unsteered, slow.unsteered)


def test_source_scores_want_pairs_and_their_own_model(tiny, basis, model):
    with pytest.raises(ValueError, match="expected at least one pair, got none"):
        source_scores(tiny, basis, [])
    with pytest.raises(ValueError, match=r"was made on model .*, not on this one"):
        source_scores(model, basis, [("a", "b")])


# Training


def test_without_a_map_weights_are_the_softmax_of_the_scores(tiny, basis, train):
    plain = fit_composite(tiny, basis, train, map="none", generator=seeded(), progress=False)
    scores = source_scores(tiny, basis, [("hand", "finger")]).log_probs[0]
    torch.testing.assert_close(plain.weights(tiny, "hand", "finger"), scores.softmax(-1))
    assert plain.strength == 1 and plain.history.train_loss[1:] == ()
    likely = dataclasses.replace(plain, scores="probability")
    torch.testing.assert_close(likely.weights(tiny, "hand", "finger"), scores.exp().softmax(-1))


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("setting", ["zero_shot", "one_shot"])
def test_training_lowers_the_loss_of_its_own_formula(tiny, basis, train, map, setting):
    """The recorded losses are those of whole passes under the vector that ``vector_for`` gives."""
    fits = [
        fit_composite(
            tiny, basis, train[:6], map=map, setting=setting, epochs=epochs, learn_strength=True, rank=2, l2=0.0,
            batch_size=3, lr=0.05, generator=seeded(), progress=False,
        )
        for epochs in (0, 25)
    ]  # fmt: skip
    losses = []
    for fit in fits:
        total = 0.0
        for one in train[:6]:
            vector = fit.vector_for(tiny, one.a, one.b)
            shown = (one.source_pair,) if setting == "one_shot" else ()
            n = len(render_prompts(tiny, [one.target_pair], [()], n_shots=0).answer_tokens[0])
            total -= n * naive_log_prob(tiny, one.target_pair, shown, vector.vector.double())[0]
        losses.append(total / 6)
    assert losses[0] == pytest.approx(fits[0].history.train_loss[0], rel=1e-4)
    assert losses[1] < losses[0] - 1e-3
    assert (fits[1].strength != 1) == (map != "transfer")  # T has a scale of its own


def test_scores_that_are_there_already_change_nothing(tiny, basis, train, test_set, fitted):
    given = source_scores(tiny, basis, [one.source_pair for one in train])
    shared = dict(map="diagonal", epochs=2, progress=False)
    plain, shortened = (
        fit_composite(tiny, basis, train, generator=seeded(), **shared, **more) for more in ({}, {"sources": given})
    )
    assert torch.equal(plain.matrix, shortened.matrix)
    of_tests = source_scores(tiny, basis, [one.source_pair for one in test_set])
    first, second = (
        evaluate_analogies(tiny, test_set, fitted, controls=[], generator=seeded(), progress=False, **more)
        for more in ({}, {"sources": of_tests})
    )
    assert torch.equal(first["composite, one-shot"].log_probs, second["composite, one-shot"].log_probs)
    with pytest.raises(ValueError, match=r"expected sources of 10 analogies under 5 vectors, got \[24, 5\]"):
        fit_composite(tiny, basis, test_set, sources=given, generator=seeded(), progress=False)
    with pytest.raises(ValueError, match=r"expected sources of 10 analogies under 5 vectors, got \[24, 5\]"):
        evaluate_analogies(tiny, test_set, fitted, sources=given, generator=seeded(), progress=False)


def test_maps_have_the_shapes_that_they_are_named_for(tiny, basis, train):
    def fit(map, **options):
        return fit_composite(tiny, basis, train, map=map, epochs=3, generator=seeded(), progress=False, **options)

    diagonal = fit("diagonal")
    assert torch.equal(diagonal.matrix, torch.diag(diagonal.matrix.diagonal()))
    assert diagonal.matrix.diagonal().ne(1).all() and diagonal.shift.ne(0).any()
    assert int(torch.linalg.matrix_rank(fit("lowrank", rank=2).matrix)) == 2
    assert int(torch.linalg.matrix_rank(fit("lowrank").matrix)) <= default_rank(basis) == 2
    full = fit("full")
    assert (full.matrix - torch.diag(full.matrix.diagonal())).abs().max() > 1e-4
    held = fit("full", l2=1e4)
    assert (held.matrix - torch.eye(len(basis))).norm() < (full.matrix - torch.eye(len(basis))).norm() / 2


# Transfer maps


@pytest.fixture(scope="module")
def transferred(tiny, basis, train):
    return fit_composite(tiny, basis, train, map="transfer", epochs=4, lr=0.1, generator=seeded(), progress=False)


def test_recognition_is_the_optimum_of_its_loss(unchecked):
    """The gradient of the penalised cross-entropy is 0, as counted by hand from probabilities less labels."""
    g = seeded()
    scores, labels = torch.randn(60, 4, generator=g).double() * torch.tensor([1.0, 5.0, 0.1, 2.0]), torch.arange(60) % 4
    scores[torch.arange(60), labels] += torch.tensor([1.0, 4.0, 0.2, 1.0])[labels]
    matrix, shift = recognition(scores.float(), labels)
    centre, spread = scores.mean(dim=0), scores.std(dim=0, correction=0)
    scaled, z = matrix.double() * spread, (scores - centre) / spread
    off = (scores @ matrix.double().T + shift.double()).softmax(-1) - F.one_hot(labels, 4)
    gradient = off.T @ z / 60 + 2e-4 * scaled
    assert gradient.abs().max() < 1e-4 and off.mean(dim=0).abs().max() < 1e-4
    assert gradient.norm() < 0.01 * (F.one_hot(labels, 4).double().T @ z / 60).norm()


def test_recognition_counts_each_source_pair_once():
    scores = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [3.0, 2.0], [3.0, 2.0]])
    assert distinct(scores, torch.tensor([0, 1, 0, -1, 1])).tolist() == [True, True, False, False, True]


def test_a_transfer_map_names_the_relation_and_then_weighs_by_it(tiny, transferred, train):
    scores = source_scores(tiny, transferred.basis, [("hand", "finger")]).log_probs[0]
    named = (scores @ transferred.matrix.T + transferred.shift).softmax(-1)
    told = transferred.explain(tiny, "hand", "finger")
    torch.testing.assert_close(told.recognised, named)
    torch.testing.assert_close(told.weights, transferred.transfer @ named)
    assert (told.weights < 0).any()
    sizes = [abs(weight) for _, weight in told.top(5)]
    assert sizes == sorted(sizes, reverse=True)
    assert told.named(1) == [(NAMES[int(named.argmax())], pytest.approx(float(named.max())))]
    assert list(told.to_dataframe().columns) == ["relation", "weight", "score", "recognised"]
    vector = transferred.vector_for(tiny, "hand", "finger").vector
    torch.testing.assert_close(vector, (transferred.transfer @ named) @ transferred.basis.matrix)
    entropy = gate_signals(tiny, transferred, train[:1])[0, 0].item()
    first = transferred.explain(tiny, train[0].a, train[0].b).recognised.tolist()
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in first if p > 0), abs=1e-5)


def test_sources_of_one_family_share_their_weights_where_the_ridge_says_so(tiny, basis, train):
    """Without a part of their own, the columns of T differ within a family in b alone."""
    fit = functools.partial(fit_composite, tiny, basis, train, map="transfer", generator=seeded(), progress=False)
    free, held = fit(l2=0.0).transfer, fit(l2=1e9, epochs=40).transfer
    family = [load_relation(name).family for name in NAMES]

    def spread(transfer):
        """Largest entry by which two columns of a family differ, beside those of the diagonal."""
        found = []
        for i, j in combinations(range(len(NAMES)), 2):
            if family[i] == family[j]:
                rows = [row for row in range(len(NAMES)) if row not in (i, j)]
                found.append(float((transfer[rows, i] - transfer[rows, j]).abs().max()))
        assert len(found) >= 3
        return max(found)

    assert spread(held) < 0.1 * spread(free)
    other = next(i for i in range(5) if family[i] != family[0])
    assert (held[:, 0] - held[:, other]).abs().max() > 10 * spread(held)


def test_transfer_maps_are_kept_and_refused(tiny, basis, train, transferred, test_set, tmp_path):
    again = CompositeMap.load(transferred.save(tmp_path / "transfer.safetensors"), model=tiny)
    assert torch.equal(again.transfer, transferred.transfer) and again.map == "transfer"
    torch.testing.assert_close(again.weights(tiny, "hand", "finger"), transferred.weights(tiny, "hand", "finger"))
    found = evaluate_analogies(tiny, test_set, transferred, controls=[], generator=seeded(), progress=False)
    assert set(found.by_relation("composite, one-shot", "unsteered, one-shot")["heaviest"]) <= set(NAMES)
    nameless = [dataclasses.replace(one, source_relation="") for one in train]
    with pytest.raises(ValueError, match="a transfer map needs analogies that name source relations of the basis"):
        fit_composite(tiny, basis, nameless, map="transfer", generator=seeded(), progress=False)
    with pytest.raises(ValueError, match=r"has a transfer \[5 5\]; map='transfer' has none"):
        dataclasses.replace(transferred, transfer=None)
    with pytest.raises(ValueError, match=r"has a transfer \[5 5\]; map='full' has \[5, 5\]"):
        dataclasses.replace(transferred, map="full")


def test_the_same_generator_gives_the_same_bits_and_nothing_else_changes(tiny, basis, train):
    before = torch.get_rng_state()
    grads = [parameter.requires_grad for parameter in tiny.parameters()]
    one, two, three = (
        fit_composite(tiny, basis, train, epochs=2, batch_size=5, generator=seeded(seed), progress=False)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.matrix, two.matrix) and not torch.equal(one.matrix, three.matrix)
    assert torch.equal(torch.get_rng_state(), before)
    assert [parameter.requires_grad for parameter in tiny.parameters()] == grads
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_the_best_epoch_on_validation_analogies_is_kept(tiny, basis, train, test_set):
    fit = fit_composite(
        tiny, basis, train, map="full", valid=test_set, epochs=6, lr=1.0, l2=0.0, generator=seeded(), progress=False
    )
    history = fit.history
    assert len(history.valid_top1) == len(history.train_loss) == 7
    keys = [(top1, -loss) for top1, loss in zip(history.valid_top1, history.valid_loss, strict=True)]
    best = max(range(7), key=lambda i: keys[i])
    losses = [
        -naive_log_prob(tiny, one.target_pair, (), fit.vector_for(tiny, one.a, one.b).vector.double())[0]
        * len(render_prompts(tiny, [one.target_pair], [()], n_shots=0).answer_tokens[0])
        for one in test_set
    ]
    assert sum(losses) / len(losses) == pytest.approx(history.valid_loss[best], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(map="cubic"), "map='cubic'; expected one of none, diagonal, full, lowrank, transfer"),
        (dict(scores="rank"), "scores='rank'; expected one of log_probability, probability"),
        (dict(rule="hard"), "rule='hard'; expected one of softmax"),
        (dict(setting="icl"), "setting='icl'; expected one of zero_shot, one_shot"),
        (dict(epochs=-1), "expected epochs of at least 0, got -1"),
        (dict(batch_size=0), "expected batch_size of at least 1, got 0"),
        (dict(l2=-1.0), "expected l2 of at least 0, got -1.0"),
        (dict(rank=6), r"expected rank in 1..5 \(the size of the basis\), got 6"),
        (dict(analogies=[]), "expected at least one analogy, got none"),
    ],
)
def test_bad_settings_are_refused(tiny, basis, train, unchecked, change, message):
    options = {"analogies": train, **change}
    with pytest.raises(ValueError, match=message):
        fit_composite(tiny, basis, options.pop("analogies"), generator=seeded(), progress=False, **options)


# The map


def test_a_composite_is_the_weighted_sum_and_explains_itself(tiny, basis, fitted):
    found = fitted.explain(tiny, "hand", "finger")
    scores = source_scores(tiny, basis, [("hand", "finger")]).log_probs[0]
    torch.testing.assert_close(found.scores, scores)
    torch.testing.assert_close(found.weights, (fitted.matrix @ scores + fitted.shift).softmax(-1))
    vector = fitted.vector_for(tiny, "hand", "finger")
    expected = sum(w * v.vector for w, v in zip(found.weights, basis, strict=True))
    torch.testing.assert_close(vector.vector, fitted.strength * expected)
    assert (vector.kind, vector.layer, vector.relation) == ("composite", LAYER, "hand : finger")
    top = found.top(2)
    assert top[0][1] == max(found.weights.tolist()) and top[0][0] == NAMES[int(found.weights.argmax())]
    frame = found.to_dataframe()
    assert list(frame.columns) == ["relation", "weight", "score", "recognised"]
    assert frame.weight.sum() == pytest.approx(1)
    figure = fitted.plot(tiny, "hand", "finger", n=3)
    assert figure.layout.yaxis.ticktext[0] == top[0][0] and "hand : finger" in figure.layout.title.text


def test_several_source_pairs_are_averaged(tiny, basis, fitted):
    pairs = [("hand", "finger"), ("foot", "toe")]
    scores = source_scores(tiny, basis, pairs).log_probs.mean(dim=0)
    weights = fitted.weights(tiny, ["hand", "foot"], ["finger", "toe"])
    torch.testing.assert_close(weights, fitted.weights_of(scores))
    with pytest.raises(ValueError, match="expected as many a as b, at least one, got 2 and 1"):
        fitted.weights(tiny, ["hand", "foot"], ["finger"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        fitted.weights(tiny, [], [])


def test_a_map_survives_its_file(tiny, fitted, tmp_path, model):
    path = fitted.save(tmp_path / "map.safetensors")
    loaded = CompositeMap.load(path, model=tiny)
    for name in ("matrix", "shift"):
        assert torch.equal(getattr(loaded, name), getattr(fitted, name))
    assert torch.equal(loaded.basis.matrix, fitted.basis.matrix) and loaded.basis.names == fitted.basis.names
    assert loaded.seen == fitted.seen
    for name in ("map", "strength", "scores", "rule", "setting", "template"):
        assert getattr(loaded, name) == getattr(fitted, name)
    assert loaded.history.train_loss == fitted.history.train_loss
    with pytest.raises(ValueError, match=r"was made on model .*, not on this one"):
        CompositeMap.load(path, model=model)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"map.safetensors: not a safetensors file"):
        CompositeMap.load(path)
    basis_file = fitted.basis.save(tmp_path / "basis.safetensors")
    with pytest.raises(ValueError, match="format 'fvlens-vector-set-1', expected 'fvlens-composite-map-1'"):
        CompositeMap.load(basis_file)


def test_a_damaged_map_is_refused(fitted, tmp_path, unchecked):
    from fvlens.composition._map import MAP_FORMAT
    from fvlens.files import read_tensors, write_tensors

    tensors, header = read_tensors(fitted.save(tmp_path / "map.safetensors"), MAP_FORMAT)
    for damage in (
        lambda t, h: t.pop("shift"),
        lambda t, h: t.update(matrix=t["matrix"][:2]),
        lambda t, h: h.update(map="cubic"),
        lambda t, h: h["vectors"].pop(),
        lambda t, h: h.pop("seen"),
    ):
        some, head = dict(tensors), {**header, "vectors": list(header["vectors"])}
        damage(some, head)
        path = write_tensors(tmp_path / "bad.safetensors", some, head, MAP_FORMAT)
        with pytest.raises(ValueError, match=r"bad.safetensors: damaged composite map"):
            CompositeMap.load(path)


# Whole trainings against plain loops


def plain_log_probs(model, analogies, shown, vectors):
    """Log-probability of each target's whole answer, one whole pass an analogy, differentiable in the vectors."""
    found = []
    for one, vector in zip(analogies, vectors, strict=True):
        demonstrations = [one.source_pair] if shown else []
        prompts = render_prompts(model, [one.target_pair], [demonstrations], n_shots=len(demonstrations))
        answer = prompts.answer_tokens[0]
        last = prompts.tokens.shape[1] - 1

        def add(resid, hook, vector=vector, last=last):
            resid = resid.clone()
            resid[:, last] += vector
            return resid

        tokens = torch.cat([prompts.tokens, answer[None, :-1]], dim=1)
        with model.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", add)]):
            logs = model(tokens)[0, last:].log_softmax(dim=-1)
        found.append((logs.gather(1, answer[:, None]).sum(), bool(logs[0].argmax() == answer[0])))
    logs, right = zip(*found, strict=True)
    return torch.stack(logs), torch.tensor(right)


def plain_adam(parameters, vectors, penalty, model, train, valid, shown, *, lr, l2, epochs, batch_size):
    """Adam with a learning rate that falls as a cosine, as anyone would write it; the best epoch, and the curves."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    order, n_train = seeded(), len(train)
    every = [*train, *valid]

    def look(first, last):
        with torch.no_grad():
            logs, right = plain_log_probs(model, every[first:last], shown, vectors(list(range(first, last))))
        return -float(logs.mean()), float(right.double().mean())

    curves = [(look(0, n_train)[0], *(look(n_train, len(every)) if valid else (0.0, 0.0)))]
    kept = [[parameter.detach().clone() for parameter in parameters]]
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        shuffled, seen = torch.randperm(n_train, generator=order).tolist(), []
        for at in range(0, n_train, batch_size):
            rows = shuffled[at : at + batch_size]
            optimiser.zero_grad()
            logs, _ = plain_log_probs(model, [train[i] for i in rows], shown, vectors(rows))
            (-logs.mean() + l2 * penalty(rows)).backward()
            optimiser.step()
            seen += (-logs.detach()).tolist()
        curves.append((sum(seen) / n_train, *(look(n_train, len(every)) if valid else (0.0, 0.0))))
        kept.append([parameter.detach().clone() for parameter in parameters])
    best = max(range(len(curves)), key=lambda i: (curves[i][2], -curves[i][1])) if valid else epochs
    return kept[best], curves


@pytest.mark.parametrize("setting", ["zero_shot", "one_shot"])
@pytest.mark.parametrize("map", ["diagonal", "full", "transfer"])
def test_a_map_is_what_a_plain_loop_trains(tiny, basis, train, test_set, map, setting):
    """With the defaults of every map: its learning rate, its l2, their schedule, and the choice of the epoch."""
    how = dict(map=map, setting=setting, epochs=3, batch_size=8, progress=False)
    made = fit_composite(tiny, basis, train, valid=test_set, generator=seeded(), **how)
    every, n = [*train, *test_set], len(basis)
    plain = [[naive_log_prob(tiny, one.source_pair, [], vector)[0] for vector in basis.matrix] for one in every]
    scores = torch.tensor(plain, dtype=torch.float32)
    if map == "transfer":  # what recognises is fitted before, and tested by itself
        families = [load_relation(name).family for name in NAMES]
        groups = sorted(set(families))
        members = torch.tensor([[float(family == group) for family in families] for group in groups])
        shown = (scores @ made.matrix.T + made.shift).softmax(dim=-1)
        same, shared, own = (torch.zeros(shape, requires_grad=True) for shape in ((), (n, len(groups)), (n, n)))
        parameters, lr, l2 = [same, shared, own], 0.02, 3e-3

        def weights(rows):
            return shown[rows] @ (same * torch.eye(n) + shared @ members + own).T

        def penalty(rows):
            return (shown[rows] @ own.T @ basis.matrix).square().sum(dim=1).mean()

    else:
        scale = (torch.ones(n) if map == "diagonal" else torch.eye(n)).requires_grad_()
        shift = torch.zeros(n, requires_grad=True)
        parameters, lr, l2 = [scale, shift], 0.05 if map == "diagonal" else 0.02, 1e-4

        def weights(rows):
            matrix = torch.diag(scale) if map == "diagonal" else scale
            return (scores[rows] @ matrix.T + shift).softmax(dim=-1)

        def penalty(rows):
            start = torch.ones(n) if map == "diagonal" else torch.eye(n)
            return (scale - start).square().sum() + shift.square().sum()

    best, curves = plain_adam(
        parameters, lambda rows: weights(rows) @ basis.matrix, penalty, tiny, train, test_set, setting == "one_shot",
        lr=lr, l2=l2, epochs=3, batch_size=8,
    )  # fmt: skip
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
        rows = list(range(len(every)))
        torch.testing.assert_close(made.weights_of(scores), weights(rows), rtol=0, atol=3e-5)
    theirs = torch.tensor(curves).T
    ours = torch.tensor([made.history.train_loss, made.history.valid_loss, made.history.valid_top1])
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    if map == "transfer":
        expected = same * torch.eye(n) + shared @ members + own
        torch.testing.assert_close(made.transfer, expected.detach(), rtol=0, atol=2e-5)
    else:
        matrix = torch.diag(scale) if map == "diagonal" else scale
        torch.testing.assert_close(made.matrix, matrix.detach(), rtol=0, atol=2e-5)
        torch.testing.assert_close(made.shift, shift.detach(), rtol=0, atol=2e-5)


def test_a_learned_gate_is_what_a_plain_loop_trains(tiny, fitted, for_gate):
    """With its defaults: learning rate, l2 and schedule; nothing is lowered where nothing is protected."""
    how = dict(kind="learned", protect=False, epochs=3, batch_size=8, progress=False)
    gate = fit_gate(tiny, fitted, for_gate, generator=seeded(), **how).gate("one_shot")
    signals = gate_signals(tiny, fitted, for_gate)
    vectors = torch.stack([fitted.vector_for(tiny, one.a, one.b).vector for one in for_gate])
    centre, spread = signals.mean(dim=0), signals.std(dim=0, correction=0).clamp(min=1e-3)
    scaled = (signals - centre) / spread
    slope, offset = torch.zeros(len(SIGNALS), requires_grad=True), torch.zeros((), requires_grad=True)

    def steered(rows):
        return (scaled[rows] @ slope + offset).sigmoid()[:, None] * vectors[rows]

    (slope, offset), _ = plain_adam(
        [slope, offset], steered, lambda rows: slope.square().sum(), tiny, for_gate, [], True,
        lr=0.1, l2=1e-3, epochs=3, batch_size=8,
    )  # fmt: skip
    plain = slope / spread
    torch.testing.assert_close(torch.tensor(gate.slopes), plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(gate.offset), offset - plain @ centre, rtol=1e-3, atol=1e-3)


def interrupted(monkeypatch, fit, what):
    """What is left of a fit that Ctrl-C stopped in its second epoch."""
    own = Training._step

    def step(self, batch):
        own(self, batch)
        if self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.warns(UserWarning, match=f"{what} was interrupted: 1 of 3 epochs are finished"):
            return fit()


@pytest.mark.parametrize("map", ["diagonal", "lowrank", "transfer"])
def test_an_interrupted_map_goes_on_to_the_same_bits(tiny, basis, train, test_set, map, monkeypatch, tmp_path):
    def fit(**more):
        how = dict(valid=test_set, map=map, l2=1e-3, epochs=3, batch_size=8, generator=seeded(), progress=False)
        return fit_composite(tiny, basis, train, **(how | more))

    file = tmp_path / "state.safetensors"
    whole = fit()
    part = interrupted(monkeypatch, lambda: fit(checkpoint=file), "composite map")
    assert whole.complete and not part.complete
    assert part.history.train_loss == whole.history.train_loss[:2]
    for state in (part.state, file):
        resumed = fit(resume=state)
        assert resumed.complete and resumed.history == whole.history
        for name in ("matrix", "shift", "transfer"):
            ours, theirs = getattr(resumed, name), getattr(whole, name)
            assert ours is theirs is None or torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="fit_composite: the saved training has map "):
        fit(map="full", resume=file)
    with pytest.warns(UserWarning, match="part.safetensors: a training that was interrupted, the best of the epochs"):
        assert not CompositeMap.load(part.save(tmp_path / "part.safetensors")).complete


def test_an_interrupted_gate_goes_on_to_the_same_bits(tiny, fitted, for_gate, monkeypatch, tmp_path):
    def fit(**more):
        how = dict(kind="learned", epochs=3, batch_size=8, generator=seeded(), progress=False)
        return fit_gate(tiny, fitted, for_gate, **how, **more)

    file = tmp_path / "state.safetensors"
    whole = fit()
    part = interrupted(monkeypatch, lambda: fit(checkpoint=file), "gate")
    assert whole.complete and not part.complete
    for state in (part.state, file):
        assert fit(resume=state).gates == whole.gates


def test_a_map_whose_loss_is_not_finite_keeps_its_start(tiny, basis, train):
    with pytest.warns(UserWarning, match="the loss of the composite map is not finite after epoch 1; try a lower lr"):
        made = fit_composite(tiny, basis, train, map="full", lr=1e30, epochs=3, generator=seeded(), progress=False)
    assert torch.equal(made.matrix, torch.eye(len(basis))) and len(made.history.train_loss) == 2


def test_a_gate_comes_back_from_its_file(tiny, fitted, for_gate, tmp_path, unchecked):
    gate = fit_gate(tiny, fitted, for_gate, kind="threshold", generator=seeded(), progress=False).gate("one_shot")
    file = gate.save(tmp_path / "gate.safetensors")
    assert Gate.load(file) == gate
    with pytest.raises(ValueError, match="expected 'fvlens-gate-1'"):
        Gate.load(fitted.save(tmp_path / "map.safetensors"))
    _, header = read_tensors(file, GATE_FORMAT)
    for change, told in [
        (dict(signals=["entropy"]), "expected slopes of entropy, source gain, .*, got those of"),
        (dict(slopes=[1.0]), "Gate: expected 7 slopes"),
        (dict(kind="open"), "Gate: kind='open'"),
        (dict(slopes=None), "slopes: expected a list, got None"),
    ]:
        write_tensors(file, {"slopes": torch.zeros(1)}, header | change, GATE_FORMAT)
        with pytest.raises(ValueError, match=f"gate.safetensors: damaged gate \\(.*{told}"):
            Gate.load(file)


def test_noise_that_joins_a_basis_is_as_long_as_the_basis_is_on_average(basis):
    unlike = VectorSet(tuple((i + 1.0) * one for i, one in enumerate(basis)))
    joined, _ = _noise(unlike, 0.5, seeded())
    norms = [one.norm() for one in unlike]
    added = joined.vectors[len(unlike) :]
    assert len(added) == round(0.5 * len(unlike)) and max(norms) > 1.5 * min(norms)
    assert [one.norm() for one in added] == pytest.approx([sum(norms) / len(norms)] * len(added), rel=1e-5)


def test_a_library_composite_acts_a_third_of_the_way_up(model):
    """On a model where a third is not a half."""
    assert model.cfg.n_layers == 4
    how = dict(names=SMALL, map="none", n_train=2, epochs=1, generator=seeded(), progress=False)
    assert library_composite(model, **how).basis.layer == 1


def test_a_basis_can_start_from_function_vectors(model, unchecked):
    """Of the same pairs, at the layer that is best for all together, each with its best scale there."""
    names, g = ["animal-home", "plural", "country-capital"], seeded(3)
    splits = {name: held_out().split(load_relation(name)) for name in names}
    short = {name: dataclasses.replace(split, train=split.train[:6]) for name, split in splits.items()}
    found = {
        name: find_vector(model, split, relation=name, n_shots=6, template="arrow", generator=g, progress=False)
        for name, split in short.items()
    }
    top1 = {name: one.sweep.top1.double() for name, one in found.items()}  # [layer scale]
    layer = int(torch.stack([one.amax(dim=1) for one in top1.values()]).mean(dim=0).argmax())
    starts = {}
    for name, one in found.items():
        row = [
            (float(top1[name][layer, i]), cell.probability, -abs(scale - 1), scale)
            for i, (scale, cell) in enumerate(zip(one.sweep.scales, one.sweep.evaluations[layer], strict=True))
        ]
        starts[name] = max(row)[-1] * one.unscaled.at_layer(layer)
    how = dict(epochs=1, template="arrow", progress=False)
    expected = finetune_many(model, short, init=starts, generator=g, **how).vectors
    made = library_composite(model, names=names, start="vector", n_train=6, generator=seeded(3), **how).basis
    assert made.layer == layer and len({float(one.norm()) for one in starts.values()}) == 3
    assert made.names == expected.names
    torch.testing.assert_close(made.matrix, expected.matrix, rtol=0, atol=0)
    again = library_composite(model, names=names[:1], start="vector", layer=0, n_train=6, generator=seeded(3), **how)
    assert again.basis.layer == 0
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


# The gate


@pytest.fixture(scope="module")
def for_gate():
    return make_analogies(parts(20, 30), kind="far", n=16, generator=seeded(5))


@pytest.mark.parametrize("setting", ["zero_shot", "one_shot"])
def test_signals_are_those_of_whole_passes(tiny, fitted, for_gate, setting):
    found = gate_signals(tiny, fitted, for_gate, setting=setting)
    assert found.shape == (len(for_gate), len(SIGNALS))
    for one, signals in zip(for_gate[:4], found.tolist(), strict=False):
        values = dict(zip(SIGNALS, signals, strict=True))
        weights = fitted.weights(tiny, one.a, one.b)
        entropy = -sum(w * math.log(w) for w in weights.tolist() if w > 0)
        assert values["entropy"] == pytest.approx(entropy, abs=1e-5)
        vector = fitted.vector_for(tiny, one.a, one.b).vector
        source = one.source_pair
        plain, steered = (naive_log_prob(tiny, source, [], v)[0] for v in (torch.zeros_like(vector), vector))
        assert values["source gain"] == pytest.approx(float(steered - plain), abs=1e-5)
        shown = [source] if setting == "one_shot" else []
        for added, end in ((torch.zeros_like(vector), ""), (vector, ", steered")):
            said = naive_log_prob(tiny, one.target_pair, shown, added)[1].log_softmax(-1).max(-1)
            if not end:
                assert values["confidence"] == pytest.approx(float(said.values), abs=1e-5)
            scores = torch.tensor(
                [
                    float(naive_log_prob(tiny, one.target_pair, [], v.vector)[1].log_softmax(-1)[said.indices])
                    for v in fitted.basis
                ]
            )
            others = (fitted.matrix @ scores + fitted.shift).softmax(-1)
            assert values["same relation" + end] == pytest.approx(math.log(float(weights @ others)), abs=1e-4)
            mixed = others @ fitted.basis.matrix
            cosine = float(mixed @ vector / mixed.norm() / vector.norm())
            assert values["likeness" + end] == pytest.approx(cosine, abs=1e-5)


def test_a_right_answer_is_likelier_to_look_like_its_source(model, real):
    """What the gate checks answers by: on the embedded model, right answers are more alike than wrong ones."""
    composite, asked = real[0], library_analogies("valid", n=60, names=NAMES, generator=seeded(2))
    options = dict(settings=["one_shot"], controls=[], allow_leak=True, generator=seeded(), progress=False)
    right = evaluate_analogies(model, asked, composite, **options)["unsteered, one-shot"].right
    same = gate_signals(model, composite, asked)[:, SIGNALS.index("same relation")]
    assert 0 < int(right.sum()) < len(asked)
    assert same[right].mean() > same[~right].mean()


def test_sources_of_a_gate_can_be_given(tiny, fitted, for_gate):
    sources = source_scores(tiny, fitted.basis, [one.source_pair for one in for_gate])
    assert torch.equal(gate_signals(tiny, fitted, for_gate, sources=sources), gate_signals(tiny, fitted, for_gate))
    options = dict(generator=seeded(), progress=False)
    assert fit_gate(tiny, fitted, for_gate, sources=sources, **options) == fit_gate(tiny, fitted, for_gate, **options)
    for name, call in (("gate_signals", gate_signals), ("fit_gate", functools.partial(fit_gate, generator=seeded()))):
        with pytest.raises(ValueError, match=f"{name}: expected sources of 3 analogies under 5 vectors, got"):
            call(tiny, fitted, for_gate[:3], sources=sources)


def test_signals_do_not_know_the_answer(tiny, fitted, for_gate):
    others = [dataclasses.replace(one, d="other", foils=(), alternatives=()) for one in for_gate]
    assert torch.equal(gate_signals(tiny, fitted, for_gate), gate_signals(tiny, fitted, others))


def test_a_learned_gate_lowers_the_loss_of_its_own_formula(tiny, fitted, for_gate):
    """The loss of the fitted gate is below that of every constant factor between never and always."""
    options = dict(kind="learned", l2=0.0, epochs=60, batch_size=100, progress=False)
    gate = fit_gate(tiny, fitted, for_gate, generator=seeded(), **options).gate("one_shot")

    def loss(factors):
        total = 0.0
        for one, factor in zip(for_gate, factors, strict=True):
            vector = float(factor) * fitted.vector_for(tiny, one.a, one.b).vector
            prompts = render_prompts(tiny, [one.target_pair], [[one.source_pair]], n_shots=1)
            total -= float(naive_log_prob(tiny, one.target_pair, [one.source_pair], vector)[0]) * int(
                prompts.answer_mask.sum()
            )
        return total / len(for_gate)

    fitted_loss = loss(gate.strength(gate_signals(tiny, fitted, for_gate)))
    assert all(fitted_loss < loss([constant] * len(for_gate)) for constant in (0.0, 0.25, 0.5, 0.75, 1.0))


def test_a_threshold_gate_is_the_best_single_cut(tiny, fitted, for_gate):
    gate = fit_gate(tiny, fitted, for_gate, kind="threshold", generator=seeded(), progress=False).gate("one_shot")
    signals = gate_signals(tiny, fitted, for_gate)
    ungated = evaluate_analogies(
        tiny, for_gate, fitted, settings=["one_shot"], controls=[], generator=seeded(), progress=False
    )
    plain, steered = ungated["unsteered, one-shot"].ranks == 0, ungated["composite, one-shot"].ranks == 0
    opened = gate.strength(signals) > 0
    best = 0
    for which in range(len(SIGNALS)):
        for cut in [-math.inf, *signals[:, which].tolist()]:
            for chosen in (signals[:, which] > cut, signals[:, which] <= cut):
                best = max(best, int(torch.where(chosen, steered, plain).sum()))
    assert int(torch.where(opened, steered, plain).sum()) == best


def test_a_threshold_by_hand():
    from fvlens.composition._fit_gate import _threshold

    signals = torch.zeros(4, len(SIGNALS))
    signals[:, 1:3] = torch.tensor([[1.0, 5.0], [2.0, 1.0], [3.0, 4.0], [4.0, 2.0]])
    plain, steered = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, True])
    nothing = torch.zeros(4, dtype=torch.bool)
    gate = _threshold(signals, plain, steered, nothing, "one_shot")
    assert gate.slopes == (0.0, 1.0, *[0.0] * 5) and gate.offset == -2.5
    assert gate.strength(signals).tolist() == [0, 0, 1, 1]
    assert gate.describe() == "1 where +1 source gain -2.5 > 0, else 0"
    never = _threshold(signals, plain, nothing, nothing, "one_shot")
    assert never.strength(signals).tolist() == [0, 0, 0, 0]
    # a cut that loses near analogies does not count
    lost = torch.tensor([False, False, True, True])
    open_to_all = _threshold(signals, nothing, lost, nothing, "one_shot")
    assert open_to_all.strength(signals).tolist() == [0, 0, 1, 1]
    only = signals[:, [2] * len(SIGNALS)]
    protected = _threshold(only, plain, lost, torch.tensor([False, True, False, False]), "one_shot")
    assert protected.strength(only)[1] == 0


def test_a_logistic_gate_is_the_regression_of_its_own_formula():
    """Against scipy on the formula in the docstring, and against what it is for."""
    from fvlens.composition._fit_gate import _logistic

    g = seeded(8)
    signals = torch.randn(60, len(SIGNALS), generator=g, dtype=torch.float64) * torch.arange(1, 8) + 3
    plain = torch.rand(60, generator=g) < 0.5
    steered = torch.where(torch.rand(60, generator=g) < 0.8, signals[:, 4] > 3, plain)
    near = torch.rand(60, generator=g) < 0.4
    standard = ((signals - signals.mean(0)) / signals.std(0, correction=0)).numpy()
    changed = [i for i in range(60) if plain[i] != steered[i]]

    def loss(parameters):
        total = 0.0
        for i in changed:
            value = standard[i] @ parameters[:-1] + parameters[-1]
            total += (5 if near[i] else 1) * np.logaddexp(0, -value if steered[i] else value)
        return total / len(changed) + 0.01 * np.square(parameters[:-1]).sum()

    best = minimize(loss, np.zeros(len(SIGNALS) + 1), method="BFGS", options={"gtol": 1e-8}).x
    gate = _logistic(signals, plain, steered, near, "one_shot")
    value = signals @ torch.tensor(gate.slopes, dtype=torch.float64) + gate.offset
    assert value.numpy() == pytest.approx(standard @ best[:-1] + best[-1], abs=1e-4)
    assert gate.kind == "logistic" and gate.strength(signals).tolist() == (value > 0).double().tolist()
    assert int(torch.where(value > 0, steered, plain).sum()) > max(int(plain.sum()), int(steered.sum()))
    # what a near analogy counts keeps the gate from opening
    harmed = _logistic(signals, plain, steered, near & ~steered, "one_shot").strength(signals)
    assert harmed.sum() < _logistic(signals, plain, steered, near & False, "one_shot").strength(signals).sum()
    for helps, opened in ((torch.ones_like(plain), 60), (torch.zeros_like(plain), 0), (plain, 0)):
        constant = _logistic(signals, plain, helps, near, "one_shot")
        assert int(constant.strength(signals).sum()) == opened and set(constant.slopes) == {0.0}


def test_a_logistic_gate_is_fitted_on_what_steering_changes(model, real):
    """On the embedded model, with a strength that solves some analogies and spoils others."""
    from fvlens.composition._fit_gate import _logistic

    strong = dataclasses.replace(real[0], strength=4.0)
    asked = library_analogies("valid", n=80, names=NAMES, generator=seeded(2))
    found = evaluate_analogies(
        model, asked, strong, settings=["one_shot"], controls=[], allow_leak=True, generator=seeded(), progress=False
    )
    plain, steered = (found[f"{way}, one-shot"].ranks == 0 for way in ("unsteered", "composite"))
    assert bool((plain & ~steered).any()) and bool((steered & ~plain).any())
    signals = gate_signals(model, strong, asked)
    for protect in (True, False):
        near = torch.tensor([protect and one.kind == "near" for one in asked])
        gate = fit_gate(model, strong, asked, protect=protect, generator=seeded(), progress=False).gates[0]
        wanted = _logistic(signals, plain, steered, near, "one_shot")
        assert gate.kind == "logistic" and gate.slopes == pytest.approx(wanted.slopes, rel=1e-4, abs=1e-4)
        assert gate.offset == pytest.approx(wanted.offset, rel=1e-4)


def test_near_analogies_limit_a_learned_gate(model, real):
    """A vector that does harm: half of it loses near analogies, the protected gate none."""
    harmful = dataclasses.replace(real[0], strength=-4.0)
    asked = library_analogies("valid", n=60, names=NAMES, generator=seeded(2))
    options = dict(kind="learned", epochs=0, generator=seeded(), progress=False)

    def near(composite):
        found = evaluate_analogies(
            model, asked, composite, settings=["one_shot"], controls=[], allow_leak=True, generator=seeded(),
            progress=False,
        )  # fmt: skip
        return [found.top1(f"{way}, one-shot", kind="near") for way in ("unsteered", "gated composite")]

    free = fit_gate(model, harmful, asked, protect=False, **options)
    assert (free.gates[0].slopes, free.gates[0].offset) == ((0.0,) * len(SIGNALS), 0.0)
    plain, lost = near(free)
    assert lost < plain
    protected = fit_gate(model, harmful, asked, **options)
    plain, kept = near(protected)
    assert kept >= plain and protected.gates[0].offset < 0
    one_less = dataclasses.replace(protected.gates[0], offset=protected.gates[0].offset + 0.25)
    assert near(harmful.with_gate(one_less))[1] < plain
    only_far = [one for one in asked if one.kind == "far"]
    assert fit_gate(model, harmful, only_far, **options).gates[0].offset == 0


def test_a_gate_is_scored_kept_and_known_to_the_leak_check(tiny, fitted, for_gate, test_set, tmp_path):
    half = Gate("learned", (0.0,) * len(SIGNALS), 0.0, "one_shot")
    gated = fitted.with_gate(half, for_gate)
    found = evaluate_analogies(tiny, test_set, gated, controls=["uniform"], generator=seeded(), progress=False)
    assert "gated composite, one-shot" in found.scored and "gated composite, zero-shot" not in found.scored
    one = test_set[0]
    vector = 0.5 * fitted.vector_for(tiny, one.a, one.b).vector
    wanted = naive_log_prob(tiny, one.target_pair, [one.source_pair], vector)[0]
    assert found["gated composite, one-shot"].log_probs[0].item() == pytest.approx(float(wanted), abs=1e-5)
    again = CompositeMap.load(gated.save(tmp_path / "gated.safetensors"))
    assert again.gates == (half,)
    with pytest.raises(ValueError, match="took part in making the composite"):
        evaluate_analogies(tiny, for_gate, gated, generator=seeded(), progress=False)
    never = Gate("threshold", (0.0,) * len(SIGNALS), -1.0, "one_shot")
    assert gated.with_gate(never).gates == (never,)


def test_bad_gates_are_refused(tiny, fitted, for_gate, unchecked):
    with pytest.raises(ValueError, match="kind='soft'; expected one of logistic, threshold, learned"):
        fit_gate(tiny, fitted, for_gate, kind="soft", generator=seeded())
    with pytest.raises(ValueError, match="setting='two_shot'; expected one of zero_shot, one_shot"):
        fit_gate(tiny, fitted, for_gate, setting="two_shot", generator=seeded())
    with pytest.raises(ValueError, match="fit_gate: expected at least one analogy, got none"):
        fit_gate(tiny, fitted, [], generator=seeded())
    with pytest.raises(ValueError, match="expected batch_size of at least 1, got 0"):
        fit_gate(tiny, fitted, for_gate, batch_size=0, generator=seeded())
    with pytest.raises(ValueError, match="gate_signals: setting='two_shot'; expected one of"):
        gate_signals(tiny, fitted, for_gate, setting="two_shot")
    with pytest.raises(ValueError, match="gate_signals: expected at least one analogy"):
        gate_signals(tiny, fitted, [])
    with pytest.raises(ValueError, match="Gate: kind='soft'; expected one of"):
        Gate("soft", (0.0,) * len(SIGNALS), 0.0, "one_shot")
    with pytest.raises(ValueError, match=r"expected 7 slopes \(entropy, source gain, confidence, .*\), got 1"):
        Gate("learned", (0.0,), 0.0, "one_shot")
    two = Gate("learned", (0.0,) * len(SIGNALS), 0.0, "one_shot")
    with pytest.raises(ValueError, match="expected one gate a setting, got gates for one_shot, one_shot"):
        dataclasses.replace(fitted, gates=(two, two))


# Changed bases


@pytest.fixture(scope="module")
def real(model):
    """A small composite of the embedded model, and analogies that it solves in part."""
    made = library_composite(model, names=NAMES, epochs=5, generator=seeded(), progress=False)
    return made, library_analogies("test", n=30, names=NAMES, generator=seeded(1))


@pytest.fixture(scope="module")
def study(model, real):
    return basis_study(model, *real, drop=(0.4,), noise=(0.4,), n_repeats=2, generator=seeded(4), progress=False)


def test_a_study_covers_every_change_and_its_figures_are_those_of_plain_evaluations(model, real, study):
    made, asked = real
    wanted = ["full basis", "40% dropped", "near-duplicates merged", "40% noise added", "own family removed"]
    assert [one.name for one in study.changes] == [*wanted, "own domain removed"]
    assert [one.n_basis for one in study.changes[:4]] == [5, 3, 5, 7]
    options = dict(settings=["zero_shot"], controls=["own vector"], generator=seeded(), progress=False)
    full = evaluate_analogies(model, asked, made, **options)
    assert study["full basis"].top1 == full.top1("composite, zero-shot") > 0.3
    assert study.references == {name: full.top1(f"{name}, zero-shot") for name in ("unsteered", "own vector")}
    without, sizes = [], []
    for one in asked:
        family = load_relation(one.target_relation).family
        left = [name for name in NAMES if load_relation(name).family != family]
        sizes.append(len(left))
        found = evaluate_analogies(model, [one], CompositeMap.plain(made.basis.select(left)), **options)
        without.append(found.top1("composite, zero-shot"))
    removed = study["own family removed"]
    assert removed.top1 == pytest.approx(sum(without) / len(asked))
    assert removed.difference.mean == pytest.approx(removed.top1 - study["full basis"].top1)
    assert removed.n_basis == pytest.approx(sum(sizes) / len(sizes))
    assert removed.top1 < study["full basis"].top1


def test_relations_of_the_embedded_model_are_recognised(model, real):
    asked = library_analogies("train", n=300, names=NAMES, kind="near", generator=seeded(3))
    made = fit_composite(model, real[0].basis, asked, map="transfer", epochs=0, generator=seeded(), progress=False)
    scores = source_scores(model, made.basis, [one.source_pair for one in real[1]]).log_probs
    named = [NAMES[i] for i in made.recognised(scores).argmax(dim=1)]
    right = [name == one.source_relation for name, one in zip(named, real[1], strict=True)]
    assert sum(right) >= 0.7 * len(right)  # by chance 0.2


def test_weights_are_stable_where_softmax_makes_them_so(study):
    """Without a map, what is left keeps its proportions; noise takes some of the mass."""
    for name in ("40% dropped", "own family removed", "own domain removed", "full basis", "near-duplicates merged"):
        assert study[name].stability == pytest.approx(1, abs=1e-4)
    assert 0 < study["40% noise added"].stability < 1


def test_duplicates_become_their_mean(basis):
    from fvlens.composition._sensitivity import _merge, _overlap

    twin = dataclasses.replace(basis[1], vector=3 * basis[1].vector, relation="twin")
    merged, target = _merge(VectorSet((*basis, twin)), 0.99)
    assert merged.names == NAMES
    torch.testing.assert_close(merged[1].vector, 2 * basis[1].vector)
    torch.testing.assert_close(merged[0].vector, basis[0].vector)
    weights = torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.1, 0.4]])
    torch.testing.assert_close(weights @ target, torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.1]]))
    half = torch.tensor([[0.5, 0.5]])
    assert _overlap(2 * half, torch.tensor([[0.9, 0.1]])).item() == pytest.approx(0.6)
    assert _overlap(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0]])).item() == pytest.approx(0.5)


def test_a_map_is_trained_anew_for_every_changed_basis(tiny, fitted, train, test_set):
    found = basis_study(
        tiny, fitted, test_set, fit=train, drop=(0.2,), merge=None, noise=(), remove=(), n_repeats=1, epochs=1,
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert [one.name for one in found.changes] == ["full basis", "20% dropped"]
    assert found["20% dropped"].stability < 0.999
    with pytest.raises(ValueError, match="took part in making the composite"):
        basis_study(tiny, fitted, train, fit=train, generator=seeded(), progress=False)


def test_a_study_as_table_and_figure(study):
    table = study.to_dataframe()
    assert list(table["change"]) == [one.name for one in study.changes]
    assert table["diff_low"].iloc[1] <= table["difference"].iloc[1] <= table["diff_high"].iloc[1]
    figure = study.plot()
    assert {"full basis (5)", "own vector"} <= set(re.findall(r"full basis \(5\)|own vector", str(figure.layout)))
    assert list(figure.data[0].x) == pytest.approx(list(table["top1"]))
    with pytest.raises(ValueError, match="no change 'half'; there are full basis, 40% dropped"):
        study["half"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": (1.0,)}, "expected shares of drop between 0 and 1, got 1.0"),
        ({"noise": (0.0,)}, "expected shares of noise above 0, got 0.0"),
        ({"merge": 2.0}, "expected merge, a cosine, in -1..1, got 2.0"),
        ({"remove": ("word",)}, "remove='word'; expected family or domain"),
        ({"n_repeats": 0}, "expected n_repeats of at least 1, got 0"),
    ],
)
def test_bad_studies_are_refused(tiny, basis, test_set, unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        basis_study(tiny, CompositeMap.plain(basis), test_set, generator=seeded(), **change)


def test_a_study_of_a_map_wants_analogies(tiny, fitted, test_set):
    with pytest.raises(ValueError, match="a map of shape 'full' is trained anew, which needs fit analogies"):
        basis_study(tiny, fitted, test_set, generator=seeded())


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


# Templates


def test_an_own_template_goes_from_the_basis_to_the_map_and_its_file(tiny, basis, train, tmp_path):
    own = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs:\n")
    named = VectorSet(tuple(dataclasses.replace(vector, template=own) for vector in basis))
    fit = fit_composite(tiny, named, train[:4], map="diagonal", epochs=1, generator=seeded(), progress=False)
    path = fit.save(tmp_path / "map.safetensors")
    loaded = CompositeMap.load(path, model=tiny)
    assert loaded.template == fit.template == CompositeMap.plain(named).template == own
    assert loaded.vector_for(tiny, "cow", "calf").template == own
    pairs = [one.source_pair for one in train[:3]]
    scores = source_scores(tiny, named, pairs).log_probs
    assert torch.equal(scores, source_scores(tiny, basis, pairs, template=own).log_probs)
    assert not torch.equal(scores, source_scores(tiny, basis, pairs).log_probs)  # of templates unknown: qa
    assert fit_composite(
        tiny, named, train[:4], map="diagonal", epochs=1, template="colon", generator=seeded(), progress=False
    ).template == TEMPLATES["colon"]  # fmt: skip

    with safe_open(path, framework="pt") as file:  # as fvlens 0.1 wrote it: the name alone
        header = json.loads(file.metadata()["fvlens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["template_text"]
    metadata = {"format": MAP_FORMAT, "fvlens": json.dumps(header)}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    with pytest.raises(ValueError, match=r"old\.safetensors: damaged composite map .* no template named 'mine'"):
        CompositeMap.load(tmp_path / "old.safetensors")
    assert CompositeMap.load(tmp_path / "old.safetensors", template=own).template == own
    header["template"] = "arrow"
    save_file(tensors, tmp_path / "old.safetensors", metadata | {"fvlens": json.dumps(header)})
    assert CompositeMap.load(tmp_path / "old.safetensors").template == TEMPLATES["arrow"]
