"""Effects of every head: values, their order, what a screen is worth, tables and figures."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations import Positions
from fvlens.attribution._figures import Kind, check_kind, top_bars
from fvlens.interruption import marked, titled
from fvlens.metrics import Interval, spearman, top_k_overlap
from fvlens.models import Fingerprint
from fvlens.prompts import Template, get_template
from fvlens.results import Result
from fvlens.screens import SCREENS
from fvlens.showing import MOST_CELLS, MOST_ROWS, Shown, map_html, named, number, table_html
from fvlens.suffix import (
    Route,
    Weights,
)
from fvlens.types import Head, as_heads

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


Method = str
"""``"exact"``, or the name of a screen."""
METHODS: tuple[Method, ...] = ("exact", *SCREENS)


def _names(method: Method) -> tuple[str, str]:
    """Name of a method's average, and the short name beside a colour scale."""
    if method == "exact":
        return "Average indirect effect", "AIE"
    return SCREENS[method].title, SCREENS[method].short


@dataclass(frozen=True, slots=True, repr=False)
class Recheck(Shown):
    """Exact effects of the best heads of a screen.

    Attributes:
        heads: the heads, best of the screen first.
        cie: their exact causal indirect effects, in the same order.
        path: how these were computed.
    """

    heads: tuple[Head, ...]
    cie: Float[Tensor, "prompt rechecked"]
    path: Route

    @property
    def aie(self) -> Float[Tensor, " rechecked"]:
        """Exact average indirect effect of each of :attr:`heads`."""
        return self.cie.mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, " rechecked"]:
        """Standard error of :attr:`aie` over prompts (NaN for a single prompt)."""
        return standard_error(self.cie)

    def _line(self) -> str:
        return (
            f"{len(self.heads)} heads, {self.cie.shape[0]} prompts, largest exact AIE {number(float(self.aie.max()))}"
        )


@dataclass(frozen=True, slots=True, repr=False)
class ScreenQuality(Shown):
    """How well a screen's scores agree with exact effects.

    Attributes:
        spearman: rank correlation of the screen's average scores with the exact AIE; NaN if one of them is constant.
        overlap: share of the k heads with the largest AIE that are among the screen's k best scores.
        k: heads compared in ``overlap``.
        n_heads: heads that were compared.
        interval: bootstrap interval of ``spearman`` over prompts, if asked for.
        overlap_rechecked: as ``overlap``, for the screen's ranking after its recheck; None if there was none.
    """

    spearman: float
    overlap: float
    k: int
    n_heads: int
    interval: Interval | None = None
    overlap_rechecked: float | None = None

    def _line(self) -> str:
        return f"{self.n_heads} heads, Spearman {number(self.spearman)}, top-{self.k} overlap {number(self.overlap)}"


@dataclass(frozen=True, slots=True, repr=False)
class IndirectEffects(Result):
    """Causal indirect effects of every head on every prompt, or a screen's scores in their place.

    Attributes:
        cie: change of the answer's probability when the head's output is replaced; positive means that the replacement
            helps. For ``atp`` and ``ig`` its estimate, for ``lrp`` a score in logits (see :attr:`unit`).
        baseline: the answer's probability on the corrupted prompt itself.
        path: ``"weights"``, ``"kv"`` or ``"naive"``: how the effects were computed. For a screen: ``"kv"``, gradients
            of suffixes, or ``"naive"``, gradients of whole prompts.
        method: ``"exact"``, or the screen ``"atp"``, ``"ig"`` or ``"lrp"``.
        positions: where heads were patched.
        answer: ``"first"`` (probability of the answer's first token) or ``"whole"`` (of the whole answer).
        complete: False if the computation was interrupted; ``cie`` then holds the prompts that were finished.
        relation, labels, template, n_shots, data_hash: the corrupted prompts.
        fingerprint: the model.
        means_hash: hash of the prompts that the means were taken over.
        n_steps: points of ``ig``; None for the other methods.
        note: what a reader of the scores must know, such as the rules behind ``lrp``; empty for exact effects.
        recheck: exact effects of the best heads of a screen; None if there was none.
        batch_size: prompts that ran together at most; None where that is not known.
        weights: how they were held on the path ``"weights"``: ``"copied"``, or ``"laid out at each call"`` where a
            second copy does not fit the memory; None on other paths.
        compute: precision of the products, where it is not the model's own.
    """

    FORMAT: ClassVar[str] = "fvlens-effects-1"

    cie: Float[Tensor, "prompt layer head"]
    baseline: Float[Tensor, " prompt"]
    path: Route
    method: str
    positions: Positions
    answer: str
    complete: bool
    relation: str
    labels: str
    template: Template | str
    n_shots: int
    data_hash: str
    fingerprint: Fingerprint
    means_hash: str = ""
    n_steps: int | None = None
    note: str = ""
    recheck: Recheck | None = None
    batch_size: int | None = None
    weights: Weights | None = None
    compute: str | None = None

    def __post_init__(self) -> None:
        mark = self.fingerprint
        if self.cie.shape[1:] != (mark.n_layers, mark.n_heads) or not len(self.cie):
            raise ValueError(
                f"IndirectEffects: expected cie of {mark.n_layers} layers x {mark.n_heads} heads and at least one "
                f"prompt, got {tuple(self.cie.shape)}."
            )
        if self.method != "exact" and self.method not in SCREENS:
            raise ValueError(f"IndirectEffects: method={self.method!r}; expected one of exact, {', '.join(SCREENS)}.")
        if self.answer not in ("first", "whole"):
            raise ValueError(f"IndirectEffects: answer={self.answer!r}; expected first or whole.")
        if self.recheck is not None:
            as_heads(self.recheck.heads, mark.n_layers, mark.n_heads)
            if self.recheck.cie.shape != (len(self.cie), len(self.recheck.heads)):
                raise ValueError(
                    f"IndirectEffects: expected a recheck of {len(self.cie)} prompts and {len(self.recheck.heads)} "
                    f"heads, got {tuple(self.recheck.cie.shape)}."
                )
        object.__setattr__(self, "template", get_template(self.template))

    @property
    def unit(self) -> str:
        """``"probability"``, or ``"logits"`` for ``lrp``, whose scores are no changes of anything."""
        return "probability" if self.method == "exact" else SCREENS[self.method].unit

    @property
    def score(self) -> str:
        """Short name of what :attr:`aie` holds: ``"AIE"``, or the name of the screen's score."""
        return _names(self.method)[1]

    @property
    def aie(self) -> Float[Tensor, "layer head"]:
        """Average indirect effect: mean of :attr:`cie` over prompts. For a screen: the mean of its scores."""
        return self.cie.mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, "layer head"]:
        """Standard error of :attr:`aie` over prompts (NaN for a single prompt)."""
        return standard_error(self.cie)

    @property
    def exact_aie(self) -> dict[Head, float]:
        """Exact AIE of the heads for which it is known, best first: all, those of the recheck, or none of a screen's.

        Equal effects keep the order of :attr:`aie`.
        """
        if self.method == "exact":
            return {head: float(self.aie[head]) for head in self._by_score()}
        if self.recheck is None:
            return {}
        order = self.recheck.aie.argsort(descending=True, stable=True).tolist()
        return {self.recheck.heads[i]: float(self.recheck.aie[i]) for i in order}

    @property
    def ranking(self) -> list[Head]:
        """All heads, best first.

        By exact AIE where that is known of all heads. After a recheck: the rechecked heads that help, by their exact
        AIE; the heads that were not rechecked, by the screen's score; and the rechecked heads that do not help (exact
        AIE of 0 or less). Scores and effects are never compared with each other: a score may have another unit, and a
        head that was not rechecked is not known to matter.
        """
        exact = self.exact_aie
        helping = [head for head, effect in exact.items() if effect > 0]
        hurting = [head for head, effect in exact.items() if not effect > 0]
        return helping + [head for head in self._by_score() if head not in exact] + hurting

    def top(self, n: int, *, helping: bool = False) -> list[Head]:
        """The first n heads of :attr:`ranking`, best first.

        A head whose exact AIE is 0 or less is known not to help. Where fewer than n other heads are left, a warning
        says how many; :meth:`caution` gives its text without a warning.

        Args:
            n: number of heads.
            helping: only heads with a positive exact AIE, of which there may be fewer than n, or none.

        Raises:
            ValueError: n is not between 1 and the number of heads; ``helping`` of a screen without a recheck, which
                knows no exact effects.
        """
        self._check_n("top", n)
        if helping:
            if self.method != "exact" and self.recheck is None:
                raise ValueError(
                    f"top: helping=True needs exact effects, and method={self.method!r} has none; give "
                    f"indirect_effects(..., recheck={n}) or more, or method='exact'."
                )
            return [head for head, effect in self.exact_aie.items() if effect > 0][:n]
        caution = self.caution(n)
        if caution:
            warnings.warn(f"top: {caution}", stacklevel=2)
        return self.ranking[:n]

    def hurting(self, n: int) -> list[Head]:
        """Those of the n best heads that are known not to help: their exact AIE is 0 or less.

        Raises:
            ValueError: n is not between 1 and the number of heads.
        """
        self._check_n("hurting", n)
        exact = self.exact_aie
        return [head for head in self.ranking[:n] if head in exact and not exact[head] > 0]

    def caution(self, n: int) -> str:
        """What must be said of the n best heads: how many of them are known not to help; empty if none is.

        Raises:
            ValueError: n is not between 1 and the number of heads.
        """
        hurting = self.hurting(n)
        if not hurting:
            return ""
        shown = ", ".join(map(str, hurting[:5])) + (", ..." if len(hurting) > 5 else "")
        known = "rechecked heads" if self.method != "exact" else "heads"
        n_helping = sum(effect > 0 for effect in self.exact_aie.values())
        return (
            f"{len(hurting)} of the {n} best heads have an exact AIE of 0 or less ({shown}), as only {n_helping} "
            f"{known} have a positive one; take fewer heads, or only those that help, with top({n}, helping=True)."
        )

    def _by_score(self) -> list[Head]:
        """All heads by :attr:`aie`, ties in their order."""
        n_heads = self.cie.shape[2]
        order = self.aie.flatten().argsort(descending=True, stable=True).tolist()
        return [Head(i // n_heads, i % n_heads) for i in order]

    def _check_n(self, function: str, n: int) -> None:
        total = self.aie.numel()
        if not 1 <= n <= total:
            raise ValueError(f"{function}: expected n between 1 and {total} (all heads), got {n}.")

    @property
    def quality(self) -> ScreenQuality | None:
        """Agreement of a screen with the exact effects that it carries: those of its rechecked heads.

        Only the m rechecked heads are compared, with ``k = min(10, m // 2)``. As these are the best of the screen,
        their scores lie close together, and the correlation is usually lower than over all heads. Nothing is said about
        heads that the screen has missed; :meth:`compare` does. None for exact effects and with fewer than 2 rechecked
        heads.
        """
        if self.recheck is None or len(self.recheck.heads) < 2:
            return None
        scores = torch.stack([self.aie[head] for head in self.recheck.heads])
        k = min(10, len(scores) // 2)
        return ScreenQuality(
            spearman=_spearman(scores, self.recheck.aie),
            overlap=top_k_overlap(scores, self.recheck.aie, k),
            k=k,
            n_heads=len(scores),
        )

    def compare(
        self,
        exact: "IndirectEffects",
        *,
        k: int = 10,
        level: float = 0.95,
        n_resamples: int = 1000,
        generator: torch.Generator | None = None,
    ) -> ScreenQuality:
        """Agreement of a screen with the exact effects of all heads on the same prompts.

        Args:
            exact: effects by ``method="exact"``.
            k: heads compared in the overlap; no more than there are.
            level, n_resamples: of the interval.
            generator: gives an interval of the correlation: percentiles over resampled prompts, drawn alike for both
                maps. Without it there is none.

        Returns:
            :class:`ScreenQuality`, of :attr:`aie` (the screen's own scores) against ``exact.aie``.

        Raises:
            ValueError: ``exact`` was not made by ``method="exact"``, or belongs to other prompts, another model, other
                means, positions or answers; ``k`` is below 1; ``level`` is not strictly between 0 and 1;
                ``n_resamples`` is below 1.

        Example:
            >>> import torch, fvlens
            >>> model = fvlens.load_model("rel-small")
            >>> pairs = fvlens.load_relation("antonym")
            >>> g = torch.Generator().manual_seed(0)
            >>> clean = fvlens.build_prompts(model, pairs, n_prompts=4, generator=g)
            >>> shuffled = fvlens.build_prompts(model, pairs, n_prompts=2, labels="random", generator=g)
            >>> means = fvlens.mean_head_activations(model, clean, progress=False)
            >>> exact = fvlens.indirect_effects(model, shuffled, means, progress=False)
            >>> screen = fvlens.indirect_effects(model, shuffled, means, method="ig", progress=False)
            >>> screen.compare(exact).spearman > 0.5
            True
        """
        if exact.method != "exact":
            raise ValueError(f"compare: expected effects by method='exact', got method={exact.method!r}.")
        differences = [
            f"{name}: {getattr(self, name)} / {getattr(exact, name)}"
            for name in ("data_hash", "means_hash", "positions", "answer", "complete")
            if getattr(self, name) != getattr(exact, name)
        ]
        differences += self.fingerprint.differences(exact.fingerprint)
        if self.cie.shape != exact.cie.shape:
            differences.append(f"shape: {tuple(self.cie.shape)} / {tuple(exact.cie.shape)}")
        if differences:
            raise ValueError(
                f"compare: the exact effects are of something else ({'; '.join(differences)}); compute both from the "
                "same prompts and means."
            )
        if k < 1 or n_resamples < 1 or not 0 < level < 1:
            raise ValueError(
                f"compare: expected k >= 1, n_resamples >= 1 and a level between 0 and 1, got k={k}, "
                f"n_resamples={n_resamples}, level={level}."
            )
        ours, theirs = self.aie.flatten(), exact.aie.flatten()
        k = min(k, len(ours))
        found = {head.layer * self.cie.shape[2] + head.head for head in self.ranking[:k]}
        best = set(theirs.argsort(descending=True, stable=True)[:k].tolist())
        return ScreenQuality(
            spearman=_spearman(ours, theirs),
            overlap=top_k_overlap(ours, theirs, k),
            k=k,
            n_heads=len(ours),
            interval=None if generator is None else _interval(self.cie, exact.cie, level, n_resamples, generator),
            overlap_rechecked=None if self.recheck is None else len(found & best) / k,
        )

    def _line(self) -> str:
        n_prompts, n_layers, n_heads = self.cie.shape
        best = self.ranking[0]
        part = "" if self.complete else ", interrupted"
        return (
            f"{named(self.relation)}, {self.labels} labels, {self.method}: {n_prompts} prompts, {n_layers} layers x "
            f"{n_heads} heads, model {self.fingerprint.name!r}, best {best} with {self.score} "
            f"{float(self.aie[best]):.3f}{part}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        stderr = self.stderr
        rows = [(str(h), f"{float(self.aie[h]):+.4f}", number(float(stderr[h]), 4)) for h in self.ranking[:MOST_ROWS]]
        return [("head", self.score, "standard error"), *rows]

    def _repr_html_(self) -> str:
        """A small map of the effects; of a model with many heads, a table of the best."""
        if self.aie.numel() > MOST_CELLS:
            return table_html(repr(self), self._cells())
        return map_html(repr(self), self.aie.tolist(), row="layer", column="head")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a prompt and head: ``prompt, layer, head, cie, baseline``.

        After a recheck there is a column ``exact_cie``, NaN for heads that were not rechecked.
        """
        import pandas as pd

        prompt, layer, head = torch.meshgrid(*(torch.arange(n) for n in self.cie.shape), indexing="ij")
        columns = {
            "prompt": prompt.flatten().numpy(),
            "layer": layer.flatten().numpy(),
            "head": head.flatten().numpy(),
            "cie": self.cie.flatten().numpy(),
            "baseline": self.baseline[prompt.flatten()].numpy(),
        }
        if self.recheck is not None:
            exact = torch.full_like(self.cie, torch.nan)
            for i, (its_layer, its_head) in enumerate(self.recheck.heads):
                exact[:, its_layer, its_head] = self.recheck.cie[:, i]
            columns["exact_cie"] = exact.flatten().numpy()
        return marked(pd.DataFrame(columns), self.complete)

    def plot(self, *, kind: Kind = "map", n_top: int = 10, zmax: float | int | None = None) -> "Figure":
        """A figure of the effects; the best heads are those of :meth:`top`, but for those known not to help.

        Args:
            kind: ``"map"``, all heads by layer, the best outlined and named; ``"top"``, the best as bars with 95%
                intervals (1.96 standard errors over prompts); ``"prompts"``, the effects of the best on every prompt.
                Of a screen: its scores, in all three.
            n_top: number of heads; the title says how many of them do not help.
            zmax: of the map: where its scale ends; by default at the largest value, or, if one head is extreme, where
                it holds 99% of the heads.

        Raises:
            ValueError: an unknown kind; ``zmax`` of another kind than the map.
        """
        from fvlens import plots

        check_kind(kind, zmax)
        n_top = min(n_top, self.aie.numel())
        left_out = self.hurting(n_top) if n_top else []
        best = [head for head in self.ranking[:n_top] if head not in left_out]
        what = f"{self.labels} labels, {self.cie.shape[0]} prompts"
        if left_out:
            what += f"; {len(left_out)} of the {n_top} best do not help"
        title = titled(f"{_names(self.method)[0]}, {named(self.relation)} ({what})", self.complete)
        shown = best or self.ranking[: max(1, n_top)]
        if kind == "prompts":
            return plots.distribution(
                list(map(str, shown)), [self.cie[:, head.layer, head.head] for head in shown], x_title=self.score,
                title=title,
            )  # fmt: skip
        if kind == "top":
            return top_bars(shown, self.aie, self.stderr, x_title=self.score, title=title)
        hover = None
        if self.recheck is not None:
            exact = dict(zip(self.recheck.heads, self.recheck.aie.tolist(), strict=True))
            n_layers, n_heads = self.aie.shape
            heads = [[Head(layer, head) for head in range(n_heads)] for layer in range(n_layers)]
            hover = [[f"exact AIE: {exact[h]:+.4g}" if h in exact else "not rechecked" for h in row] for row in heads]
        return plots.heatmap(
            self.aie,
            stderr=self.stderr,
            outlined=best,
            title=title,
            colorbar_title=self.score,
            outlined_label="top heads" if self.recheck is None else "top heads (rechecked exactly first)",
            hover=hover,
            zmax=zmax,
        )


def standard_error(cie: Float[Tensor, " prompt *axes"]) -> Float[Tensor, " *axes"]:
    """Standard error of the mean over prompts; NaN for a single one."""
    if len(cie) < 2:
        return torch.full_like(cie[0], torch.nan)
    return cie.std(dim=0) / len(cie) ** 0.5


def _spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Rank correlation, NaN where it is undefined."""
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return float("nan")
    return spearman(a, b)


def _interval(
    a: Float[Tensor, "prompt layer head"],
    b: Float[Tensor, "prompt layer head"],
    level: float,
    n_resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Percentile bootstrap of the rank correlation of two maps over their prompts."""
    rows = torch.randint(len(a), (n_resamples, len(a)), generator=generator, device=generator.device).cpu()
    found = [_spearman(a[row].mean(dim=0).flatten(), b[row].mean(dim=0).flatten()) for row in rows]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(found, dtype=torch.float64).quantile(ends).tolist()
    return Interval(low, high, level)
