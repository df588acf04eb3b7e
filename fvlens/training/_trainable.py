"""Trainable steerings: parameters that ``fvlens.inject`` adds to the activations like any vector."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.arguments import check_kinds
from fvlens.interventions import lock, resid_hook, z_hook
from fvlens.models import fingerprint
from fvlens.showing import Shown
from fvlens.types import Head, HeadLike, as_heads, as_whole, is_bridge
from fvlens.vectors import DistributedVector, FunctionVector


class TrainableVector(Shown, nn.Module):
    """A vector of the residual stream as a parameter: ``resid_l[-1] := resid_l[-1] + v`` with a gradient to v.

    For several relations there is a row each. Every row is a parameter of its own, so that an optimiser with memory,
    such as Adam, treats each relation as if it were alone.

    Args:
        init: what training starts from: a ``FunctionVector``, several of them, or a tensor ``[d_model]`` or ``[relation
            d_model]``.
        layer: the vector is added after this layer; by default that of ``init``.
        device: where the parameters are; ``inject`` moves what it adds to the model's device in any case.

    Raises:
        ValueError: no vector; a tensor that has not one or two axes; ``layer`` neither given nor one in all vectors.

    Example:
        >>> import torch, fvlens
        >>> from torch.nn.functional import cross_entropy
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> pairs = fvlens.load_relation("antonym").pairs[:20]
        >>> prompts = fvlens.build_prompts(model, pairs, n_shots=0, generator=torch.Generator())
        >>> trained = fvlens.TrainableVector(torch.zeros(model.cfg.d_model), layer=1)
        >>> optimiser = torch.optim.Adam(trained.parameters(), lr=0.3)
        >>> losses = []
        >>> with frozen(model), fvlens.inject(model, trained):
        ...     for _ in range(5):
        ...         logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        ...         loss = cross_entropy(logits, prompts.first_answer_token)
        ...         optimiser.zero_grad()
        ...         loss.backward()
        ...         _ = optimiser.step()
        ...         losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        init: FunctionVector | Sequence[FunctionVector] | Float[Tensor, "*relation d_model"],
        layer: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_kinds("TrainableVector", TrainableVector.__init__, {"init": init, "layer": layer, "device": device})
        if layer is not None:
            as_whole(layer, "TrainableVector: layer")
        if isinstance(init, FunctionVector):
            layers, values = {init.layer}, init.vector
        elif isinstance(init, Tensor):
            layers, values = set(), init
        else:
            layers = {vector.layer for vector in init}
            values = torch.stack([vector.vector for vector in init]) if len(init) else torch.empty(0)
        if values.ndim not in (1, 2) or not values.numel():
            raise ValueError(
                f"TrainableVector: expected [d_model] or [relation d_model], got shape {list(values.shape)}."
            )
        if layer is None:
            if len(layers) != 1:
                said = f"the vectors are of layers {sorted(layers)}" if layers else "a tensor does not say its layer"
                raise ValueError(f"TrainableVector: {said}; give layer=.")
            layer = layers.pop()
        self.layer = layer
        self.is_single = values.ndim == 1
        rows = values.detach().float().to(device).reshape(-1, values.shape[-1])
        self.rows = nn.ParameterList([nn.Parameter(row.clone()) for row in rows])

    def _line(self) -> str:
        rows = f"{len(self.rows)} x " if not self.is_single else ""
        return (
            f"{rows}{len(self.rows[0])} numbers after layer {self.layer}, norm {float(self.matrix.detach().norm()):.3f}"
        )

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """The one vector.

        Raises:
            ValueError: there are several relations.
        """
        if not self.is_single:
            raise ValueError(f"vector: there are {len(self.rows)} relations; use .matrix or .of(rows).")
        return self.rows[0]

    @property
    def matrix(self) -> Float[Tensor, "relation d_model"]:
        """All vectors, a row a relation."""
        return torch.stack(list(self.rows))

    def additions(self) -> Mapping[str, Float[Tensor, "*batch d_model"]]:
        """What ``inject`` adds. Of several relations row i goes to prompt i; :meth:`of` assigns them otherwise."""
        return {resid_hook(self.layer): self.vector if self.is_single else self.matrix}

    def of(self, rows: Int[Tensor, " batch"]) -> "Rows":
        """A steering for a batch of prompts: prompt i gets the vector of relation ``rows[i]``."""
        return Rows(self, rows)

    def check(self, model: Any) -> None:
        """Nothing to refuse: whether the shape fits, ``inject`` checks itself."""

    def to_vector(self, like: FunctionVector, *, kind: str = "fine-tuned") -> FunctionVector:
        """The one vector, detached, with the provenance of ``like``."""
        return dataclasses.replace(like, vector=self.vector.detach(), layer=self.layer, kind=kind)


class Rows:
    """The rows of a trainable vector that belong to the prompts of one batch."""

    def __init__(self, whole: TrainableVector, rows: Int[Tensor, " batch"]) -> None:
        self.whole, self.rows = whole, rows

    def additions(self) -> Mapping[str, Float[Tensor, "batch d_model"]]:
        return {resid_hook(self.whole.layer): self.whole.matrix[self.rows.to(self.whole.rows[0].device)]}

    def check(self, model: Any) -> None:
        self.whole.check(model)


class TrainableDistributedVector(Shown, nn.Module):
    """One parameter ``[d_head]`` for each chosen head, added to that head's own z at the last token.

    Args:
        init: a ``DistributedVector``, or the number ``[head d_head]`` of each of ``heads``.
        heads: the heads, if ``init`` is a tensor.
        n_layers, n_heads: the model's shape, if ``init`` is a tensor.

    Raises:
        ValueError: the heads are not of the model, or are not as many as ``init`` has rows.
    """

    def __init__(
        self,
        init: DistributedVector | Float[Tensor, "head d_head"],
        *,
        heads: Iterable[HeadLike] | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(init, DistributedVector):
            chosen, (n_layers, n_heads) = list(init.heads), init.values.shape[:2]
            values = torch.stack([init.values[head] for head in chosen])
        elif heads is None or n_layers is None or n_heads is None:
            raise ValueError("TrainableDistributedVector: a tensor needs heads=, n_layers= and n_heads= beside it.")
        else:
            chosen, values = as_heads(heads, n_layers, n_heads), init
        if len(chosen) != len(values):
            raise ValueError(f"TrainableDistributedVector: {len(chosen)} heads, but {len(values)} rows of numbers.")
        self.heads: tuple[Head, ...] = tuple(chosen)
        self.shape = (int(n_layers), int(n_heads))
        self.values = nn.Parameter(values.detach().float().clone())

    def _line(self) -> str:
        n, width = self.values.shape
        return f"{n} heads x {width} numbers, norm {float(self.values.detach().norm()):.3f}"

    @property
    def joins_after(self) -> int:
        """The layer below the first of the heads, up to which nothing depends on them; -1 below the model's first."""
        return min(head.layer for head in self.heads) - 1

    def by_layer(self) -> Mapping[int, Float[Tensor, "head d_head"]]:
        """What is added to the z of each layer that has some of the heads: zero to heads that were not chosen."""
        found = {}
        for layer in sorted({head.layer for head in self.heads}):
            own = [i for i, head in enumerate(self.heads) if head.layer == layer]
            index = torch.tensor([self.heads[i].head for i in own], device=self.values.device)
            zeros = torch.zeros(self.shape[1], self.values.shape[1], device=self.values.device)
            found[layer] = zeros.index_copy(0, index, self.values[own])
        return found

    def additions(self) -> Mapping[str, Float[Tensor, "head d_head"]]:
        """What ``inject`` adds: :meth:`by_layer`, by the name of the hook."""
        return {z_hook(layer): value for layer, value in self.by_layer().items()}

    def check(self, model: Any) -> None:
        """Nothing to refuse: whether the shape fits, ``inject`` checks itself."""

    def to_vector(self, model: Any, *, relation: str = "") -> DistributedVector:
        """The trained numbers, detached, as a ``DistributedVector`` of this model."""
        values = torch.zeros(*self.shape, self.values.shape[1])
        for head, row in zip(self.heads, self.values.detach().cpu(), strict=True):
            values[head] = row
        return DistributedVector(
            values=values,
            heads=self.heads,
            relation=relation,
            fingerprint=fingerprint(model),
            kind="fine-tuned distributed",
        )


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """While open, the model's parameters take no gradient and the model is in evaluation mode.

    Flags and modes of all its parts are put back on any exit. They are the model's, so all threads see them; where
    several blocks overlap, in whatever order they end, the last one puts back what the first one found.
    """
    whole = [model, model.original_model] if is_bridge(model) else [model]  # a bridge does not count all its modules
    parts = [*model.parameters(), *(part for one in whole for part in one.modules())]
    taken: list[Any] = []
    try:
        with lock:
            for part in {id(part): part for part in parts}.values():
                taken.append(part)
                _freeze(part)
        yield
    finally:
        with lock:
            for part in taken:
                _thaw(part)


_frozen: dict[int, tuple[Any, bool, int]] = {}
"""By its id, each frozen parameter or module, its flag or mode before, and how many blocks are open on it."""


def _freeze(part: Any) -> None:
    name = "requires_grad" if isinstance(part, Tensor) else "training"
    _, before, n_open = _frozen.get(id(part), (part, getattr(part, name), 0))
    _frozen[id(part)] = part, before, n_open + 1
    setattr(part, name, False)


def _thaw(part: Any) -> None:
    _, before, n_open = _frozen.pop(id(part))
    if n_open > 1:
        _frozen[id(part)] = part, before, n_open - 1
    else:
        setattr(part, "requires_grad" if isinstance(part, Tensor) else "training", before)
