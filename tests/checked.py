"""The check of types and shapes, as jaxtyping makes it but at a small part of its cost.

jaxtyping's own wrapper binds every call to a signature, checks the arguments twice and makes all of that anew for a
function inside a function: between a third and a half of what a small run takes. Here arguments are checked once,
the result once, in the same scope of axes, and the two checks are made once a signature.
"""

import dataclasses
import functools
import inspect
import typing

import jaxtyping
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import AbstractArray, TypeCheckError

_jaxtyped = jaxtyping.jaxtyped
_SCOPE = _jaxtyped("context")  # of one call: the sizes of its axes
_made = {}


def install(package):
    """Check every function and dataclass of a package that is imported from now on."""
    jaxtyping.jaxtyped = jaxtyped  # what the hook puts before each of them
    jaxtyping.install_import_hook(package, "beartype.beartype")


def jaxtyped(fn=None, *, typechecker=None):
    """What ``jaxtyping.jaxtyped`` does to functions, methods, properties and dataclasses."""
    again = functools.partial(jaxtyped, typechecker=typechecker)
    if fn == "context":
        return _jaxtyped(fn)
    if fn is None:
        return again
    if isinstance(fn, type):
        own = vars(fn).get("__init__")
        if dataclasses.is_dataclass(fn) and own is not None and not hasattr(own, "is_checked"):
            fn.__init__ = again(own)
        return fn
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(again(fn.__func__))
    if isinstance(fn, property):
        return property(*(each and again(each) for each in (fn.fget, fn.fset, fn.fdel)))
    return _wrapped(fn, *_checks(fn, typechecker))


def _wrapped(fn, of_arguments, of_result):
    said = f"{fn.__module__}.{fn.__qualname__}"

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        with _SCOPE:
            if of_arguments is not None:
                try:
                    of_arguments(*args, **kwargs)
                except BeartypeCallHintViolation as error:
                    raise TypeCheckError(f"whilst checking the parameters of {said}: {error}") from error
            result = fn(*args, **kwargs)
            if of_result is not None:
                try:
                    of_result(result)
                except BeartypeCallHintViolation as error:
                    raise TypeCheckError(f"whilst checking the return value of {said}: {error}") from error
            return result

    wrapped.is_checked = True
    return wrapped


def _checks(fn, typechecker):
    """The checks of a function's arguments and of its result; None where nothing is said of them."""
    kinds = [(name, _same(annotation)) for name, annotation in fn.__annotations__.items()]
    key = (fn.__module__, fn.__qualname__, fn.__code__, *kinds)
    try:
        known = key in _made
    except TypeError:  # an annotation without a hash, as of the commands' options
        return _make(fn, typechecker)
    if not known:
        _made[key] = _make(fn, typechecker)
    return _made[key]


def _same(annotation):
    """What is equal for equal annotations; each ``Float[Tensor, "n"]`` is a class of its own."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return annotation.dtype, annotation.array_type, annotation.dim_str
    return annotation


def _make(fn, typechecker):
    hints = {name: _hint(annotation, fn.__globals__) for name, annotation in fn.__annotations__.items()}
    returned = {"return": hints.pop("return")} if "return" in hints else {}
    signature = inspect.signature(fn)
    plain = [
        one.replace(annotation=one.empty, default=one.default if one.default is one.empty else ...)
        for one in signature.parameters.values()
    ]
    arguments = signature.replace(parameters=plain, return_annotation=signature.empty)

    def check(signature, body, hints):
        scope = {}
        exec(f"def stand_in{signature}: {body}", scope)
        made = scope["stand_in"]
        made.__name__, made.__qualname__, made.__module__ = fn.__name__, fn.__qualname__, fn.__module__
        made.__annotations__ = hints
        if signature is arguments:
            made.__defaults__, made.__kwdefaults__ = fn.__defaults__, fn.__kwdefaults__
        return typechecker(made)

    return (
        check(arguments, "pass", hints) if hints else None,
        check("(result)", "return result", returned) if returned else None,
    )


def _hint(annotation, scope):
    """An annotation without quotes; anything where a name in it is not known at run time."""

    def holder(value: annotation):
        pass

    try:
        return typing.get_type_hints(holder, scope, include_extras=True)["value"]
    except Exception:
        return typing.Any
