"""A task kept apart by head."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations import HeadMeans
from fvlens.arguments import check_arguments, check_kinds
from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import z_hook
from fvlens.models import Fingerprint, check_model
from fvlens.prompts import Template, known_template, template_from, template_header
from fvlens.showing import Shown, named
from fvlens.types import Head, HeadLike, as_flag, as_heads, as_list, as_text
from fvlens.vectors._parts import INTERRUPTED, as_float32, chosen_heads

DISTRIBUTED_FORMAT = "fvlens-distributed-vector-1"


@dataclass(frozen=True, slots=True, repr=False)
class DistributedVector(Shown):
    """A task injected where it arises: each chosen head's mean output is added to that head's own z.

    Attributes:
        values: what is added, zero for heads that were not chosen.
        heads: the chosen heads.
        relation: the task's name.
        fingerprint: the model it was made on.
        template: of the prompts behind the means; None if unknown.
        complete: False if it was trained and the training was interrupted.
    """

    values: Float[Tensor, "layer head d_head"]
    heads: tuple[Head, ...]
    relation: str
    fingerprint: Fingerprint
    kind: str = "distributed"
    template: Template | str | None = None
    complete: bool = True

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("values", "heads", "fingerprint")}
        check_kinds("DistributedVector", DistributedVector, given)
        mark = self.fingerprint
        expected = (mark.n_layers, mark.n_heads, mark.d_head)
        if self.values.shape != expected:
            raise ValueError(f"DistributedVector: expected values of shape {expected}, got {tuple(self.values.shape)}.")
        for name in ("relation", "kind"):
            as_text(getattr(self, name), f"DistributedVector: {name}")
        as_flag(self.complete, "DistributedVector: complete")
        object.__setattr__(self, "values", as_float32(self.values, "DistributedVector: values"))
        object.__setattr__(self, "heads", tuple(as_heads(self.heads, mark.n_layers, mark.n_heads)))
        object.__setattr__(self, "template", known_template(self.template))

    def _line(self) -> str:
        part = "" if self.complete else ", interrupted"
        return (
            f"{named(self.relation)}, {self.kind}: {len(self.heads)} heads, norm {float(self.values.norm()):.3f}, "
            f"model {self.fingerprint.name!r}{part}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [("head", "norm"), *((str(head), f"{float(self.values[head].norm()):.3f}") for head in self.heads)]

    def additions(self) -> Mapping[str, Float[Tensor, "head d_head"]]:
        """What :func:`fvlens.inject` adds: hook name of each layer's z -> values of its heads."""
        return {z_hook(layer): self.values[layer] for layer in sorted({head.layer for head in self.heads})}

    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if the vector was made on another model."""
        check_model(self.fingerprint, model, f"the distributed vector of {self.relation!r}")

    def save(self, path: str | Path) -> Path:
        """Write it to one safetensors file, metadata in its header. Replaces an existing file at once."""
        header = {
            "heads": [list(head) for head in self.heads],
            "relation": self.relation,
            "kind": self.kind,
            **template_header(self.template),
            "complete": self.complete,
            "fingerprint": dataclasses.asdict(self.fingerprint),
        }
        return write_tensors(Path(path), {"values": self.values}, header, DISTRIBUTED_FORMAT)

    @classmethod
    def load(
        cls, path: str | Path, *, model: Any = None, template: Template | str | None = None
    ) -> "DistributedVector":
        """Read what :meth:`save` wrote, with a warning if its training was interrupted.

        Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, it must have been made on this model.
            template: taken instead of the file's; see :meth:`FunctionVector.load`.

        Raises:
            ValueError: no such file; not a distributed vector, or a damaged one; or one of another model than
                ``model``.
        """
        path = Path(path)
        tensors, header = read_tensors(path, DISTRIBUTED_FORMAT)
        try:
            mark = Fingerprint.from_fields(header["fingerprint"])
            values = tensors["values"]
            if values.ndim != 3 or values.shape[:2] != (mark.n_layers, mark.n_heads):
                said = f"[{mark.n_layers} {mark.n_heads} d_head]"
                raise ValueError(f"expected numbers {said}, got {list(values.shape)}")
            loaded = cls(
                values=as_float32(values, "values"),
                heads=tuple(as_heads(as_list(header["heads"], "heads"), mark.n_layers, mark.n_heads)),
                relation=as_text(header["relation"], "relation"),
                fingerprint=mark,
                kind=as_text(header["kind"], "kind"),
                template=template_from(header, template),
                complete=as_flag(header.get("complete", True), "complete"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: damaged distributed vector ({type(error).__name__}: {error}).") from error
        if model is not None:
            loaded.check(model)
        if not loaded.complete:
            warnings.warn(f"{path.name}: {INTERRUPTED}.", stacklevel=2)
        return loaded


def distributed_vector(
    model: Any, means: HeadMeans, *, heads: Iterable[HeadLike], alpha: float = 1.0
) -> DistributedVector:
    """A function vector kept apart by head: add ``alpha * mean z_{l,h}`` to each chosen head's own z.

    Args:
        model: the model.
        means: task means at the last token.
        heads: the chosen heads.
        alpha: strength; 1 in the source.

    Returns:
        :class:`DistributedVector`, which :func:`fvlens.inject` takes like any vector.

    Raises:
        ValueError: as for :func:`function_vector`.

    References:
        arXiv:2606.05079 (from its code).
    """
    check_arguments(distributed_vector, locals())
    chosen, means_z = chosen_heads(model, means, heads)
    values = torch.zeros_like(means_z)
    for head in chosen:
        values[head.layer, head.head] = alpha * means_z[head.layer, head.head]
    return DistributedVector(
        values=values,
        heads=tuple(chosen),
        relation=means.relation,
        fingerprint=means.fingerprint,
        template=means.template,
    )
