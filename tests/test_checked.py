"""The checker that the tests run under: it checks, and its checks are made once a signature."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import checked
import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

jaxtyped = partial(checked.jaxtyped, typechecker=beartype)  # as the import hook decorates


def doubled(shape, kind=Tensor):
    """A function inside a function, decorated at every call of this one."""

    @jaxtyped
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


def test_axes_of_one_name_are_of_one_size_in_a_call_and_in_no_other():
    @jaxtyped
    def outer(x: Float[Tensor, "a b"], *more: Float[Tensor, " a"], last: Float[Tensor, " b"]) -> Float[Tensor, "b a"]:
        inner(torch.ones(7))  # a scope of its own
        return x if last[0] else x.T

    @jaxtyped
    def inner(x: Float[Tensor, " a"]) -> None:
        pass

    x = torch.ones(2, 3)
    assert outer(x, torch.ones(2), last=torch.zeros(3)).shape == (3, 2)
    assert outer(torch.ones(4, 4), last=torch.ones(4)).shape == (4, 4)
    for more, last in (((), torch.zeros(2)), ((torch.ones(2), torch.ones(3)), torch.zeros(3))):
        with pytest.raises(TypeCheckError, match=r"whilst checking the parameters of .*outer"):
            outer(x, *more, last=last)
    with pytest.raises(TypeCheckError, match=r"whilst checking the return value of .*outer"):
        outer(x, last=torch.ones(3))


def test_methods_properties_and_dataclasses_are_checked():
    @jaxtyped
    @dataclass
    class Value:
        x: Float[Tensor, " n"]
        y: Float[Tensor, " n"]
        other: "Value | None" = None

        @jaxtyped
        def times(self, factor: float, /) -> "Value":
            return Value(factor * self.x, self.y)

        @classmethod
        @jaxtyped
        def of(cls, n: int) -> None:
            return n

        @property
        @jaxtyped
        def first(self) -> float:
            return self.x[0]

    value = Value(torch.ones(2), torch.ones(2))
    assert value.times(2.0).x.tolist() == [2.0, 2.0]
    for call, what in (
        (lambda: Value(torch.ones(2), torch.ones(3)), "parameters of .*Value.__init__"),
        (lambda: value.times("2"), "parameters of .*Value.times"),
        (lambda: Value.of("2"), "parameters of .*Value.of"),
        (lambda: Value.of(2), "return value of .*Value.of"),
        (lambda: value.first, "return value of .*Value.first"),
    ):
        with pytest.raises(TypeCheckError, match=f"whilst checking the {what}"):
            call()
    for call in (value.times, lambda: value.times(factor=2.0), lambda: value.times(1.0, 2.0)):
        with pytest.raises(TypeError, match=r"Value\.times\(\)"):  # Python's own word for a call that does not fit
            call()


def test_generators_run_when_they_are_asked():
    begun = []

    @jaxtyped
    def numbers(n: int) -> Iterator[int]:
        begun.append(n)
        yield from range(n)

    made = numbers(2)
    assert begun == [] and list(made) == [0, 1] and begun == [2]
    with pytest.raises(TypeCheckError, match=r"whilst checking the parameters of .*numbers"):
        numbers("2")


def test_checks_can_be_switched_off(unchecked):
    assert doubled("3")(torch.ones(4), n=0.5).tolist() == [0.5] * 4


def test_a_signature_is_checked_by_one_pair_of_checks(monkeypatch):
    made = []
    monkeypatch.setattr(checked, "_made", {})
    checking = partial(checked.jaxtyped, typechecker=lambda function: made.append(function) or beartype(function))
    monkeypatch.setitem(globals(), "jaxtyped", checking)
    for _ in range(3):
        doubled("5")(torch.ones(5))
    assert len(made) == 2  # of the parameters, and of the result
    doubled("6")
    assert len(made) == 4


def test_annotations_without_a_hash_are_checked_all_the_same():
    @jaxtyped
    def first(n: Annotated[int, {"a": 1}]) -> int:
        return n

    assert first(1) == 1
    with pytest.raises(TypeCheckError, match=r"whilst checking the parameters of .*first"):
        first("1")


def test_the_package_is_checked():
    from fvlens.metrics import top_k_accuracy
    from fvlens.relations import Relation

    assert jaxtyping.jaxtyped is checked.jaxtyped
    with pytest.raises(TypeCheckError, match="top_k_accuracy"):
        top_k_accuracy(torch.ones(3), 1)  # integers are wanted
    with pytest.raises(TypeCheckError, match=r"Relation\.__init__"):
        Relation(name=3, pairs=())
