"""Heads and the two protocols."""

import pytest
import torch

from fvlens.types import Head, HookedModel, Steering, as_flag, as_heads, as_number, as_text, as_texts, as_whole


def test_a_head_is_a_pair_with_a_short_name():
    head = Head(3, 11)
    assert head == (3, 11)
    assert str(head) == f"{head}" == "L3H11"
    layer, index = head
    assert (layer, index) == (head.layer, head.head)


def test_as_heads_takes_heads_tuples_and_lists_in_the_given_order():
    made = as_heads([(1, 0), Head(0, 3), [0, 1]], n_layers=2, n_heads=4)
    assert made == [Head(1, 0), Head(0, 3), Head(0, 1)]
    assert all(isinstance(head, Head) for head in made)
    assert as_heads(iter(made), 2, 4) == made
    assert as_heads([], 2, 4) == []


@pytest.mark.parametrize("entry", [(0,), (0, 1, 2), (0.0, 1), ("0", "1"), 3, None])
def test_as_heads_wants_pairs_of_integers(unchecked, entry):
    with pytest.raises(ValueError, match=r"heads: expected \(layer, head\) pairs of integers, got"):
        as_heads([entry], 2, 4)


def test_as_heads_given_one_bare_pair_says_what_is_expected(unchecked):
    with pytest.raises(ValueError, match=r"expected \(layer, head\) pairs of integers, got 0"):
        as_heads((0, 1), 2, 4)


@pytest.mark.parametrize("entry", [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_as_heads_knows_the_model(entry):
    with pytest.raises(ValueError, match=r"does not exist: the model has layers 0\.\.1 and heads 0\.\.3"):
        as_heads([entry], 2, 4)


def test_as_heads_refuses_a_head_given_twice():
    with pytest.raises(ValueError, match="L1H2 is listed twice; give each head once"):
        as_heads([(1, 2), (0, 0), Head(1, 2)], 2, 4)


def test_a_hooked_transformer_is_a_hooked_model(tiny):
    assert isinstance(tiny, HookedModel)
    assert not isinstance(torch.nn.Linear(2, 2), HookedModel)


def test_steering_is_known_by_its_two_methods():
    class Complete:
        def additions(self):
            return {}

        def check(self, model):
            return None

    class WithoutCheck:
        def additions(self):
            return {}

    assert isinstance(Complete(), Steering)
    assert not isinstance(WithoutCheck(), Steering)
    assert not isinstance(torch.zeros(3), Steering)


def test_numpy_integers_are_integers(unchecked):
    pairs = [tuple(row) for row in torch.tensor([[1, 2], [0, 3]]).numpy()]
    assert as_heads(pairs, 2, 4) == [Head(1, 2), Head(0, 3)]
    assert all(type(i) is int for head in as_heads(pairs, 2, 4) for i in head)


@pytest.mark.parametrize(
    "check, wrong, expected",
    [
        (as_flag, [0, 1, None, "true", 1.0], "expected true or false"),
        (as_whole, [True, 1.0, "1", None, float("nan")], "expected a whole number"),
        (as_number, [True, "1", None, float("nan"), float("inf"), 10**400], "expected a finite number"),
        (as_text, [1, None, True, ["a"], b"a"], "expected a text"),
        (as_texts, ["ab", None, {"a": 1}], "expected a list"),
    ],
)
def test_a_value_of_another_kind_is_refused_and_none_is_read_out_of_it(unchecked, check, wrong, expected):
    for value in wrong:
        with pytest.raises(ValueError, match=f"here: {expected}, got "):
            check(value, "here")


def test_values_of_the_right_kind_are_taken_as_they_are(unchecked):
    assert as_flag(True, "here") is True
    assert as_flag(False, "here") is False
    assert as_whole(3, "here", 1, 3) == 3
    assert as_number(2, "here") == 2.0
    assert (as_text("a", "here"), as_texts(["a", "b"], "here")) == ("a", ("a", "b"))
    for value, bounds, expected in ((0, (1,), "at least 1"), (4, (1, 3), "1..3")):
        with pytest.raises(ValueError, match=f"here: expected {expected}, got {value}"):
            as_whole(value, "here", *bounds)
