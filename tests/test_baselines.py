"""Baselines against plain Hugging Face models: own embeddings fed, weights really changed."""

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import WORDS, global_randomness, rows_of
from checkpoints import hugging_face, save
from conftest import random_model, seeded
from oracle import hf
from scipy.stats import entropy
from torch.nn import functional as F

import fvlens
from fvlens.evaluation import LayerScaleSweep
from fvlens.metrics import kl_divergence
from fvlens.models import embedded_folder, fingerprint
from fvlens.prompts import Template, get_template
from fvlens.suffix import has_hooks
from fvlens.training import (
    Adapted,
    LoRA,
    SoftPrompt,
    TrainableVector,
    _untrained,
    act_add,
    collateral_change,
    compare,
    evaluate_adapted,
    few_shot,
    finetune,
    lora,
    soft_prompt,
    unrelated_prompts,
)
from fvlens.training._adaptations import Steered, Unchanged
from fvlens.training._loop import Training
from fvlens.training._lora import why_not_low_rank

N_TRAIN = 12


@pytest.fixture(scope="module")
def plain():
    """The embedded model as plain Hugging Face."""
    return hugging_face(embedded_folder())


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def either(request):
    """The embedded model in either class."""
    return fvlens.load_model("rel-small", device="cpu", backend=request.param)


@pytest.fixture(scope="module")
def split():
    return fvlens.load_relation("country-capital").split(seeded())


@pytest.fixture(scope="module")
def words(model):
    """Bare queries of unequal lengths, answers of one token and of several."""
    prompts = fvlens.build_prompts(model, WORDS, n_shots=0, generator=seeded())
    rows, answers = rows_of(prompts)
    assert len({len(row) for row in rows}) > 1 and len({len(answer) for answer in answers}) > 1
    return prompts


def random_soft(model, n):
    g = seeded(n)
    tokens = torch.randint(5, model.cfg.d_vocab, (n,), generator=g)
    return SoftPrompt(tokens, 0.3 * torch.randn(n, model.cfg.d_model, generator=g), fingerprint(model))


def random_lora(model, layers, rank):
    g, cfg = seeded(rank), model.cfg
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    return LoRA(
        layers=layers,
        a_q=torch.randn(len(layers), cfg.d_model, rank, generator=g) / cfg.d_model**0.5,
        b_q=torch.randn(len(layers), rank, cfg.n_heads, cfg.d_head, generator=g),
        a_v=torch.randn(len(layers), cfg.d_model, rank, generator=g) / cfg.d_model**0.5,
        b_v=torch.randn(len(layers), rank, n_kv, cfg.d_head, generator=g),
        fingerprint=fingerprint(model),
    )


def with_soft(plain, row, tokens, offsets):
    """Logits [pos d_vocab] of Hugging Face fed with embeddings: BOS, the soft tokens, the rest."""
    table = plain.get_input_embeddings().weight
    row = torch.tensor(row)
    embeddings = torch.cat([table[row[:1]], table[tokens] + offsets, table[row[1:]]])
    return plain(inputs_embeds=embeddings[None], use_cache=False).logits[0]


@contextlib.contextmanager
def changed_weights(plain, change):
    """Hugging Face with ``A B`` really added to its weights, whatever they are called and however they lie."""
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    try:
        with torch.no_grad():
            for i, layer in enumerate(change.layers):
                q = (change.a_q[i] @ change.b_q[i].flatten(1)).detach()
                v = (change.a_v[i] @ change.b_v[i].flatten(1)).detach()
                if hasattr(plain, "transformer"):
                    weight = plain.transformer.h[layer].attn.c_attn.weight  # [d_model, q k v]
                    weight[:, : q.shape[1]] += q
                    weight[:, -v.shape[1] :] += v
                else:
                    attention = plain.model.layers[layer].self_attn
                    attention.q_proj.weight += q.T
                    attention.v_proj.weight += v.T
        yield
    finally:
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(before[name])


def close(ours, theirs, relative=2e-5):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


# --- soft prompts ---


@pytest.mark.parametrize("n", [1, 3])
def test_a_soft_prompt_equals_embeddings_fed_to_hugging_face(either, plain, words, n):
    soft = random_soft(either, n)
    soft.offsets.requires_grad_()
    got = soft.read(either, words.tokens, words.attention_mask, n_read=1)[:, 0]
    rows, answers = rows_of(words)
    unsoft = Unchanged().read(either, words.tokens, words.attention_mask, n_read=1)[:, 0]
    assert (got - unsoft).detach().abs().max() > 0.5
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        offsets = soft.offsets.detach().clone().requires_grad_()
        theirs = with_soft(plain, row, soft.tokens, offsets)[-1]
        close(got[i].detach(), theirs.detach())
        (expected,) = torch.autograd.grad(theirs.log_softmax(-1)[answer[0]], offsets)
        (found,) = torch.autograd.grad(got[i].log_softmax(-1)[answer[0]], soft.offsets, retain_graph=True)
        close(found, expected, 1e-4)
        assert expected.abs().max() > 1e-4


def test_zero_offsets_are_ordinary_tokens(model, plain, words):
    soft = dataclasses.replace(random_soft(model, 2), offsets=torch.zeros(2, model.cfg.d_model))
    with torch.no_grad():
        got = soft.read(model, words.tokens, words.attention_mask, n_read=1)[:, 0]
    for i, row in enumerate(rows_of(words)[0]):
        close(got[i], hf.logits(plain, [row[0], *soft.tokens.tolist(), *row[1:]])[-1])


def test_soft_tokens_come_first_where_there_is_no_bos(model, words):
    soft = random_soft(model, 2)
    bare = fvlens.build_prompts(
        model, WORDS, n_shots=0, template=get_template("qa").with_bos("none"), generator=seeded()
    )
    for prompts, n_front in ((words, 1), (bare, 0)):
        with soft.applied(model, prompts.tokens, prompts.attention_mask, n_read=1) as (tokens, mask):
            for i, row in enumerate(rows_of(prompts)[0]):
                assert (row[0] == model.tokenizer.bos_token_id) == bool(n_front)
                assert tokens[i][mask[i].bool()].tolist() == [*row[:n_front], *soft.tokens.tolist(), *row[n_front:]]


def hand_trained(plain, rows, answers, tokens, seed, lr, epochs, size):
    """A soft prompt trained in a plain loop, one query at a time; offsets after each epoch, and losses of its steps."""
    offsets = torch.zeros(len(tokens), plain.config.n_embd, requires_grad=True)
    optimiser = torch.optim.Adam([offsets], lr=lr)
    g, after, of_steps = seeded(seed), [offsets.detach().clone()], []
    for _ in range(epochs):
        seen = []
        order = torch.randperm(len(rows), generator=g).tolist()
        for start in range(0, len(rows), size):
            batch = order[start : start + size]
            losses = []
            for i in batch:
                logits = with_soft(plain, rows[i] + answers[i][:-1], tokens, offsets)
                losses.append(-hf.answer_log_probability(logits[-len(answers[i]) :], answers[i]))
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            seen += torch.stack(losses).tolist()
            optimiser.step()
        after.append(offsets.detach().clone())
        of_steps.append(sum(seen) / len(seen))
    plain.zero_grad(set_to_none=True)
    return after, of_steps


def test_training_a_soft_prompt_equals_a_loop_by_hand(model, plain, words):
    pairs = list(words.queries)
    trained = soft_prompt(
        model, pairs, n_tokens=2, lr=0.02, epochs=3, batch_size=3, schedule="constant", generator=seeded(),
        progress=False,
    )  # fmt: skip
    rows, answers = rows_of(words)
    after, of_steps = hand_trained(plain, rows, answers, trained.change.tokens, trained.seed, 0.02, 3, 3)
    close(trained.change.offsets, after[-1], 1e-3)
    assert trained.best_epoch == 3  # without validation pairs the last
    norms = torch.stack([offsets.norm() for offsets in after])
    assert torch.allclose(trained.history.norm, norms, rtol=1e-3)
    with torch.no_grad():
        at_start = [
            -hf.answer_log_probability(
                with_soft(plain, row + answer[:-1], trained.change.tokens, after[0])[-len(answer) :], answer
            )
            for row, answer in zip(rows, answers, strict=True)
        ]
    losses = torch.tensor([float(torch.stack(at_start).mean()), *of_steps])
    assert torch.allclose(trained.history.train_loss, losses, rtol=1e-3)


def test_the_default_rate_of_a_soft_prompt_follows_what_the_first_block_reads(model, plain, words):
    trained = soft_prompt(model, list(words.queries), epochs=1, generator=seeded(), progress=False)
    read = []
    with torch.no_grad():
        for row in rows_of(words)[0]:
            read.append(plain(torch.tensor([row]), output_hidden_states=True).hidden_states[0][0])
    # the loop's rows are those of all queries with the given answer tokens behind them: here the longest has several
    tokens, mask, _ = fvlens.prompts.with_answers(words)
    read = []
    with torch.no_grad():
        for row, keep in zip(tokens, mask, strict=True):
            ids = row[keep.bool()][None]
            read.append(plain(ids, output_hidden_states=True).hidden_states[0][0])
    assert trained.lr == pytest.approx(0.1 * torch.cat(read).square().mean().sqrt().item(), rel=1e-5)


# --- low-rank updates ---


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_updates_equal_changed_weights(either, plain, words, rank):
    change = random_lora(either, (0, 2), rank)
    with torch.no_grad():
        got = change.read(either, words.tokens, words.attention_mask, n_read=1)[:, 0]
        before = Unchanged().read(either, words.tokens, words.attention_mask, n_read=1)[:, 0]
    assert (got - before).abs().max() > 0.5
    with changed_weights(plain, change):
        for i, row in enumerate(rows_of(words)[0]):
            close(got[i], hf.logits(plain, row)[-1])
    assert not has_hooks(either)
    assert not any(block.attn._forward_pre_hooks for block in either.blocks)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_low_rank_updates_of_grouped_queries(tmp_path, generator, name, backend):
    folder = save(name, tmp_path)
    theirs = hugging_face(folder)
    ours = fvlens.load_model(folder, device="cpu", backend=backend)
    prompts = fvlens.build_prompts(ours, WORDS, n_shots=1, generator=generator)
    change = random_lora(ours, (2, 1), 2)
    assert change.b_v.shape[2] < change.b_q.shape[2]
    with torch.no_grad():
        got = change.read(ours, prompts.tokens, prompts.attention_mask, n_read=1)[:, 0]
        before = Unchanged().read(ours, prompts.tokens, prompts.attention_mask, n_read=1)[:, 0]
    assert (got - before).abs().max() > 0.1 * before.abs().max()
    with changed_weights(theirs, change):
        for i, row in enumerate(rows_of(prompts)[0]):
            close(got[i], hf.logits(theirs, row)[-1], 5e-5)


def test_gradients_of_low_rank_updates_are_those_of_the_weights(either, plain, words):
    """``dL/dA = (dL/dW) B^T`` and ``dL/dB = A^T (dL/dW)``, with dL/dW of the changed weights from Hugging Face."""
    change = random_lora(either, (1,), 2)
    parts = [change.a_q, change.b_q, change.a_v, change.b_v]
    for part in parts:
        part.requires_grad_()
    logits = change.read(either, words.tokens, words.attention_mask, n_read=1)[:, 0]
    found = torch.autograd.grad(F.cross_entropy(logits, words.first_answer_token), parts)
    with changed_weights(plain, change):
        weight = plain.transformer.h[1].attn.c_attn.weight
        losses = []
        for row, answer in zip(*rows_of(words), strict=True):
            logits = plain(torch.tensor([row]), use_cache=False).logits[0, -1:]
            losses.append(F.cross_entropy(logits, torch.tensor(answer[:1])))
        (full,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
        d = weight.shape[0]
        for own, (a, b) in ((full[:, :d], (0, 1)), (full[:, -d:], (2, 3))):
            close(found[a][0], own @ parts[b][0].flatten(1).T.detach(), 1e-4)
            close(found[b][0].flatten(1), parts[a][0].T.detach() @ own, 1e-4)
            assert own.abs().max() > 1e-4


def test_low_rank_training_starts_at_the_plain_model_and_learns(either, split):
    trained = lora(
        either, split.train[:N_TRAIN], epochs=4, lr=0.05, valid=split.valid, generator=seeded(), progress=False
    )
    loss = -evaluate_adapted(either, split.valid, None, generator=seeded()).answer_log_probability
    assert trained.history.valid_loss[0].item() == pytest.approx(loss, rel=1e-5)
    assert trained.history.valid_loss[trained.best_epoch] < 0.5 * loss
    best = max(range(5), key=lambda e: (trained.history.valid_top1[e], -trained.history.valid_loss[e], -e))
    assert trained.best_epoch == best > 0
    found = evaluate_adapted(either, split.valid, trained, generator=seeded())
    assert found.top1 == pytest.approx(trained.history.valid_top1[best].item())
    assert -found.answer_log_probability == pytest.approx(trained.history.valid_loss[best].item(), rel=1e-4)


# --- activation addition ---


def test_activation_addition_equals_hidden_states_of_hugging_face(either, plain, split):
    pairs = split.train[:N_TRAIN]
    added = act_add(either, pairs, layer=1, n_shots=3, batch_size=5, generator=seeded())
    clean = fvlens.build_prompts(either, pairs, n_shots=3, generator=seeded())
    bare = fvlens.build_prompts(either, pairs, n_shots=0, generator=seeded())
    assert clean.queries == bare.queries
    means = []
    with torch.no_grad():
        for prompts in (clean, bare):
            states = [
                plain(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0, -1]
                for row in rows_of(prompts)[0]
            ]
            means.append(torch.stack(states).double().mean(dim=0))
    close(added.vector.vector, (means[0] - means[1]).float(), 1e-4)
    assert added.vector.layer == 1 and added.choices == () and added.n_trainable == 0 and added.history is None
    assert added.vector.kind == "difference of means" and added.vector.data_hash == clean.data_hash


def test_activation_addition_chooses_layer_and_scale_on_validation_pairs(model, plain, split):
    pairs = split.train[:N_TRAIN]
    added = act_add(model, pairs, layer=(0, 1), scales=(1, 3), valid=split.valid, n_shots=3, generator=seeded())
    assert [choice[:2] for choice in added.choices] == [(0, 1.0), (0, 3.0), (1, 1.0), (1, 3.0)]
    prompts = fvlens.build_prompts(model, split.valid, n_shots=0, generator=seeded())
    cells = {}
    for layer, scale, top1, loss in added.choices:
        single = act_add(model, pairs, layer=layer, scales=(scale,), n_shots=3, generator=seeded())
        right, logs = [], []
        for row, answer in zip(*rows_of(prompts), strict=True):
            logits = hf.steered_logits(plain, row, single.vector.vector, layer)[-1]
            right.append(int(logits.argmax()) == answer[0])
            logs.append(float(logits.log_softmax(-1)[answer[0]]))
        assert top1 == pytest.approx(np.mean(right))
        cells[layer, scale] = top1, float(np.exp(logs).mean()), single.vector
        if max(map(len, rows_of(prompts)[1])) == 1:
            assert loss == pytest.approx(-np.mean(logs), rel=1e-4)
    *_, best = max(cells.values(), key=lambda cell: cell[:2])
    assert added.vector.layer == best.layer
    assert torch.equal(added.vector.vector, best.vector)
    every = act_add(model, pairs, valid=split.valid, n_shots=3, generator=seeded())
    assert len(every.choices) == model.cfg.n_layers * 4


# --- scores ---


def test_activation_addition_takes_top1_before_all_else(model, split, monkeypatch, unchecked):
    """Best top-1; of equals the likelier answer, then the scale nearer to 1, whatever the loss."""
    cells = [(0.5, 0.9, -1.0), (0.75, 0.1, -2.0), (0.75, 0.3, -9.0), (0.75, 0.3, -3.0)]

    def sweep(model, pairs, vectors, *, scales, **how):
        row = [SimpleNamespace(top1=a, probability=b, answer_log_probability=c) for a, b, c in cells]
        return LayerScaleSweep(tuple(vectors), tuple(scales), (tuple(row),), row[0], True)

    monkeypatch.setattr(_untrained, "layer_scale_sweep", sweep)
    how = dict(layer=2, n_shots=2)
    added = act_add(model, split.train[:4], scales=(1, 2, 3, 4), valid=split.valid, generator=seeded(), **how)
    single = act_add(model, split.train[:4], scales=(3,), generator=seeded(), **how)
    assert torch.equal(added.vector.vector, single.vector.vector)
    assert [choice[2:] for choice in added.choices] == [(0.5, 1.0), (0.75, 2.0), (0.75, 9.0), (0.75, 3.0)]


def test_an_interrupted_choice_of_activation_addition_is_none(model, split, monkeypatch):
    original = _untrained.layer_scale_sweep
    monkeypatch.setattr(
        _untrained, "layer_scale_sweep", lambda *a, **k: dataclasses.replace(original(*a, **k), complete=False)
    )
    with pytest.raises(KeyboardInterrupt):
        act_add(model, split.train[:4], valid=split.valid[:4], n_shots=2, generator=seeded())


def test_scores_equal_evaluate_for_vectors_and_prompting(either, split):
    vector = act_add(either, split.train[:N_TRAIN], layer=1, n_shots=3, generator=seeded()).vector
    shown = few_shot(split.train, n_shots=4, generator=seeded())
    cases = [
        (None, {}),
        (vector, {"vector": vector}),
        (Steered(vector), {"vector": vector}),
        (shown, {"setting": "icl", "demonstrations": split.train, "n_shots": 4}),
    ]
    for adapted, how in cases:
        ours = evaluate_adapted(either, split.test, adapted, generator=seeded(shown.seed))
        expected = fvlens.evaluate(either, split.test, generator=seeded(shown.seed), **how)
        assert torch.equal(ours.ranks, expected.ranks)
        assert ours.predictions == expected.predictions
        assert torch.allclose(ours.probabilities, expected.probabilities, rtol=1e-4, atol=1e-7)
        assert torch.allclose(ours.log_probabilities, expected.log_probabilities, rtol=1e-4, atol=1e-5)
        same = ["setting", "n_shots", "queries", "data_hash", "vector_kind", "vector_layer", "template", "labels"]
        assert [getattr(ours, name) for name in same] == [getattr(expected, name) for name in same]
        if "setting" not in how:
            assert ours.interval == expected.interval


def test_whole_answers_under_soft_prompts_and_updates_equal_hugging_face(either, plain, words):
    soft, update = random_soft(either, 2), random_lora(either, (0, 1), 1)
    rows, answers = rows_of(words)
    for change in (soft, update):
        found = evaluate_adapted(either, list(words.queries), change, generator=seeded())
        with torch.no_grad(), changed_weights(plain, change) if change is update else contextlib.nullcontext():
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
                whole = row + answer[:-1]
                logits = (
                    hf.logits(plain, whole) if change is update else with_soft(plain, whole, soft.tokens, soft.offsets)
                )[-len(answer) :]
                expected = hf.answer_log_probability(logits, answer)
                assert found.log_probabilities[i].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
                assert found.ranks[i].item() == int((logits[0] > logits[0, answer[0]]).sum())
                assert found.predictions[i] == either.tokenizer.decode([int(logits[0].argmax())]).removeprefix(" ")
        assert found.vector_kind == type(change).__name__ and found.setting == "zero_shot"


def test_batches_and_padding_change_nothing(model, words):
    pairs = list(words.queries)
    for change in (
        random_soft(model, 3),
        random_lora(model, (0, 3), 2),
        few_shot(WORDS, n_shots=2, generator=seeded()),
    ):
        whole = evaluate_adapted(model, pairs, change, generator=seeded())
        for size in (1, 3):
            part = evaluate_adapted(model, pairs, change, batch_size=size, generator=seeded())
            assert torch.equal(part.ranks, whole.ranks) and part.interval == whole.interval
            assert torch.allclose(part.log_probabilities, whole.log_probabilities, rtol=1e-4, atol=1e-5)


# --- collateral change ---


def test_kl_divergence_equals_scipy():
    g = seeded()
    p, q = 3 * torch.randn(4, 50, generator=g), 3 * torch.randn(4, 50, generator=g)
    p[0, 3] = -torch.inf  # what P never says adds nothing
    expected = entropy(p.double().softmax(-1).numpy(), q.double().softmax(-1).numpy(), axis=-1)
    assert kl_divergence(p, q).numpy() == pytest.approx(expected, rel=1e-9)
    assert kl_divergence(p, p).tolist() == [0, 0, 0, 0]
    q[1, 5] = -torch.inf
    assert kl_divergence(p, q)[1] == torch.inf


def test_collateral_change_equals_hugging_face_and_scipy(model, plain, split):
    relation = fvlens.load_relation("country-capital")
    prompts = unrelated_prompts(model, relation, n=6, generator=seeded())
    vector = act_add(model, split.train[:N_TRAIN], layer=1, scales=(6,), n_shots=3, generator=seeded()).vector
    soft, update = random_soft(model, 2), random_lora(model, (0, 2), 3)
    rows, _ = rows_of(prompts)
    before = [hf.logits(plain, row)[-1].double().softmax(-1) for row in rows]

    def check(change, after):
        found = collateral_change(model, change, prompts, batch_size=4, generator=seeded())
        expected = [
            entropy(p.numpy(), logits.double().softmax(-1).numpy()) for p, logits in zip(before, after, strict=True)
        ]
        assert found.divergences.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert found.mean == pytest.approx(np.mean(expected), rel=1e-3) and found.mean > 1e-3
        low, high, _ = fvlens.metrics.bootstrap_interval(found.divergences, generator=seeded())
        assert found.interval[:2] == (low, high)

    check(vector, [hf.steered_logits(plain, row, vector.vector, 1)[-1] for row in rows])
    with torch.no_grad():
        check(soft, [with_soft(plain, row, soft.tokens, soft.offsets)[-1] for row in rows])
        with changed_weights(plain, update):
            after = [hf.logits(plain, row)[-1] for row in rows]
        check(update, after)
    shown = few_shot(split.train, n_shots=2, generator=seeded())
    written = shown.change.on(model, prompts)
    for text, own, shots in zip(written.texts, prompts.texts, written.demonstrations, strict=True):
        first = "".join(f"Q: {pair.input}\nA: {pair.output}\n\n" for pair in shots[:2])
        assert text == first + own and set(shots[:2]) <= set(split.train)
    check(shown, [hf.logits(plain, row)[-1] for row in rows_of(written)[0]])
    assert collateral_change(model, None, prompts, generator=seeded()).divergences.tolist() == [0.0] * 6


def test_unrelated_prompts_hold_no_word_of_the_relation_and_no_sister(model):
    relation = fvlens.load_relation("country-capital")
    prompts = unrelated_prompts(model, relation, n=60, generator=seeded())
    words = {*relation.inputs, *relation.outputs}
    homes = {}
    for name in fvlens.list_relations():
        for pair in fvlens.load_relation(name).pairs:
            homes.setdefault(pair, set()).add(name)
    seen = set()
    for query, shown in zip(prompts.queries, prompts.demonstrations, strict=True):
        pairs = [query, *shown]
        assert len({pair.input for pair in pairs}) == 3
        assert not words & {word for pair in pairs for word in pair}
        home = set.intersection(*(homes[pair] for pair in pairs))
        names = {name for name in home if fvlens.load_relation(name).family != relation.family}
        assert names and relation.name not in names
        seen |= names
    assert len(seen) > 20
    again = unrelated_prompts(model, relation, n=60, generator=seeded())
    assert again.data_hash == prompts.data_hash


# --- what every method has in common ---


@pytest.fixture(scope="module")
def every(model, split):
    """Each method's result on few pairs, one epoch."""
    pairs, g = split.train[:N_TRAIN], seeded()
    short = {"valid": split.valid, "epochs": 1, "progress": False}
    means = fvlens.mean_head_activations(
        model, fvlens.build_prompts(model, pairs, n_prompts=4, n_shots=3, generator=g), progress=False
    )
    spread = fvlens.distributed_vector(model, means, heads=[(1, 0), (1, 3), (2, 1)])
    return {
        "few": few_shot(pairs, n_shots=3, generator=g),
        "added": act_add(model, pairs, layer=1, n_shots=3, generator=g),
        "tuned": finetune(model, pairs, init="zero", layer=1, generator=g, **short),
        "spread": finetune(model, pairs, init=spread, generator=g, **short),
        "soft": soft_prompt(model, pairs, n_tokens=3, generator=g, **short),
        "lora": lora(model, pairs, rank=2, layers=(0, 1, 3), generator=g, **short),
    }


def test_methods_say_what_they_are(model, every):
    d = model.cfg.d_model
    wide = model.cfg.n_heads * model.cfg.d_head
    expected = {
        "few": ("3-shot prompting", 0),
        "added": ("activation addition", 0),
        "tuned": ("fine-tuned vector", d),
        "spread": ("fine-tuned vector", 3 * model.cfg.d_head),
        "soft": ("3 soft tokens", 3 * d),
        "lora": ("LoRA, rank 2", 3 * 2 * 2 * (d + wide)),
    }
    for name, one in every.items():
        assert isinstance(one, Adapted)
        assert (one.method, one.n_trainable) == expected[name]
        assert one.seconds >= 0 and one.complete
        assert (one.history is None) == (one.n_trainable == 0)
    for name in ("soft", "lora"):
        one = every[name]
        assert len(one.history) == 2 and one.settings.epochs == 1 and one.lr > 0
        frame = one.to_dataframe()
        assert frame["method"].unique().tolist() == [one.method]
        assert frame["valid_top1"].tolist() == pytest.approx(one.history.valid_top1.tolist())
        drawn = [list(trace.y) for trace in one.plot().data if trace.y is not None]
        for curve in (one.history.train_loss, one.history.valid_loss, one.history.norm):
            assert any(y == pytest.approx(curve.tolist()) for y in drawn if len(y) == 2)
    assert every["lora"].change.rank == 2


def test_training_leaves_the_model_alone(split):
    own = fvlens.load_model("rel-small", device="cpu")
    own.train()
    for i, parameter in enumerate(own.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    weights = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
    randomness = global_randomness()

    def untouched():
        assert all(torch.equal(parameter, weights[name]) for name, parameter in own.named_parameters())
        assert [parameter.requires_grad for parameter in own.parameters()] == [i % 2 == 0 for i in range(len(weights))]
        assert all(parameter.grad is None for parameter in own.parameters())
        assert own.training and not has_hooks(own)
        assert not any(block.attn._forward_pre_hooks for block in own.blocks)

    short = {"epochs": 1, "progress": False}
    for method in (soft_prompt, lora):
        first, second = (method(own, split.train[:6], generator=seeded(), **short) for _ in range(2))
        untouched()
        names = ["offsets"] if method is soft_prompt else ["a_q", "b_q", "a_v", "b_v"]
        for name in names:
            ours = getattr(first.change, name)
            assert torch.equal(ours, getattr(second.change, name)) and not ours.requires_grad
            assert ours.device.type == "cpu"

    def broken(*args, **kwargs):
        raise RuntimeError("in the middle")

    for method in (soft_prompt, lora):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(own.blocks[3].mlp), "forward", broken)
            with pytest.raises(RuntimeError, match="in the middle"):
                method(own, split.train[:6], generator=seeded(), **short)
        untouched()
    assert global_randomness() == randomness


def test_an_interrupted_training_gives_the_best_so_far(model, split, monkeypatch):
    n = 0
    real = Training.one_epoch

    def some(self):
        nonlocal n
        n += 1
        if n == 3:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Training, "one_epoch", some)
    with pytest.warns(UserWarning, match="2 of 5 epochs are finished"):
        found = soft_prompt(model, split.train[:6], epochs=5, generator=seeded(), progress=False)
    assert not found.complete and len(found.history) == 3


def test_what_is_wrong_is_said(model, split, every, unchecked):
    pairs, g = split.train[:N_TRAIN], seeded()
    soft_of = lambda **how: soft_prompt(model, pairs, generator=g, progress=False, **how)  # noqa: E731
    lora_of = lambda **how: lora(model, pairs, generator=g, progress=False, **how)  # noqa: E731
    add_of = lambda **how: act_add(model, pairs, n_shots=3, generator=g, **how)  # noqa: E731
    cases = [
        (lambda: few_shot([], generator=g), "few_shot: pairs: expected at least one pair, got none"),
        (lambda: few_shot(pairs, n_shots=0, generator=g), r"few_shot: expected n_shots in 1\.\.12, .*got 0"),
        (lambda: few_shot(pairs, n_shots=13, generator=g), r"few_shot: expected n_shots in 1\.\.12, .*got 13"),
        (lambda: soft_of(n_tokens=0), "soft_prompt: expected n_tokens of at least 1, got 0"),
        (lambda: soft_of(n_tokens=160), r"soft_prompt: a prompt is \d+ tokens long with its 160 soft tokens"),
        (lambda: soft_of(epochs=0), "expected epochs of at least 1, got 0"),
        (lambda: lora_of(rank=0), r"lora: expected rank in 1\.\.16, the width of a head, got 0"),
        (lambda: lora_of(rank=17), r"lora: expected rank in 1\.\.16, .*got 17"),
        (lambda: lora_of(layers=()), r"lora: expected different layers in 0\.\.3, got \[\]"),
        (lambda: lora_of(layers=(1, 1)), r"lora: expected different layers in 0\.\.3, got \[1, 1\]"),
        (lambda: lora_of(layers=(4,)), r"lora: expected different layers in 0\.\.3, got \[4\]"),
        (lambda: add_of(layer=4), r"act_add: expected layers in 0\.\.3, got \[4\]"),
        (lambda: add_of(layer=()), r"act_add: expected layers in 0\.\.3, got \[\]"),
        (lambda: add_of(layer=1, scales=(float("nan"),)), r"act_add: expected finite scales, got \[nan\]"),
        (lambda: add_of(layer=1, scales=()), r"act_add: expected finite scales, got \[\]"),
        (lambda: add_of(), "act_add: 4 layers and 1 scales, but no validation pairs"),
        (lambda: add_of(layer=1, batch_size=0), "act_add: expected batch_size of at least 1, got 0"),
        (lambda: act_add(model, pairs, layer=1, n_shots=12, generator=g), "12 demonstrations wanted"),
        (
            lambda: evaluate_adapted(model, pairs, "soft", generator=g),
            "expected what a baseline or finetune gives.*str",
        ),
        (lambda: evaluate_adapted(model, pairs, None, batch_size=0, generator=g), "evaluate_adapted: .*batch_size"),
        (
            lambda: evaluate_adapted(model, pairs, TrainableVector(torch.zeros(2, 128), 1), generator=g),
            r"the tensor for blocks.1.hook_resid_post has a batch axis of 2, but there are 12 pairs",
        ),
        (lambda: every["lora"].vector, "vector: LoRA, rank 2 adds no vector"),
        (lambda: every["few"].to_dataframe(), "3-shot prompting: nothing was trained"),
        (lambda: every["added"].plot(), "activation addition: nothing was trained"),
        (lambda: compare(model, "antonym", n_train=0), "compare: expected n_train of at least 1, got 0"),
    ]
    relation = fvlens.load_relation("antonym")
    for n, shots in ((0, 2), (1, -1)):
        wrong = lambda n=n, shots=shots: unrelated_prompts(model, relation, n=n, n_shots=shots, generator=g)  # noqa: E731
        cases.append((wrong, f"expected n >= 1 and n_shots >= 0, got {n} and {shots}"))
    cases.append(
        (lambda: unrelated_prompts(model, relation, n_shots=500, generator=g), "no library relation has 501 pairs")
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_change_of_another_model_is_refused(model, every, tiny, generator):
    prompts = unrelated_prompts(tiny, fvlens.load_relation("antonym"), n=2, generator=generator)
    named = {"soft": "the soft prompt", "lora": "the low-rank update", "added": "the vector of"}
    for name, what in named.items():
        for call in (
            lambda name=name: evaluate_adapted(tiny, WORDS, every[name], generator=generator),
            lambda name=name: collateral_change(tiny, every[name], prompts, generator=generator),
        ):
            with pytest.raises(ValueError, match=f"{what}.* was made on model"):
                call()


def test_models_whose_projections_cannot_be_reached(split, either):
    assert why_not_low_rank(either, range(4)) is None
    assert "blocks.9.attn.hook_q" in why_not_low_rank(either, [9])
    made = random_model(use_split_qkv_input=True)
    with pytest.raises(ValueError, match=r"lora: cannot reach .*attention inputs are split by head"):
        lora(made, WORDS, generator=seeded(), progress=False)


def test_of_two_equal_logits_the_smaller_id_is_right(tied):
    pairs = [("hot", "cold"), ("big", "small")]
    vector = fvlens.FunctionVector(torch.ones(tied.cfg.d_model), 1, (), "r", fingerprint(tied))
    found = evaluate_adapted(tied, pairs, vector, generator=seeded())
    assert found.ranks.tolist() == [0, 1] and found.predictions == ("cold", "cold")


def test_all_methods_are_asked_in_the_template_that_they_were_made_in(tiny, split, monkeypatch):
    own = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs:\n")
    pairs, how = split.train[:3], dict(template=own, generator=seeded())
    made = [
        act_add(tiny, pairs, layer=1, n_shots=1, **how),
        soft_prompt(tiny, pairs, n_tokens=1, epochs=1, progress=False, **how),
        lora(tiny, pairs, epochs=1, progress=False, **how),
    ]
    assert made[0].vector.template == own
    assert [one.settings.template for one in made[1:]] == [own, own]
    for one in made:
        found = evaluate_adapted(tiny, split.test, one, generator=seeded())
        given = evaluate_adapted(tiny, split.test, one, template=own, generator=seeded())
        assert found.template == own and torch.equal(found.probabilities, given.probabilities)
        other = evaluate_adapted(tiny, split.test, one, template="qa", generator=seeded())
        assert not torch.equal(found.probabilities, other.probabilities)
