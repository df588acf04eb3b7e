"""The checker that the tests run under: it checks, and it is made once a signature."""

from typing import Annotated

import checked
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor


def doubled(shape, kind=Tensor):
    """A function inside a function, as jaxtyping's hook decorates it: at every call of this one."""

    @jaxtyped(typechecker=checked.check)
    def inner(x: Float[kind, shape], n: int = 2) -> Float[kind, shape]:
        return x * n if n else x[1:]

    return inner


def test_shapes_and_types_are_checked_also_of_functions_that_are_made_again():
    three, four = doubled("3"), doubled("4")
    for inner, right, wrong in ((three, 3, 4), (four, 4, 3), (doubled("3"), 3, 4)):
        assert inner(torch.ones(right)).tolist() == [2.0] * right
        for call in (lambda: inner(torch.ones(wrong)), lambda: inner(torch.ones(right), n="2")):  # noqa: B023
            with pytest.raises(TypeCheckError, match=r"whilst checking the parameters of .*inner"):
                call()
        with pytest.raises(TypeCheckError, match=r"whilst checking the return value of .*inner"):
            inner(torch.ones(right), n=0)


def test_a_signature_is_checked_by_one_check(monkeypatch):
    made = []
    own = checked.beartype
    monkeypatch.setattr(checked, "beartype", lambda function: made.append(function) or own(function))
    monkeypatch.setattr(checked, "_made", {})
    for _ in range(3):
        doubled("5")(torch.ones(5))
    assert len(made) == 2  # of the parameters, and of parameters with the result
    doubled("6")
    assert len(made) == 4


def test_annotations_without_a_hash_are_checked_all_the_same():
    @jaxtyped(typechecker=checked.check)
    def first(n: Annotated[int, {"a": 1}]) -> int:
        return n

    assert first(1) == 1
    with pytest.raises(TypeCheckError, match=r"whilst checking the parameters of .*first"):
        first("1")


def test_the_package_is_checked():
    from fvlens.metrics import top_k_accuracy

    with pytest.raises(TypeCheckError, match="top_k_accuracy"):
        top_k_accuracy(torch.ones(3), 1)  # integers are wanted
