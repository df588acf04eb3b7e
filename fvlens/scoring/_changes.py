"""Changes as edits of the engine, and as hooks of whole passes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.interventions import checked_additions, hooked, inject, resid_hook, resid_pre_hook, z_hook
from fvlens.models import model_device
from fvlens.scoring._scores import Change
from fvlens.suffix import Edit, Site, Variant, rows_of
from fvlens.types import HeadLike, Steering, as_heads


def ablation(
    model: Any, heads: Iterable[HeadLike], *, value: Literal["zero"] | Float[Tensor, "layer head d_head"] = "zero"
) -> Variant:
    """Heads overwritten at the prompt's last token, as a change that :func:`score` takes.

    ``z[l, h] := 0`` or ``z[l, h] := value[l, h]``, as :func:`fvlens.ablate` does it by hooks.

    Args:
        model: the model.
        heads: ``Head``s or ``(layer, head)`` pairs, at least one.
        value: ``"zero"``, or one value per head of the whole model, such as the ``z`` of mean head activations.

    Raises:
        ValueError: no heads, or heads that the model has not; an unknown ``value`` or one of the wrong shape.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.scoring import ablation, score
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> pairs = fvlens.load_relation("antonym").pairs[:8]
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(model, pairs, n_shots=3, generator=g)
        >>> without = ablation(model, [(1, 0), (1, 3)])
        >>> score(model, prompts, [None, without]).first.shape
        torch.Size([2, 8])
    """
    cfg = model.cfg
    chosen = as_heads(heads, cfg.n_layers, cfg.n_heads)
    shape = (cfg.n_layers, cfg.n_heads, cfg.d_head)
    if not chosen:
        raise ValueError("ablation: expected at least one head, got none.")
    if isinstance(value, Tensor):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"ablation: value has shape {list(value.shape)}; expected [layer head d_head] = {list(shape)}."
            )
    elif value != "zero":
        raise ValueError(f"ablation: value={value!r}; expected 'zero' or a tensor [layer head d_head].")
    new = (value if isinstance(value, Tensor) else torch.zeros(shape)).to(model_device(model), cfg.dtype)
    return tuple(Edit(layer, "z", new[layer, head], head=head, op="replace") for layer, head in chosen)


def as_edits(model: Any, change: Change, scale: float, n_prompts: int, *, check: bool = True) -> Variant | None:
    """A change as edits of the prompt's last token; None where it steers a hook that the engine has no site for.

    Raises:
        ValueError: the steering does not fit the model, was made on another one, or has a batch axis that is not one
            row a prompt; a scale other than 1 on edits.
    """
    if change is None:
        return ()
    if isinstance(change, tuple):
        if scale != 1 or any(edit.where is not None for edit in change):
            raise ValueError(
                f"a change given as edits takes scale=1 and acts at the prompt's last token; got scale={scale} and "
                f"where={[edit.where for edit in change]}; scale the edits' values, and leave where out."
            )
        return change
    sites: dict[str, tuple[int, Site]] = {
        resid_hook(layer): (layer, "resid_post") for layer in range(model.cfg.n_layers)
    }
    sites |= {resid_pre_hook(layer + 1): (layer, "resid_post") for layer in range(model.cfg.n_layers - 1)}
    sites |= {z_hook(layer): (layer, "z") for layer in range(model.cfg.n_layers)}
    edits = []
    for name, value in checked_additions(model, change, scale=scale, check=check).items():
        if name not in sites:
            return None
        layer, site = sites[name]
        _check_rows(name, value, n_prompts)
        edits.append(Edit(layer, site, scale * value.detach().to(model_device(model))))
    return tuple(edits)


def _check_rows(name: str, value: Tensor, n_prompts: int) -> None:
    """Refuse a batch axis that is not one row a prompt."""
    if value.ndim > (2 if name.endswith("hook_z") else 1) and value.shape[0] != n_prompts:
        raise ValueError(
            f"the tensor for {name} has a batch axis of {value.shape[0]}, but there are {n_prompts} pairs; "
            "give one row a pair, or one tensor without a batch axis for all."
        )


def changed(
    model: Any,
    change: Change,
    scale: float,
    rows: slice,
    n_prompts: int,
    *,
    every_new_token: bool = False,
    check: bool = True,
) -> contextlib.AbstractContextManager[Any]:
    """The model under the part of a change that belongs to these prompts, at the last token of each.

    Whether a steering belongs to the model is asked with the first prompts only.
    """
    if change is None:
        return contextlib.nullcontext()
    if isinstance(change, tuple):
        return _edited(model, rows_of([change], rows)[0])
    part = _Rows(change, rows, n_prompts) if isinstance(change, Steering) else change
    return inject(model, part, scale=scale, every_new_token=every_new_token, check=check and rows.start == 0)


@contextlib.contextmanager
def _edited(model: Any, edits: Variant) -> Iterator[None]:
    """The model under edits of the last position, by hooks."""

    def hook(own: Sequence[Edit]) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            last = x[:, -1].clone()
            for edit in own:
                place = (slice(None),) if edit.head is None else (slice(None), edit.head)
                value, old = edit.value.to(x.device), last[place]
                new = value.expand_as(old) if edit.op == "replace" else old + value if edit.op == "add" else old * value
                last[place] = new.to(x.dtype)
            return torch.cat([x[:, :-1], last[:, None]], dim=1)

        return change

    names = {edit: (z_hook if edit.site == "z" else resid_hook)(edit.layer) for edit in edits}
    grouped: dict[str, list[Edit]] = {}
    for edit, name in names.items():
        grouped.setdefault(name, []).append(edit)
    with hooked(model, {name: hook(own) for name, own in grouped.items()}):
        yield


@dataclass(frozen=True, slots=True)
class _Rows:
    """Those rows of a steering with a batch axis that belong to the prompts of one batch."""

    whole: Steering
    rows: slice
    n_prompts: int

    def additions(self) -> Mapping[str, Float[Tensor, "*axes"]]:
        return {name: self._own(name, value) for name, value in self.whole.additions().items()}

    def _own(self, name: str, value: Float[Tensor, "*axes"]) -> Float[Tensor, "*rows"]:
        _check_rows(name, value, self.n_prompts)
        return value if value.ndim <= (2 if name.endswith("hook_z") else 1) else value[self.rows]

    def check(self, model: Any) -> None:
        self.whole.check(model)
