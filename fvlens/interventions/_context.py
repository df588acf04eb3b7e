"""Temporary changes of a model that belong to the thread and task that made them.

A model is shared: what one thread hangs on it, all threads run through. So nothing is hung on it for a time. A context
variable holds the blocks that are open here; two kinds of passive parts look there and do nothing else:

*Dispatchers* are torch hooks, one at each hook point that was ever used. They stay, so that opening and closing a block
changes no table of hooks that another thread's forward may be walking through. Only where somebody else's hooks sit
at the same point are they moved, to keep the order of opening.

*Stand-ins* take the place of a method of one object (``forward``, ``generate``) while any block anywhere needs it. They
are put in and taken out under a lock; to look a method up is one step, so no thread can see half of it.

A block that ends is emptied. That holds wherever its generator is closed, in another thread or by the collector, and
for tasks that inherited it.
"""

import contextlib
import contextvars
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fvlens.interventions._bridges import part_threads
from fvlens.types import is_bridge

Function = Callable[[Tensor], Tensor | None]
"""What is called on an activation; what it returns, if anything, replaces it."""

Method = Callable[..., Any]
"""What is called instead of a method: ``(method, *arguments)``."""


class _Block:
    """What one open block does: dispatcher or stand-in -> its functions, in order. Empty once it has ended."""

    __slots__ = ("functions",)

    def __init__(self) -> None:
        self.functions: dict[Any, tuple[Callable[..., Any], ...]] = {}


_open_blocks: contextvars.ContextVar[tuple[_Block, ...]] = contextvars.ContextVar("fvlens_open_blocks", default=())

# Held for a few steps of our own and never while a caller's code runs. Reentrant, as the collector may close an
# abandoned block in any of these steps.
lock = threading.RLock()


class _Dispatcher:
    """A torch forward hook that calls the functions of the blocks that are open in this context."""

    def __init__(self) -> None:
        self.users: set[_Block] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Dispatcher, ()  # in a copy of the model nothing is open

    def __call__(self, point: Any, args: Any, output: Any) -> Any:
        result = None
        for block in _open_blocks.get():
            for function in block.functions.get(self, ()):
                conversion = point.hook_conversion  # a bridge's activation -> TransformerLens' shape, and back
                new = function(output if conversion is None else conversion.convert(output))
                if new is not None:
                    result = output = new if conversion is None else conversion.revert(new)
        return result


class _StandIn:
    """A method of one object that passes through whatever blocks open in this context put around it."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.users: set[_Block] = set()
        self.was_own = name in owner.__dict__
        self.method = getattr(owner, name)

    def put_in(self) -> None:
        self.owner.__dict__[self.name] = self

    def take_out(self) -> None:
        """Put the method back, unless somebody else has replaced it since."""
        if self.owner.__dict__.get(self.name) is self:
            if self.was_own:
                self.owner.__dict__[self.name] = self.method
            else:
                del self.owner.__dict__[self.name]

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the owner gets its own method back
        return (_same, (self.method,)) if self.was_own else (getattr, (self.owner, self.name))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self.method
        for block in _open_blocks.get():
            for function in block.functions.get(self, ()):
                method = functools.partial(function, method)
        return method(*args, **kwargs)


def _same(method: Any) -> Any:
    return method


_stand_ins: "weakref.WeakKeyDictionary[Any, dict[str, _StandIn]]" = weakref.WeakKeyDictionary()
"""Owner -> name -> the stand-in that is in place."""


@contextlib.contextmanager
def acting(
    points: Iterable[tuple[Any, Function]] = (), methods: Mapping[tuple[Any, str], Method] | None = None
) -> Iterator[None]:
    """Call functions at hook points and around methods, while the block is open, in this thread and task only.

    Args:
        points: pairs of a hook point and what is called on its activation.
        methods: ``(owner, name)`` -> what is called instead of that method: it gets the method (or what blocks that
            were opened before put around it), then the arguments.
    """
    block = _Block()
    functions: dict[Any, tuple[Callable[..., Any], ...]] = {}
    try:
        for point, function in points:
            dispatcher = _dispatcher(point, block)
            functions[dispatcher] = (*functions.get(dispatcher, ()), function)
        for (owner, name), method in (methods or {}).items():
            functions[_stand_in(owner, name, block)] = (method,)
        block.functions = functions
        _open_blocks.set((*_still_open(), block))
        yield
    finally:
        block.functions = {}
        _open_blocks.set(_still_open())  # of this context, which may be another one than the one it was opened in
        with lock:
            for part in functions:
                part.users.discard(block)
                if isinstance(part, _StandIn) and not part.users:
                    part.take_out()
                    _stand_ins.get(part.owner, {}).pop(part.name, None)


def _still_open() -> tuple[_Block, ...]:
    return tuple(block for block in _open_blocks.get() if block.functions)


def _dispatcher(point: Any, block: _Block) -> _Dispatcher:
    """The dispatcher that runs behind all hooks which sit on this point by now, with ``block`` as its user."""
    with lock:
        hooks = point._forward_hooks
        present = list(hooks.items())
        if present and isinstance(present[-1][1], _Dispatcher):
            last = present[-1][1]
            last.users.add(block)
            return last
        # somebody else's hooks sit behind ours, or there is none of ours
        idle = [(key, hook) for key, hook in present if isinstance(hook, _Dispatcher) and not hook.users]
        for key, _ in idle[1:]:
            hooks.pop(key, None)
        if idle:
            key, last = idle[0]
            last.users.add(block)
            hooks.move_to_end(key)
            return last
        last = _Dispatcher()
        last.users.add(block)
        point.register_forward_hook(last)
        return last


def _stand_in(owner: Any, name: str, block: _Block) -> _StandIn:
    """The stand-in for a method, in place, with ``block`` as its user."""
    with lock:
        own = _stand_ins.setdefault(owner, {})
        part = own.get(name) or _StandIn(owner, name)
        part.users.add(block)
        if own.get(name) is not part:
            own[name] = part
            part.put_in()
        return part


def hooked(model: Any, functions: Mapping[str, Function]) -> contextlib.AbstractContextManager[None]:
    """Call a function on each named activation, while the block is open; what it returns, if anything, replaces it.

    Only forwards of the thread and task that opened it are concerned. Unlike the models' own ``hooks``, it treats both
    kinds of model alike, and a name that a model has not is an error.

    Raises:
        KeyError: the model has no hook of that name.
    """
    return acting(points_of(model, functions))


def points_of(model: Any, functions: Mapping[str, Function]) -> list[tuple[Any, Function]]:
    """Each named hook point with its function."""
    if not functions:
        return []
    points = model.hook_dict
    if is_bridge(model):
        part_threads(model)
        for name in functions:
            if name.endswith(_ASKED):
                _show(points[name])
    return [(points[name], function) for name, function in functions.items()]


_ASKED = (".hook_scale", ".hook_normalized", ".hook_attn_out", ".hook_mlp_out")
"""Points that a TransformerBridge asks for hooks before it runs them, or runs them with gradients."""


def _show(point: Any) -> None:
    """Let TransformerLens know of the dispatcher at a hook point; what it then does gives the same bits."""
    from transformer_lens.hook_points import LensHandle

    with lock:
        if any(isinstance(handle.hook, _Shown) for handle in point.fwd_hooks):
            return
        shown: Any = _Shown()
        point.fwd_hooks.append(LensHandle(shown, is_permanent=True))


class _Shown:
    """Stands in TransformerLens' list of hooks for a dispatcher, which is not there to be removed."""

    def remove(self) -> None:
        pass


def acts_on(model: Any) -> bool:
    """Whether anybody's hooks would act on a forward of this model in this context: own blocks, and hooks of others.

    What other threads have opened does not count, nor do dispatchers that wait.
    """
    blocks = _still_open()
    for point in model.hook_dict.values():
        if point.bwd_hooks or any(not isinstance(handle.hook, _Shown) for handle in point.fwd_hooks):
            return True
        if blocks and any(hook in block.functions for hook in list(point._forward_hooks.values()) for block in blocks):
            return True
    return False
