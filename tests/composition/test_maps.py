"""Composite vectors: rules, source scores, the shapes of maps, explanations, files."""

import dataclasses
import functools
import json
import math
from itertools import combinations, pairwise

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import brentq
from torch.nn import functional as F

from composition.whole_passes import LAYER, NAMES, naive_log_prob
from fvlens import VectorSet
from fvlens.composition import (
    MAPS,
    RULES,
    CompositeMap,
    best_single_weights,
    default_rank,
    entmax_weights,
    evaluate_analogies,
    fit_composite,
    gate_signals,
    library_analogies,
    softmax_weights,
    source_scores,
    sparsemax_weights,
    top_k_weights,
    uniform_weights,
    weights_by,
)
from fvlens.composition._affine import distinct, recognition
from fvlens.composition._map import MAP_FORMAT
from fvlens.files import read_tensors, write_tensors
from fvlens.prompts import TEMPLATES, Template, render_prompts
from fvlens.relations import Pair, load_relation

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
        (dict(lr=0.0), r"fit_composite: expected lr over 0, or None for the default, got 0\.0"),
        (dict(lr=-0.1), r"fit_composite: expected lr over 0, or None for the default, got -0\.1"),
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


def test_relations_of_the_embedded_model_are_recognised(model, real):
    asked = library_analogies("train", n=300, names=NAMES, kind="near", generator=seeded(3))
    made = fit_composite(model, real[0].basis, asked, map="transfer", epochs=0, generator=seeded(), progress=False)
    scores = source_scores(model, made.basis, [one.source_pair for one in real[1]]).log_probs
    named = [NAMES[i] for i in made.recognised(scores).argmax(dim=1)]
    right = [name == one.source_relation for name, one in zip(named, real[1], strict=True)]
    assert sum(right) >= 0.7 * len(right)  # by chance 0.2


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
