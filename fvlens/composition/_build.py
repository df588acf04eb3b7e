"""A composite from the library alone: basis, map and gate over what the held-out division leaves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

import torch

from fvlens.composition._evaluate import plain_pair
from fvlens.composition._fit_gate import fit_gate
from fvlens.composition._fit_map import fit_composite
from fvlens.composition._gate import GateKind
from fvlens.composition._map import CompositeMap, Map
from fvlens.composition._queries import AnalogySetting
from fvlens.composition._starts import basis_starts
from fvlens.find import finished
from fvlens.prompts import Template, template_for
from fvlens.relations import Analogy, Relation, as_relations, held_out, list_relations, make_analogies
from fvlens.training import finetune_many

Start = Literal["zero", "vector"]
"""What the vectors of a basis are trained from."""
STARTS: tuple[Start, ...] = get_args(Start)

Names = Sequence[str | FilePath | Relation] | str | FilePath
"""Relations, as :func:`fvlens.relations.as_relations` takes them."""


def library_parts(part: str, names: Names | None = None) -> list[Relation]:
    """Relations with one part of their pairs, as the held-out division splits them.

    A pair can stand in two relations, in one of them for fitting and in the other for testing, and so can its reverse.
    The test part leaves out what any relation outside the held-out families has for fitting.

    Args:
        part: ``"train"``, ``"valid"`` or ``"test"``.
        names: relations, their names, files or a folder; by default those outside the held-out families.

    Raises:
        ValueError: no such part; an unknown relation, or pairs that cannot be read.
    """
    if part not in ("train", "valid", "test"):
        raise ValueError(f"library_parts: part={part!r}; expected train, valid or test.")
    division = held_out()
    chosen = as_relations(division.relations() if names is None else names, what="library_parts")
    parts = [dataclasses.replace(one, pairs=getattr(division.split(one), part)) for one in chosen]
    if part != "test":
        return parts
    own = [one for one in chosen if one.name not in list_relations()]
    splits = [division.split(one) for one in (*as_relations(division.relations()), *own)]
    fitted = {plain_pair(pair) for split in splits for pair in (*split.train, *split.valid)}
    return [
        dataclasses.replace(
            one, pairs=tuple(p for p in one.pairs if not {plain_pair(p), plain_pair((p.output, p.input))} & fitted)
        )
        for one in parts
    ]


def library_analogies(
    part: str,
    *,
    n: int,
    generator: torch.Generator,
    names: Names | None = None,
    kind: Literal["near", "far"] | None = None,
    n_foils: int = 3,
) -> list[Analogy]:
    """Analogies of :func:`library_parts` for fitting or testing, half near and half far or of one kind.

    Far ones connect the pairs of domains that :func:`fvlens.relations.held_out` leaves for fitting.

    Args:
        part: ``"train"``, ``"valid"`` or ``"test"`` of each relation's split.
        n: how many at most.
        generator: source of randomness.
        names: relations; by default those outside the held-out families.
        kind: only near or only far ones.
        n_foils: wrong answers for each.

    Raises:
        ValueError: no such part or kind; no near or no far analogy can be made.
    """
    if kind not in (None, "near", "far"):
        raise ValueError(f"library_analogies: kind={kind!r}; expected near, far or None.")
    known = as_relations(held_out().relations() if names is None else names, what="library_analogies")
    parts = library_parts(part, known)
    shared: dict[str, Any] = dict(generator=generator, n_foils=n_foils, known=known)
    n_far = {"near": 0, "far": n, None: max(1, n // 2)}[kind]
    near = make_analogies(parts, kind="near", n=max(1, n - n_far), **shared) if kind != "far" else []
    domains = held_out().fitted_domain_pairs()
    far = make_analogies(parts, kind="far", n=n_far, domains=domains, **shared) if kind != "near" else []
    return [*near, *far]


def library_composite(
    model: Any,
    *,
    names: Names | None = None,
    layer: int | None = None,
    start: Start = "vector",
    n_train: int = 20,
    map: Map = "none",
    setting: AnalogySetting = "zero_shot",
    n_analogies: int = 2430,
    epochs: int = 20,
    gate: GateKind | None = None,
    template: Template | str = "qa",
    generator: torch.Generator,
    progress: bool = True,
) -> CompositeMap:
    """A composite whose basis is trained on the library's relations, ready for :meth:`CompositeMap.vector_for`.

    Basis: one vector a relation, trained on the first ``n_train`` pairs of its train part. Map: trained on
    analogies of the train parts, its epoch chosen on a tenth as many of the valid parts; for the bare query half near
    and half far, for the one-shot prompt far ones, as it answers near ones unsteered. Gate: fitted on analogies of the
    valid parts, half near and half far, drawn anew. Held-out families, pairs of domains and test pairs take no part.

    Args:
        model: any model that fvlens loads.
        names: relations of the basis, their names, files or a folder; by default those outside the held-out families.
        layer: where vectors act; by default as ``start`` says.
        start: what the vectors of the basis are trained from. ``"vector"``: function vectors of the same pairs, all of
            the same ten heads, each with its own best scale, at the layer at which these are best together in top-1 on
            the validation pairs of eight relations. ``"zero"``: nothing, a third of the way up. ``fvlens study start``
            measures what either brings and costs.
        n_train: training pairs of each basis vector.
        map: ``"none"`` needs no analogies; see :func:`fit_composite`.
        setting: the prompts that map and gate are trained on.
        n_analogies: training analogies of the map; the gate has a fifth as many.
        epochs: passes over the pairs of the basis and over the analogies.
        gate: ``"logistic"``, ``"threshold"``, ``"learned"`` (see :func:`fit_gate`) or None.
        template: how queries are written.
        generator: all randomness.
        progress: show bars. Interrupting passes on: a part is no composite.

    Raises:
        ValueError: an unknown relation or choice; numbers out of range.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.composition import library_composite
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> names, g = ["animal-young", "animal-home"], torch.Generator().manual_seed(0)
        >>> composite = library_composite(model, names=names, epochs=5, generator=g, progress=False)
        >>> composite.explain(model, "cow", "calf").top(1)[0][0]
        'animal-young'
    """
    if start not in STARTS:
        raise ValueError(f"library_composite: start={start!r}; expected one of {', '.join(STARTS)}.")
    template = template_for(model, template)
    division = held_out()
    chosen = as_relations(division.relations() if names is None else names, what="library_composite")
    splits = {one.name: division.split(one) for one in chosen}
    starts: Any = "zero"
    if start == "vector":
        parts = {name: dataclasses.replace(split, train=split.train[:n_train]) for name, split in splits.items()}
        starts = basis_starts(model, parts, layer=layer, template=template, generator=generator, progress=progress)
    elif layer is None:
        layer = model.cfg.n_layers // 3
    tuned = finetune_many(
        model, splits, init=starts, layer=layer, n_train=n_train, epochs=epochs, template=template,
        generator=generator, progress=progress,
    )  # fmt: skip
    basis = finished(tuned).vectors
    pairs = [pair for split in splits.values() for part in (split.train[:n_train], split.valid) for pair in part]
    drawn: dict[str, Any] = dict(generator=generator, names=chosen, n_foils=0)
    if map == "none":
        composite = CompositeMap.plain(basis, template=template, setting=setting, pairs=pairs)
    else:
        kind = "far" if setting == "one_shot" else None
        composite = fit_composite(
            model, basis, library_analogies("train", n=n_analogies, kind=kind, **drawn), map=map, setting=setting,
            valid=library_analogies("valid", n=max(2, n_analogies // 10), kind=kind, **drawn), epochs=epochs,
            template=template, basis_pairs=pairs, generator=generator, progress=progress,
        )  # fmt: skip
        finished(composite)
    if gate is not None:
        analogies = library_analogies("valid", n=max(2, n_analogies // 5), **drawn)
        composite = fit_gate(
            model, composite, analogies, kind=gate, setting=setting, generator=generator, progress=progress
        )
    return finished(composite)
