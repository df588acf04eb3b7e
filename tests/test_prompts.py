"""Prompts against text written by hand and the bare tokenizer; corruption, queries and every error message."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fvlens.evaluation import filter_correct
from fvlens.models import embedded_folder
from fvlens.prompts import (
    PAD_ANSWER,
    TEMPLATES,
    Template,
    TokenClass,
    build_prompts,
    get_template,
    read_template,
    render_prompts,
    template_or,
)
from fvlens.relations import Pair, list_relations, load_relation

BOS = "<|endoftext|>"
LABELS = ("true", "permuted", "deranged", "random")
# The built-in templates once more, by hand: a demonstration, and a query without its answer.
WRITTEN = {
    "qa": (lambda x, y: f"Q: {x}\nA: {y}\n\n", lambda x: f"Q: {x}\nA:"),
    "arrow": (lambda x, y: f" {x} -> {y}\n", lambda x: f" {x} ->"),
    "colon": (lambda x, y: f" {x}: {y}\n", lambda x: f" {x}:"),
}
ANTONYMS = load_relation("antonym").pairs
UNEVEN = (
    Pair("hot", "cold"),
    Pair("an unquestionably strange request", "an ordinary one"),
    Pair("Llanfairpwllgwyngyll", "Aberystwyth harbour"),
    Pair("naïve 42!", "x"),
    Pair("early", "late"),
    Pair("big", "small"),
)


@pytest.fixture(scope="module")
def bare():
    """The embedded tokenizer without any library around it."""
    return Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))


def stand_in(tokenizer, n_ctx=160):
    """Something with a tokenizer and a context, which is all that prompts need of a model."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx), hook_dict={}, blocks=[])


def ids_of(bare, text):
    return bare.encode(text, add_special_tokens=False).ids


def rows(prompts):
    """Each prompt's tokens without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(prompts.tokens, prompts.attention_mask, strict=True)]


# Tokens against the bare tokenizer


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("n_shots", [0, 1, 5])
@pytest.mark.parametrize("name", list(WRITTEN))
def test_tokens_are_those_of_the_text_written_by_hand(model, bare, generator, name, n_shots, labels):
    if labels == "deranged" and n_shots == 1:
        return  # one label cannot be deranged: see the errors
    pairs = UNEVEN if n_shots < 5 else ANTONYMS[:20]
    prompts = build_prompts(
        model, pairs, n_prompts=9, n_shots=n_shots, labels=labels, template=name, generator=generator
    )
    demonstration, question = WRITTEN[name]
    bos = bare.token_to_id(BOS)
    assert len(prompts) == len(prompts.tokens) == 9
    assert (prompts.labels, prompts.n_shots, prompts.template) == (labels, n_shots, TEMPLATES[name])
    for i, query in enumerate(prompts.queries):
        shown = prompts.demonstrations[i]
        assert len(shown) == n_shots
        text = "".join(demonstration(x, y) for x, y in shown) + question(query.input)
        assert prompts.texts[i] == text
        assert rows(prompts)[i] == [bos, *ids_of(bare, text)]
        whole = ids_of(bare, text + " " + query.output)
        answer = prompts.answer_tokens[i][prompts.answer_mask[i]].tolist()
        assert ids_of(bare, text) + answer == whole
        assert prompts.first_answer_token[i] == answer[0]
        assert (prompts.answer_tokens[i, len(answer) :] == PAD_ANSWER).all()
        # padding stands on the left only
        mask = prompts.attention_mask[i]
        assert mask.tolist() == sorted(mask.tolist())


def test_the_fixed_demonstrations_of_render_prompts_are_kept(model, bare):
    demonstrations = [[Pair("big", "late"), Pair("hot", "big")], [Pair("up", "down"), Pair("up", "down")]]
    queries = [Pair("early", "late"), Pair("up", "down")]
    prompts = render_prompts(model, queries, demonstrations, template="arrow", n_shots=2, relation="made up")
    assert prompts.texts == (" big -> late\n hot -> big\n early ->", " up -> down\n up -> down\n up ->")
    assert prompts.demonstrations == tuple(map(tuple, demonstrations))
    assert prompts.relation == "made up"
    assert rows(prompts) == [[bare.token_to_id(BOS), *ids_of(bare, text)] for text in prompts.texts]


def saved(tokenizer, folder, **special):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def bos_adding(tmp_path_factory):
    """The embedded tokenizer with a post-processor that puts a BOS in front, as Llama's has."""
    made = Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    return saved(made, tmp_path_factory.mktemp("bos"), bos_token=BOS, eos_token=BOS, pad_token=BOS)


def test_exactly_one_bos_also_if_the_tokenizer_adds_its_own(model, bos_adding, bare):
    bos = bare.token_to_id(BOS)
    assert bos_adding("Q")["input_ids"][0] == bos  # it does add one
    mine = build_prompts(stand_in(bos_adding), UNEVEN, n_shots=2, generator=seeded())
    reference = build_prompts(model, UNEVEN, n_shots=2, generator=seeded())
    assert rows(mine) == rows(reference)
    assert torch.equal(mine.answer_tokens, reference.answer_tokens)
    assert [row.count(bos) for row in rows(mine)] == [1] * len(UNEVEN)
    assert all(row[0] == bos for row in rows(mine))


def test_a_tokenizer_without_bos_gets_none(bare, tmp_path):
    plain = saved(Tokenizer.from_str(bare.to_str()), tmp_path)
    assert plain.bos_token_id is None
    prompts = build_prompts(stand_in(plain), UNEVEN, n_shots=1, generator=seeded())
    assert rows(prompts) == [ids_of(bare, text) for text in prompts.texts]
    assert not (prompts.token_classes == TokenClass.BOS).any()


def test_an_answer_that_merges_with_the_prompt_gets_its_own_tokens(tmp_path):
    vocabulary = ["x", "y", "z", ":", " ", "\n", ": ", " y", " x"]
    merges = [(":", " "), (" ", "y"), (" ", "x")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    assert made.encode(" x: y").tokens == [" x", ": ", "y"]  # across the border of prompt and answer
    tokenizer = saved(made, tmp_path, pad_token="\n")
    prompts = build_prompts(stand_in(tokenizer), [("x", "y")], n_shots=0, template="colon", generator=seeded())
    assert tokenizer.convert_ids_to_tokens(prompts.tokens[0].tolist()) == [" x", ":"]
    assert tokenizer.convert_ids_to_tokens(prompts.answer_tokens[0].tolist()) == [" y"]


def test_answers_of_several_tokens_are_padded_on_the_right(model, bare, generator):
    prompts = build_prompts(model, UNEVEN, n_shots=2, generator=generator)
    lengths = prompts.answer_mask.sum(dim=1).tolist()
    assert lengths == [len(ids_of(bare, " " + pair.output)) for pair in UNEVEN]
    assert len(set(lengths)) > 2
    assert prompts.answer_tokens.shape[1] == max(lengths)
    for answer, n, pair in zip(prompts.answer_tokens, lengths, UNEVEN, strict=True):
        assert bare.decode(answer[:n].tolist()) == " " + pair.output
        assert answer[n:].tolist() == [PAD_ANSWER] * (max(lengths) - n)


def test_left_padding_changes_no_logits(model, generator):
    prompts = build_prompts(model, UNEVEN, n_shots=2, generator=generator)
    assert len({len(row) for row in rows(prompts)}) > 2
    with torch.inference_mode():
        together = model(prompts.tokens, attention_mask=prompts.attention_mask)
        for i, row in enumerate(rows(prompts)):
            alone = model(torch.tensor([row]))[0]
            torch.testing.assert_close(together[i, -len(row) :], alone, atol=1e-5, rtol=1e-5)


# Token classes

B, P, X, Y, S, Q, L = (
    TokenClass.BOS,
    TokenClass.PREFIX,
    TokenClass.DEMONSTRATION_INPUT,
    TokenClass.DEMONSTRATION_LABEL,
    TokenClass.SEPARATOR,
    TokenClass.QUERY,
    TokenClass.PREDICTIVE,
)
CLASSED = {
    "qa": [
        *[("Q", S), (":", S), (" big", X), ("\n", S), ("A", S), (":", S), (" small", Y), ("\n\n", S)],
        *[("Q", S), (":", S), (" begin", X), ("\n", S), ("A", S), (":", S), (" finish", Y), ("\n\n", S)],
        *[("Q", S), (":", S), (" hot", Q), ("\n", S), ("A", S), (":", L)],
    ],
    "arrow": [
        *[(" big", X), (" ->", S), (" small", Y), ("\n", S), (" begin", X), (" ->", S), (" finish", Y), ("\n", S)],
        *[(" hot", Q), (" ->", L)],
    ],
    "colon": [
        *[(" big", X), (":", S), (" small", Y), ("\n", S), (" begin", X), (":", S), (" finish", Y), ("\n", S)],
        *[(" hot", Q), (":", L)],
    ],
}


@pytest.mark.parametrize("name", list(CLASSED))
def test_token_classes_by_hand(model, bare, name):
    demonstrations = [Pair("big", "small"), Pair("begin", "finish")]
    prompts = render_prompts(model, [Pair("hot", "cold")], [demonstrations], template=name, n_shots=2)
    found = [
        (bare.decode([token], skip_special_tokens=False), kind)
        for token, kind in zip(prompts.tokens[0].tolist(), prompts.token_classes[0].tolist(), strict=True)
    ]
    assert found == [(BOS, B), *CLASSED[name]]


def test_words_of_several_tokens_a_prefix_and_padding_are_classed(model, bare):
    template = Template("told", "the{input} is{output};", "the{input} is", prefix="Opposites, by rote.\n")
    queries = [Pair("unquestionably strange", "plain"), Pair("hot", "cold")]
    demonstrations = [[Pair("extraordinarily big", "small")]] * 2
    prompts = render_prompts(model, queries, demonstrations, template=template, n_shots=1)
    for i, query in enumerate(queries):
        text = {kind: [] for kind in TokenClass}
        for token, kind in zip(prompts.tokens[i].tolist(), prompts.token_classes[i].tolist(), strict=True):
            text[TokenClass(kind)].append(token)
        said = {kind: bare.decode(tokens, skip_special_tokens=False) for kind, tokens in text.items()}
        assert said[TokenClass.PREFIX] == "Opposites, by rote.\n"
        assert said[TokenClass.DEMONSTRATION_INPUT] == " extraordinarily big"
        assert said[TokenClass.DEMONSTRATION_LABEL] == " small"
        assert said[TokenClass.QUERY] == " " + query.input
        assert said[TokenClass.SEPARATOR] + said[TokenClass.PREDICTIVE] == "the is;the is"
        assert len(text[TokenClass.PREDICTIVE]) == len(text[TokenClass.BOS]) == 1
        assert len(text[TokenClass.PADDING]) == (prompts.attention_mask[i] == 0).sum()
        assert ((prompts.token_classes[i] == TokenClass.PADDING) == (prompts.attention_mask[i] == 0)).all()
    assert (prompts.token_classes[:, -1] == TokenClass.PREDICTIVE).all()


def test_a_template_that_ends_with_the_word_predicts_at_the_words_last_token(model):
    template = Template("bare", "{input}{output}\n", "{input}")
    prompts = render_prompts(model, [Pair("hot", "cold")], [[Pair("big", "small")]], template=template, n_shots=1)
    assert prompts.texts == (" big small\n hot",)
    assert prompts.token_classes[0].tolist() == [B, X, Y, S, L]


# Corrupted labels

SMALL = tuple(Pair(f"x{i}", f"y{i}") for i in range(4))


def true_labels(prompts, pairs):
    truth = dict(pairs)
    return [[truth[x] for x, _ in shown] for shown in prompts.demonstrations]


def shown_labels(prompts):
    return [[y for _, y in shown] for shown in prompts.demonstrations]


def test_true_labels_are_true(model, generator):
    prompts = build_prompts(model, ANTONYMS, n_prompts=20, n_shots=4, generator=generator)
    assert shown_labels(prompts) == true_labels(prompts, ANTONYMS)


def test_permuted_labels_are_every_permutation_equally_often(model, generator):
    prompts = build_prompts(model, SMALL, n_prompts=600, n_shots=3, labels="permuted", generator=generator)
    seen = dict.fromkeys(itertools.permutations(range(3)), 0)
    for shown, true in zip(shown_labels(prompts), true_labels(prompts, SMALL), strict=True):
        assert sorted(shown) == sorted(true)
        seen[tuple(true.index(label) for label in shown)] += 1
    assert all(60 < n < 140 for n in seen.values()), seen  # 100 expected, standard deviation 9


def test_deranged_labels_never_stay(model, generator):
    prompts = build_prompts(model, SMALL, n_prompts=200, n_shots=3, labels="deranged", generator=generator)
    seen = {(1, 2, 0): 0, (2, 0, 1): 0}
    for shown, true in zip(shown_labels(prompts), true_labels(prompts, SMALL), strict=True):
        assert sorted(shown) == sorted(true)
        seen[tuple(true.index(label) for label in shown)] += 1
    assert min(seen.values()) > 70


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_deranged_labels_differ_as_words_whatever_repeats(tiny, groups, seed):
    outputs = [f"y{g}" for g, n in enumerate(groups) for _ in range(n)]
    pairs = [Pair("query", "y"), *(Pair(f"x{i}", y) for i, y in enumerate(outputs))]
    model = stand_in(tiny.tokenizer, n_ctx=1000)
    settings_ = dict(queries=pairs[:1], n_shots=len(outputs), labels="deranged", template="colon")
    if 2 * max(groups) > len(outputs):
        with pytest.raises(ValueError, match=f"one label stands in {max(groups)} of {len(outputs)} demonstrations"):
            build_prompts(model, pairs, **settings_, generator=seeded(seed))
        return
    prompts = build_prompts(model, pairs, **settings_, generator=seeded(seed))
    shown, true = shown_labels(prompts)[0], true_labels(prompts, pairs)[0]
    assert sorted(shown) == sorted(true)
    assert all(a != b for a, b in zip(shown, true, strict=True))


def test_a_derangement_is_found_even_where_chance_finds_none(model, generator):
    pairs = [Pair("query", "y"), *(Pair(f"x{i}", "a" if i < 10 else "b") for i in range(20))]
    prompts = build_prompts(
        model, pairs, queries=pairs[:1], n_shots=20, labels="deranged", template="colon", generator=generator
    )
    assert all(a != b for a, b in zip(shown_labels(prompts)[0], true_labels(prompts, pairs)[0], strict=True))


def test_random_labels_come_from_the_pool_only(model, generator):
    pool = ["red", "green", "blue"]
    prompts = build_prompts(model, SMALL, n_prompts=50, n_shots=3, labels="random", pool=pool, generator=generator)
    assert {label for shown in shown_labels(prompts) for label in shown} == set(pool)


@pytest.mark.parametrize("named", [True, False])
def test_random_labels_are_by_default_never_an_answer_of_the_relation_in_use(model, generator, named):
    relation = load_relation("antonym")
    pairs = relation if named else ANTONYMS[:100]
    queries = ANTONYMS[100:]  # their answers are no labels either
    prompts = build_prompts(
        model, pairs, queries=queries, n_prompts=150, n_shots=10, labels="random", generator=generator
    )
    labels = {label for shown in shown_labels(prompts) for label in shown}
    assert len(labels) > 500
    assert not labels & set(relation.outputs)
    library = {word for name in list_relations() if name != "antonym" for word in load_relation(name).outputs}
    assert labels <= library
    assert prompts.relation == ("antonym" if named else "")


def test_corruption_leaves_the_queries_answers_alone(model):
    truth = dict(ANTONYMS)
    for labels in LABELS:
        prompts = build_prompts(model, ANTONYMS, n_prompts=30, n_shots=3, labels=labels, generator=seeded())
        assert all(truth[query.input] == query.output for query in prompts.queries)


# Queries and demonstrations

colliding = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("uvwxyz")), min_size=4, max_size=30, unique=True
)


@settings(max_examples=60, deadline=None)
@given(pairs=colliding, n_shots=st.integers(0, 4), labels=st.sampled_from(LABELS), seed=st.integers(0, 1000))
def test_a_query_is_never_among_its_demonstrations(tiny, pairs, n_shots, labels, seed):
    """Demonstrations come from the first pair of each input; queries are asked as they stand, of one input too."""
    kept = list({x: (x, y) for x, y in reversed(pairs)}.values())
    enough = all(sum(x != query for x, _ in kept) >= n_shots for query, _ in pairs)
    own = dict(n_shots=n_shots, labels=labels, pool=["q"], template="colon", generator=seeded(seed))
    try:
        prompts = build_prompts(tiny, kept, queries=pairs, **own)
    except ValueError as error:
        prompts = None
        wrong_labels = "deranged" in str(error)
    if prompts is None:
        assert wrong_labels or not enough
        return
    assert enough
    for query, shown in zip(prompts.queries, prompts.demonstrations, strict=True):
        assert query.input not in [x for x, _ in shown]
        if labels == "true":
            assert len(set(shown)) == len(shown)
            assert set(shown) <= set(kept)
    assert [tuple(query) for query in prompts.queries] == pairs


def test_each_query_is_asked_once_in_order_by_default(model, generator):
    prompts = build_prompts(model, ANTONYMS[:20], queries=ANTONYMS[20:30], n_shots=3, generator=generator)
    assert prompts.queries == ANTONYMS[20:30]
    assert {pair for shown in prompts.demonstrations for pair in shown} <= set(ANTONYMS[:20])


def test_more_prompts_than_queries_visit_them_again_in_new_order(model, generator):
    queries = ANTONYMS[:10]
    prompts = build_prompts(model, ANTONYMS, queries=queries, n_prompts=25, n_shots=2, generator=generator)
    first, second, rest = prompts.queries[:10], prompts.queries[10:20], prompts.queries[20:]
    assert set(first) == set(second) == set(queries)
    assert len(set(rest)) == 5
    assert first != second
    assert set(rest) <= set(queries)


def test_fewer_prompts_than_queries_are_drawn_without_repetition(model, generator):
    prompts = build_prompts(model, ANTONYMS, n_prompts=40, n_shots=0, generator=generator)
    assert len(set(prompts.queries)) == 40
    assert prompts.queries != ANTONYMS[:40]


def test_demonstrations_are_drawn_evenly(model, generator):
    prompts = build_prompts(
        model, ANTONYMS[:10], queries=ANTONYMS[10:11], n_prompts=300, n_shots=3, generator=generator
    )
    counts = [sum(pair in shown for shown in prompts.demonstrations) for pair in ANTONYMS[:10]]
    assert all(60 < n < 120 for n in counts), counts  # 90 expected, standard deviation 8
    firsts = {shown[0] for shown in prompts.demonstrations}
    assert firsts == set(ANTONYMS[:10])


def test_the_relation_is_recorded(model, generator):
    relation = load_relation("plural")
    split = relation.split(seeded())
    assert build_prompts(model, relation, n_prompts=1, generator=generator).relation == "plural"
    assert build_prompts(model, tuple(split.train), n_prompts=1, generator=generator).relation == ""
    assert build_prompts(model, split.train, queries=relation, n_prompts=1, generator=generator).relation == "plural"
    assert build_prompts(model, split.train, n_prompts=1, relation="own", generator=generator).relation == "own"


@pytest.mark.parametrize("labels", LABELS)
def test_same_seed_same_prompts_and_the_global_generator_is_left_alone(model, labels):
    before = torch.random.get_rng_state()
    one, two = (
        build_prompts(model, ANTONYMS, n_prompts=12, n_shots=3, labels=labels, generator=seeded(5)) for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.tokens, two.tokens)
    assert one.texts == two.texts
    assert one.data_hash == two.data_hash
    other = build_prompts(model, ANTONYMS, n_prompts=12, n_shots=3, labels=labels, generator=seeded(6))
    assert other.texts != one.texts


# The set as a value


def test_select_keeps_rows_in_order(model, generator):
    prompts = build_prompts(model, UNEVEN, n_shots=2, generator=generator)
    flags = torch.tensor([True, False, False, True, False, True])
    for kept, index in ((prompts.select(flags), [0, 3, 5]), (prompts.select([4, 0]), [4, 0])):
        assert len(kept) == len(index)
        for field in ("tokens", "attention_mask", "answer_tokens", "token_classes", "first_answer_token"):
            assert torch.equal(getattr(kept, field), getattr(prompts, field)[index])
        for field in ("queries", "demonstrations", "texts"):
            assert getattr(kept, field) == tuple(getattr(prompts, field)[i] for i in index)
        assert (kept.relation, kept.labels, kept.template) == (prompts.relation, prompts.labels, prompts.template)
    assert len(prompts) == 6


def test_select_refuses_wrong_flags_and_an_empty_choice(model, generator):
    prompts = build_prompts(model, UNEVEN, n_shots=1, generator=generator)
    with pytest.raises(ValueError, match=r"select: expected 6 flags, one a prompt, got shape \(4,\)"):
        prompts.select(torch.ones(4, dtype=torch.bool))
    for empty in (torch.zeros(6, dtype=torch.bool), []):
        with pytest.raises(ValueError, match="select: expected at least one prompt to keep, got none"):
            prompts.select(empty)


def test_the_data_hash_tells_prompts_apart(model):
    pairs = [Pair("hot", "cold"), Pair("big", "small"), Pair("early", "late")]

    def made(queries=((pairs[0]),), shown=((pairs[1],),), **options):
        return render_prompts(model, list(queries), [list(d) for d in shown], n_shots=1, **options)

    base = made()
    assert base.data_hash == hashlib.sha256(b"Q: big\nA: small\n\nQ: hot\nA:\x1ecold").hexdigest()[:16]
    others = [
        made(queries=[Pair("hot", "warm")]),  # another answer
        made(queries=[Pair("icy", "cold")]),  # another query
        made(shown=[[pairs[2]]]),  # another demonstration
        made(template="arrow"),
        made(queries=[pairs[0], pairs[2]], shown=[[pairs[1]]] * 2),
        made(queries=[pairs[2], pairs[0]], shown=[[pairs[1]]] * 2),  # another order
    ]
    hashes = [base.data_hash, *(prompts.data_hash for prompts in others)]
    assert len(set(hashes)) == len(hashes)
    assert others[-1].select([1]).data_hash == base.data_hash


# The filter set


def right_answers(hugging_face, bare, prompts):
    """Top-1 word of each prompt by the plain Hugging Face model, one prompt at a time."""
    with torch.inference_mode():
        return [bare.decode([int(hugging_face(torch.tensor([row])).logits[0, -1].argmax())]) for row in rows(prompts)]


@pytest.mark.parametrize("batch_size", [64, 7])
def test_filter_correct_keeps_what_the_hugging_face_model_answers(model, bare, batch_size):
    hugging_face = AutoModelForCausalLM.from_pretrained(embedded_folder(), local_files_only=True).eval()
    demonstrations, queries = ANTONYMS[:30], ANTONYMS[30:60]
    prompts = build_prompts(model, demonstrations, queries=queries, n_shots=3, generator=seeded())
    said = right_answers(hugging_face, bare, prompts)
    words = [word.strip() if len(ids_of(bare, word)) == 1 and word.startswith(" ") else None for word in said]
    # every second query gets the model's own answer, the others a wrong one
    pairs = [
        Pair(query.input, word) if word and i % 2 else Pair(query.input, "zebra" if word != "zebra" else "lion")
        for i, (query, word) in enumerate(zip(queries, words, strict=True))
    ]
    expected = tuple(pair for pair, word in zip(pairs, words, strict=True) if pair.output == word)
    assert 0 < len(expected) < len(pairs)
    kept = filter_correct(
        model, pairs, demonstrations=demonstrations, n_shots=3, batch_size=batch_size, generator=seeded()
    )
    assert kept == expected


def test_filter_correct_draws_from_the_pairs_themselves_and_warns_if_nothing_is_left(model):
    pairs = [Pair(x, "qqqq") for x, _ in ANTONYMS[:8]]
    with pytest.warns(UserWarning, match="filter_correct: the model answers none of the queries correctly"):
        assert filter_correct(model, pairs, n_shots=0, generator=seeded()) == ()
    with pytest.raises(ValueError, match=r"8 demonstrations wanted .* but only 7"):
        filter_correct(model, pairs, n_shots=8, generator=seeded())


# Errors


@pytest.mark.parametrize(
    ("demonstration", "query", "message"),
    [
        ("{input}\n", "{input}:", r"template 'bad': expected \{output\} exactly once in demonstration"),
        ("{output}\n", "{input}:", r"template 'bad': expected \{input\} exactly once in demonstration"),
        ("{input}{input}{output}", "{input}:", r"expected \{input\} exactly once in demonstration, got '\{input\}\{in"),
        ("{input}:{output}\n", "Q:", r"template 'bad': expected \{input\} exactly once in query, got 'Q:'"),
        ("{input}:{output}\n", "{input}:{output}", "template 'bad': the query must end before the answer"),
    ],
)
def test_a_template_must_place_both_words_once(demonstration, query, message):
    with pytest.raises(ValueError, match=message):
        Template("bad", demonstration, query)


def test_templates_go_by_name_or_as_they_are(model, generator):
    own = Template("own", "{input} =>{output}.", "{input} =>")
    assert get_template("qa") is TEMPLATES["qa"]
    assert get_template(own) is own
    with pytest.raises(
        ValueError, match="no template named 'prose'; expected one of qa, arrow, colon, chat, or a Temp"
    ):
        build_prompts(model, SMALL, template="prose", n_shots=1, generator=generator)


def test_unknown_labels(model, generator, unchecked):
    with pytest.raises(ValueError, match="labels='shuffled'; expected one of true, permuted, deranged, random"):
        build_prompts(model, SMALL, labels="shuffled", n_shots=1, generator=generator)


@pytest.mark.parametrize(("n_shots", "n_prompts"), [(-1, 5), (2, 0), (2, -3)])
def test_counts_out_of_range(model, generator, n_shots, n_prompts):
    with pytest.raises(ValueError, match=f"n_shots >= 0 and n_prompts >= 1, got {n_shots} and {n_prompts}"):
        build_prompts(model, SMALL, n_shots=n_shots, n_prompts=n_prompts, generator=generator)


def test_no_queries_and_too_few_pairs(model, generator):
    with pytest.raises(ValueError, match="build_prompts: queries: expected at least one pair, got none"):
        build_prompts(model, SMALL, queries=[], n_shots=1, generator=generator)
    with pytest.raises(ValueError, match="4 demonstrations wanted for query 'x0', but only 3 pairs have another input"):
        build_prompts(model, SMALL, n_shots=4, generator=generator)


def test_an_empty_pool(model, generator):
    with pytest.raises(ValueError, match="labels='random' needs a pool of answers, got an empty one"):
        build_prompts(model, SMALL, n_shots=1, labels="random", pool=[], generator=generator)


def test_an_impossible_derangement(model, generator):
    with pytest.raises(ValueError, match=r"labels='deranged' is impossible: one label stands in 1 of 1 .*permuted"):
        build_prompts(model, SMALL, n_shots=1, labels="deranged", generator=generator)


def test_a_model_without_a_usable_tokenizer(generator):
    with pytest.raises(ValueError, match=r"the model has no tokenizer; put its tokenizer.s files"):
        build_prompts(stand_in(None), SMALL, n_shots=1, generator=generator)
    slow = SimpleNamespace(is_fast=False, bos_token_id=0)
    with pytest.raises(ValueError, match=r"expected a fast tokenizer \(with character offsets\), got SimpleNamespace"):
        build_prompts(stand_in(slow), SMALL, n_shots=1, generator=generator)


def test_a_prompt_longer_than_the_context(model, generator):
    # BOS, 8 tokens a demonstration, 6 of the query, 1 of the answer
    fits = build_prompts(stand_in(model.tokenizer, n_ctx=24), ANTONYMS, n_prompts=3, n_shots=2, generator=generator)
    assert fits.tokens.shape[1] == 23
    expected = r"a prompt with its answer is 24 tokens long, but the model's context holds 23; use fewer shots .got 2."
    with pytest.raises(ValueError, match=expected):
        build_prompts(stand_in(model.tokenizer, n_ctx=23), ANTONYMS, n_prompts=3, n_shots=2, generator=generator)


def test_of_two_equal_logits_only_the_smaller_id_passes_the_filter(tied):
    pairs = [Pair("hot", "cold"), Pair("big", "small"), Pair("icy", "cold")]
    assert filter_correct(tied, pairs, n_shots=1, generator=seeded()) == (pairs[0], pairs[2])


# Templates as values


def test_a_template_survives_json_and_shows_its_name(tmp_path):
    own = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs {x}:\n")
    for template in (own, *TEMPLATES.values()):
        text = json.dumps(template.to_json())
        assert Template.from_json(json.loads(text)) == template
        path = tmp_path / "template.json"
        path.write_text(text, encoding="utf-8")
        assert read_template(path) == template
        assert str(template) == f"{template}" == template.name
    short = {key: text for key, text in TEMPLATES["qa"].to_json().items() if key not in ("prefix", "bos")}
    assert Template.from_json(short) == TEMPLATES["qa"]


def test_a_bare_query_is_the_text_of_a_zero_shot_prompt(model):
    own = Template("mine", "{input} is to{output};\n", "<{x}>{input} is to", prefix="Pairs {x}:\n")
    for template in (own, *TEMPLATES.values()):
        prompts = build_prompts(model, [Pair("hot", "cold")], n_shots=0, template=template, generator=seeded())
        assert prompts.texts == (template.bare("hot"),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["qa"], r'expected a template as an object with name, demonstration, query, prefix, .*, got \["qa"\]'),
        ("qa", 'expected a template as an object .* got "qa"'),
        ({"name": "a", "query": "{input}"}, "expected a template as an object"),
        ({**TEMPLATES["qa"].to_json(), "suffix": ""}, "expected a template as an object"),
        ({**TEMPLATES["qa"].to_json(), "query": 3}, "template: expected query as text, got 3"),
        ({**TEMPLATES["qa"].to_json(), "name": " "}, "template: expected a name, got ' '"),
        ({**TEMPLATES["qa"].to_json(), "query": "Q:"}, "template 'qa': expected {input} exactly once in query"),
    ],
)
def test_what_is_no_template_is_refused(value, message, tmp_path, unchecked):
    with pytest.raises(ValueError, match=message):
        Template.from_json(value)
    path = tmp_path / "template.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ValueError, match="^template.json: " + message):
        read_template(path)


def test_a_file_that_holds_no_template_is_refused(tmp_path):
    path = tmp_path / "template.json"
    with pytest.raises(ValueError, match=r"no template at .*template\.json\."):
        read_template(path)
    path.write_text("{not json", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^template\.json: not a JSON file, .*Expecting property name"):
        read_template(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^template\.json: not a JSON file"):
        read_template(path)


def test_the_first_template_that_is_given_is_taken():
    assert template_or() == template_or(None, "") == TEMPLATES["qa"]
    assert template_or(None, "", "arrow", "colon") == TEMPLATES["arrow"]
    with pytest.raises(ValueError, match="no template named 'mine'"):
        template_or(None, "mine")
