"""The checker of types and shapes, which makes the check of a signature once.

jaxtyping decorates functions inside functions too, so each call of the outer one would make the inner ones' checks
anew, in milliseconds, and most of a small run would be that. What jaxtyping hands over has no body of its own and
depends on the signature alone, so one check serves all of them.
"""

from beartype import beartype
from jaxtyping import AbstractArray

_made = {}


def _same(annotation):
    """What is equal for equal annotations; each ``Float[Tensor, "n"]`` is a class of its own."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return annotation.dtype, annotation.array_type, annotation.dim_str
    return annotation


def check(function):
    """The function with beartype's check of its arguments."""
    kinds = [(name, _same(annotation)) for name, annotation in function.__annotations__.items()]
    key = (function.__module__, function.__qualname__, function.__code__, *kinds)
    try:
        known = key in _made
    except TypeError:  # an annotation without a hash, as of the commands' options
        return beartype(function)
    if not known:
        _made[key] = beartype(function)
    return _made[key]
