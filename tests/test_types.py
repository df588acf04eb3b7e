"""Heads and the two protocols."""

import pytest
import torch

from fvlens.types import Head, HookedModel, Steering, as_heads


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
