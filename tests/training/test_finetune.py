"""Fine-tuned vectors: against plain loops over whole forward passes, written here without the package's own."""

import pytest
import torch
from conftest import needs_hooked, seeded

import fvlens
from fvlens.interventions import resid_hook
from fvlens.training import (
    CrossEntropy,
    Settings,
    Task,
    TrainableVector,
    Training,
    VectorChange,
    Wants,
    _prepared,
    finetune,
    finetune_many,
    frozen,
)
from training.plain_loops import (
    CASES,
    MORE,
    PAIRS,
    TRAIN,
    VALID,
    close,
    curves_of,
    plain_log_probs,
    plain_top1,
    plain_training,
    split_of,
    tokenised,
    vector_change,
    vector_of,
)


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
    settings = dict(init="zero", layer=1, lr=5.0, epochs=3, progress=False)

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
