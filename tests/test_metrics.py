"""Scores against numpy, scipy and brute force; properties of the bootstrap; every error message."""

import math
import re
import string
from collections import Counter

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlens.metrics import (
    Interval,
    _intervals,
    best_token,
    best_tokens,
    bootstrap_interval,
    exact_match,
    is_best,
    log_probability,
    paired_difference,
    probability,
    rank,
    spearman,
    token_f1,
    top_k_accuracy,
    top_k_overlap,
)

# Probability, rank


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 1, 3)])
def test_probability_and_log_probability_are_scipys_softmax(generator, shape):
    logits = 8 * torch.randn(*shape, 37, generator=generator)
    tokens = torch.randint(37, shape, generator=generator)
    expected = scipy.special.log_softmax(logits.double().numpy(), axis=-1)
    expected = np.take_along_axis(expected, tokens.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probability(logits, tokens).numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(probability(logits, tokens).numpy(), np.exp(expected), rtol=1e-4, atol=1e-7)


def test_probabilities_of_all_tokens_sum_to_one(generator):
    logits = 5 * torch.randn(1, 50, generator=generator)
    every = torch.arange(50)
    assert probability(logits.expand(50, 50), every).sum().item() == pytest.approx(1, abs=1e-5)


def test_log_probability_survives_where_the_probability_underflows():
    logits = torch.tensor([[0.0, -1000.0], [1e4, 1e4]])
    assert log_probability(logits, torch.tensor([1, 0])).tolist() == [-1000.0, pytest.approx(-math.log(2), abs=1e-3)]


def test_adding_a_constant_to_the_logits_changes_nothing(generator):
    logits, tokens = torch.randn(5, 9, generator=generator).double(), torch.arange(5)
    torch.testing.assert_close(log_probability(logits + 123.0, tokens), log_probability(logits, tokens))
    assert torch.equal(rank(logits + 123.0, tokens), rank(logits, tokens))


def test_half_precision_logits_are_summed_in_float32(generator):
    logits = torch.zeros(2, 5000, dtype=torch.bfloat16)
    result = probability(logits, torch.tensor([0, 4999]))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), 1 / 5000, rtol=1e-6)


def test_log_probability_has_the_gradient_of_cross_entropy(generator):
    logits = torch.randn(4, 7, generator=generator, requires_grad=True)
    tokens = torch.tensor([0, 6, 3, 3])
    (ours,) = torch.autograd.grad(-log_probability(logits, tokens).sum(), logits)
    one_hot = np.eye(7)[tokens.numpy()]
    np.testing.assert_allclose(ours.numpy(), scipy.special.softmax(logits.detach().numpy(), -1) - one_hot, atol=1e-6)


def test_rank_is_a_brute_force_count(generator):
    logits = torch.randint(0, 5, (3, 4, 12), generator=generator).float()  # many ties
    tokens = torch.randint(12, (3, 4), generator=generator)
    for i in range(3):
        for j in range(4):
            row, token = logits[i, j].tolist(), int(tokens[i, j])
            larger = sum(value > row[token] for value in row)
            earlier = sum(value == row[token] for value in row[:token])
            assert rank(logits, tokens)[i, j].item() == larger + earlier


def test_rank_zero_is_argmax_where_there_are_no_ties(generator):
    logits = torch.randn(200, 11, generator=generator)
    tokens = torch.randint(11, (200,), generator=generator)
    assert torch.equal(rank(logits, tokens) == 0, logits.argmax(-1) == tokens)


# among them 1.001, which is 1 in bfloat16, and zeros of both signs, which are equal
few_values = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1e-8, 1.0, 1.001, 60000.0, math.inf])


@settings(deadline=None, max_examples=200)
@given(
    logits=st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(few_values, min_size=width, max_size=width), min_size=1, max_size=4)
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_all_that_judges_reads_one_order(logits, dtype):
    """The order is Python's stable sort by falling logit, of the numbers as the type holds them."""
    logits = torch.tensor(logits).to(dtype)
    n_rows, width = logits.shape
    orders = [sorted(range(width), key=lambda token: (-row[token], token)) for row in logits.double().tolist()]
    assert best_token(logits).tolist() == [order[0] for order in orders]
    for k in {1, width}:
        assert best_tokens(logits, k).tolist() == [order[:k] for order in orders]
    for token in range(width):
        asked = torch.full((n_rows,), token)
        places = [order.index(token) for order in orders]
        assert rank(logits, asked).tolist() == places
        assert is_best(logits, asked).tolist() == [place == 0 for place in places]


@pytest.mark.parametrize("width", [1000, 50257])  # long rows are reduced in pieces
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_first_of_many_equal_tokens_is_best_in_long_rows(generator, width, dtype):
    logits = torch.randint(0, 3, (8, width), generator=generator).to(dtype)
    expected = torch.from_numpy((logits == 2).numpy().argmax(axis=-1))  # numpy gives the first
    assert torch.equal(best_token(logits), expected)
    assert torch.equal(rank(logits, expected), torch.zeros(8, dtype=torch.int64))
    assert rank(logits[:1], torch.tensor([width - 1])).item() == sum(
        value > logits[0, -1] or (value == logits[0, -1] and i < width - 1) for i, value in enumerate(logits[0])
    )


def test_a_single_row_has_a_best_token_without_an_axis():
    assert best_token(torch.tensor([0.0, 2.0, 2.0])).shape == ()
    assert int(best_token(torch.tensor([0.0, 2.0, 2.0]))) == 1


def test_no_rows_have_no_best_token():
    assert best_token(torch.zeros(0, 7)).tolist() == []


def test_nan_is_refused_or_never_right():
    logits = torch.tensor([[0.0, math.nan, 1.0], [3.0, 0.0, 0.0], [math.nan, math.nan, math.nan]])
    with pytest.raises(ValueError, match="best_token: expected logits without NaN, got 4 NaN of 9; check the model"):
        best_token(logits)
    with pytest.raises(ValueError, match="best_tokens: expected logits without NaN, got 4 NaN of 9"):
        best_tokens(logits, 2)
    for token in (0, 1, 2, 3, -1):  # the last two are no tokens
        assert is_best(logits, torch.full((3,), token)).tolist() == [False, token == 0, False]


def test_best_tokens_refuses_more_than_there_are_and_an_empty_vocabulary_has_none():
    for k in (0, 8):
        with pytest.raises(ValueError, match=re.escape(f"best_tokens: expected k in 1..7 (the vocabulary), got {k}")):
            best_tokens(torch.zeros(2, 7), k)
    with pytest.raises(ValueError, match="best_token: expected a vocabulary of at least 1 token, got 0"):
        best_token(torch.zeros(2, 0))


@pytest.mark.parametrize("bad, shown", [(-1, "got -1"), (7, "got 7")])
@pytest.mark.parametrize("function", [probability, log_probability, rank])
def test_token_ids_outside_the_vocabulary_are_refused(function, bad, shown):
    with pytest.raises(ValueError, match=re.escape("expected token ids in 0..6, " + shown)):
        function(torch.zeros(2, 7), torch.tensor([0, bad]))


def test_no_prompts_give_no_scores():
    assert probability(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_rank_refuses_nan():
    with pytest.raises(ValueError, match="rank: expected logits without NaN, got 2 NaN of 6; check the model"):
        rank(torch.tensor([[0.0, math.nan, 1.0], [math.nan, 0.0, 0.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_top_k_accuracy_counts_the_answers_in_the_sorted_list(generator, k):
    logits = torch.randn(60, 30, generator=generator)
    tokens = torch.randint(30, (60,), generator=generator)
    hits = [int(t) in np.argsort(-row.numpy())[:k] for row, t in zip(logits, tokens, strict=True)]
    assert top_k_accuracy(rank(logits, tokens), k) == pytest.approx(np.mean(hits))


def test_top_k_accuracy_refuses_nothing_and_k_zero():
    with pytest.raises(ValueError, match="top_k_accuracy: expected at least 1 rank, got 0"):
        top_k_accuracy(torch.zeros(0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="top_k_accuracy: expected k of at least 1, got 0"):
        top_k_accuracy(torch.tensor([0, 1]), 0)


# Bootstrap


def test_bootstrap_agrees_with_scipys_percentile_bootstrap(generator):
    values = torch.randn(40, generator=generator) ** 2
    ours = bootstrap_interval(values, n_resamples=20_000, generator=generator)
    theirs = scipy.stats.bootstrap(
        (values.double().numpy(),), np.mean, confidence_level=0.95, n_resamples=20_000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert ours.level == 0.95


def test_bootstrap_of_two_values_has_the_exact_binomial_quantiles(generator):
    # The mean of n draws from {0, 1} with equal odds is Binomial(n, 1/2) / n.
    n = 40
    interval = bootstrap_interval(torch.arange(n) % 2, level=0.9, n_resamples=20_000, generator=generator)
    low, high = scipy.stats.binom.ppf([0.05, 0.95], n, 0.5) / n
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_interval_covers_the_true_mean_at_its_level(level):
    # 400 samples of 60 exponential values (true mean 1). The percentile interval is known to cover a little too little.
    data = np.random.default_rng(7).exponential(size=(400, 60))
    draw = seeded(1)
    covered = 0
    for row in data:
        low, high, _ = bootstrap_interval(torch.from_numpy(row), level=level, n_resamples=400, generator=draw)
        covered += low <= 1 <= high
    error = math.sqrt(level * (1 - level) / 400)
    assert level - 0.03 - 3 * error < covered / 400 < level + 3 * error


def test_bootstrap_is_the_same_for_the_same_seed_and_leaves_the_global_state_alone():
    values = torch.randn(30, generator=seeded(3))
    before = torch.get_rng_state()
    first, second, other = (bootstrap_interval(values, generator=seeded(s)) for s in (5, 5, 6))
    assert first == second
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)
    used = seeded(5)
    bootstrap_interval(values, generator=used)
    assert bootstrap_interval(values, generator=used) != first  # the generator moved on


def test_bootstrap_does_not_depend_on_how_it_is_cut_into_chunks(monkeypatch):
    values = torch.randn(25, generator=seeded(3))
    whole = bootstrap_interval(values, n_resamples=500, generator=seeded(0))
    monkeypatch.setattr(_intervals, "_CHUNK", 25 * 64)
    cut = bootstrap_interval(values, n_resamples=500, generator=seeded(0))
    assert cut == whole


def test_bootstrap_moves_and_scales_with_the_values():
    values = torch.rand(50, generator=seeded(2)).double()
    base = bootstrap_interval(values, generator=seeded(0))
    moved = bootstrap_interval(3 * values + 10, generator=seeded(0))
    assert (moved.low, moved.high) == (pytest.approx(3 * base.low + 10), pytest.approx(3 * base.high + 10))
    assert base.low < values.mean().item() < base.high


def test_bootstrap_of_equal_values_is_that_value_and_flags_count_as_numbers():
    assert bootstrap_interval(torch.ones(9, dtype=torch.bool), generator=seeded(0)) == Interval(1.0, 1.0, 0.95)
    flags = torch.tensor([True, False, True, True])
    assert bootstrap_interval(flags, generator=seeded(0)) == bootstrap_interval(flags.float(), generator=seeded(0))


@pytest.mark.parametrize(
    "values, options, message",
    [
        (torch.zeros(0), {}, "expected at least 1 value, got 0"),
        (torch.tensor([1.0, math.nan, math.inf]), {}, "expected finite values, got 2 NaN or infinite of 3"),
        (torch.ones(3), {"level": 95.0}, "expected a level strictly between 0 and 1, got 95.0"),
        (torch.ones(3), {"level": 0.0}, "expected a level strictly between 0 and 1, got 0.0"),
        (torch.ones(3), {"n_resamples": 0}, "expected n_resamples of at least 1, got 0"),
    ],
)
def test_bootstrap_refuses(generator, values, options, message):
    with pytest.raises(ValueError, match=f"bootstrap_interval: {re.escape(message)}"):
        bootstrap_interval(values, generator=generator, **options)
    with pytest.raises(ValueError, match=f"paired_difference: {re.escape(message)}"):
        paired_difference(values, values, generator=generator, **options)


def test_paired_difference_is_the_bootstrap_of_the_differences():
    draw = np.random.default_rng(0)
    shared = 10 * draw.normal(size=80)  # what both have in common must cancel
    a, b = shared + draw.normal(size=80) * 0.1 + 0.5, shared + draw.normal(size=80) * 0.1
    result = paired_difference(torch.from_numpy(a), torch.from_numpy(b), generator=seeded(4))
    assert result.mean == pytest.approx(np.mean(a - b))
    assert result.interval == bootstrap_interval(torch.from_numpy(a - b), generator=seeded(4))
    assert 0.4 < result.interval.low < result.mean < result.interval.high < 0.6


def test_paired_difference_changes_sign_with_its_arguments():
    a, b = torch.tensor([True, True, False, True]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    forth, back = paired_difference(a, b, generator=seeded(0)), paired_difference(b, a, generator=seeded(0))
    assert forth.mean == 0.5 == -back.mean
    assert (forth.interval.low, forth.interval.high) == (
        pytest.approx(-back.interval.high), pytest.approx(-back.interval.low),
    )  # fmt: skip


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: paired_difference(a, b, generator=seeded(0)),
        spearman,
        lambda a, b: top_k_overlap(a, b, 1),
    ],
)
def test_two_lengths_are_refused(unchecked, call):
    with pytest.raises(ValueError, match=re.escape("expected two tensors of one length, got (4,) and (1,); give")):
        call(torch.arange(4.0), torch.zeros(1))


# Rankings

values = st.lists(st.integers(-3, 3), min_size=2, max_size=20)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_spearman_is_scipys_with_many_ties(data):
    a = data.draw(values)
    b = data.draw(st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
    if len(set(a)) == 1 or len(set(b)) == 1:
        return
    expected = scipy.stats.spearmanr(a, b).statistic
    assert spearman(torch.tensor(a), torch.tensor(b).float()) == pytest.approx(expected, abs=1e-9)


def test_spearman_sees_only_the_order(generator):
    a, b = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    assert spearman(a, b) == pytest.approx(spearman(a.exp(), b**3))
    assert spearman(a, b) == pytest.approx(-spearman(-a, b)) == pytest.approx(spearman(b, a))
    assert spearman(a, a.exp()) == 1.0
    assert spearman(a, -a) == -1.0


@pytest.mark.parametrize(
    "a, b, message",
    [
        ([1.0], [2.0], "spearman: expected at least 2 values, got 1"),
        ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0], "spearman: expected values without NaN, got 1 NaN of 3 in a"),
        ([1.0, 2.0], [5.0, 5.0], "spearman: expected values that differ, got 2 equal values in b"),
    ],
)
def test_spearman_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        spearman(torch.tensor(a), torch.tensor(b))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_top_k_overlap_is_a_brute_force_count(data):
    a = data.draw(values)
    b = data.draw(st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
    k = data.draw(st.integers(1, len(a)))
    best = [set(sorted(range(len(a)), key=lambda i, s=scores: (-s[i], i))[:k]) for scores in (a, b)]
    expected = sum(i in best[1] for i in best[0]) / k
    assert top_k_overlap(torch.tensor(a), torch.tensor(b), k) == pytest.approx(expected)


def test_top_k_overlap_at_its_ends():
    a = torch.arange(6.0)
    assert top_k_overlap(a, -a, 3) == 0.0
    assert top_k_overlap(a, -a, 6) == 1.0
    assert top_k_overlap(a, a**3, 2) == 1.0


def test_top_k_overlap_refuses():
    a = torch.arange(4.0)
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"top_k_overlap: expected k in 1\.\.4 \(the number of values\), got {k}"):
            top_k_overlap(a, a, k)
    with pytest.raises(ValueError, match="top_k_overlap: expected values without NaN, got 1 NaN of 2 in b"):
        top_k_overlap(torch.ones(2), torch.tensor([math.nan, 1.0]), 1)


# Whole answers


def squad_normalise(text):
    """SQuAD's rules, written out with regular expressions."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(predicted, expected):
    """F1 from precision and recall over matched words, one by one."""
    p, e = squad_normalise(predicted).split(), squad_normalise(expected).split()
    left, shared = Counter(e), 0
    for word in p:
        if left[word] > 0:
            left[word] -= 1
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(p), shared / len(e)
    return 2 * precision * recall / (precision + recall)


answers = st.lists(st.sampled_from(["the", "a", "New", "York.", "big-city", "don't"]), max_size=5).map("  ".join)


@settings(deadline=None, max_examples=100)
@given(answers, answers)
def test_whole_answer_scores_follow_squad(predicted, expected):
    predicted, expected = f" x {predicted}\n", f"X, {expected}"  # never empty after normalisation
    assert exact_match(predicted, expected) == (squad_normalise(predicted) == squad_normalise(expected))
    assert token_f1(predicted, expected) == pytest.approx(squad_f1(predicted, expected))
    assert token_f1(predicted, expected) == pytest.approx(token_f1(expected, predicted))


@pytest.mark.parametrize(
    "predicted, expected, match, f1",
    [
        (" Paris", "paris", True, 1.0),
        ("new   york\n", " New York", True, 1.0),
        ("Paris", "Rome", False, 0.0),
        ("to to be", "to be be", False, 2 / 3),
        ("a", "a", True, 1.0),  # an answer made of articles alone keeps them
        (" A", "a", True, 1.0),
        ("a", "the", False, 0.0),
        ("a", "b", False, 0.0),
        ("!", "?", False, 0.0),
        ("", "", True, 1.0),
        ("", "Rome", False, 0.0),
    ],
)
def test_whole_answer_scores_of_chosen_answers(predicted, expected, match, f1):
    assert exact_match(predicted, expected) is match
    assert token_f1(predicted, expected) == pytest.approx(f1)
