"""Edits of a prompt's last tokens, variants made of them, and how the variants of one layer are edited together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Site = Literal["resid_post", "z"]
SITES: tuple[Site, ...] = ("resid_post", "z")
Op = Literal["add", "replace", "scale"]
OPS: tuple[Op, ...] = ("add", "replace", "scale")


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One change of one activation at chosen positions of a suffix.

    Attributes:
        layer: the block.
        site: ``"resid_post"``, the residual stream after the block; or ``"z"``, its heads' mixed values.
        value: what is added, put in its place, or multiplied by: ``[d_model]`` at ``"resid_post"``; at ``"z"``
            ``[d_head]`` for one head, ``[head d_head]`` for all of them. With a leading prompt axis each prompt has its
            own. ``"scale"`` also takes a tensor without axes.
        head: the head edited at ``"z"``; None for all of them.
        op: ``"add"``, ``"replace"`` or ``"scale"``.
        where: the suffix positions that are edited; None for the first one, the prompt's last token.
    """

    layer: int
    site: Site
    value: Float[Tensor, "*axes"]
    head: int | None = None
    op: Op = "add"
    where: Bool[Tensor, "prompt suffix"] | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES or self.op not in OPS:
            raise ValueError(
                f"Edit: site={self.site!r} and op={self.op!r}; expected one of {', '.join(SITES)} and one of "
                f"{', '.join(OPS)}."
            )
        if self.head is not None and self.site != "z":
            raise ValueError(f"Edit: head={self.head} at site={self.site!r}; only 'z' has heads.")

    @property
    def is_batched(self) -> bool:
        """Whether every prompt has a value of its own."""
        return self.value.ndim > (2 if self.site == "z" and self.head is None else 1)


Variant = tuple[Edit, ...]
"""What one copy of every prompt has changed; its edits at one place act in this order."""


def check_variants(model: Any, variants: Sequence[Variant], n_prompts: int, n_suffix: int) -> None:
    """Refuse edits that do not fit the model or the prompts.

    Raises:
        ValueError: a layer or head that the model has not; a value or a ``where`` of the wrong shape.
    """
    cfg = model.cfg
    for edit in {id(edit): edit for variant in variants for edit in variant}.values():
        if not 0 <= edit.layer < cfg.n_layers or not 0 <= (edit.head or 0) < cfg.n_heads:
            raise ValueError(
                f"Edit: layer={edit.layer}, head={edit.head}; the model has layers 0..{cfg.n_layers - 1} and heads "
                f"0..{cfg.n_heads - 1}."
            )
        whole = (cfg.d_model,) if edit.site == "resid_post" else (cfg.n_heads, cfg.d_head)
        own = whole if edit.head is None else (cfg.d_head,)
        allowed = [own, (n_prompts, *own), *([()] if edit.op == "scale" else [])]
        if tuple(edit.value.shape) not in allowed:
            raise ValueError(
                f"Edit: a value of shape {list(edit.value.shape)} at {edit.site} of layer {edit.layer}; expected "
                f"{list(own)}, or with a leading axis of {n_prompts} prompts {[n_prompts, *own]}."
            )
        if edit.where is not None and tuple(edit.where.shape) != (n_prompts, n_suffix):
            raise ValueError(
                f"Edit: where has shape {list(edit.where.shape)}; expected [prompt suffix] = {[n_prompts, n_suffix]}."
            )


def rows_of(variants: Sequence[Variant], rows: slice | Int[Tensor, " row"]) -> list[Variant]:
    """The variants for some of the prompts: values and places that are a prompt's own are cut alike."""
    cut: dict[int, Edit] = {}

    def own(edit: Edit) -> Edit:
        if edit.where is None and not edit.is_batched:
            return edit
        if id(edit) not in cut:
            value = edit.value[rows] if edit.is_batched else edit.value
            cut[id(edit)] = replace(edit, value=value, where=None if edit.where is None else edit.where[rows])
        return cut[id(edit)]

    return [tuple(own(edit) for edit in variant) for variant in variants]


def joining(variant: Variant, n_layers: int) -> tuple[int, int]:
    """Where a variant leaves the kept run: its first edited layer, and whether inside that block (0) or behind it (1).

    A variant without edits never does.
    """
    places = [(edit.layer, 0 if edit.site == "z" else 1) for edit in variant]
    return min(places, default=(n_layers, 0))


@dataclass(slots=True)
class SiteEdits:
    """The edits of several variants at one site, applied together."""

    groups: "list[_Group]" = field(default_factory=list)

    @classmethod
    def of(cls, variants: Sequence[Variant], layer: int, site: Site) -> "SiteEdits":
        """Those that act at this site of this layer; variant i stands at place i of the variant axis."""
        rounds: dict[tuple[Any, ...], list[tuple[int, Edit]]] = {}
        for place, variant in enumerate(variants):
            here = [edit for edit in variant if edit.layer == layer and edit.site == site]
            for turn, edit in enumerate(here):  # one variant's edits at one place act one after another
                kind = (turn, edit.op, edit.head is None, tuple(edit.value.shape), edit.is_batched, id(edit.where))
                rounds.setdefault(kind, []).append((place, edit))
        return cls([_Group.of(rounds[kind]) for kind in sorted(rounds, key=lambda kind: kind[0])])

    def __bool__(self) -> bool:
        return bool(self.groups)

    def apply(self, x: Float[Tensor, "prompt variant suffix *axes"]) -> Float[Tensor, "prompt variant suffix *axes"]:
        """A new tensor with the edits in it; the given one where there are none."""
        for group in self.groups:
            x = group.apply(x)
        return x


@dataclass(frozen=True, slots=True)
class _Group:
    """Edits of the same kind, at most one a variant."""

    op: Op
    variants: list[int]
    heads: list[int] | None
    values: Float[Tensor, " edit *axes"]
    is_batched: bool
    where: Bool[Tensor, "prompt suffix"] | None

    @classmethod
    def of(cls, entries: Iterable[tuple[int, Edit]]) -> "_Group":
        places, edits = zip(*entries, strict=True)
        first = edits[0]
        heads = None if first.head is None else [edit.head for edit in edits]
        values = first.value[None] if len(edits) == 1 else torch.stack([edit.value for edit in edits])
        return cls(first.op, list(places), heads, values, first.is_batched, first.where)

    def apply(self, x: Tensor) -> Tensor:
        x = x.clone()
        if self.heads is None:
            places, index = x.transpose(0, 1), (torch.tensor(self.variants, device=x.device),)
        else:
            places = x.permute(1, 3, 0, 2, 4)  # variant, head, prompt, suffix, d_head
            index = tuple(torch.tensor(i, device=x.device) for i in (self.variants, self.heads))
        old = places[index]  # [edit prompt suffix *axes]
        values = self.values.to(x.device)
        if self.is_batched:
            values = values[:, :, None]
        else:
            values = values[:, None, None] if values.ndim > 1 else values.view(-1, *[1] * (old.ndim - 1))
        if self.where is None:
            changed = self._changed(old[:, :, :1], values)
            new = changed if old.shape[2] == 1 else torch.cat([changed, old[:, :, 1:]], dim=2)
        else:
            where = self.where.to(x.device)[None].view(1, *old.shape[1:3], *[1] * (old.ndim - 3))
            new = torch.where(where, self._changed(old, values), old)
        places[index] = new
        return x

    def _changed(self, old: Tensor, values: Tensor) -> Tensor:
        """The new activations; sums and products are made in the wider of the two precisions and rounded once."""
        if self.op == "replace":
            return values.to(old.dtype).expand_as(old)
        return (old + values if self.op == "add" else old * values).to(old.dtype)
