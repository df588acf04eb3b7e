"""Scores against plain loops over one unpadded prompt at a time; sweeps and controls against single evaluations."""

import contextlib
import dataclasses
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, WORDS, build
from conftest import random_model, seeded
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens import scoring
from fvlens.evaluation import (
    Evaluation,
    LayerScaleSweep,
    _controls,
    _generate,
    _sweeps,
    controls,
    evaluate,
    generate_answers,
    head_count_sweep,
    layer_scale_sweep,
    layer_sweep,
)
from fvlens.interventions import resid_hook, z_hook
from fvlens.metrics import Interval, bootstrap_interval
from fvlens.models import embedded_folder, fingerprint
from fvlens.prompts import TEMPLATES, Template, build_prompts
from fvlens.relations import Pair, Relation
from fvlens.suffix import has_hooks
from fvlens.types import Head
from fvlens.vectors import FunctionVector, distributed_vector, function_vector

PAIRS = tuple(Pair(*pair) for pair in WORDS)
"""Inputs and answers of one token and of several."""

DEMONSTRATIONS = tuple(
    Pair(*pair)
    for pair in [
        ("hot", "cold"),
        ("day", "night"),
        ("left", "right"),
        ("young", "old"),
        ("rich", "poor"),
        ("up", "down"),
    ]
)


def steering(model, tensors, **attributes):
    """A Steering with given tensors that fits any model."""
    return SimpleNamespace(additions=lambda: tensors, check=lambda model: None, **attributes)


def made_vector(model, layer=1, seed=0, norm=6.0, heads=((0, 1), (1, 2), (2, 0)), relation="made"):
    direction = torch.randn(model.cfg.d_model, generator=seeded(seed))
    return FunctionVector(
        vector=norm * direction / direction.norm(),
        layer=layer,
        heads=tuple(Head(*head) for head in heads),
        relation=relation,
        fingerprint=fingerprint(model),
    )


@pytest.fixture
def means(tiny):
    clean = build_prompts(tiny, DEMONSTRATIONS, n_shots=2, n_prompts=6, generator=seeded(3))
    return fvlens.mean_head_activations(tiny, clean, progress=False)


@pytest.fixture(autouse=True)
def _leaves_no_trace(tiny):
    """No hooks stay, the model's generate is its own, the global random state is neither read nor set."""
    state = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not has_hooks(tiny)
    assert "generate" not in tiny.__dict__


def same(one, other):
    """Whether two evaluations agree in every field; probabilities to float rounding, since other rows ran beside."""
    for field in dataclasses.fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor) and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        elif field.name == "ranks":  # far down, where logits lie close, neighbours may change places
            assert bool(((ours - theirs).abs() <= theirs // 1000).all()), f"ranks: {ours} and {theirs}"
        else:
            equal = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert equal, f"{field.name}: {ours} and {theirs}"
    return True


# --- oracle 1: plain Hugging Face, one unpadded prompt at a time, text and tokens by hand ---


@pytest.fixture(scope="module")
def plain():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(embedded_folder(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)


def tokens_by_hand(tokenizer, text, answer):
    """Prompt and answer tokens, with one BOS in front."""
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    both = tokenizer(f"{text} {answer}", add_special_tokens=False)["input_ids"]
    assert both[: len(prompt)] == prompt
    return [tokenizer.bos_token_id, *prompt], both[len(prompt) :]


@contextlib.contextmanager
def hf_added(plain, layer, vector, positions):
    """Add a vector behind a block at some positions."""

    def hook(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for position in positions:
            hidden[:, position] += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = plain.transformer.h[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hf_scores(plain, prompt, answer, vector=None, layer=0):
    """Rank, probability, whole-answer log-probability and best token, by definition."""
    block = contextlib.nullcontext() if vector is None else hf_added(plain, layer, vector, [len(prompt) - 1])
    with torch.no_grad(), block:
        logits = plain(torch.tensor([prompt + answer])).logits[0].double()
    logs = logits.log_softmax(dim=-1)
    first = logs[len(prompt) - 1]
    return (
        sum(float(value) > float(first[answer[0]]) for value in first),
        math.exp(first[answer[0]]),
        sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)),
        int(first.argmax()),
    )


@pytest.mark.parametrize("scale", [None, 1.0, 1.7])
def test_scores_equal_a_plain_hugging_face_model(model, plain, tokenizer, scale):
    # "zzqq" is left out: 8,000 tokens are likelier, and rounding decides which of two nearly equal ones comes first
    pairs = [*(pair for pair in PAIRS if pair.output != "zzqq"), ("France", "Paris"), ("cat", "kittenling")]
    vector = None if scale is None else made_vector(model, layer=1, norm=4.0)
    kwargs = {} if scale is None else {"scale": scale}
    found = evaluate(model, pairs, vector=vector, generator=seeded(), batch_size=4, **kwargs)
    n_tokens = set()
    for i, (x, y) in enumerate(pairs):
        prompt, answer = tokens_by_hand(tokenizer, f"Q: {x}\nA:", y)
        n_tokens.add(len(answer))
        added = None if vector is None else scale * vector.vector
        place, probability, log_probability, best = hf_scores(plain, prompt, answer, added, layer=1)
        assert int(found.ranks[i]) == place
        assert float(found.probabilities[i]) == pytest.approx(probability, abs=1e-5)
        assert float(found.log_probabilities[i]) == pytest.approx(log_probability, abs=1e-4)
        assert found.predictions[i] == tokenizer.decode([best]).removeprefix(" ")
    assert 1 in n_tokens
    assert max(n_tokens) > 2
    assert found.queries == tuple(Pair(*pair) for pair in pairs)


@pytest.mark.parametrize(("setting", "labels"), [("icl", None), ("shuffled", None), ("shuffled", "random")])
def test_settings_with_demonstrations_equal_a_plain_hugging_face_model(model, plain, tokenizer, setting, labels):
    # the demonstrations are those that build_prompts draws from the same generator
    expected = {"icl": "true", "shuffled": labels or "permuted"}[setting]
    kwargs = dict(n_shots=3, pool=["Paris", "red"], template="arrow")
    prompts = build_prompts(model, DEMONSTRATIONS, queries=PAIRS, labels=expected, generator=seeded(5), **kwargs)
    vector = made_vector(model, layer=2, norm=3.0)
    found = evaluate(
        model, PAIRS, vector=vector, setting=setting, labels=labels, demonstrations=DEMONSTRATIONS, batch_size=3,
        generator=seeded(5), **kwargs,
    )  # fmt: skip
    for i, (text, pair) in enumerate(zip(prompts.texts, PAIRS, strict=True)):
        prompt, answer = tokens_by_hand(tokenizer, text, pair.output)
        place, probability, log_probability, _ = hf_scores(plain, prompt, answer, vector.vector, layer=2)
        assert int(found.ranks[i]) == place
        assert float(found.probabilities[i]) == pytest.approx(probability, abs=1e-5)
        assert float(found.log_probabilities[i]) == pytest.approx(log_probability, abs=1e-4)
    assert (found.setting, found.labels, found.n_shots, str(found.template)) == (setting, expected, 3, "arrow")
    assert found.data_hash == prompts.data_hash
    assert all(
        pair.input not in [d.input for d in row] for pair, row in zip(PAIRS, prompts.demonstrations, strict=True)
    )


def hf_continue(plain, prompt, n_new, vector, layer, every):
    tokens = list(prompt)
    for _ in range(n_new):
        positions = range(len(prompt) - 1, len(tokens)) if every else [len(prompt) - 1]
        with torch.no_grad(), hf_added(plain, layer, vector, positions):
            tokens.append(int(plain(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("every", [False, True])
def test_generated_answers_equal_a_plain_hugging_face_model(model, plain, tokenizer, every):
    vector = made_vector(model, layer=1, norm=5.0)
    found = generate_answers(
        model, PAIRS, vector=vector, max_new_tokens=5, every_new_token=every, batch_size=3, generator=seeded()
    )
    for raw, pair in zip(found.raw_texts, PAIRS, strict=True):
        prompt, _ = tokens_by_hand(tokenizer, f"Q: {pair.input}\nA:", pair.output)
        new = hf_continue(plain, prompt, 5, vector.vector, 1, every)
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id)]
        assert raw == tokenizer.decode(new)


# --- oracle 2: whole forward passes of the model itself, on every architecture, in double precision ---


def naive_logits(model, prompt, later, tensors, every=False):
    """Logits of one unpadded sequence without a cache; the tensors are added at the prompt's last token."""

    def adding(tensor):
        def hook(x, hook):
            x = x.clone()
            x[:, len(prompt) - 1 : None if every else len(prompt)] += tensor
            return x

        return hook

    tokens = torch.tensor([prompt + later])
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, adding(tensor)) for name, tensor in tensors.items()]):
        return model(tokens, attention_mask=torch.ones_like(tokens))[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_whole_unpadded_forwards(name):
    model = build(name, dtype=torch.float64)
    cfg, g = model.cfg, seeded(7)
    tensors = {
        resid_hook(1): torch.randn(cfg.d_model, generator=g, dtype=torch.float64),
        z_hook(2): torch.randn(cfg.n_heads, cfg.d_head, generator=g, dtype=torch.float64),
    }
    kwargs = dict(setting="icl", demonstrations=DEMONSTRATIONS, n_shots=2, batch_size=3, scale=0.5)
    prompts = build_prompts(model, DEMONSTRATIONS, queries=PAIRS, n_shots=2, generator=seeded(2))
    added = {key: 0.5 * tensor for key, tensor in tensors.items()}
    found = evaluate(model, PAIRS, vector=steering(model, tensors), generator=seeded(2), **kwargs)
    texts = generate_answers(
        model, PAIRS, vector=steering(model, tensors), generator=seeded(2), max_new_tokens=3, **kwargs
    ).raw_texts
    steered_late = []
    for i in range(len(PAIRS)):
        prompt = prompts.tokens[i][prompts.attention_mask[i].bool()].tolist()
        answer = prompts.answer_tokens[i][prompts.answer_mask[i]].tolist()
        logs = naive_logits(model, prompt, answer, added).log_softmax(dim=-1)
        first = logs[len(prompt) - 1]
        whole = sum(logs[len(prompt) - 1 + j, token] for j, token in enumerate(answer))
        assert int(found.ranks[i]) == int((first > first[answer[0]]).sum())
        torch.testing.assert_close(found.probabilities[i], first[answer[0]].exp(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.log_probabilities[i], whole, rtol=1e-9, atol=1e-9)
        if len(answer) > 1:  # what an injection at index -1 of the longer sequence would give
            late = naive_logits(model, prompt + answer[:-1], answer[-1:], added).log_softmax(dim=-1)
            wrong = sum(late[len(prompt) - 1 + j, token] for j, token in enumerate(answer))
            steered_late.append(float((whole - wrong).abs()))
        new = []
        for _ in range(3):
            new.append(int(naive_logits(model, prompt, new, added)[-1].argmax()))
        assert texts[i] == model.tokenizer.decode(new)
    assert min(steered_late) > 1e-4
    assert not has_hooks(model)


# --- properties ---


@pytest.mark.parametrize("setting", ["zero_shot", "icl"])
def test_batch_size_changes_nothing(tiny, setting):
    vector = made_vector(tiny)
    kwargs = dict(vector=vector, setting=setting, demonstrations=DEMONSTRATIONS, n_shots=3)
    whole = evaluate(tiny, PAIRS, generator=seeded(), **kwargs)
    for batch_size in (1, 3):
        parts = evaluate(tiny, PAIRS, generator=seeded(), batch_size=batch_size, **kwargs)
        assert torch.equal(parts.ranks, whole.ranks)
        assert parts.predictions == whole.predictions
        assert parts.interval == whole.interval
        torch.testing.assert_close(parts.log_probabilities, whole.log_probabilities, rtol=1e-5, atol=1e-5)
        a, b = (generate_answers(tiny, PAIRS, generator=seeded(), batch_size=n, **kwargs) for n in (batch_size, 64))
        assert a.raw_texts == b.raw_texts


def test_order_and_company_of_the_pairs_change_nothing(tiny):
    vector = made_vector(tiny)
    whole = evaluate(tiny, PAIRS, vector=vector, generator=seeded())
    back = evaluate(tiny, PAIRS[::-1], vector=vector, generator=seeded())
    torch.testing.assert_close(back.log_probabilities.flip(0), whole.log_probabilities, rtol=1e-5, atol=1e-5)
    alone = torch.cat([evaluate(tiny, [p], vector=vector, generator=seeded()).log_probabilities for p in PAIRS])
    torch.testing.assert_close(alone, whole.log_probabilities, rtol=1e-5, atol=1e-5)


def test_same_seed_same_bits(tiny, means):
    vector = made_vector(tiny)
    kwargs = dict(setting="shuffled", demonstrations=DEMONSTRATIONS, n_shots=3)
    one, two = seeded(4), seeded(4)
    assert same(
        evaluate(tiny, PAIRS, vector=vector, generator=one, **kwargs),
        evaluate(tiny, PAIRS, vector=vector, generator=two, **kwargs),
    )
    assert torch.equal(one.get_state(), two.get_state())
    assert not torch.equal(one.get_state(), seeded(4).get_state())
    tables = [
        controls(
            tiny, PAIRS, vector, demonstrations=DEMONSTRATIONS, n_shots=3, means=means, n_random=3,
            generator=seeded(4), progress=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    for ours, theirs in zip(tables[0].rows, tables[1].rows, strict=True):
        assert (ours.interval, ours.difference) == (theirs.interval, theirs.difference)
        assert all(same(a, b) for a, b in zip(ours.evaluations, theirs.evaluations, strict=True))


def test_a_zero_vector_or_scale_is_no_vector(tiny):
    bare = evaluate(tiny, PAIRS, generator=seeded())
    for vector, scale in ((made_vector(tiny) * 0.0, 1.0), (made_vector(tiny), 0.0)):
        still = evaluate(tiny, PAIRS, vector=vector, scale=scale, generator=seeded())
        torch.testing.assert_close(still.log_probabilities, bare.log_probabilities, rtol=1e-6, atol=1e-6)
        assert torch.equal(still.ranks, bare.ranks)
    moved = evaluate(tiny, PAIRS, vector=made_vector(tiny), generator=seeded())
    assert not torch.allclose(moved.log_probabilities, bare.log_probabilities)


def test_a_vector_may_hold_one_row_a_pair(tiny):
    vectors = [made_vector(tiny, seed=seed) for seed in range(len(PAIRS))]
    rows = steering(tiny, {resid_hook(1): torch.stack([vector.vector for vector in vectors])})
    for batch_size in (64, 3):
        found = evaluate(tiny, PAIRS, vector=rows, batch_size=batch_size, generator=seeded())
        for i, (pair, vector) in enumerate(zip(PAIRS, vectors, strict=True)):
            alone = evaluate(tiny, [pair], vector=vector, generator=seeded())
            torch.testing.assert_close(found.log_probabilities[i], alone.log_probabilities[0], rtol=1e-5, atol=1e-5)


def test_a_distributed_vector_equals_adding_its_parts_to_z(tiny, means):
    vector = distributed_vector(tiny, means, heads=[(0, 1), (2, 3)], alpha=3.0)
    found = evaluate(tiny, PAIRS, vector=vector, generator=seeded())
    for i, pair in enumerate(PAIRS):
        prompt, answer = tokens_by_hand(tiny.tokenizer, f"Q: {pair.input}\nA:", pair.output)
        logs = naive_logits(tiny, prompt, answer, vector.additions()).log_softmax(dim=-1)
        whole = sum(float(logs[len(prompt) - 1 + j, token]) for j, token in enumerate(answer))
        assert float(found.log_probabilities[i]) == pytest.approx(whole, abs=1e-4)
    assert (found.vector_kind, found.vector_layer) == ("distributed", None)


def test_prompts_that_fill_the_context_run_apart():
    """A long prompt with a short answer beside a short prompt with a long one: together they exceed the context."""
    pairs = [Pair("extraordinarily unlikely wordings", "old"), Pair("up", "extraordinarily unlikely wordings")]
    roomy = random_model()
    prompts = build_prompts(roomy, pairs, n_shots=0, generator=seeded())
    lengths, answers = prompts.attention_mask.sum(1), prompts.answer_mask.sum(1)
    n_ctx = int((lengths + answers).max())
    assert int(lengths.max() + answers.max()) - 1 > n_ctx
    tight = random_model(n_ctx=n_ctx)
    found = evaluate(tight, pairs, generator=seeded())
    alone = [evaluate(tight, [pair], generator=seeded()) for pair in pairs]
    torch.testing.assert_close(found.log_probabilities, torch.cat([one.log_probabilities for one in alone]))


def test_summaries_are_the_means_of_the_entries(tiny):
    found = evaluate(tiny, PAIRS, vector=made_vector(tiny), generator=seeded(), scale=2)
    found = dataclasses.replace(found, ranks=torch.tensor([0, 1, 4, 5, 0, 9, 99, 0]))
    assert found.top1 == 3 / 8
    assert found.top5 == 5 / 8
    assert found.mean_rank == 118 / 8
    assert found.mrr == pytest.approx((3 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 10 + 1 / 100) / 8)
    assert found.correct.tolist() == [True, False, False, False, True, False, False, True]
    assert found.probability == pytest.approx(sum(found.probabilities.tolist()) / 8)
    assert found.answer_log_probability == pytest.approx(sum(found.log_probabilities.tolist()) / 8)
    assert found.n == 8
    interval = found.interval
    assert repr(found) == (
        "Evaluation(custom pairs, zero_shot, function vector x 2, n=8, top1=0.375 "
        f"[{interval.low:.3f}, {interval.high:.3f}], probability={found.probability:.3f})"
    )


def test_the_interval_is_the_bootstrap_of_top1_after_the_prompt_draws(model):
    generator = seeded(6)
    pairs = fvlens.load_relation("antonym").pairs[:30]
    build_prompts(model, DEMONSTRATIONS, queries=pairs, n_shots=4, generator=generator)
    found = evaluate(model, pairs, setting="icl", demonstrations=DEMONSTRATIONS, n_shots=4, generator=seeded(6))
    assert found.interval == bootstrap_interval(found.ranks == 0, generator=generator)
    assert found.interval.low <= found.top1 <= found.interval.high


def test_provenance(tiny):
    named = Relation("opposite", PAIRS)
    vector = made_vector(tiny, layer=2)
    found = evaluate(tiny, named, vector=vector, scale=0.5, generator=seeded())
    assert (found.relation, found.n_shots, found.labels, found.scale) == ("opposite", 0, "true", 0.5)
    assert (found.vector_kind, found.vector_relation, found.vector_layer) == ("function", "made", 2)
    assert found.fingerprint == fingerprint(tiny)
    assert found.model_name == tiny.cfg.model_name
    bare = evaluate(tiny, PAIRS, generator=seeded())
    assert (bare.relation, bare.vector_kind, bare.vector_layer, bare.fingerprint) == ("", None, None, None)
    icl = dict(setting="icl", n_shots=2, generator=seeded())
    assert evaluate(tiny, PAIRS, demonstrations=named, **icl).relation == "opposite"
    assert evaluate(tiny, named, demonstrations=DEMONSTRATIONS, **icl).relation == "opposite"
    assert evaluate(tiny, named, relation="given", generator=seeded()).relation == "given"


def test_evaluation_as_a_table_and_a_figure(tiny):
    found = evaluate(tiny, PAIRS, generator=seeded())
    table = found.to_dataframe()
    assert table["query"].tolist() == [pair.input for pair in PAIRS]
    assert table["answer"].tolist() == [pair.output for pair in PAIRS]
    assert table["prediction"].tolist() == list(found.predictions)
    assert table["rank"].tolist() == found.ranks.tolist()
    assert table["log_probability"].tolist() == found.log_probabilities.tolist()
    assert set(table["vector"]) == {"none"}
    ranked = dataclasses.replace(found, ranks=torch.tensor([0, 1, 4, 5, 0, 9, 99, 0]))
    figure = ranked.plot(k=5)
    assert list(figure.data[-1].x) == [1, 2, 3, 4, 5]
    assert list(figure.data[-1].y) == [3 / 8, 4 / 8, 4 / 8, 4 / 8, 5 / 8]


# --- generated answers ---


def test_answers_end_where_the_template_or_the_text_ends(tiny, monkeypatch):
    pairs = [Pair("hot", "cold water"), Pair("big", "small"), Pair("up", "The Down"), Pair("dry", "wet")]
    texts = [" cold water\n\nQ: more", " small", "\n small", " wet and dry"]
    rows = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows)) + 2
    end = tiny.tokenizer.eos_token_id
    ids = torch.tensor([row + [end] + rows[0][:1] * (width - len(row) - 1) for row in rows])
    monkeypatch.setattr(_generate, "_generate", lambda *args: ids)
    found = generate_answers(tiny, pairs, generator=seeded())
    assert found.raw_texts == tuple(texts)
    assert found.texts == ("cold water", "small", "", "wet and dry")
    assert found.matches.tolist() == [True, True, False, False]
    assert found.f1_scores.tolist() == pytest.approx([1, 1, 0, 0.5])
    assert found.exact_match == 0.5
    assert found.f1 == pytest.approx(2.5 / 4)
    after = seeded()
    build_prompts(tiny, pairs, n_shots=0, generator=after)
    state = after.get_state()
    assert found.interval == bootstrap_interval(found.matches, generator=after)
    assert found.f1_interval == bootstrap_interval(found.f1_scores, generator=after.set_state(state))
    assert "exact_match=0.500" in repr(found)
    table = found.to_dataframe()
    assert table["text"].tolist() == list(found.texts)
    assert table["exact_match"].tolist() == found.matches.tolist()
    assert list(found.plot().data[0].x) == [found.exact_match, found.f1]


@pytest.mark.parametrize(
    ("demonstration", "end"),
    [
        ("Q:{input}\nA:{output}\n\n", "\n"),
        ("{input} ->{output}; ", "; "),
        ("{input} ->{output}", None),
        ("{input} ->{output} ", None),
        ("The{output} of{input}.\n", " of"),
    ],
)
def test_end_of_an_answer(demonstration, end):
    assert _generate._end_of_answer(Template("t", demonstration, "{input} ->")) == end


def test_one_new_token_is_the_prediction_of_evaluate(tiny):
    kwargs = dict(vector=made_vector(tiny), generator=seeded())
    raw = generate_answers(tiny, PAIRS, max_new_tokens=1, **kwargs).raw_texts
    predictions = evaluate(tiny, PAIRS, **kwargs).predictions
    assert [text.removeprefix(" ") for text in raw] == list(predictions)


# --- sweeps ---


@pytest.mark.parametrize("setting", ["zero_shot", "shuffled"])
def test_layer_sweep_equals_single_evaluations(tiny, setting):
    vector = made_vector(tiny, norm=20.0)
    kwargs = dict(setting=setting, demonstrations=DEMONSTRATIONS, n_shots=3, scale=1.5)
    sweep = layer_sweep(tiny, PAIRS, vector, generator=seeded(8), progress=False, **kwargs)
    assert sweep.layers == (0, 1, 2)
    assert sweep.complete
    for layer, one in zip(sweep.layers, sweep.evaluations, strict=True):
        assert same(one, evaluate(tiny, PAIRS, vector=vector.at_layer(layer), generator=seeded(8), **kwargs))
    assert same(sweep.baseline, evaluate(tiny, PAIRS, generator=seeded(8), **kwargs))
    assert sweep.top1.tolist() == pytest.approx([one.top1 for one in sweep.evaluations])
    assert sweep.probability.tolist() == pytest.approx([one.probability for one in sweep.evaluations])
    assert sweep.intervals == tuple(one.interval for one in sweep.evaluations)


def test_layer_sweep_takes_a_vector_for_each_layer(tiny):
    vectors = {2: made_vector(tiny, layer=2, seed=2), 0: made_vector(tiny, layer=0, seed=1)}
    sweep = layer_sweep(tiny, PAIRS, vectors, generator=seeded(8), progress=False)
    assert sweep.layers == (0, 2)
    for layer, one in zip(sweep.layers, sweep.evaluations, strict=True):
        assert same(one, evaluate(tiny, PAIRS, vector=vectors[layer], generator=seeded(8)))
    assert layer_sweep(tiny, PAIRS, vectors, layers=[2], generator=seeded(8), progress=False).layers == (2,)


def test_layer_and_scale_sweep_equals_single_evaluations(tiny):
    vector = made_vector(tiny, norm=20.0)
    kwargs = dict(setting="icl", demonstrations=DEMONSTRATIONS, n_shots=3)
    sweep = layer_scale_sweep(tiny, PAIRS, vector, scales=(2, 0.5, 2), generator=seeded(8), progress=False, **kwargs)
    assert (sweep.layers, sweep.scales, sweep.complete) == ((0, 1, 2), (0.5, 2.0), True)
    for i, layer in enumerate(sweep.layers):
        for j, scale in enumerate(sweep.scales):
            there = vector.at_layer(layer)
            one = evaluate(tiny, PAIRS, vector=there, scale=scale, generator=seeded(8), **kwargs)
            assert same(sweep.at(layer, scale), one) and sweep.at(layer, scale).scale == scale
            assert float(sweep.top1[i, j]) == pytest.approx(one.top1)
            assert float(sweep.probability[i, j]) == pytest.approx(one.probability)
            assert sweep.intervals[i][j] == one.interval
    assert same(sweep.baseline, evaluate(tiny, PAIRS, generator=seeded(8), **kwargs))
    by_layer = layer_sweep(tiny, PAIRS, vector, scale=2, generator=seeded(8), progress=False, **kwargs)
    at_two = sweep.at_scale(2)
    assert at_two.best_layer == by_layer.best_layer
    assert all(map(same, at_two.evaluations, by_layer.evaluations))
    mapped = {layer: vector.at_layer(layer) for layer in (2, 0)}
    few = layer_scale_sweep(tiny, PAIRS, mapped, scales=[2], generator=seeded(8), progress=False, **kwargs)
    assert few.layers == (0, 2) and same(few.at(2, 2), sweep.at(2, 2))


def test_layer_and_scale_sweep_asks_all_cells_in_one_go(tiny, monkeypatch):
    seen = []
    own = _sweeps.score

    def watched(model, prompts, changes, **options):
        seen.append((len(changes), options["scales"]))
        return own(model, prompts, changes, **options)

    monkeypatch.setattr(_sweeps, "score", watched)
    layer_scale_sweep(tiny, PAIRS, made_vector(tiny), scales=(1, 3), generator=seeded(), progress=False)
    assert seen == [(7, [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0])]


def test_the_best_layer_and_scale_has_the_largest_top1_then_probability_then_is_nearest_to_scale_one():
    low, sure, unsure = scored([0, 3, 3], 0.9), scored([0, 0, 3], 0.6), scored([0, 0, 3], 0.5)

    def place(*rows):
        return LayerScaleSweep((4, 5), (0.5, 1.0, 1.5), rows, low, True).best_place

    assert place((low, low, unsure), (sure, low, low)) == (5, 0.5)
    assert place((low, low, low), (low, low, unsure)) == (5, 1.5)
    assert place((sure, low, low), (low, sure, low)) == (5, 1.0)  # the scale first
    assert place((low, sure, low), (low, sure, low)) == (4, 1.0)  # then the layer
    assert place((low, low, low), (sure, low, sure)) == (5, 0.5)  # then the smaller of two that are as near
    whole = LayerScaleSweep((4, 5), (0.5, 1.0, 1.5), ((low, sure, low), (low, low, low)), low, True)
    assert whole.best is sure and (whole.best_layer, whole.best_scale) == (4, 1.0)
    with pytest.raises(
        ValueError, match=r"visited layers \[4, 5\] and scales \[0.5, 1.0, 1.5\], not layer 4 with scale 2"
    ):
        whole.at_scale(2)


def test_an_interrupted_layer_and_scale_sweep_keeps_finished_queries(tiny, monkeypatch):
    own = _sweeps.score

    def cut(*args, **options):
        found = own(*args, **options)
        parts = {name: getattr(found, name)[:, :2] for name in ("ranks", "first", "rest", "best")}
        return dataclasses.replace(found, prompts=found.prompts[:2], complete=False, **parts)

    whole = layer_scale_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), progress=False)
    monkeypatch.setattr(_sweeps, "score", cut)
    part = layer_scale_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), progress=False)
    assert not part.complete and part.best.n == 2 and not part.at_scale(1).complete
    assert torch.equal(part.at(1, 2).ranks, whole.at(1, 2).ranks[:2])
    says_that_it_is_a_part(part)
    says_that_it_is_a_part(part.at_scale(1))


def scored(ranks, probability):
    n = len(ranks)
    return Evaluation(
        setting="zero_shot", relation="r", queries=(Pair("a", "b"),) * n, predictions=("b",) * n,
        ranks=torch.tensor(ranks), probabilities=torch.full((n,), probability), log_probabilities=torch.zeros(n),
        interval=Interval(0.1, 0.9, 0.95), template=TEMPLATES["qa"], n_shots=0, labels="true", scale=1.0,
        vector_kind=None, vector_relation=None, vector_layer=None, model_name="m", fingerprint=None, data_hash="",
        path="naive", batch_size=1, weights=None, compute=None,
    )  # fmt: skip


def test_the_best_has_the_largest_top1_then_the_largest_probability_then_comes_first():
    low, sure, unsure = scored([0, 3, 3], 0.9), scored([0, 0, 3], 0.6), scored([0, 0, 3], 0.5)
    rest = dict(baseline=low, complete=True)

    def best_layer(*evaluations):
        return _sweeps.LayerSweep(layers=(4, 5, 6), evaluations=evaluations, **rest).best_layer

    assert best_layer(low, unsure, sure) == 6
    assert best_layer(low, sure, unsure) == 5
    assert best_layer(sure, low, sure) == 4
    counts = _sweeps.HeadCountSweep(
        counts=(1, 5, 10), evaluations=(low, sure, sure), ranking=(Head(0, 0),), layer=1, **rest
    )
    assert counts.best_count == 5


def test_sweeps_as_tables_and_figures(tiny, means):
    by_layer = layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), progress=False)
    by_count = head_count_sweep(tiny, PAIRS, means, [(0, 1), (2, 2), (1, 0)], 1, generator=seeded(), progress=False)
    for sweep, name, x, marked in (
        (by_layer, "layer", by_layer.layers, by_layer.best_layer),
        (by_count, "n_heads", by_count.counts, by_count.best_count),
    ):
        table = sweep.to_dataframe()
        assert table[name].tolist() == list(x)
        assert table["top1"].tolist() == [one.top1 for one in sweep.evaluations]
        assert table["high"].tolist() == [one.interval.high for one in sweep.evaluations]
        assert table["log_probability"].tolist() == [one.answer_log_probability for one in sweep.evaluations]
        figure = sweep.plot()
        assert list(figure.data[-1].x) == list(x)
        assert list(figure.data[-1].y) == [one.top1 for one in sweep.evaluations]
        assert any("no vector" in note.text for note in figure.layout.annotations)
        assert any(note.x == marked and "best" in note.text for note in figure.layout.annotations)


def test_head_count_sweep_equals_single_evaluations(tiny, means):
    ranking = [(2, 1), (0, 3), (1, 1), (1, 0), (0, 0), (2, 2)]
    sweep = head_count_sweep(tiny, PAIRS, means, ranking, 1, generator=seeded(8), scale=4.0, progress=False)
    assert sweep.counts == (1, 2, 3, 5)
    assert sweep.ranking == tuple(Head(*head) for head in ranking)
    assert sweep.layer == 1
    for count, one in zip(sweep.counts, sweep.evaluations, strict=True):
        vector = function_vector(tiny, means, heads=ranking[:count], layer=1)
        assert same(one, evaluate(tiny, PAIRS, vector=vector, scale=4.0, generator=seeded(8)))
    assert same(sweep.baseline, evaluate(tiny, PAIRS, scale=4.0, generator=seeded(8)))
    some = head_count_sweep(tiny, PAIRS, means, ranking, 1, counts=[6, 2], generator=seeded(8), progress=False)
    assert some.counts == (2, 6)


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


# --- interruption ---


def interrupted_after(n, monkeypatch):
    """The n + 1st run of prompts is interrupted."""
    real, calls = scoring.run_prefix, []

    def counting(*args, **kwargs):
        calls.append(args)
        if len(calls) == n + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(scoring, "run_prefix", counting)


def test_an_interrupted_sweep_keeps_the_finished_queries(tiny, means, monkeypatch):
    options = dict(batch_size=2, progress=False)
    whole = layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), **options)
    n_runs, done = 0, []
    while True:
        with monkeypatch.context() as patch:
            interrupted_after(n_runs, patch)
            if n_runs == 0:
                with pytest.raises(KeyboardInterrupt):
                    layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), **options)
            else:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    part = layer_sweep(tiny, PAIRS, made_vector(tiny), generator=seeded(), **options)
                if part.complete:
                    break
                n = part.baseline.n
                assert [str(one.message) for one in caught] == [
                    f"layer sweep was interrupted: {n} of {len(PAIRS)} queries are finished."
                ]
                assert part.layers == whole.layers
                places = [PAIRS.index(pair) for pair in part.baseline.queries]
                assert places == sorted(places)
                for some, every in zip(part.evaluations, whole.evaluations, strict=True):
                    assert some.queries == part.baseline.queries
                    torch.testing.assert_close(some.log_probabilities, every.log_probabilities[places])
                done.append(n)
        n_runs += 1
    assert done == sorted(set(done))
    assert len(done) >= 3
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        with pytest.warns(UserWarning, match=r"head-count sweep was interrupted: \d of 8 queries are finished"):
            part = head_count_sweep(tiny, PAIRS, means, [(0, 0), (1, 1)], 1, generator=seeded(), **options)
    assert part.counts == (1, 2)
    assert not part.complete
    says_that_it_is_a_part(part)
    assert "complete" not in whole.to_dataframe() and "interrupted" not in whole.plot().layout.title.text


def says_that_it_is_a_part(result):
    """In its table and in its figure."""
    assert not result.to_dataframe().complete.any()
    assert "interrupted" in result.plot().layout.title.text


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
    real = scoring.run_prefix
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "run_prefix", lambda *a, **k: counted.append(1) or real(*a, **k))
        table()
    with monkeypatch.context() as patch:
        interrupted_after(len(counted) - 1, patch)  # in the last row, of corrupted demonstrations
        with pytest.warns(UserWarning, match=r"controls was interrupted: 4 of 5 rows are finished"):
            found = table()
    assert [row.kind for row in found.rows] == ["no_vector", "vector", "random_vector", "icl"]
    assert not found.complete


# --- errors ---


@pytest.mark.parametrize("function", [evaluate, generate_answers])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"setting": "few"}, r"setting='few'; expected one of zero_shot, icl, shuffled"),
        ({"setting": "icl"}, r"setting='icl' needs demonstrations, got None; give the pairs to draw them from"),
        ({"setting": "shuffled"}, r"setting='shuffled' needs demonstrations, got None"),
        (
            {"setting": "icl", "demonstrations": DEMONSTRATIONS, "n_shots": 0},
            r"needs n_shots of at least 1, got 0; without demonstrations the setting is 'zero_shot'",
        ),
        ({"labels": "permuted"}, r"labels='permuted' with setting='zero_shot'; labels belong to setting='shuffled'"),
        (
            {"setting": "shuffled", "demonstrations": DEMONSTRATIONS, "labels": "true"},
            r"labels='true'; expected one of permuted, deranged, random",
        ),
        ({"batch_size": 0}, r"expected batch_size of at least 1, got 0"),
        ({"vector": torch.zeros(32)}, r"inject: expected a Steering .* got Tensor"),
        (
            {"vector": SimpleNamespace(additions=lambda: {resid_hook(0): torch.ones(3, 32)}, check=lambda model: None)},
            r"blocks.0.hook_resid_post has a batch axis of 3, but there are 8 pairs; give one row a pair",
        ),
        (
            {"vector": SimpleNamespace(additions=lambda: {z_hook(0): torch.ones(9, 4, 8)}, check=lambda model: None)},
            r"blocks.0.attn.hook_z has a batch axis of 9, but there are 8 pairs",
        ),
        ({"setting": "icl", "demonstrations": DEMONSTRATIONS, "n_shots": 6}, r"6 demonstrations wanted"),
    ],
)
def test_bad_settings_are_refused(tiny, unchecked, function, settings, message):
    with pytest.raises(ValueError, match=message):
        function(tiny, PAIRS, generator=seeded(), **settings)


def test_no_pairs_are_refused(tiny):
    with pytest.raises(ValueError, match="expected at least one query pair, got none"):
        evaluate(tiny, [], generator=seeded())


def test_a_vector_of_another_model_is_refused(tiny):
    vector = made_vector(random_model(initializer_range=0.2))
    with pytest.raises(ValueError, match=r"was made on model .* not on this one"):
        evaluate(tiny, PAIRS, vector=vector, generator=seeded())


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, r"expected max_new_tokens of at least 1, got 0"),
        (200, r"with max_new_tokens=200 it does not fit the model's context of 160; generate fewer tokens"),
    ],
)
def test_bad_lengths_are_refused(tiny, n, message):
    with pytest.raises(ValueError, match=message):
        generate_answers(tiny, PAIRS, max_new_tokens=n, generator=seeded())


@pytest.mark.parametrize(
    ("vector", "layers", "message"),
    [
        ("function", [], r"expected at least one layer, got none"),
        (
            "function",
            [1, 3],
            r"no vector for layer 3; the model has layers 0\.\.2, and there are vectors for \[0, 1, 2\]",
        ),
        ("map", [0, 1], r"no vector for layer 1; .* there are vectors for \[0\]"),
        ("outside", None, r"no vector for layer 7; the model has layers 0\.\.2"),
        ("distributed", None, r"expected a vector with at_layer\(\), or a map from layer to vector, got Distributed"),
    ],
)
def test_bad_layers_are_refused(tiny, means, unchecked, vector, layers, message):
    one = made_vector(tiny)
    given = {
        "function": one,
        "map": {0: one},
        "outside": {7: one},
        "distributed": distributed_vector(tiny, means, heads=[(0, 0)]),
    }[vector]
    with pytest.raises(ValueError, match=message):
        layer_sweep(tiny, PAIRS, given, layers=layers, generator=seeded(), progress=False)


@pytest.mark.parametrize(
    ("ranking", "counts", "message"),
    [
        ([], None, r"expected a ranking of at least one head, got none"),
        ([(0, 0), (1, 1)], [], r"expected counts in 1\.\.2 \(the ranking's length\), got \[\]"),
        ([(0, 0), (1, 1)], [0, 1], r"expected counts in 1\.\.2 .* got \[0, 1\]"),
        ([(0, 0), (1, 1)], [3], r"expected counts in 1\.\.2 .* got \[3\]"),
        ([(0, 9)], None, r"L0H9 does not exist"),
    ],
)
def test_bad_counts_are_refused(tiny, means, ranking, counts, message):
    with pytest.raises(ValueError, match=message):
        head_count_sweep(tiny, PAIRS, means, ranking, 1, counts=counts, generator=seeded(), progress=False)


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


# --- ties ---


def test_of_two_equal_logits_the_smaller_id_is_right(tied):
    """Ranks, top-1, predictions and generated text tell the same."""
    pairs = [("hot", "cold"), ("big", "small"), ("large", "small")]
    found = evaluate(tied, pairs, generator=seeded())
    assert found.ranks.tolist() == [0, 1, 1]
    assert found.predictions == ("cold",) * 3
    assert found.top1 == pytest.approx(1 / 3)
    assert torch.equal(found.probabilities, found.probabilities[:1].expand(3))
    made = generate_answers(tied, pairs, max_new_tokens=2, generator=seeded())
    assert made.raw_texts == (" cold cold",) * 3
    assert made.matches.tolist() == [False] * 3


def test_unknown_options_are_refused_with_the_known_ones(tiny):
    known = "setting, demonstrations, n_shots, template, labels, pool, relation"
    with pytest.raises(
        TypeError, match=f"^evaluate: unexpected options colour; expected some of {known}, batch_size, "
    ):
        evaluate(tiny, PAIRS, colour="red", generator=seeded())
    with pytest.raises(TypeError, match=f"^generate_answers: unexpected options path; expected some of {known}\\."):
        generate_answers(tiny, PAIRS, path="naive", generator=seeded())
