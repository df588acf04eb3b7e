"""Training vectors: against plain loops over whole forward passes, written here without the package's own."""

import dataclasses
import itertools
import json
import math
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from architectures import WORDS, build
from checkpoints import save
from conftest import HAS_HOOKED, needs_hooked, seeded
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens.interventions import inject, resid_hook, z_hook
from fvlens.models import embedded_folder, fingerprint
from fvlens.prompts import TEMPLATES, Template
from fvlens.relations import Pair, Relation, Split
from fvlens.suffix import has_hooks
from fvlens.training import (
    CrossEntropy,
    DistributedChange,
    FineTunedSet,
    History,
    Settings,
    SteerablePrompts,
    Task,
    TrainableDistributedVector,
    TrainableVector,
    Training,
    TrainingState,
    VectorChange,
    VectorSet,
    Wants,
    _loop,
    _prepared,
    evaluate_adapted,
    finetune,
    finetune_many,
    frozen,
)
from fvlens.vectors import DistributedVector, FunctionVector

PAIRS = tuple(Pair(*pair) for pair in WORDS)
TRAIN, VALID = PAIRS[:5], PAIRS[5:]
MORE = tuple(
    Pair(*pair) for pair in [("king", "queen"), ("cat", "dog"), ("one", "two"), ("red", "blue"), ("day", "night")]
)


def with_words(folder):
    """A checkpoint with the embedded model's tokenizer, which knows the library's words, and an embedding for each."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models by name, float64 where the class computes in it; ``bridge-*`` from tiny checkpoints."""
    made = {}

    def get(name):
        if name not in made:
            if name.startswith("bridge-"):
                folder = with_words(save(name.removeprefix("bridge-"), tmp_path_factory.mktemp(name)))
                dtype = (
                    torch.float64 if name == "bridge-gpt2" else torch.float32
                )  # others have parts in single precision
                made[name] = fvlens.load_model(folder, device="cpu", backend="bridge", dtype=dtype)
            else:
                made[name] = build(name, dtype=torch.float64)
        return made[name]

    yield get
    for model in made.values():
        assert not has_hooks(model)


@pytest.fixture
def small(models):
    """The random model that most tests train on."""
    return models("gpt2" if HAS_HOOKED else "bridge-gpt2")


def vector_of(model, layer=1, seed=0, relation="r", scale=1.0, **fields):
    values = scale * torch.randn(model.cfg.d_model, generator=seeded(seed))
    return FunctionVector(values, layer, (), relation, fingerprint(model), **fields)


def vector_change(model, tasks, trainable, path):
    prompts = SteerablePrompts.of(model, tasks, "qa", layer=trainable.layer, path=path)
    return VectorChange(prompts, trainable)


def split_of(train, valid=(), test=()):
    return Split(*(tuple(Pair(*pair) for pair in part) for part in (train, valid, test)), "input")


# --- the oracle: one prompt at a time, no padding, whole forward passes ---


def tokenised(model, pair):
    """Tokens of the bare query, and of the answer."""
    tokenizer = model.tokenizer
    query = tokenizer(f"Q: {pair[0]}\nA:", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"Q: {pair[0]}\nA: {pair[1]}", add_special_tokens=False)["input_ids"]
    assert whole[: len(query)] == query
    return [tokenizer.bos_token_id, *query], whole[len(query) :]


def plain_logits(model, pair, layer, vector):
    """Logits behind the query and behind each answer token, the vector added at the query's last token alone."""
    query, answer = tokenised(model, pair)
    tokens = torch.tensor([[*query, *answer[:-1]]])

    def add(resid, hook):
        steered = resid.clone()
        steered[0, len(query) - 1] = steered[0, len(query) - 1] + vector
        return steered

    with model.hooks(fwd_hooks=[(resid_hook(layer), add)]):
        return model(tokens)[0, len(query) - 1 :], torch.tensor(answer)


def plain_log_probs(model, pair, layer, vector):
    logits, answer = plain_logits(model, pair, layer, vector)
    return logits.double().log_softmax(dim=-1)[torch.arange(len(answer)), answer]


def plain_loss(model, pairs, layer, vector, loss="cross_entropy"):
    found = [plain_log_probs(model, pair, layer, vector) for pair in pairs]
    if loss == "cross_entropy":
        return -sum(one.sum() for one in found) / len(found)
    return (-sum(one.mean() for one in found) / len(found)).exp()


def plain_top1(model, pairs, layer, vector):
    hits = 0
    for pair in pairs:
        logits, answer = plain_logits(model, pair, layer, vector)
        hits += int(logits[0].argmax() == answer[0])
    return hits / len(pairs)


def plain_training(model, train, valid, init, layer, *, seed, lr, epochs, batch_size, l2=0.0, anchor="zero",
                   loss="cross_entropy", schedule="cosine"):  # fmt: skip
    """Adam on a vector, as anyone would write it; the vector, the curves, and every epoch's vector."""
    vector = init.clone().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=lr)
    order = torch.Generator().manual_seed(seed)
    centre = init if anchor == "init" else torch.zeros_like(init)
    curves, vectors = [], []

    def look(train_loss):
        with torch.no_grad():
            curves.append(
                [
                    train_loss,
                    plain_loss(model, valid, layer, vector, loss),
                    plain_top1(model, valid, layer, vector),
                    vector.norm(),
                    torch.cosine_similarity(vector, init, dim=0),
                ]
            )
            vectors.append(vector.detach().clone())

    with torch.no_grad():
        look(plain_loss(model, train, layer, vector, loss))
    for epoch in range(epochs):
        seen = []  # of each pair the mean or the sum of its log-probabilities, before its step
        for group in optimiser.param_groups:
            group["lr"] = lr * (0.5 * (1 + math.cos(math.pi * epoch / epochs)) if schedule == "cosine" else 1)
        shuffled = torch.randperm(len(train), generator=order).tolist()
        for at in range(0, len(train), batch_size):
            batch = [train[i] for i in shuffled[at : at + batch_size]]
            optimiser.zero_grad()
            with torch.no_grad():
                own = [plain_log_probs(model, pair, layer, vector) for pair in batch]
                seen += [-float(one.sum() if loss == "cross_entropy" else one.mean()) for one in own]
            (plain_loss(model, batch, layer, vector, loss) + l2 * (vector - centre).square().sum()).backward()
            optimiser.step()
        mean = sum(seen) / len(seen)
        look(mean if loss == "cross_entropy" else math.exp(mean))
    best = max(range(len(curves)), key=lambda i: (curves[i][2], -curves[i][1]))
    return vectors[best], torch.tensor(curves).T, best


def curves_of(history):
    return torch.stack([getattr(history, field.name) for field in dataclasses.fields(history)])


def close(ours, theirs, tolerance=1e-5):
    assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


# --- gradients ---

CASES = [
    *(pytest.param(name, path, marks=needs_hooked) for name, path in [
        ("gpt2", "weights"), ("gpt2", "kv"), ("gpt2", "naive"), ("grouped-query", "weights"), ("grouped-query", "kv"),
        ("local", "weights"), ("soft-caps", "weights"), ("parallel", "weights"), ("alibi", "kv"),
        ("shortformer", "naive"),
    ]),
    ("bridge-gpt2", "kv"), ("bridge-gpt2", "naive"), ("bridge-llama", "kv"), ("bridge-gemma2", "kv"),
]  # fmt: skip


@pytest.mark.parametrize("layer", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("name, path", CASES)
def test_losses_and_gradients_equal_a_plain_forward(models, name, path, layer):
    model = models(name)
    start = 0.5 * torch.randn(model.cfg.d_model, generator=seeded())
    trainable = TrainableVector(start[None], layer)
    change = vector_change(model, [Task("", PAIRS, (), 0)], trainable, path)
    assert change.prompts.n_suffix > 1  # answers of several tokens
    plain = start.clone().requires_grad_()
    with frozen(model):
        rows, relation = torch.arange(len(PAIRS)), torch.zeros(len(PAIRS), dtype=torch.long)
        readout = change.read(rows, relation, Wants(first=True))
        logs, right = readout.log_probs, CrossEntropy().is_right(readout)
        logs.sum().backward()
        expected = [plain_log_probs(model, pair, layer, plain) for pair in PAIRS]
        sum(one.sum() for one in expected).backward()
    assert logs.dtype == torch.float32
    tolerance = 1e-6 if next(model.parameters()).dtype == torch.float64 else 2e-5
    for row, own in zip(logs, expected, strict=True):
        torch.testing.assert_close(row[: len(own)].double(), own, rtol=2 * tolerance, atol=0)
        assert (row[len(own) :] == 0).all()
    close(trainable.rows[0].grad, plain.grad, tolerance)
    assert right.tolist() == [bool(plain_top1(model, [pair], layer, start)) for pair in PAIRS]


def test_first_token_of_an_answer_does_not_decide_the_whole(models, small):
    """Of two answers with the same first token, the loss tells them apart."""
    tokens = [tokenised(small, ("big", word))[1] for word in ("smallx", "smallish")]
    assert tokens[0][0] == tokens[1][0] and tokens[0] != tokens[1]
    runs = [
        finetune(small, [("big", word)], init="zero", layer=1, epochs=1, generator=seeded(), progress=False)
        for word in ("smallx", "smallish")
    ]
    assert abs(runs[0].history.train_loss[0] - runs[1].history.train_loss[0]) > 1e-3
    assert not torch.equal(runs[0].vector.vector, runs[1].vector.vector)


# --- whole trainings ---


@pytest.mark.parametrize(
    "name, path, settings",
    [
        pytest.param("gpt2", "weights", dict(), marks=needs_hooked),
        pytest.param("gpt2", "weights", dict(loss="perplexity", batch_size=3), marks=needs_hooked),
        pytest.param("gpt2", "naive", dict(l2=0.03, anchor="init", schedule="constant"), marks=needs_hooked),
        pytest.param("gpt2", "kv", dict(l2=0.03), marks=needs_hooked),
        ("bridge-gpt2", "kv", dict(batch_size=4)),
        ("bridge-gpt2", "naive", dict(loss="perplexity")),
    ],
    ids=str,
)
def test_a_training_equals_a_plain_loop(models, name, path, settings):
    model = models(name)
    init = vector_of(model, scale=0.3)
    settings = dict(lr=0.05, epochs=3, batch_size=2) | settings
    tuned = finetune(model, TRAIN, init=init, valid=VALID, path=path, generator=seeded(), progress=False, **settings)
    with frozen(model):
        vector, curves, best = plain_training(model, TRAIN, VALID, init.vector, 1, seed=tuned.seed, **settings)
    assert (tuned.path, tuned.best_epoch, tuned.complete) == (path, best, True)
    close(tuned.vector.vector, vector)
    torch.testing.assert_close(curves_of(tuned.history), curves.float(), rtol=1e-5, atol=1e-6)
    assert tuned.history.train_loss[-1] < tuned.history.train_loss[0]


def test_a_training_on_the_embedded_model_equals_a_plain_loop(model):
    split = fvlens.load_relation("antonym").split(seeded())
    train, valid = split.train[:10], split.valid[:6]
    tuned = finetune(model, train, init="zero", layer=1, valid=valid, lr=1.0, epochs=2, generator=seeded(),
                     progress=False)  # fmt: skip
    with frozen(model):
        vector, curves, best = plain_training(
            model, train, valid, torch.zeros(model.cfg.d_model), 1, seed=tuned.seed, lr=1.0, epochs=2, batch_size=5
        )
    assert tuned.best_epoch == best
    close(tuned.vector.vector, vector)
    torch.testing.assert_close(curves_of(tuned.history)[:4], curves[:4].float(), rtol=1e-5, atol=1e-6)
    assert tuned.history.cosine.isnan().all()  # the start was zero


def test_default_learning_rate_is_a_share_of_the_residual_stream(models, small):
    seen = []
    for pair in TRAIN:
        query, _ = tokenised(small, pair)
        with small.hooks(fwd_hooks=[(resid_hook(1), lambda resid, hook: seen.append(resid[0, -1].detach()) or None)]):
            small(torch.tensor([query]))
    expected = VectorChange.relative_lr * torch.stack(seen).square().mean().sqrt()
    for path in (None, "naive"):
        tuned = finetune(small, TRAIN, init="zero", layer=1, epochs=1, path=path, generator=seeded(), progress=False)
        assert tuned.lr == pytest.approx(float(expected), rel=1e-5)
    assert VectorChange.relative_lr == 0.03


def test_loss_is_without_its_penalty(small):
    init = vector_of(small)
    runs = [
        finetune(small, TRAIN, init=init, l2=l2, epochs=1, generator=seeded(), progress=False) for l2 in (0.0, 10.0)
    ]
    assert runs[0].history.train_loss[0] == runs[1].history.train_loss[0]
    assert runs[1].history.norm[1] < runs[0].history.norm[1]  # drawn to zero


def test_anchor_holds_the_vector_near_its_start(small):
    init = vector_of(small)
    settings = dict(init=init, l2=100.0, epochs=4, lr=0.05, schedule="constant", generator=seeded(), progress=False)
    held = finetune(small, TRAIN, anchor="init", **settings)
    free = finetune(small, TRAIN, **(settings | dict(l2=0.0, generator=seeded())))
    moved = [float((one.vector.vector - init.vector).norm()) for one in (held, free)]
    assert moved[0] < 0.3 * moved[1]


def test_one_pair_and_a_pair_twice(small):
    settings = dict(init="zero", layer=1, lr=0.05, epochs=3, batch_size=None, progress=False)
    once = finetune(small, TRAIN[:1], generator=seeded(), **settings)
    with pytest.warns(UserWarning, match="finetune: pairs: 1 pair dropped that stood before already"):
        twice = finetune(small, TRAIN[:1] * 2, generator=seeded(), **settings)
    close(twice.vector.vector, once.vector.vector)
    torch.testing.assert_close(twice.history.train_loss, once.history.train_loss)


# --- choosing: on the validation pairs, and on nothing else ---


def test_best_epoch_is_that_of_the_best_validation_score(model):
    split = fvlens.load_relation("antonym").split(seeded())
    settings = dict(init="zero", layer=1, lr=6.0, schedule="constant", progress=False)
    tuned = finetune(model, split.train[:5], valid=split.valid, epochs=6, generator=seeded(), **settings)
    scores = list(zip(tuned.history.valid_top1.tolist(), (-tuned.history.valid_loss).tolist(), strict=True))
    assert tuned.best_epoch == scores.index(max(scores))
    assert 0 < tuned.best_epoch < 6  # neither the start nor the end
    last = finetune(model, split.train[:5], epochs=tuned.best_epoch, generator=seeded(), **settings)
    assert torch.equal(last.vector.vector, tuned.vector.vector)  # without valid: the last epoch
    assert last.history.valid_loss.isnan().all() and last.history.valid_top1.isnan().all()
    assert last.best_epoch == tuned.best_epoch


def test_top1_comes_before_the_loss_and_the_first_epoch_before_later_ones(small, monkeypatch):
    task = Task("", TRAIN[:1], VALID[:1], 0)
    trainable = TrainableVector(torch.zeros(1, small.cfg.d_model), 1)
    change = vector_change(small, [task], trainable, "naive")
    training = Training([task], change, Settings(lr=1.0, patience=2))
    scores = iter([(0.5, 2.0), (0.5, 3.0), (0.75, 9.0), (0.75, 9.0), (0.5, 1.0)])

    def score(rows):
        if rows[0][0] == training.train_rows[0][0]:
            return [0.1], [0.0]
        top1, loss = next(scores)
        return [loss], [top1]

    monkeypatch.setattr(training, "_score", score)
    chosen = []
    for i in range(5):
        with torch.no_grad():
            training.parameters[0][0].fill_(float(i))
        training.record()
        chosen.append((training.best_epochs[0], float(training.best[0][0]), training.stopped[0]))
    assert chosen == [(0, 0, False), (0, 0, False), (2, 2, False), (2, 2, False), (2, 2, True)]


def test_layer_is_chosen_on_the_validation_pairs(small):
    settings = dict(init="zero", valid=TRAIN[:3], lr=0.3, epochs=2, progress=False)
    tuned = finetune(small, TRAIN, layer=[2, 0, 1], generator=seeded(), **settings)
    alone = {layer: finetune(small, TRAIN, layer=layer, generator=seeded(), **settings) for layer in (2, 0, 1)}
    scores = []
    for layer, run in alone.items():
        assert run.layer_scores == ()
        at = run.best_epoch
        scores.append((layer, float(run.history.valid_top1[at]), float(run.history.valid_loss[at])))
    assert tuned.layer_scores == tuple(scores)
    best = max(scores, key=lambda score: (score[1], -score[2]))[0]
    assert tuned.vector.layer == best
    assert torch.equal(tuned.vector.vector, alone[best].vector.vector)
    assert len({score[2] for score in scores}) == 3


def test_layer_of_many_is_the_best_on_average(small):
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    settings = dict(init="zero", lr=0.3, epochs=2, progress=False)
    both = finetune_many(small, splits, layer=range(3), generator=seeded(), **settings)
    alone = [finetune_many(small, splits, layer=layer, generator=seeded(), **settings) for layer in range(3)]
    scores = []
    for layer, runs in enumerate(alone):
        top1 = [float(run.history.valid_top1[run.best_epoch]) for run in runs]
        losses = [float(run.history.valid_loss[run.best_epoch]) for run in runs]
        scores.append((layer, sum(top1) / 2, sum(losses) / 2))
    best = max(scores, key=lambda score: (score[1], -score[2]))[0]
    assert both.vectors.layer == best
    assert torch.equal(both.vectors.matrix, alone[best].vectors.matrix)
    assert both["a"].layer_scores == both["b"].layer_scores == tuple(scores)


def test_test_pairs_change_nothing_and_validation_pairs_decide(model):
    split = fvlens.load_relation("antonym").split(seeded())
    settings = dict(init="zero", layer=1, lr=10.0, epochs=3, progress=False)

    def trained(valid, test):
        runs = finetune_many(model, {"a": split_of(split.train[:10], valid, test)}, generator=seeded(), **settings)
        return runs["a"]

    first = trained(split.valid[:6], split.test)
    assert first.best_epoch > 0
    for test in (split.test[::-1], [(a, "wrong") for a, _ in split.test], ()):
        other = trained(split.valid[:6], test)
        assert torch.equal(other.vector.vector, first.vector.vector)
        assert torch.equal(other.history.valid_loss, first.history.valid_loss)
    seen = trained(split.train[:10], split.test)  # pairs that training makes better to its end
    assert seen.best_epoch == 3 > first.best_epoch
    assert torch.equal(seen.history.train_loss, first.history.train_loss)  # validation pairs choose, and train nothing


# --- many at once ---


def many(model, splits, init, **settings):
    """All in one run, and one after another with the same generator."""
    together = finetune_many(model, splits, init=init, generator=seeded(), progress=False, **settings)
    g = seeded()
    starts = init if isinstance(init, dict) else dict.fromkeys(splits, init)
    alone = [
        finetune(model, split.train, init=starts[name], valid=split.valid, relation=name, generator=g, progress=False,
                 **settings)
        for name, split in splits.items()
    ]  # fmt: skip
    return together, alone


def compare(together, alone):
    assert [run.relation for run in together] == [run.relation for run in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.seed, one.best_epoch, len(one.history)) == (other.seed, other.best_epoch, len(other.history))
        assert one.lr == pytest.approx(other.lr, rel=1e-6)
        assert one.vector.data_hash == other.vector.data_hash
        close(one.vector.vector, other.vector.vector)
        torch.testing.assert_close(
            curves_of(one.history), curves_of(other.history), rtol=1e-5, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("at_once", [None, 8])
@pytest.mark.parametrize("settings", [dict(), dict(loss="perplexity", l2=0.05, anchor="init")], ids=str)
def test_many_equal_separate_runs(small, monkeypatch, settings, at_once):
    """Relations of 5, 3 and 1 pairs, with answers of several tokens and of one, with a patience that stops some."""
    if at_once is not None:
        monkeypatch.setattr(_prepared, "_MOST_ROWS", at_once)
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:]), "c": split_of(PAIRS[:1], TRAIN[1:2])}
    init = {name: vector_of(small, seed=i, scale=0.2) for i, name in enumerate(splits)}
    together, alone = many(small, splits, init, lr=0.4, epochs=8, batch_size=2, patience=2, **settings)
    compare(together, alone)
    assert len({len(run.history) for run in together}) > 1  # they stopped at different epochs
    assert together.complete and len(together) == 3


def test_many_equal_separate_runs_on_the_embedded_model(model):
    names = ("antonym", "country-capital", "plural")
    splits = {name: fvlens.load_relation(name).split(seeded()) for name in names}
    splits = {name: split_of(split.train[:20], split.valid[:8]) for name, split in splits.items()}
    together, alone = many(model, splits, "zero", layer=1, epochs=3)
    compare(together, alone)
    assert all(run.history.train_loss[-1] < run.history.train_loss[0] for run in together)


def test_relations_may_have_validation_pairs_or_none(small):
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE)}
    together, alone = many(small, splits, "zero", layer=1, lr=0.3, epochs=3)
    compare(together, alone)
    assert together["b"].best_epoch == 3 and together["b"].history.valid_loss.isnan().all()


def test_relations_are_named_loaded_and_cut(model):
    names = ["antonym", "country-capital"]
    g = seeded()
    runs = finetune_many(model, [names[0], fvlens.load_relation(names[1])], init="zero", layer=1, n_train=4, epochs=1,
                         generator=g, progress=False)  # fmt: skip
    again = seeded()
    splits = {name: fvlens.load_relation(name).split(again) for name in names}
    same = finetune_many(
        model, {name: split_of(split.train[:4], split.valid) for name, split in splits.items()}, init="zero", layer=1,
        epochs=1, generator=again, progress=False,
    )  # fmt: skip
    assert runs.vectors.names == tuple(names) and runs.vectors.categories == ("meaning", "encyclopedic")
    assert torch.equal(runs.vectors.matrix, same.vectors.matrix)
    assert runs["antonym"].vector.data_hash == same["antonym"].vector.data_hash
    everything = finetune_many(
        model, {"antonym": splits["antonym"]}, init="zero", layer=1, n_train=None, epochs=1, generator=g,
        progress=False,
    )  # fmt: skip
    assert everything["antonym"].state.header["n_train"] == [len(splits["antonym"].train)]


def test_starts_by_name_and_by_order(small):
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    starts = [vector_of(small, seed=1), vector_of(small, seed=2)]
    settings = dict(epochs=1, lr=1e-9, progress=False)
    by_order = finetune_many(small, splits, init=starts, generator=seeded(), **settings)
    by_name = finetune_many(small, splits, init={"b": starts[1], "a": starts[0]}, generator=seeded(), **settings)
    for runs in (by_order, by_name):
        close(runs.vectors.matrix, torch.stack([start.vector for start in starts]))


# --- what is odd ---


def test_a_loss_that_is_not_finite_stops_its_relation_alone(small):
    splits = {"wild": split_of(TRAIN, VALID), "calm": split_of(MORE[:3], MORE[3:])}
    wild = vector_of(small, relation="wild")
    wild = dataclasses.replace(wild, vector=torch.full_like(wild.vector, 3e38))
    with pytest.warns(UserWarning, match="the loss of wild is not finite after epoch 0; try a lower lr"):
        runs = finetune_many(
            small, splits, init={"wild": wild, "calm": vector_of(small, seed=3)}, lr=0.1, epochs=2,
            generator=seeded(), progress=False,
        )  # fmt: skip
    assert torch.equal(runs["wild"].vector.vector, wild.vector) and len(runs["wild"].history) == 1
    g = seeded()
    torch.randint(2**31, (1,), generator=g)
    alone = finetune(
        small, MORE[:3], init=vector_of(small, seed=3), valid=MORE[3:], lr=0.1, epochs=2, generator=g, progress=False
    )
    assert runs["calm"].seed == alone.seed
    close(runs["calm"].vector.vector, alone.vector.vector)


def test_without_validation_the_last_finite_epoch_stands(small):
    with pytest.warns(UserWarning, match="the loss of this relation is not finite after epoch 1; try a lower lr"):
        tuned = finetune(small, TRAIN, init="zero", layer=1, lr=1e30, epochs=3, generator=seeded(), progress=False)
    assert tuned.best_epoch == 0 and len(tuned.history) == 2
    assert (tuned.vector.vector == 0).all()


def test_half_precision_is_trained_in_single_precision(small, models, tmp_path):
    name = "bridge-gpt2" if not HAS_HOOKED else None
    if name is None:
        half, wide = build("gpt2", dtype=torch.bfloat16), build("gpt2")
    else:
        folder = with_words(save("gpt2", tmp_path))
        half, wide = (
            fvlens.load_model(folder, device="cpu", backend="bridge", dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
        )
    settings = dict(init="zero", layer=1, lr=0.05, epochs=3, progress=False)
    expected = finetune(wide, TRAIN, generator=seeded(), **settings)
    for path in (None, "naive"):
        tuned = finetune(half, TRAIN, path=path, generator=seeded(), **settings)
        assert tuned.state.tensors["0.value"].dtype == tuned.state.tensors["0.adam.0.exp_avg"].dtype == torch.float32
        torch.testing.assert_close(tuned.history.train_loss, expected.history.train_loss, rtol=0.03, atol=0)
        assert tuned.history.train_loss[-1] < tuned.history.train_loss[0]
        # a vector far below the residual stream's precision still moves, by sums in the wider of the two
        assert float(tuned.vector.vector.abs().max()) > 0
        trainable = TrainableVector(torch.zeros(1, half.cfg.d_model), 1)
        change = vector_change(half, [Task("", TRAIN, (), 0)], trainable, tuned.path)
        with torch.no_grad():
            logits = change.read(torch.arange(2), torch.zeros(2, dtype=torch.long), Wants(logits=True)).logits
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())  # nowhere rounded to the model's precision


def test_the_models_dropout_and_the_callers_contexts_do_not_matter(models):
    model = models("bridge-gpt2")
    assert model.original_model.config.resid_pdrop > 0
    settings = dict(init="zero", layer=0, lr=0.05, epochs=1, progress=False)
    expected = finetune(model, TRAIN, generator=seeded(), **settings)
    model.train()
    try:
        with torch.no_grad():
            tuned = finetune(model, TRAIN, generator=seeded(), **settings)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(tuned.vector.vector, expected.vector.vector)


def test_hooks_of_others_mean_whole_passes_and_a_warning(models, small):
    point = small.hook_dict[resid_hook(2)]
    point.add_hook(lambda resid, hook: 1.5 * resid, is_permanent=True)
    try:
        with pytest.warns(UserWarning, match="finetune takes whole forward passes, which is slow \\(hooks on the mod"):
            tuned = finetune(small, TRAIN, init="zero", layer=1, lr=0.05, epochs=1, generator=seeded(), progress=False)
        with frozen(small):
            assert float(tuned.history.train_loss[0]) == pytest.approx(
                float(plain_loss(small, TRAIN, 1, torch.zeros(small.cfg.d_model))), rel=1e-6
            )
    finally:
        small.reset_hooks(including_permanent=True)
    assert tuned.path == "naive"


# --- the model is left as it was ---


@pytest.mark.parametrize("end", ["success", "error", "interrupt", "error inside a forward"])
@pytest.mark.parametrize("path", [None, "naive"])
def test_the_model_is_left_as_it_was(models, small, monkeypatch, end, path):
    parameters = dict(small.named_parameters())
    names = list(parameters)
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    parameters[names[0]].requires_grad_(False)
    grad = torch.ones_like(parameters[names[1]])
    parameters[names[1]].grad = grad
    small.train()
    list(small.modules())[-1].eval()
    modes = [module.training for module in small.modules()]
    assert len(set(modes)) == 2
    flags = [parameter.requires_grad for parameter in parameters.values()]
    own = Training.one_epoch

    def one_epoch(self):
        own(self)
        if self.epoch == 1 and end == "error":
            raise RuntimeError("on purpose")
        if self.epoch == 1 and end == "interrupt":
            raise KeyboardInterrupt
        if self.epoch == 1 and end == "error inside a forward":
            monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: 1 / 0)

    monkeypatch.setattr(Training, "one_epoch", one_epoch)
    kinds = {"success": (), "error": RuntimeError, "interrupt": (), "error inside a forward": ZeroDivisionError}

    def train():
        return finetune(
            small, TRAIN, init="zero", layer=1, lr=0.1, epochs=3, path=path, generator=seeded(), progress=False
        )

    try:
        if end == "interrupt":
            with pytest.warns(UserWarning, match="was interrupted: 1 of 3 epochs are finished"):
                train()
        elif kinds[end]:
            with pytest.raises(kinds[end]):
                train()
        else:
            train()
        assert [parameter.requires_grad for parameter in parameters.values()] == flags
        assert [module.training for module in small.modules()] == modes
        assert all(torch.equal(parameters[name], values[name]) for name in names)
        assert parameters[names[1]].grad is grad and (grad == 1).all()
        assert all(parameters[name].grad is None for name in names if name != names[1])
        assert not has_hooks(small)
    finally:
        small.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None


def test_global_randomness_is_untouched_and_a_seed_gives_the_same_bits(small):
    before = torch.get_rng_state()
    runs = [
        finetune(small, TRAIN, init="zero", layer=1, epochs=2, batch_size=2, generator=seeded(seed), progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].vector.vector, runs[1].vector.vector)
    assert runs[0].seed == runs[1].seed != runs[2].seed
    assert not torch.equal(runs[0].vector.vector, runs[2].vector.vector)


# --- stopping and going on ---

SHORT = dict(init="zero", layer=1, valid=VALID, lr=0.3, epochs=4, batch_size=2, progress=False)


def interrupted(monkeypatch, at_epoch, *args, train=finetune, **settings):
    """A training in which Ctrl-C comes in the middle of an epoch."""
    own = Training._step

    def step(self, batch):
        own(self, batch)
        if self.epoch == at_epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.warns(UserWarning, match=f"was interrupted: {at_epoch} of 4 epochs are finished"):
            return train(*args, **settings)


def same(one, other):
    assert torch.equal(one.vector.vector, other.vector.vector)
    torch.testing.assert_close(curves_of(one.history), curves_of(other.history), rtol=0, atol=0, equal_nan=True)
    assert (one.best_epoch, one.lr, one.seed) == (other.best_epoch, other.lr, other.seed)
    assert one.state.header == other.state.header
    assert one.state.tensors.keys() == other.state.tensors.keys()
    for name, tensor in one.state.tensors.items():
        torch.testing.assert_close(tensor, other.state.tensors[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at_epoch", [0, 2])
def test_interruption_gives_the_best_so_far_and_resuming_the_same_bits(small, monkeypatch, tmp_path, at_epoch):
    whole = finetune(small, TRAIN, generator=seeded(), **SHORT)
    part = interrupted(monkeypatch, at_epoch, small, TRAIN, generator=seeded(), **SHORT)
    assert not part.complete and len(part.history) == at_epoch + 1
    torch.testing.assert_close(
        curves_of(part.history), curves_of(whole.history)[:, : at_epoch + 1], rtol=0, atol=0, equal_nan=True
    )
    best = max(range(at_epoch + 1), key=lambda i: (part.history.valid_top1[i], -part.history.valid_loss[i]))
    assert part.best_epoch == best
    file = part.state.save(tmp_path / "state.safetensors")
    for state in (part.state, file, str(file), TrainingState.load(file), part.state):  # in memory twice: it is kept
        resumed = finetune(small, TRAIN, resume=state, generator=seeded(), **SHORT)
        assert resumed.complete
        same(resumed, whole)


def test_checkpoints_are_states_and_resuming_a_finished_training_changes_nothing(small, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    whole = finetune(small, TRAIN, checkpoint=file, generator=seeded(), **SHORT)
    same(finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT), whole)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    interrupted(monkeypatch, 3, small, TRAIN, checkpoint=file, generator=seeded(), **SHORT)
    assert len(TrainingState.load(file).tensors["0.curve"]) == 4
    same(finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT), whole)


def test_many_resume_with_relations_that_have_stopped(small, monkeypatch):
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    settings = dict(init="zero", layer=1, lr=0.6, epochs=4, batch_size=2, patience=1, progress=False)
    whole = finetune_many(small, splits, generator=seeded(), **settings)
    lengths = [len(run.history) for run in whole]
    at_epoch = min(lengths)  # one of them has stopped, the other goes on
    assert len(set(lengths)) == 2 and at_epoch < 4
    part = interrupted(monkeypatch, at_epoch, small, splits, train=finetune_many, generator=seeded(), **settings)
    assert not part.complete
    resumed = finetune_many(small, splits, resume=part["a"].state, generator=seeded(), **settings)
    for one, other in zip(resumed, whole, strict=True):
        same(one, other)


def test_interruption_between_layers_gives_the_best_of_those_done(small, monkeypatch):
    settings = dict(init="zero", valid=VALID, lr=0.3, epochs=2, progress=False)
    first = finetune(small, TRAIN, layer=0, generator=seeded(), **settings)
    own = _prepared.SteeredPrompts
    calls = itertools.count()

    def kept(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(_prepared, "SteeredPrompts", kept)
    with pytest.warns(UserWarning, match="finetune was interrupted: 1 of 3 layers are done"):
        part = finetune(small, TRAIN, layer=range(3), generator=seeded(), **settings)
    assert not part.complete and len(part.layer_scores) == 1
    assert torch.equal(part.vector.vector, first.vector.vector)
    monkeypatch.setattr(_prepared, "SteeredPrompts", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # nothing is done yet
        finetune(small, TRAIN, layer=range(3), generator=seeded(), **settings)


def test_interruption_inside_a_later_layer_is_not_complete(small, monkeypatch):
    settings = dict(init="zero", valid=VALID, lr=0.3, epochs=2, progress=False)
    own = Training.one_epoch

    def one_epoch(self):
        if self.change.prompts.layer == 1:
            raise KeyboardInterrupt
        own(self)

    monkeypatch.setattr(Training, "one_epoch", one_epoch)
    with pytest.warns(UserWarning, match="was interrupted: 0 of 2 epochs"):
        part = finetune(small, TRAIN, layer=range(3), generator=seeded(), **settings)
    assert [layer for layer, _, _ in part.layer_scores] == [0, 1]
    assert part.vector.layer == 0 and not part.complete and not part.vector.complete


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(lr=0.2), "settings"),
        (dict(epochs=5), "settings"),
        (dict(layer=2), "layer"),
        (dict(generator=seeded(1)), "seeds"),
        (dict(valid=VALID[:2]), "data_hash"),
        (dict(relation="other"), "relations"),
        (dict(path="naive"), "path"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_state_of_another_training_is_refused(small, change, named):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    with pytest.raises(ValueError, match=f"finetune: the saved training has {named} .*, this one "):
        finetune(small, TRAIN, resume=done.state, **({"generator": seeded()} | SHORT | change))


def test_a_state_of_other_pairs_or_another_model_is_refused(small, models, tmp_path):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    with pytest.raises(ValueError, match=r"the saved training has data_hash '[0-9a-f]{16}', this one"):
        finetune(small, [*TRAIN[:4], ("warm", "cold")], resume=done.state, generator=seeded(), **SHORT)
    with pytest.raises(ValueError, match=re.escape("the saved training has n_train [5], this one [4].")):
        finetune(small, TRAIN[:4], resume=done.state, generator=seeded(), **(SHORT | dict(valid=[TRAIN[4], *VALID])))
    file = done.state.save(tmp_path / "state.safetensors")
    parameter = next(small.parameters())
    with torch.no_grad():
        parameter[0, 0] += 1
    try:
        with pytest.raises(ValueError, match=r"the saved training has fingerprint .*weights.*, this one"):
            finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT)
    finally:
        with torch.no_grad():
            parameter[0, 0] -= 1


def test_a_model_of_another_name_is_the_same_model(small):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    done.state.header["fingerprint"] = dict(done.state.header["fingerprint"], name="renamed", revision="abc")
    same_again = finetune(small, TRAIN, resume=done.state, generator=seeded(), **SHORT)
    assert torch.equal(same_again.vector.vector, done.vector.vector)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.tensors.pop("0.best"),
        lambda state: state.tensors.update({"0.value": torch.zeros(7)}),
        lambda state: state.tensors.update({"0.generator": torch.zeros(3, dtype=torch.uint8)}),
        lambda state: state.header.pop("lrs"),
        lambda state: state.header.update(stopped=None),
    ],
)
def test_a_damaged_state_is_refused(small, damage):
    done = finetune(small, TRAIN, generator=seeded(), **SHORT)
    damage(done.state)
    with pytest.raises(ValueError, match="finetune: the saved training is damaged \\("):
        finetune(small, TRAIN, resume=done.state, generator=seeded(), **SHORT)


@pytest.fixture(scope="module")
def two_done(models):
    """The state of a training of two relations, one of which has stopped."""
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    model = models("gpt2" if HAS_HOOKED else "bridge-gpt2")
    settings = dict(init="zero", layer=1, lr=0.6, epochs=4, batch_size=2, patience=1, progress=False)
    return finetune_many(model, splits, generator=seeded(), **settings)


def altered(state, **tensors):
    """The state with other tensors, by their name with a dot for each __; None takes one out."""
    every = {**state.tensors, **{name.replace("__", "."): value for name, value in tensors.items()}}
    return TrainingState({name: value for name, value in every.items() if value is not None}, state.header)


def test_a_state_is_checked_when_it_is_read(two_done, tmp_path):
    state = two_done.runs[0].state
    shapes = {name: tensor.shape for name, tensor in state.tensors.items()}
    assert state.header["stopped"].count(True) >= 1 and shapes["0.adam.0.exp_avg"] == shapes["0.value"]
    loaded = TrainingState.load(state.save(tmp_path / "good"))
    assert loaded.header == state.header and loaded.tensors.keys() == state.tensors.keys()
    d = shapes["0.value"][0]
    steps = {i: (len(state.tensors[f"{i}.curve"]) - 1) * n for i, n in ((0, 3), (1, 2))}  # 5 and 3 pairs, 2 a step
    assert {i: float(state.tensors[f"{i}.adam.0.step"]) for i in (0, 1)} == steps
    nan = torch.full((d,), math.nan)
    for change, message in [
        (dict(**{"0__best": nan}), "0.best: holds NaN or infinite values"),
        (dict(**{"1__start": nan}), "1.start: holds NaN or infinite values"),
        (dict(**{"0__best": torch.zeros(d, dtype=torch.int64)}), "0.best: expected numbers of a floating precision"),
        (dict(**{"1__value": torch.zeros(d + 1)}), f"1.value: expected shape [{d}], got [{d + 1}]"),
        (dict(**{"0__curve": torch.zeros(2, 4)}), "0.curve: expected 1 to 5 rows of 5, got [2, 4]"),
        (dict(**{"0__curve": torch.zeros(6, 5)}), "0.curve: expected 1 to 5 rows of 5, got [6, 5]"),
        (dict(**{"0__curve": None}), "KeyError: '0.curve'"),
        (dict(**{"0__generator": torch.zeros(3)}), "0.generator: expected bytes, got torch.float32 [3]"),
        (dict(**{"0__adam__0__step": torch.tensor(1.0)}), f"after {steps[0]} steps"),
        (dict(**{"0__adam__0__exp_avg": torch.zeros(2)}), f"expected moments of one shape after {steps[0]} steps"),
        (dict(**{"0__adam__0__exp_avg": None}), "KeyError: '0.adam.0.exp_avg'"),
        (dict(**{"0__adam__0__exp_avg_sq": -torch.ones(d)}), "0.adam.0.exp_avg_sq: expected squares, got -1.0"),
        (dict(**{"0__adam__0__more": torch.ones(d)}), "unknown tensors 0.adam.0.more"),
        (dict(**{"2__value": torch.ones(d)}), "unknown tensors 2.value"),
    ]:
        path = altered(state, **change).save(tmp_path / "bad")
        with pytest.raises(ValueError, match=r"bad: damaged training state \(.*" + re.escape(message)):
            TrainingState.load(path)
    for change, message in [
        (dict(best_epochs=[9, 0]), "best_epochs: expected 0.."),
        (dict(best_epochs=[0.0, 0]), "best_epochs: expected a whole number"),
        (dict(stopped=[0, 1]), "stopped: expected true or false"),
        (dict(lrs=[0.1]), "lrs: expected 2, one a relation, got 1"),
        (dict(lrs=[0.1, -1]), "lrs: expected numbers over 0, got -1"),
        (dict(relations=None), "relations: expected a list"),
    ]:
        path = TrainingState(state.tensors, state.header | change).save(tmp_path / "bad")
        with pytest.raises(ValueError, match=r"bad: damaged training state \(.*" + re.escape(message)):
            TrainingState.load(path)


def test_a_relation_that_stopped_may_hold_what_stopped_it(two_done, tmp_path):
    state = two_done.runs[0].state
    i = state.header["stopped"].index(True)
    nan = torch.full_like(state.tensors[f"{i}.value"], math.nan)
    path = altered(state, **{f"{i}__value": nan, f"{i}__adam__0__exp_avg": nan}).save(tmp_path / "state")
    assert TrainingState.load(path).tensors[f"{i}.value"].isnan().all()


def test_moments_of_a_state_fit_the_parameters(small):
    """They fit each other, but not what is trained; and nothing of the training has changed by then."""
    task = Task("r", TRAIN, VALID, 0)
    change = vector_change(small, [task], TrainableVector(torch.zeros(1, small.cfg.d_model), 1), None)
    training = Training([task], change, Settings(epochs=3, lr=0.1))
    _loop.train(training, epochs=1, progress=False)
    state = training.state()
    of_two = {f"0.adam.1.{name}": state.tensors[f"0.adam.0.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    short = {f"0.adam.0.{name}": torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
    all_short = {f"0.{name}": torch.zeros(3) for name in ("value", "start", "best")}
    before = change.trainable.rows[0].detach().clone()
    for tensors, message in [
        (of_two, "moments of 2 parameters, but there are 1"),
        (short, f"0.adam.0.exp_avg: expected shape [{small.cfg.d_model}], got [3]"),
        (all_short, f"0.value: expected shape [{small.cfg.d_model}], got [3]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            training.restore(TrainingState({**state.tensors, **tensors}, state.header))
        assert torch.equal(change.trainable.rows[0], before) and len(training.curves[0]) == 2


@pytest.mark.parametrize("kind", ["vector", "distributed", "set"])
def test_a_vector_of_an_interrupted_training_says_so(small, monkeypatch, tmp_path, kind):
    how = dict(lr=0.3, epochs=4, batch_size=2, progress=False, generator=seeded())
    where = dict(init=distributed(small)) if kind == "distributed" else dict(init="zero", layer=1, relation="r")
    whole = finetune(small, TRAIN, **how, **where)
    part = interrupted(monkeypatch, 2, small, TRAIN, **how, **where)
    vectors = [run.vector if kind != "set" else VectorSet((run.vector,)) for run in (whole, part)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(vectors[0]).load(vectors[0].save(tmp_path / "whole"))
    told = "part: a training that was interrupted, the best of the epochs that were finished" + ": r" * (kind == "set")
    with pytest.warns(UserWarning, match=f"{told}\\."):
        loaded = type(vectors[1]).load(vectors[1].save(tmp_path / "part"))
    flags = [[one.complete for one in (found if kind == "set" else [found])] for found in (again, loaded)]
    assert flags == [[True], [False]]


def test_what_is_made_of_a_part_is_a_part(small, unchecked):
    part, whole = vector_of(small, complete=False), vector_of(small, seed=1)
    assert not (part + whole).complete and not (2 * part).complete and not part.at_layer(0).complete
    assert (whole + whole).complete and fvlens.random_vector_like(part, seeded()).complete
    with pytest.raises(ValueError, match="FunctionVector: complete: expected true or false, got 1"):
        vector_of(small, complete=1)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("load", [TrainingState.load, VectorSet.load])
def test_files_are_not_executed(tmp_path, load):
    trap, file = tmp_path / "trap", tmp_path / "file.safetensors"
    file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="not a safetensors file, or a truncated one"):
        load(file)
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists()  # it would have


def test_a_state_file_must_be_one(small, tmp_path):
    with pytest.raises(ValueError, match="no vector file at"):
        finetune(small, TRAIN, resume=tmp_path / "none", generator=seeded(), **SHORT)
    file = vector_of(small).save(tmp_path / "vector.safetensors")
    with pytest.raises(ValueError, match="expected 'fvlens-training-1'"):
        finetune(small, TRAIN, resume=file, generator=seeded(), **SHORT)


def test_checkpoint_folder_is_asked_for_before_the_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "one_epoch", lambda self: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"finetune: folder .*absent of the checkpoint does not exist; create"):
        finetune(small, TRAIN, checkpoint=tmp_path / "absent" / "state", generator=seeded(), **SHORT)


# --- the progress bar ---


def test_one_bar_counts_epochs(small, monkeypatch):
    bars = []

    class Bar(_loop.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append((kwargs, self))

        def update(self, n=1):
            self.counted = getattr(self, "counted", 0) + n
            return super().update(n)

    monkeypatch.setattr(_loop, "tqdm", Bar)
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    finetune_many(small, splits, init="zero", layer=1, epochs=3, generator=seeded())
    ((settings, bar),) = bars
    assert (settings["total"], settings["disable"], settings["desc"]) == (3, False, "fine-tuning 2 relations")
    assert bar.counted == 3
    finetune(small, TRAIN, init="zero", layer=1, epochs=1, relation="a", generator=seeded(), progress=False)
    assert bars[-1][0]["disable"] and bars[-1][0]["desc"] == "fine-tuning a"


# --- modules for training by hand ---


def by_hand(model, module, additions, targets, *, lr, epochs):
    """A notebook's loop: one inject around all steps."""
    prompts = fvlens.build_prompts(model, targets, n_shots=0, generator=seeded())
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    with frozen(model), inject(model, additions):
        for _ in range(epochs):
            logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
            losses = F.cross_entropy(logits.float(), prompts.first_answer_token, reduction="none")
            optimiser.zero_grad()
            losses.mean().backward()
            optimiser.step()
    return losses


HAND = dict(lr=0.05, epochs=4, batch_size=None, schedule="constant", progress=False)


def single(model, pairs):
    return [pair for pair in pairs if len(tokenised(model, pair)[1]) == 1]


def test_by_hand_reaches_what_finetune_reaches(small):
    pairs = single(small, [*PAIRS, *MORE])[:6]
    init = vector_of(small, scale=0.3)
    module = TrainableVector(init)
    by_hand(small, module, module, pairs, lr=0.05, epochs=4)
    tuned = finetune(small, pairs, init=init, generator=seeded(), **HAND)
    close(module.vector.detach(), tuned.vector.vector)
    found = module.to_vector(init)
    assert (found.kind, found.relation, found.layer) == ("fine-tuned", "r", 1)
    assert not found.vector.requires_grad and torch.equal(found.vector, module.vector.detach())
    tokens = torch.tensor([tokenised(small, pairs[0])[0]])
    with torch.no_grad():
        expected = plain_logits(small, pairs[0], 1, found.vector)[0][0]
        with inject(small, found):
            torch.testing.assert_close(small(tokens)[0, -1], expected)


@pytest.mark.parametrize("assigned", [False, True])
def test_several_rows_by_hand(small, assigned):
    """Row i goes to prompt i, or where it is assigned; one open ``inject`` sees the rows move."""
    pairs = single(small, [*PAIRS, *MORE])[:4]
    starts = [vector_of(small, seed=i, scale=0.3) for i in range(2 if assigned else 4)]
    module = TrainableVector(starts)
    rows = torch.tensor([0, 1, 1, 0]) if assigned else torch.arange(4)
    steering = module.of(rows) if assigned else module
    by_hand(small, module, steering, pairs, lr=0.05, epochs=4)
    for i, start in enumerate(starts):
        own = [pair for pair, row in zip(pairs, rows.tolist(), strict=True) if row == i]
        tuned = finetune(small, own, init=start, generator=seeded(), **HAND)
        close(module.rows[i].detach(), tuned.vector.vector)
    assert torch.equal(module.matrix, torch.stack(list(module.rows)))
    with pytest.raises(ValueError, match=re.escape(f"vector: there are {len(starts)} relations; use .matrix or .of(")):
        module.vector


def test_trainable_vectors_take_vectors_and_tensors(small):
    one, two = vector_of(small, 1), vector_of(small, 2)
    assert torch.equal(TrainableVector(one).vector, one.vector) and TrainableVector(one).layer == 1
    assert TrainableVector([one, two], 0).layer == 0
    assert TrainableVector(one, 2).layer == 2
    half = TrainableVector(one.vector.bfloat16(), 1)
    assert half.vector.dtype == torch.float32 and half.vector.requires_grad
    assert set(half.additions()) == {resid_hook(1)}
    source = one.vector.clone()
    module = TrainableVector(source, 1)
    with torch.no_grad():
        module.vector.add_(1)
    assert torch.equal(source, one.vector)  # a copy
    for init, message in [
        (torch.zeros(2, 2, 2), r"expected \[d_model\] or \[relation d_model\], got shape \[2, 2, 2\]"),
        ([], r"expected \[d_model\] or \[relation d_model\], got shape \[0\]"),
        (torch.zeros(4), "a tensor does not say its layer; give layer=."),
        ([one, two], r"the vectors are of layers \[1, 2\]; give layer=."),
    ]:
        with pytest.raises(ValueError, match=f"TrainableVector: {message}"):
            TrainableVector.__init__.__wrapped__(TrainableVector.__new__(TrainableVector), init)


def distributed(model, seed=0, heads=((0, 2), (2, 1), (2, 3))):
    values = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    for head in heads:
        values[head] = 0.1 * torch.randn(model.cfg.d_head, generator=seeded(seed + sum(head)))
    return DistributedVector(values, tuple(fvlens.Head(*head) for head in heads), "r", fingerprint(model))


def plain_distributed_log_probs(model, pair, numbers, heads):
    """Log-probability of each answer token with numbers added to heads, by hooks of our own."""
    query, answer = tokenised(model, pair)

    def add(z, hook):
        z = z.clone()
        for i, (layer, head) in enumerate(heads):
            if hook.name.startswith(f"blocks.{layer}."):
                z[0, len(query) - 1, head] = z[0, len(query) - 1, head] + numbers[i]
        return z

    hooks = [(z_hook(layer), add) for layer in sorted({layer for layer, _ in heads})]
    with model.hooks(fwd_hooks=hooks):
        logits = model(torch.tensor([[*query, *answer[:-1]]]))[0, len(query) - 1 :]
    return logits.double().log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]


def plain_distributed(model, pairs, numbers, heads, *, lr, epochs):
    """The same training, one prompt at a time."""
    parameter = torch.stack([numbers[head] for head in heads]).clone().requires_grad_()
    optimiser = torch.optim.Adam([parameter], lr=lr)
    losses = []
    for _ in range(epochs):
        total = -sum(plain_distributed_log_probs(model, pair, parameter, heads).sum() for pair in pairs) / len(pairs)
        losses.append(float(total.detach()))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    return parameter.detach(), losses


@pytest.mark.parametrize("heads", [((0, 2), (2, 1), (2, 3)), ((1, 1),)], ids=["several layers", "one head"])
@pytest.mark.parametrize("name, path", CASES)
def test_losses_and_gradients_of_heads_equal_a_plain_forward(models, name, path, heads):
    model = models(name)
    trainable = TrainableDistributedVector(distributed(model, heads=heads))
    prompts = SteerablePrompts.of(model, [Task("", PAIRS, (), 0)], "qa", layer=trainable.joins_after, path=path)
    assert (prompts.path, trainable.joins_after) == (path, heads[0][0] - 1)
    change = DistributedChange(prompts, trainable)
    plain = trainable.values.detach().clone().requires_grad_()
    with frozen(model):
        rows, relation = torch.arange(len(PAIRS)), torch.zeros(len(PAIRS), dtype=torch.long)
        readout = change.read(rows, relation, Wants(first=True))
        readout.log_probs.sum().backward()
        whole = change.read(rows, relation, Wants(hooks=(z_hook(2),)))  # what a hook sees is that of whole passes
        logits = change.read(rows, relation, Wants(logits=True)).logits
        expected = [plain_distributed_log_probs(model, pair, plain, heads) for pair in PAIRS]
        sum(one.sum() for one in expected).backward()
    tolerance = 1e-6 if next(model.parameters()).dtype == torch.float64 else 2e-5
    for row, own in zip(readout.log_probs, expected, strict=True):
        torch.testing.assert_close(row[: len(own)].double(), own, rtol=2 * tolerance, atol=0)
    close(trainable.values.grad, plain.grad, tolerance)
    assert plain.grad.norm(dim=1).min() > 1e-3
    torch.testing.assert_close(whole.log_probs, readout.log_probs, rtol=2 * tolerance, atol=1e-6)
    torch.testing.assert_close(logits[:, 0], readout.first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, path",
    [*(pytest.param("gpt2", path, marks=needs_hooked) for path in ("weights", "kv")), ("bridge-llama", "kv")],
)
def test_distributed_training_equals_a_plain_loop(models, name, path):
    model = models(name)
    init = distributed(model)
    fastest = None if (name, path) != ("gpt2", "kv") else path
    tuned = finetune(model, TRAIN, init=init, path=fastest, generator=seeded(), **(HAND | dict(epochs=3)))
    with frozen(model):
        numbers, losses = plain_distributed(model, TRAIN, init.values, init.heads, lr=0.05, epochs=3)
    assert (tuned.path, tuned.relation, tuned.vector.kind) == (path, "r", "fine-tuned distributed")
    # entry 0 is the start, and each epoch's one step saw the numbers before it
    torch.testing.assert_close(tuned.history.train_loss, torch.tensor([losses[0], *losses]), rtol=1e-5, atol=0)
    assert tuned.best_epoch == 3
    close(torch.stack([tuned.vector.values[head] for head in init.heads]), numbers)
    others = tuned.vector.values.clone()
    for head in init.heads:
        others[head] = 0
    assert (others == 0).all()


def test_distributed_vector_by_hand(small):
    pairs = single(small, [*PAIRS, *MORE])[:5]
    init = distributed(small)
    module = TrainableDistributedVector(init)
    by_hand(small, module, module, pairs, lr=0.05, epochs=3)
    numbers, _ = plain_distributed(small, pairs, init.values, init.heads, lr=0.05, epochs=3)
    close(module.values.detach(), numbers)
    found = module.to_vector(small, relation="x")
    assert found.relation == "x" and found.heads == init.heads
    assert torch.equal(torch.stack([found.values[head] for head in init.heads]), module.values.detach())
    again = TrainableDistributedVector(
        module.values.detach(), heads=[(0, 2), (2, 1), (2, 3)], n_layers=small.cfg.n_layers, n_heads=small.cfg.n_heads
    )
    for hook, value in again.additions().items():
        assert torch.equal(value, module.additions()[hook])


@needs_hooked
def test_heads_of_a_model_without_a_fast_path_take_whole_passes(models):
    model = models("shortformer")
    with pytest.warns(UserWarning, match="finetune takes whole forward passes, which is slow \\(positions shortformer"):
        tuned = finetune(model, TRAIN, init=distributed(model), generator=seeded(), **HAND)
    assert tuned.path == "naive"


@needs_hooked
def test_a_training_of_heads_by_whole_passes_goes_on_so(small, tmp_path):
    """Version 0.1 trained heads by whole passes only, and its states say so."""
    file = tmp_path / "state"
    how = HAND | dict(epochs=3)
    naive = finetune(small, TRAIN, init=distributed(small), path="naive", checkpoint=file, generator=seeded(), **how)
    for state in (naive.state, file):
        resumed = finetune(small, TRAIN, init=distributed(small), resume=state, generator=seeded(), **how)
        assert resumed.path == "naive"
        assert torch.equal(resumed.vector.values, naive.vector.values)
    with pytest.raises(ValueError, match="finetune: the saved training has path 'naive', this one 'weights'"):
        finetune(small, TRAIN, init=distributed(small), resume=file, path="weights", generator=seeded(), **how)


def test_default_learning_rate_of_heads_is_a_share_of_their_z(small):
    init = distributed(small)
    seen = []
    for pair in TRAIN:
        query, _ = tokenised(small, pair)
        for layer, head in init.heads:
            see = lambda z, hook, head=head: seen.append(z[0, -1, head].detach()) or None  # noqa: E731
            with small.hooks(fwd_hooks=[(z_hook(layer), see)]):
                small(torch.tensor([query]))
    tuned = finetune(small, TRAIN, init=init, epochs=1, generator=seeded(), progress=False)
    assert tuned.lr == pytest.approx(
        VectorChange.relative_lr * float(torch.stack(seen).square().mean().sqrt()), rel=1e-5
    )


def test_distributed_errors(small, unchecked):
    init = distributed(small)
    values = torch.zeros(2, small.cfg.d_head)
    with pytest.raises(ValueError, match="a tensor needs heads=, n_layers= and n_heads= beside it"):
        TrainableDistributedVector(values)
    with pytest.raises(ValueError, match="TrainableDistributedVector: 1 heads, but 2 rows of numbers"):
        TrainableDistributedVector(values, heads=[(0, 0)], n_layers=3, n_heads=4)
    prompts = SteerablePrompts.of(small, [Task("", PAIRS, (), 0)], "qa", layer=0, path="naive")
    with pytest.raises(
        ValueError, match=r"first head is in layer 0, but .* kept up to layer 0; make them with layer=-1"
    ):
        DistributedChange(prompts, TrainableDistributedVector(init))
    with pytest.raises(ValueError, match="finetune: a distributed vector acts at its heads' own layers; leave layer="):
        finetune(small, TRAIN, init=init, layer=1, generator=seeded())
    with pytest.raises(ValueError, match="finetune: no training pairs of r"):
        finetune(small, [], init=init, generator=seeded())


# --- results ---


def test_result_says_where_it_comes_from(small):
    init = dataclasses.replace(vector_of(small), heads=(fvlens.Head(0, 1),), template="arrow")
    tuned = finetune(small, TRAIN, init=init, valid=VALID, epochs=1, l2=0.5, generator=seeded(), progress=False)
    vector = tuned.vector
    assert (vector.kind, vector.relation, vector.layer, str(vector.template)) == ("fine-tuned", "r", 1, "arrow")
    assert vector.heads == init.heads and vector.seed == tuned.seed
    assert vector.fingerprint == fingerprint(small)
    assert tuned.settings == Settings(l2=0.5, epochs=1, template="arrow")
    queries = fvlens.build_prompts(small, [*TRAIN, *VALID], n_shots=0, template="arrow", generator=seeded())
    assert vector.data_hash == queries.data_hash
    named = finetune(
        small, Relation("words", TRAIN), init=init, template="qa", epochs=1, generator=seeded(), progress=False
    )
    assert named.relation == "words" and named.settings.template == TEMPLATES["qa"]
    assert tuned.seconds > 0


def test_tables_and_figures(small):
    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE[:3], MORE[3:])}
    runs = finetune_many(small, splits, init="zero", layer=1, epochs=2, lr=0.1, generator=seeded(), progress=False)
    table = runs.to_dataframe()
    assert list(table.columns) == [
        "relation", "epoch", "train_loss", "valid_loss", "valid_top1", "norm", "cosine",
    ]  # fmt: skip
    assert table.relation.tolist() == ["a"] * 3 + ["b"] * 3 and table.epoch.tolist() == [0, 1, 2] * 2
    for name in ("train_loss", "valid_loss", "valid_top1", "norm"):
        assert table[name].tolist() == [x for run in runs for x in getattr(run.history, name).tolist()]
    assert len(runs["b"].history) == 3
    figure = runs["b"].plot()
    traces = {trace.name: list(trace.y) for trace in figure.data}
    assert traces["training pairs"] == runs["b"].history.train_loss.double().tolist()
    assert traces["validation top-1"] == runs["b"].history.valid_top1.double().tolist()
    assert "cosine" not in traces  # the start was zero
    assert figure.layout.title.text == "Training of b"
    with pytest.raises(ValueError, match="no training of 'c' here; there are a, b"):
        runs["c"]


def test_history_counts_its_entries():
    curve = torch.arange(3.0)
    assert len(History(curve, curve, curve, curve, curve)) == 3


# --- vector sets ---


@pytest.fixture
def some(small):
    return VectorSet(
        (
            dataclasses.replace(vector_of(small, seed=0, relation="antonym"), heads=(fvlens.Head(1, 2),)),
            dataclasses.replace(vector_of(small, seed=1, relation="country-capital"), kind="fine-tuned", template="qa"),
            dataclasses.replace(vector_of(small, seed=2, relation="my own"), seed=7, data_hash="abc"),
        )
    )


def test_vector_set_holds_its_vectors(small, some):
    assert some.names == ("antonym", "country-capital", "my own")
    assert some.categories == ("meaning", "encyclopedic", "")
    assert (len(some), some.layer, some.fingerprint) == (3, 1, fingerprint(small))
    assert torch.equal(some.matrix[1], vector_of(small, seed=1).vector)
    assert [vector.relation for vector in some] == list(some.names)
    assert some["my own"] is some[2] is some.vectors[2]
    some.check(small)


def test_vector_set_selects(some):
    assert some.select(["my own", "antonym"]).names == ("my own", "antonym")
    assert some.select(["my own", "antonym"]).categories == ("", "meaning")
    assert some.select(category="encyclopedic").names == ("country-capital",)
    assert some.select(["antonym", "country-capital"], category="meaning").names == ("antonym",)
    assert some.select().names == some.names
    with pytest.raises(
        ValueError, match="select: nothing of category 'spelling' among antonym, country-capital, my own"
    ):
        some.select(category="spelling")
    with pytest.raises(ValueError, match="no vector of 'synonym' in this set; it holds antonym, country-capital, my"):
        some.select(["synonym"])
    with pytest.raises(ValueError, match="select: expected at least one name, got none"):
        some.select([])


def test_vector_set_round_trip(small, some, tmp_path):
    file = some.save(tmp_path / "set.safetensors")
    assert file == tmp_path / "set.safetensors"
    loaded = VectorSet.load(file, model=small)
    assert loaded.categories == some.categories
    for one, other in zip(loaded, some, strict=True):
        assert torch.equal(one.vector, other.vector)
        for field in dataclasses.fields(FunctionVector):
            if field.name != "vector":
                assert getattr(one, field.name) == getattr(other, field.name)
    some.select(["antonym"]).save(file)  # replaces it
    assert VectorSet.load(file).names == ("antonym",)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.safetensors"]


def test_a_set_says_its_model_once_and_sets_of_version_0_1_are_read(some, tmp_path):
    """These held the fingerprint beside every vector."""
    from fvlens.files import read_tensors, write_tensors
    from fvlens.training._set import SET_FORMAT

    renamed = dataclasses.replace(some[1].fingerprint, name="renamed")  # the same model by another name
    some = VectorSet((some[0], dataclasses.replace(some[1], fingerprint=renamed), some[2]))
    tensors, header = read_tensors(some.save(tmp_path / "set.safetensors"), SET_FORMAT)
    assert ["fingerprint" in entry for entry in header["vectors"]] == [False, True, False]
    shared = header.pop("fingerprint")
    header["vectors"] = [{"fingerprint": shared} | entry for entry in header["vectors"]]
    for file in (tmp_path / "set.safetensors", write_tensors(tmp_path / "old", tensors, header, SET_FORMAT)):
        assert [one.fingerprint for one in VectorSet.load(file)] == [one.fingerprint for one in some]


def test_vector_set_table_and_similarity(small, some):
    table = some.to_dataframe()
    assert list(table.columns) == ["relation", "category", "kind", "layer", "dimension", "value"]
    assert len(table) == 3 * small.cfg.d_model
    row = table[(table.relation == "my own") & (table.dimension == 5)].iloc[0]
    assert row.value == float(some[2].vector[5]) and (row.category, row.kind, row.layer) == ("", "function", 1)
    for i, j in itertools.product(range(3), repeat=2):
        assert float(some.similarity()[i, j]) == pytest.approx(some[i].cosine(some[j]), abs=1e-6)
    figure = some.plot()
    assert "Cosine similarity of 3 vectors" in figure.layout.title.text


def test_vector_set_errors(small, models, some, tmp_path, unchecked):
    first = some[0]
    with pytest.raises(ValueError, match="VectorSet: expected at least one vector, got none"):
        VectorSet(())
    with pytest.raises(ValueError, match="VectorSet: two vectors are named 'antonym'; names must be unique"):
        VectorSet((first, first))
    with pytest.raises(ValueError, match="'antonym' is of layer 1, 'x' of 2; bring them together with at_layer"):
        VectorSet((first, vector_of(small, 2, relation="x")))
    with pytest.raises(ValueError, match="VectorSet: 3 vectors, but 1 categories"):
        VectorSet(some.vectors, ("one",))
    other = models("bridge-llama")
    with pytest.raises(ValueError, match="'antonym' and 'x' are of two models"):
        VectorSet((first, vector_of(other, relation="x")))
    with pytest.raises(ValueError, match="the set of 3 vectors"):
        some.check(other)
    file = some.save(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="the set of 3 vectors"):
        VectorSet.load(file, model=other)
    with pytest.raises(ValueError, match="no vector file at"):
        VectorSet.load(tmp_path / "none")
    with pytest.raises(ValueError, match="does not exist; create it first"):
        some.save(tmp_path / "absent" / "set")
    single = first.save(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="expected 'fvlens-vector-set-1'"):
        VectorSet.load(single)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda t, h: t.pop("matrix"), "KeyError: 'matrix'"),
        (lambda t, h: h.pop("vectors"), "KeyError: 'vectors'"),
        (lambda t, h: h.pop("categories"), "KeyError: 'categories'"),
        (lambda t, h: h["vectors"].pop(), "3 rows, but 2 vectors in the header"),
        (lambda t, h: h.update(vectors=[1, 2, 3]), "TypeError"),
        (lambda t, h: h.update(categories=["a"]), "3 vectors, but 1 categories"),
        (lambda t, h: h["vectors"][0].update(layer=99), "expected a layer in 0..2, got 99"),
        (lambda t, h: t.update(matrix=t["matrix"][:, :5]), "expected shape"),
        (lambda t, h: t["matrix"].fill_(math.nan), "NaN or infinite"),
    ],
)
def test_damaged_vector_sets_are_refused(some, tmp_path, damage, told, unchecked):
    from fvlens.files import read_tensors, write_tensors
    from fvlens.training._set import SET_FORMAT

    file = some.save(tmp_path / "set.safetensors")
    tensors, header = read_tensors(file, SET_FORMAT)
    damage(tensors, header)
    tensors.setdefault("other", torch.zeros(1))
    write_tensors(file, tensors, header, SET_FORMAT)
    with pytest.raises(ValueError, match=f"set.safetensors: damaged vector set \\(.*{re.escape(told)}"):
        VectorSet.load(file)


# --- errors ---


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss="mse"), "finetune: loss='mse'; expected one of cross_entropy, perplexity."),
        (dict(anchor="one"), "finetune: anchor='one'; expected one of zero, init."),
        (dict(schedule="step"), "finetune: schedule='step'; expected one of cosine, constant."),
        (dict(l2=-1.0), "finetune: expected l2 of 0 or more, got -1.0."),
        (dict(l2=math.nan), "finetune: expected l2 of 0 or more, got nan."),
        (dict(lr=0.0), "finetune: expected lr over 0, or None, got 0.0."),
        (dict(lr=math.inf), "finetune: expected lr over 0, or None, got inf."),
        (dict(epochs=0), "finetune: expected epochs of at least 1, got 0."),
        (dict(batch_size=0), "finetune: expected batch_size of at least 1, got 0."),
        (dict(patience=0), "finetune: expected patience of at least 1, got 0."),
        (dict(template="none"), "template"),
        (dict(layer=None), "finetune: init='zero' does not say where; give layer=."),
        (dict(layer=3), "finetune: expected layers in 0..2, got [3]."),
        (dict(layer=-1), "finetune: expected layers in 0..2, got [-1]."),
        (dict(layer=[]), "finetune: expected layers in 0..2, got []."),
        (dict(layer=[0, 1], valid=None), "finetune: several layers, but no validation pairs to choose by; give valid="),
        (
            dict(layer=[0, 1], checkpoint="x"),
            "finetune: resume and checkpoint are for the training of one layer, got layers [0, 1].",
        ),
        (
            dict(layer=[0, 1], resume=TrainingState({}, {})),
            "finetune: resume and checkpoint are for the training of one layer, got layers [0, 1].",
        ),
        (dict(init="noise"), "finetune: init='noise'; expected a vector or 'zero'."),
        (dict(path="fast"), "path='fast'; expected one of weights, kv, naive"),
        (dict(max_memory=1000), "max_memory=1000 bytes is too small"),
    ],
)
def test_bad_settings_are_refused(small, unchecked, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(small, TRAIN, **({"generator": seeded()} | SHORT | change))


def test_pairs_and_models_are_checked(small, models, unchecked, monkeypatch):
    with pytest.raises(ValueError, match="finetune: no training pairs of this relation"):
        finetune(small, [], generator=seeded(), **SHORT)
    other = models("bridge-llama")
    foreign = vector_of(other)
    with pytest.raises(ValueError, match="the vector of 'r'"):
        finetune(small, TRAIN, generator=seeded(), **(SHORT | dict(init=foreign)))
    tuned = finetune(small, TRAIN, check=False, generator=seeded(), **(SHORT | dict(init=foreign, epochs=1)))
    assert tuned.vector.fingerprint == fingerprint(small)
    monkeypatch.setattr(_prepared, "_MOST_ROWS", 2)
    with pytest.raises(
        ValueError, match=re.escape("finetune: a step of 3 pairs of this relation does not fit the mem")
    ):
        finetune(small, TRAIN, generator=seeded(), **(SHORT | dict(batch_size=3, loss="perplexity")))


def test_a_step_of_more_than_fits_adds_up_the_gradients_of_its_parts(small, monkeypatch):
    settings = SHORT | dict(batch_size=5, l2=0.01)
    whole = finetune(small, TRAIN, generator=seeded(), **settings)
    monkeypatch.setattr(_prepared, "_MOST_ROWS", 2)
    parts = finetune(small, TRAIN, generator=seeded(), **settings)
    assert parts.batch_size < 5 <= whole.batch_size
    close(parts.vector.vector, whole.vector.vector)
    torch.testing.assert_close(curves_of(parts.history), curves_of(whole.history), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_relations_of_many_are_checked(small, unchecked):
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    settings = dict(layer=1, generator=seeded(), progress=False)
    start = vector_of(small)
    for relations, init, more, message in [
        ({}, "zero", {}, "finetune_many: expected at least one relation, got none."),
        ([], "zero", {}, "finetune_many: expected at least one relation, got none."),
        (splits, "noise", {}, "finetune_many: init='noise'; expected 'zero' or function vectors."),
        (splits, {"a": start}, {}, "finetune_many: init has no vector of b."),
        (splits, [start], {}, "finetune_many: 2 relations, but 1 vectors to start from."),
        (splits, [start, start.at_layer(2)], dict(layer=None), "finetune: the starts are of layers [1, 2]; give lay"),
        (splits, "zero", dict(n_train=0), "finetune_many: expected n_train of at least 1, or None for all pairs, got"),
        (["antonym", "antonym"], "zero", {}, "finetune_many: two relations are named 'antonym'; names must be"),
        ({"a": split_of(())}, "zero", {}, "finetune: no training pairs of a."),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            finetune_many(small, relations, init=init, **(settings | more))


def test_frozen_puts_everything_back_after_an_error(small):
    small.train()
    try:
        with pytest.raises(ZeroDivisionError, match="inside, False"), frozen(small):
            raise ZeroDivisionError(f"inside, {small.training}")
        assert small.training and all(parameter.requires_grad for parameter in small.parameters())
    finally:
        small.eval()


def test_no_warnings_in_an_ordinary_training(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = finetune_many(
            small, {"a": split_of(TRAIN, VALID)}, init="zero", layer=1, epochs=1, generator=seeded(), progress=False
        )
    assert isinstance(runs, FineTunedSet)


# --- ties ---


@pytest.mark.parametrize("path", ["weights", "kv", "naive"])
def test_of_two_equal_logits_the_smaller_id_is_right_in_validation(tied, path):
    """The model answers every prompt by its bias alone, which no vector changes."""
    vector = vector_of(tied)
    for valid, expected in (([("hot", "cold"), ("big", "small")], 0.5), ([("big", "small")], 0.0)):
        tuned = finetune(
            tied, [("icy", "cold")], valid=valid, init=vector, epochs=1, path=path, generator=seeded(), progress=False
        )
        assert tuned.history.valid_top1.tolist() == [expected, expected]


# --- templates ---

OWN = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs:\n")


def test_an_own_template_goes_from_prompts_to_the_tuned_vectors_scores(small, tmp_path, monkeypatch):
    """Prompts, means, vector, file, training, file, evaluation: at every place the same text is asked."""
    shown = fvlens.build_prompts(small, TRAIN, n_prompts=3, n_shots=2, template=OWN, generator=seeded())
    means = fvlens.mean_head_activations(small, shown, progress=False)
    made = fvlens.function_vector(small, means, heads=[(0, 1)], layer=1)
    vector = FunctionVector.load(made.save(tmp_path / "v.safetensors"), model=small)
    tuned = finetune(small, TRAIN, init=vector, valid=VALID, epochs=1, generator=seeded(), progress=False)
    assert tuned.settings.template == OWN
    loaded = FunctionVector.load(tuned.vector.save(tmp_path / "tuned.safetensors"), model=small)
    assert loaded.template == vector.template == means.template == OWN

    asked = tuple(f"Pairs:\n {pair.input} is to" for pair in VALID)
    texts = []
    for module in ("fvlens.evaluation._prompting", "fvlens.training._collateral", "fvlens.training._prepared"):
        original = __import__(module, fromlist=["build_prompts"]).build_prompts

        def watched(*args, original=original, **given):
            texts.append(original(*args, **given).texts)
            return original(*args, **given)

        monkeypatch.setattr(f"{module}.build_prompts", watched)
    scored = fvlens.evaluate(small, VALID, vector=loaded, generator=seeded())
    assert (scored.template, texts.pop()) == (OWN, asked)
    sweep = fvlens.layer_sweep(small, VALID, loaded, layers=[1], generator=seeded(), progress=False)
    assert torch.equal(sweep.evaluations[0].ranks, scored.ranks) and texts.pop() == asked
    answers = fvlens.generate_answers(small, VALID, vector=loaded, max_new_tokens=1, generator=seeded())
    assert (answers.template, texts.pop()) == (OWN, asked)
    for adapted in (tuned, loaded):
        again = evaluate_adapted(small, VALID, adapted, generator=seeded())
        assert torch.equal(again.ranks, scored.ranks) and texts.pop() == asked
    fvlens.evaluate(small, VALID, vector=loaded, template="qa", generator=seeded())  # what is given goes first
    assert texts.pop() == tuple(f"Q: {pair.input}\nA:" for pair in VALID)
    fvlens.evaluate(small, VALID, generator=seeded())
    assert texts.pop() == tuple(f"Q: {pair.input}\nA:" for pair in VALID)

    splits = {"a": split_of(TRAIN, VALID), "b": split_of(MORE)}
    many = finetune_many(
        small, splits, init=[loaded, loaded], n_train=2, epochs=1, generator=seeded(), progress=False
    ).vectors
    kept = VectorSet.load(many.save(tmp_path / "set.safetensors"))
    assert kept.template == many.template == OWN and [one.template for one in kept] == [OWN, OWN]


def test_starts_of_several_templates_need_one_to_be_given(small):
    splits = {"a": split_of(TRAIN), "b": split_of(MORE)}
    starts = [vector_of(small, template=OWN), vector_of(small, template="arrow")]
    with pytest.raises(
        ValueError, match=r"finetune_many: the starts are of 2 templates \(arrow, mine\); give template="
    ):
        finetune_many(small, splits, init=starts, epochs=1, generator=seeded(), progress=False)
    given = finetune_many(small, splits, init=starts, epochs=1, template="colon", generator=seeded(), progress=False)
    assert {str(vector.template) for vector in given.vectors} == {"colon"}
    assert VectorSet((vector_of(small, template=OWN), vector_of(small, relation="s"))).template is None


def test_a_training_of_version_0_1_goes_on(small, tmp_path):
    """Its state holds the name of the template alone."""
    how = dict(init="zero", layer=1, epochs=2, template="arrow", progress=False)
    whole = finetune(small, TRAIN, generator=seeded(), **how)
    header = json.loads(json.dumps(whole.state.header))
    assert header["settings"]["template"] == TEMPLATES["arrow"].to_json()
    header["settings"]["template"] = "arrow"
    old = TrainingState(whole.state.tensors, header)
    assert torch.equal(finetune(small, TRAIN, resume=old, generator=seeded(), **how).vector.vector, whole.vector.vector)
    header["settings"]["template"] = "mine"
    with pytest.raises(ValueError, match=r"the saved training has settings .*'template': 'mine'"):
        finetune(small, TRAIN, resume=old, generator=seeded(), **how)


def test_a_distributed_vector_is_trained_in_its_own_template(small):
    values = torch.zeros(small.cfg.n_layers, small.cfg.n_heads, small.cfg.d_head)
    init = DistributedVector(values, (fvlens.Head(0, 1),), "r", fingerprint(small), template=OWN)
    tuned = finetune(small, TRAIN[:2], init=init, epochs=1, generator=seeded(), progress=False)
    assert tuned.settings.template == OWN and tuned.vector.template == OWN
