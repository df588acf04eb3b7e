"""The two ways to steer: :func:`inject` and :func:`ablate`."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.interventions._context import acting, points_of
from fvlens.interventions._generation import Positions, touched, watching
from fvlens.interventions._names import resid_hook, z_hook
from fvlens.types import HeadLike, Steering, as_heads, is_bridge

Replacement = Callable[[Tensor], Tensor]
"""The activation at the touched positions -> its replacement (a new tensor)."""

_RESIDUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@contextlib.contextmanager
def inject(
    model: Any, steering: Steering, *, scale: float | int = 1.0, every_new_token: bool = False, check: bool = True
) -> Iterator[Any]:
    """Add a steering's tensors to the activations at the last token of each prompt, while the block is open.

    ``x[-1] := x[-1] + scale * v`` for every hook ``x`` that the steering names: for a function vector the residual
    stream after its layer, for a distributed vector the own ``z`` of each selected head. Prompts must be left-padded;
    a batch that is padded on the right is refused. The sum is a new tensor; neither the activation nor the steering's
    tensors are written to. Gradients flow to the latter. Blocks may be nested: their additions add up.

    Only forwards of the thread and asyncio task that opened the block are steered, and of tasks created inside it.
    Whatever runs a forward in a thread of its own (``threading.Thread``, an executor) runs the plain model, unless it
    is given a copy of the context (``contextvars.copy_context().run``, ``asyncio.to_thread``).

    Args:
        model: the model.
        steering: what is added and where, such as a ``FunctionVector``. Its tensors are ``[d_model]`` at a residual
            hook and ``[head d_head]`` at ``hook_z``; with a leading batch axis each prompt gets its own. They are moved
            to the activation's device; the sum has its dtype.
        scale: factor on all additions.
        every_new_token: under ``model.generate``, steer each newly generated token too and not only the prompt's last.
            Outside ``generate`` it changes nothing.
        check: ask the steering whether it was made on this model.

    Yields:
        The model.

    Raises:
        ValueError: on entry: ``steering`` is not a Steering, names no hook, names one that the model has not or that
            cannot be steered, or has a tensor of the wrong shape; ``scale`` is not finite; ``steering.check(model)``
            refuses the model. In a forward: the batch axis of a tensor differs from the activation's; the batch is
            padded on the right.
        RuntimeError: the block ended without an exception, but a hook of the steering never ran.

    Example:
        >>> import torch, fvlens
        >>> from types import SimpleNamespace
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> ones = torch.ones(model.cfg.d_model)
        >>> steering = SimpleNamespace(additions=lambda: {resid_hook(1): ones}, check=lambda model: None)
        >>> tokens = torch.tensor([[0, 10, 11, 12]])
        >>> plain = model(tokens)
        >>> with inject(model, steering):
        ...     steered = model(tokens)
        >>> (steered != plain).any(dim=-1).tolist()
        [[False, False, False, True]]

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2 (function vector); arXiv:2606.05079 (distributed injection).
    """
    check_arguments(inject, locals())
    edits: dict[str, Replacement] = {}
    for name, value in checked_additions(model, steering, scale=scale, check=check).items():
        batched = value.ndim > len(_steerable_shape(model, name))
        # asked anew in every forward: what a module adds may be computed from its parameters, which training moves
        edits[name] = functools.partial(_add, name=name, values=steering.additions, scale=scale, batched=batched)
    with _edited(model, edits, "inject", "every_new" if every_new_token else "last"):
        yield model


def checked_additions(
    model: Any, steering: Steering, *, scale: float | int = 1.0, check: bool = True
) -> dict[str, Float[Tensor, "*axes"]]:
    """What a steering adds, hook name -> tensor, if it fits the model.

    Args:
        model: the model.
        steering: what is added and where.
        scale: factor on all additions; it is only looked at.
        check: ask the steering whether it was made on this model.

    Raises:
        ValueError: as for :func:`inject` on entry.
    """
    if not isinstance(steering, Steering):
        raise ValueError(
            f"inject: expected a Steering (an object with additions() and check(model), such as a FunctionVector), got "
            f"{type(steering).__name__}."
        )
    if not math.isfinite(scale):
        raise ValueError(f"inject: expected a finite scale, got {scale}.")
    if check:
        steering.check(model)
    additions = dict(steering.additions())
    if not additions:
        raise ValueError("inject: expected at least one tensor to add, but the steering's additions() are empty.")
    for name, value in additions.items():
        shape = _steerable_shape(model, name)
        if tuple(value.shape[-len(shape) :]) != shape or value.ndim > len(shape) + 1:
            raise ValueError(
                f"inject: the tensor for {name} has shape {list(value.shape)}; this model takes {list(shape)}, or that "
                "with a leading batch axis. Was it made on a model of another shape?"
            )
    return additions


@contextlib.contextmanager
def ablate(
    model: Any,
    heads: Iterable[HeadLike],
    *,
    value: Literal["zero"] | Float[Tensor, "layer head d_head"] = "zero",
    positions: Literal["last", "all"] = "last",
) -> Iterator[Any]:
    """Overwrite the mixed values ``z`` of some heads, while the block is open, for the thread and task that opened it.

    ``z[l, h] := 0`` or ``z[l, h] := value[l, h]``. The output bias ``b_O`` of the block stays, since it belongs to no
    head. Nothing is written in place. Gradients flow to ``value``. At one hook, edits run in the order in which they
    were opened: an ``inject`` into the same ``z`` adds to the ablated value if opened inside, and is overwritten if
    opened outside.

    Args:
        model: the model.
        heads: ``Head``s or ``(layer, head)`` pairs, at least one.
        value: ``"zero"``, or one value per head of the whole model, such as the ``z`` of mean head activations.
        positions: ``"last"``: the last token of each left-padded prompt (under ``model.generate`` the prompt's last
            token only). ``"all"``: every position of every forward, new tokens included.

    Yields:
        The model.

    Raises:
        ValueError: no heads, or heads that the model has not; an unknown ``value`` or one of the wrong shape; unknown
            ``positions``. In a forward with ``positions="last"``: the batch is padded on the right.
        RuntimeError: the block ended without an exception, but a hook of the ablation never ran.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> tokens = torch.tensor([[0, 10, 11, 12]])
        >>> with ablate(model, [(0, 1)]):
        ...     _, cache = model.run_with_cache(tokens)
        >>> (cache[z_hook(0)][0, :, 1] == 0).all(dim=-1).tolist()
        [False, False, False, True]

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2 (patching a head's output at the last token).
    """
    check_arguments(ablate, locals())
    cfg = model.cfg
    chosen = as_heads(heads, cfg.n_layers, cfg.n_heads)
    if not chosen:
        raise ValueError("ablate: expected at least one head, got none.")
    if positions not in ("last", "all"):
        raise ValueError(f"ablate: positions={positions!r}; expected 'last' or 'all'.")
    if isinstance(value, Tensor):
        expected = (cfg.n_layers, cfg.n_heads, cfg.d_head)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"ablate: value has shape {list(value.shape)}; expected [layer head d_head] = {list(expected)}."
            )
    elif value != "zero":
        raise ValueError(f"ablate: value={value!r}; expected 'zero' or a tensor [layer head d_head].")
    edits: dict[str, Replacement] = {}
    for layer in sorted({head.layer for head in chosen}):
        indices = [head.head for head in chosen if head.layer == layer]
        new = value[layer][indices] if isinstance(value, Tensor) else None
        edits[z_hook(layer)] = functools.partial(_overwrite, indices=indices, new=new)
    with _edited(model, edits, "ablate", positions):
        yield model


def _steerable_shape(model: Any, name: str) -> tuple[int, ...]:
    """Shape of an activation behind its batch and position axes; ValueError if it cannot be steered."""
    if name not in model.hook_dict:
        raise ValueError(
            f"inject: the model has no hook {name!r}; it has {model.cfg.n_layers} layers, and their hooks are "
            f"named like {resid_hook(0)!r} and {z_hook(0)!r}."
        )
    kind = name.rpartition(".")[2]
    if kind == "hook_resid_mid" and is_bridge(model):
        raise ValueError(
            f"inject: {name!r} cannot be steered on a TransformerBridge: there it is what the MLP reads, and the "
            "residual stream itself passes by; steer hook_attn_out instead."
        )
    if kind in _RESIDUAL_HOOKS:
        return (model.cfg.d_model,)
    if name.endswith("attn.hook_z"):
        return (model.cfg.n_heads, model.cfg.d_head)
    raise ValueError(
        f"inject: {name!r} cannot be steered; expected attn.hook_z or one of {', '.join(_RESIDUAL_HOOKS)}."
    )


def _add(
    activation: Float[Tensor, "batch pos *axes"],
    *,
    name: str,
    values: Callable[[], Mapping[str, Tensor]],
    scale: float | int,
    batched: bool,
) -> Float[Tensor, "batch pos *axes"]:
    value = values()[name]
    if batched and value.shape[0] != activation.shape[0]:
        raise ValueError(
            f"inject: the tensor for {name} has a batch axis of {value.shape[0]}, but {activation.shape[0]} prompts "
            "are run together; give one row per prompt, or one tensor without a batch axis for all."
        )
    delta = (scale * value).to(device=activation.device)
    # the sum is made in the wider of the two precisions and rounded once; so is the gradient over the prompts
    return (activation + (delta.unsqueeze(1) if batched else delta)).to(activation.dtype)


def _overwrite(
    activation: Float[Tensor, "batch pos head d_head"],
    *,
    indices: list[int],
    new: Float[Tensor, "chosen d_head"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    result = activation.clone()
    result[:, :, indices] = 0.0 if new is None else new.to(device=activation.device, dtype=activation.dtype)
    return result


@contextlib.contextmanager
def _edited(model: Any, edits: Mapping[str, Replacement], caller: str, positions: Positions) -> Iterator[None]:
    """Run ``edits`` (hook name -> edit) at the wanted positions, clean up on any exit, refuse a hook that never ran."""
    silent = set(edits)

    def edit_at(name: str, edit: Replacement) -> Callable[[Tensor], Tensor | None]:
        key = object()  # one hook of one block

        def act(activation: Tensor) -> Tensor | None:
            silent.discard(name)
            where = touched(model, key, activation.shape[1], positions)
            if where is None:
                return None
            result = activation.clone()
            result[:, where] = edit(activation[:, where])
            return result

        return act

    points = points_of(model, {name: edit_at(name, edit) for name, edit in edits.items()})
    methods = {} if positions == "all" else watching(model, caller)
    with acting(points, methods):
        yield
    if silent:
        raise RuntimeError(
            f"{caller}: {', '.join(sorted(silent))} never ran while the block was open, so nothing was changed there. "
            "Run this very model inside the block, and do not stop below that layer (stop_at_layer)."
        )
