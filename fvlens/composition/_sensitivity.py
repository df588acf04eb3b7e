"""What a composite owes to its basis: the same analogies with parts of it dropped, merged, drowned or removed."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.composition._evaluate import Unseen, evaluate_analogies
from fvlens.composition._fit_map import fit_composite
from fvlens.composition._map import CompositeMap
from fvlens.composition._queries import AnalogySetting
from fvlens.find import finished
from fvlens.metrics import Difference, Interval, bootstrap_interval, paired_difference
from fvlens.models import Fingerprint
from fvlens.progress import tqdm
from fvlens.relations import Analogy, list_relations, load_relation
from fvlens.results import Result
from fvlens.showing import Shown, as_said, number, span
from fvlens.suffix import Route
from fvlens.training import VectorSet
from fvlens.vectors import random_vector_like

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@dataclass(frozen=True, slots=True, repr=False)
class Change(Shown):
    """One change of the basis.

    Attributes:
        name: such as ``"25% dropped"``.
        n_basis: vectors left, a mean over repeats.
        n_repeats: random draws behind it.
        top1: share of analogies solved with the changed basis, and its bootstrap interval over analogies.
        difference: to the full basis on the same analogies, paired.
        stability: ``sum_i min(|w_i|, |w'_i|)`` over the relations that are left and weigh the same way before and
            after, either scaled so that its sizes sum to 1; 0 to 1, a mean over analogies.
    """

    name: str
    n_basis: float
    n_repeats: int
    top1: float
    interval: Interval
    difference: Difference
    stability: float

    def _line(self) -> str:
        return f"{self.name}: {self.n_basis:g} vectors, top1={self.top1:.3f} {span(*self.interval[:2])}"


@dataclass(frozen=True, slots=True, repr=False)
class BasisStudy(Result):
    """Analogies solved with the full basis and with changed ones.

    Attributes:
        changes: the full basis first.
        references: top-1 without steering, and with the target's own vector where the basis has all of them.
        n_analogies: how many.
        setting: the prompts steered.
        fingerprint: the model; None where it is not known.
    """

    FORMAT: ClassVar[str] = "fvlens-basis-study-1"

    changes: tuple[Change, ...]
    references: dict[str, float]
    n_analogies: int
    setting: AnalogySetting
    fingerprint: Fingerprint | None = None

    def __getitem__(self, name: str) -> Change:
        """A change by its name.

        Raises:
            ValueError: there is none of that name.
        """
        for change in self.changes:
            if change.name == name:
                return change
        raise ValueError(f"no change {name!r}; there are {', '.join(change.name for change in self.changes)}.")

    def _line(self) -> str:
        shown = ", ".join(f"{one.name} {one.top1:.3f}" for one in self.changes)
        return f"{self.n_analogies} analogies, {self.setting}, top1: {shown}"

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [
            (one.name, f"{one.n_basis:g}", number(one.top1), span(*one.interval[:2]), number(one.stability))
            for one in self.changes
        ]
        return [("change", "vectors", "top-1", "interval", "stability"), *rows]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a change: ``change, n_basis, n_repeats, stability``, top-1 and difference with their intervals."""
        import pandas as pd

        return pd.DataFrame(
            dict(
                change=one.name, n_basis=one.n_basis, n_repeats=one.n_repeats, top1=one.top1, low=one.interval.low,
                high=one.interval.high, difference=one.difference.mean, diff_low=one.difference.interval.low,
                diff_high=one.difference.interval.high, stability=one.stability,
            )
            for one in self.changes
        )  # fmt: skip

    def plot(self) -> "Figure":
        """Top-1 under every change with its interval, beside the references."""
        from fvlens import plots

        return plots.bars(
            [f"{one.name} ({one.n_basis:.0f})" for one in self.changes],
            [one.top1 for one in self.changes],
            [one.interval.low for one in self.changes],
            [one.interval.high for one in self.changes],
            x_title="Top-1", x_range=(0, 1.15), references=self.references,
            highlighted=[f"{self.changes[0].name} ({self.changes[0].n_basis:.0f})"],
            level=self.changes[0].interval.level,
            title=f"Changed basis (vectors left), {self.n_analogies} analogies, {as_said(self.setting)}",
        )  # fmt: skip


def basis_study(
    model: Any,
    composite: CompositeMap,
    analogies: Sequence[Analogy],
    *,
    fit: Sequence[Analogy] = (),
    drop: Sequence[float] = (0.1, 0.25, 0.5),
    merge: float | None = 0.9,
    noise: Sequence[float] = (0.25,),
    remove: Sequence[str] = ("family", "domain"),
    n_repeats: int = 3,
    setting: AnalogySetting = "zero_shot",
    epochs: int = 20,
    unseen: Unseen = "pairs",
    allow_leak: bool = False,
    path: Route | None = None,
    max_memory: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> BasisStudy:
    """Solve the same analogies with changed bases.

    Every basis, the full one too, gets a map of the composite's shape, trained anew on ``fit``; a gate takes no part.

    Args:
        model: the model of the basis.
        composite: the map with the full basis.
        analogies: what is asked.
        fit: training analogies for the maps; needed unless the composite has no map.
        drop: shares of the basis that are dropped at random.
        merge: vectors of at least this cosine become one, their mean; None: no such change.
        noise: random vectors of the basis's mean length that join it, as shares of its size.
        remove: ``"family"`` and ``"domain"``: each analogy is solved without the basis relations of its target's
            family or domain; one whose target relation the library does not know counts as unchanged.
        n_repeats: draws behind each random change.
        setting: prompts that are steered.
        epochs: of the maps.
        unseen, allow_leak, path, max_memory: as for :func:`evaluate_analogies`.
        generator: all draws.
        progress: show a bar.

    Raises:
        ValueError: as :func:`evaluate_analogies`; shares out of range; a map without ``fit``.
    """
    for name, values in (("drop", drop), ("noise", noise)):
        wrong = [share for share in values if not 0 < share < (1 if name == "drop" else float("inf"))]
        if wrong:
            bound = "between 0 and 1" if name == "drop" else "above 0"
            raise ValueError(f"basis_study: expected shares of {name} {bound}, got {wrong[0]}.")
    if merge is not None and not -1 <= merge <= 1:
        raise ValueError(f"basis_study: expected merge, a cosine, in -1..1, got {merge}.")
    strange = [what for what in remove if what not in ("family", "domain")]
    if strange:
        raise ValueError(f"basis_study: remove={strange[0]!r}; expected family or domain.")
    if n_repeats < 1:
        raise ValueError(f"basis_study: expected n_repeats of at least 1, got {n_repeats}.")
    if composite.map != "none" and not fit:
        raise ValueError(f"basis_study: a map of shape {composite.map!r} is trained anew, which needs fit analogies.")
    analogies = tuple(analogies)
    shared: dict[str, Any] = dict(settings=[setting], unseen=unseen, allow_leak=allow_leak)
    shared |= dict(path=path, max_memory=max_memory, generator=generator, progress=False)
    full = evaluate_analogies(model, analogies, composite, controls=["own vector"], **shared)
    label = setting.replace("_", "-")
    references = {
        name: full.top1(f"{name}, {label}") for name in ("unsteered", "own vector") if f"{name}, {label}" in full.scored
    }

    def solve(basis: VectorSet, asked: Sequence[Analogy]) -> tuple[Tensor, Tensor]:
        """Which are solved with this basis, and their weights."""
        if composite.map == "none":
            n = len(basis)
            changed = dataclasses.replace(composite, basis=basis, matrix=torch.eye(n), shift=torch.zeros(n), gates=())
        else:
            changed = fit_composite(
                model, basis, fit, map=composite.map, scores=composite.scores, rule=composite.rule,
                setting=composite.setting, learn_strength=composite.strength != 1, epochs=epochs,
                template=composite.template, path=path, max_memory=max_memory, generator=generator, progress=False,
            )  # fmt: skip
            changed = dataclasses.replace(finished(changed), seen=composite.seen.with_analogies(fit))
        found = evaluate_analogies(model, asked, changed, controls=[], **shared)
        return found[f"composite, {label}"].right.double(), found.weights

    seed = int(torch.randint(2**31, (1,), generator=generator))
    if composite.map == "none":
        before, weights_before = full[f"composite, {label}"].right.double(), full.weights
    else:  # by a map that is trained on `fit`, too, so that only the basis differs
        before, weights_before = solve(composite.basis, analogies)

    def change(name: str, n_basis: Sequence[int], solved: Sequence[Tensor], overlaps: Sequence[Tensor]) -> Change:
        right = torch.stack(list(solved)).mean(dim=0)
        interval = bootstrap_interval(right, generator=torch.Generator().manual_seed(seed))
        difference = paired_difference(right, before, generator=torch.Generator().manual_seed(seed))
        overlap = torch.cat(list(overlaps)).nanmean()
        mean = sum(n_basis) / len(n_basis)
        return Change(name, mean, len(n_basis), float(right.mean()), interval, difference, float(overlap))

    basis = composite.basis
    n = len(basis)
    changes = [change("full basis", [n], [before], [torch.ones(len(analogies))])]
    draws: list[tuple[str, Callable[[], tuple[VectorSet, Tensor]], int]] = [
        *((f"{share:.0%} dropped", lambda share=share: _drop(basis, share, generator), n_repeats) for share in drop),
        *([("near-duplicates merged", lambda: _merge(basis, merge), 1)] if merge is not None else []),
        *((f"{share:.0%} noise added", lambda share=share: _noise(basis, share, generator), n_repeats)
          for share in noise),
    ]  # fmt: skip
    total = sum(repeats for _, _, repeats in draws) + len(remove)
    with tqdm(total=total, disable=not progress, desc="changed bases") as bar:
        for name, draw, repeats in draws:
            sizes, solved, overlaps = [], [], []
            for _ in range(repeats):
                changed, target = draw()
                right, weights = solve(changed, analogies)
                sizes.append(len(changed))
                solved.append(right)
                overlaps.append(_overlap(weights_before @ target, weights))
                bar.update()
            changes.append(change(name, sizes, solved, overlaps))
        for what in remove:
            sizes, right, overlap = [], before.clone(), torch.ones(len(analogies))
            for left, rows in _without(basis, analogies, what):
                place = [basis.names.index(name) for name in left.names]
                right[rows], weights = solve(left, [analogies[i] for i in rows])
                overlap[rows] = _overlap(weights_before[rows][:, place], weights)
                sizes += [len(left)] * len(rows)
            sizes += [n] * (len(analogies) - len(sizes))
            changed = change(f"own {what} removed", sizes, [right], [overlap])
            changes.append(dataclasses.replace(changed, n_repeats=1))
            bar.update()
    return BasisStudy(tuple(changes), references, len(analogies), setting, composite.basis.fingerprint)


def _overlap(before: Float[Tensor, "row relation"], after: Float[Tensor, "row relation"]) -> Float[Tensor, " row"]:
    """Common mass of two sets of weights of summed size 1 each; NaN where nothing of the first is left."""
    first, second = (w / w.abs().sum(dim=1, keepdim=True) for w in (before, after))
    return torch.where(first * second > 0, torch.minimum(first.abs(), second.abs()), 0.0 * first).sum(dim=1)


def _drop(basis: VectorSet, share: float, generator: torch.Generator) -> tuple[VectorSet, Tensor]:
    n = len(basis)
    n_left = max(1, n - round(share * n))
    places = sorted(torch.randperm(n, generator=generator)[:n_left].tolist())
    return basis.select([basis.names[i] for i in places]), torch.eye(n)[:, places]


def _merge(basis: VectorSet, cosine: float) -> tuple[VectorSet, Tensor]:
    """Each vector joins the first kept one that is near enough; means take the first one's name."""
    near = basis.similarity() >= cosine
    groups: list[list[int]] = []
    for i in range(len(basis)):
        home = next((group for group in groups if bool(near[group[0], i])), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    vectors = [dataclasses.replace(basis[group[0]], vector=basis.matrix[group].mean(dim=0)) for group in groups]
    target = torch.zeros(len(basis), len(groups))
    for j, group in enumerate(groups):
        target[group, j] = 1
    return VectorSet(tuple(vectors)), target


def _noise(basis: VectorSet, share: float, generator: torch.Generator) -> tuple[VectorSet, Tensor]:
    n, extra = len(basis), max(1, round(share * len(basis)))
    scale = float(basis.matrix.norm(dim=1).mean()) / basis[0].norm()
    vectors = [
        dataclasses.replace(scale * random_vector_like(basis[0], generator), relation=f"noise {i + 1}")
        for i in range(extra)
    ]
    return VectorSet((*basis, *vectors)), torch.cat([torch.eye(n), torch.zeros(n, extra)], dim=1)


def _without(basis: VectorSet, analogies: Sequence[Analogy], what: str) -> list[tuple[VectorSet, list[int]]]:
    """Bases without the family or domain of the targets, with the analogies that each is for."""
    known = set(list_relations())

    def group(name: str) -> str:
        return getattr(load_relation(name), what) if name in known else ""

    of_basis = {name: group(name) for name in basis.names}
    of_targets = [group(one.target_relation) for one in analogies]
    found = []
    for wanted in dict.fromkeys(of_targets):
        left = [name for name in basis.names if of_basis[name] != wanted]
        if wanted and left and len(left) < len(basis):
            rows = [i for i, group_of_target in enumerate(of_targets) if group_of_target == wanted]
            found.append((basis.select(left), rows))
    return found
