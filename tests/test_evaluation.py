"""Scores against plain loops over one unpadded prompt at a time, and generated answers."""

import contextlib
import dataclasses
import functools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, build
from conftest import TOKENIZER, random_model, seeded
from evaluations import DEMONSTRATIONS, PAIRS, made_vector, same, steering
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens.evaluation import (
    _generate,
    controls,
    evaluate,
    generate_answers,
)
from fvlens.interventions import resid_hook, z_hook
from fvlens.metrics import bootstrap_interval
from fvlens.models import embedded_folder, fingerprint
from fvlens.prompts import AnswerEnd, Template, build_prompts
from fvlens.relations import Pair, Relation
from fvlens.suffix import has_hooks
from fvlens.vectors import distributed_vector

pytestmark = pytest.mark.usefixtures("no_trace")

ENDLESS = Template("endless", "{input} ->{output}", "{input} ->")
"""A template without a separator, in which only an end token ends an answer."""

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


def until_line_break(tokenizer, new):
    """Text of these tokens up to the first one with a line break in it."""
    broken = [i for i, token in enumerate(new) if "\n" in tokenizer.decode([token])]
    return tokenizer.decode(new[: broken[0] + 1] if broken else new)


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
        assert raw == until_line_break(tokenizer, new)


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
        assert texts[i] == until_line_break(model.tokenizer, new)
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
    whole = torch.tensor([True, False, False, False, False, False, False, True])  # the fifth goes on wrongly
    found = dataclasses.replace(found, ranks=torch.tensor([0, 1, 4, 5, 0, 9, 99, 0]), whole=whole)
    assert (found.top1, found.exact) == (3 / 8, 2 / 8)
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
        f"[{interval.low:.3f}, {interval.high:.3f}], exact=0.250, probability={found.probability:.3f})"
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
    end = tiny.tokenizer.eos_token_id
    rows = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows[1].append(end)
    monkeypatch.setattr(_generate, "_generate", lambda *args: rows)
    found = generate_answers(tiny, pairs, generator=seeded())
    assert found.raw_texts == tuple(texts)
    assert found.texts == ("cold water", "small", "", "wet and dry")
    assert found.ended.tolist() == [True, True, True, False]
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
    assert table["ended"].tolist() == found.ended.tolist()
    assert table["exact_match"].tolist() == found.matches.tolist()
    assert list(found.plot().data[0].x) == [found.exact_match, found.f1]


@pytest.mark.parametrize(
    ("demonstration", "text", "token"),
    [
        ("Q:{input}\nA:{output}\n\n", "\n", None),
        ("{input} ->{output}; ", "; ", None),
        ("{input} ->{output}", None, None),
        ("{input} ->{output} ", None, None),
        ("The{output} of{input}.\n", " of", None),
        ("<|user|>{input}<|bot|>{output}<|end|>\n", None, "<|end|>"),
        ("<|user|>{input}<|bot|>{output} <|end|><|user|>", None, "<|end|>"),
    ],
)
def test_end_of_an_answer(turns, demonstration, text, token):
    end = AnswerEnd.of(turns, Template("t", demonstration, "{input} ->"))
    ends = {turns.eos_token_id, *([] if token is None else turns.convert_tokens_to_ids([token]))}
    assert (end.text, end.tokens) == (text, ends)
    assert (
        AnswerEnd.of(SimpleNamespace(eos_token_id=None), Template("t", "{input}{output}\n", "{input}")).tokens == set()
    )


@pytest.fixture(scope="module")
def turns():
    """A tokenizer with tokens for turns."""
    made = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    return made


def test_an_answer_is_the_text_before_its_end(turns):
    end = AnswerEnd.of(turns, Template("t", "{input}{output}<|end|>\n", "{input}"))
    ids = turns("\n cold water<|end|> hot", add_special_tokens=False)["input_ids"]
    kept = end.until(ids)
    assert turns.decode(kept) == "\n cold water<|end|>"
    assert [end.reached(ids[:n]) for n in range(len(kept) + 1)] == [False] * len(kept) + [True]
    assert (end.written(kept), end.answer(kept)) == ("\n cold water", "cold water")
    assert end.until(ids[: len(kept) - 1]) == ids[: len(kept) - 1]
    semicolon = AnswerEnd.of(turns, Template("t", "{input}{output};", "{input}"))
    ids = turns(" cold; hot;", add_special_tokens=False)["input_ids"]
    assert (semicolon.answer(semicolon.until(ids)), semicolon.answer(ids)) == ("cold", "cold")


def test_nothing_is_generated_behind_the_end_of_the_last_answer(tiny):
    """Each row ends by itself, whatever stands beside it; the model is not run for tokens that nobody sees."""
    pairs = [*PAIRS, Pair("near", "far")]
    free = generate_answers(tiny, pairs, max_new_tokens=6, template=ENDLESS, generator=seeded())
    assert not free.ended.any()
    rows = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in free.raw_texts]
    stop = tiny.tokenizer.decode(rows[0][2])
    ending = dataclasses.replace(ENDLESS, demonstration=f"{{input}} ->{{output}}{stop}")
    for size in (1, 3, len(pairs)):
        found = generate_answers(tiny, pairs, max_new_tokens=6, template=ending, batch_size=size, generator=seeded())
        for raw, text, ended, whole in zip(found.raw_texts, found.texts, found.ended, free.raw_texts, strict=True):
            assert bool(ended) == (stop in whole)
            assert whole.startswith(raw) and (stop in raw if ended else raw == whole)
            assert text == whole.split(stop)[0].strip()
    passes = []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda x, hook: passes.append(x.shape[1]))]):
        generate_answers(tiny, pairs[:1], max_new_tokens=6, template=ending, generator=seeded())
    shorter = [
        generate_answers(tiny, pairs[:1], max_new_tokens=n, template=ENDLESS, generator=seeded()) for n in range(1, 6)
    ]
    assert len(passes) == next(n for n, one in enumerate(shorter, start=1) if stop in one.raw_texts[0])


@pytest.fixture(scope="module")
def asked_of(model):
    """A relation's test pairs, its demonstrations and its vector, found with few prompts."""

    def ask(name):
        found = fvlens.find_vector(
            model, name, n_prompts=20, n_corrupted=5, layers=[1, 2], scales=[1, 2], generator=seeded(), progress=False
        )
        return found.split, found.vector

    return functools.cache(ask)


@pytest.mark.parametrize(
    ("relation", "template"), [("antonym", "qa"), ("antonym", "colon"), ("country-capital", "arrow")]
)
def test_the_embedded_model_ends_its_answers(model, asked_of, relation, template):
    """What it writes until the separator is right as often as its first token, with a vector in the prompt too."""
    split, vector = asked_of(relation)
    shown = dict(setting="icl", demonstrations=split.train, n_shots=5)
    for how in ({"template": template, **shown}, {"template": template, "vector": vector}):
        top1 = evaluate(model, split.test, generator=seeded(), **how).top1
        found = generate_answers(model, split.test, generator=seeded(), **how)
        assert top1 > 0.5
        assert found.exact_match == pytest.approx(top1, abs=0.02)
        assert found.ended.double().mean() > 0.98


def test_one_new_token_is_the_prediction_of_evaluate(tiny):
    kwargs = dict(vector=made_vector(tiny), generator=seeded())
    raw = generate_answers(tiny, PAIRS, max_new_tokens=1, **kwargs).raw_texts
    predictions = evaluate(tiny, PAIRS, **kwargs).predictions
    assert [text.removeprefix(" ") for text in raw] == list(predictions)


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
        ({"vector": torch.zeros(32)}, r"vector: expected a Steering or None, got a Tensor"),
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
    with pytest.raises(ValueError, match="evaluate: pairs: expected at least one pair, got none"):
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
