"""Causal mediation over heads: which heads carry the task.

For each prompt p~ with corrupted demonstrations and each head (l, h), the head's output is replaced by its task mean
and the change of the answer's probability is the causal indirect effect (CIE). Its mean over prompts is the average
indirect effect (AIE), by which heads are ranked. All heads and prompts are computed exactly; see :mod:`fvlens.suffix`
for why this costs little more than running the prompts once.

Gradient screens (:mod:`fvlens.screens`) estimate or replace the effect of every head by a few backward passes. They can
miss heads, so the best heads of a screen can be run again exactly (``recheck``), and a screen can be measured against
the exact map (:meth:`IndirectEffects.compare`).
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.activations import HeadMeans, Positions, position_mask
from fvlens.interventions import hooked, z_hook
from fvlens.metrics import Interval, log_probability, spearman, top_k_overlap
from fvlens.models import Fingerprint, fingerprint, model_device
from fvlens.prompts import Prompts, Template, TokenClass, get_template
from fvlens.screens import Screening, attribution_patching, integrated_gradients, relevance
from fvlens.suffix import (
    Route,
    Weights,
    check_compute,
    choose_route,
    halving,
    in_batches,
    open_reader,
    plan_batch,
    plan_slices,
    run_prefix,
    why_not_kv,
)
from fvlens.types import Head

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


Method = Literal["exact", "atp", "ig", "lrp"]
METHODS: tuple[Method, ...] = ("exact", "atp", "ig", "lrp")
_NAMES = {
    "exact": ("Average indirect effect", "AIE"),
    "atp": ("Attribution patching", "AtP"),
    "ig": ("Integrated gradients", "IG"),
    "lrp": ("Attention relevance (LRP, in logits)", "LRP relevance"),
}
"""Method -> name of its average, and the short name beside a colour scale."""


@dataclass(frozen=True, slots=True)
class Recheck:
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
        return _standard_error(self.cie)


@dataclass(frozen=True, slots=True)
class ScreenQuality:
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


@dataclass(frozen=True, slots=True)
class IndirectEffects:
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
        object.__setattr__(self, "template", get_template(self.template))

    @property
    def unit(self) -> str:
        """``"probability"``, or ``"logits"`` for ``lrp``, whose scores are no changes of anything."""
        return "logits" if self.method == "lrp" else "probability"

    @property
    def score(self) -> str:
        """Short name of what :attr:`aie` holds: ``"AIE"``, or the name of the screen's score."""
        return _NAMES[self.method][1]

    @property
    def aie(self) -> Float[Tensor, "layer head"]:
        """Average indirect effect: mean of :attr:`cie` over prompts. For a screen: the mean of its scores."""
        return self.cie.mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, "layer head"]:
        """Standard error of :attr:`aie` over prompts (NaN for a single prompt)."""
        return _standard_error(self.cie)

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
        return pd.DataFrame(columns)

    def plot(self, *, n_top: int = 10) -> "go.Figure":
        """Heatmap of the AIE, layer by head, the ``n_top`` best heads outlined; of a screen, its mean scores by name.

        Outlined are the heads of :meth:`top`, but for those that are known not to help; the title says how many these
        are. After a recheck the hover text gives the exact AIE.
        """
        from fvlens import plots

        n_top = min(n_top, self.aie.numel())
        what = f"{self.labels} labels, {self.cie.shape[0]} prompts"
        hover = None
        if self.recheck is not None:
            exact = dict(zip(self.recheck.heads, self.recheck.aie.tolist(), strict=True))
            n_layers, n_heads = self.aie.shape
            heads = [[Head(layer, head) for head in range(n_heads)] for layer in range(n_layers)]
            hover = [[f"exact AIE: {exact[h]:+.4g}" if h in exact else "not rechecked" for h in row] for row in heads]
        left_out = self.hurting(n_top)
        if left_out:
            what += f"; {len(left_out)} of the {n_top} best do not help"
        return plots.heatmap(
            self.aie,
            stderr=self.stderr,
            outlined=[head for head in self.ranking[:n_top] if head not in left_out],
            title=f"{_NAMES[self.method][0]}, {self.relation or 'custom pairs'} ({what})",
            colorbar_title=self.score,
            outlined_label="top heads" if self.recheck is None else "top heads (rechecked exactly first)",
            hover=hover,
        )


def _standard_error(cie: Float[Tensor, " prompt *axes"]) -> Float[Tensor, " *axes"]:
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


def indirect_effects(
    model: Any,
    prompts: Prompts,
    means: HeadMeans,
    *,
    method: Method = "exact",
    recheck: int = 0,
    n_steps: int = 8,
    positions: Positions | None = None,
    answer: Literal["first", "whole"] = "first",
    path: Route | None = None,
    max_memory: int | None = None,
    compute: torch.dtype | None = None,
    progress: bool = True,
) -> IndirectEffects:
    """Causal indirect effect of every head on corrupted prompts, exactly or screened by gradients.

    ``CIE(l, h | p~) = P(y | p~, z_{l,h} := mean z_{l,h}) - P(y | p~)``, with P the probability of the answer's first
    token [paper]. The standard error over prompts is ours.

    ``method`` gives the exact effects (the default) or one of the scores of :mod:`fvlens.screens`:

    * ``"atp"``: ``(mean z - z~) . dP(y)/dz~`` at the patched positions; one forward and one backward pass.
    * ``"ig"``: the same with the gradient averaged over ``n_steps`` midpoints of the line from z~ to mean z, all heads
      of one layer moved together; ``n_steps`` backward passes a layer.
    * ``"lrp"``: ``sum_k max(0, A dlogit_y/dA)`` of the attention from the last token to the demonstrations' label
      tokens k, under AttnLRP rules (norm scales constant, activation functions as constant ratios, half the gradient to
      each factor of a product, softmax by its plain gradient; see :func:`~fvlens.screens.relevance_rules`). Unit:
      logits. Only the label tokens as keys are our variant [choice]. ``note`` says which rules were applied.

    What a screen saves depends on the number of heads. Counted in tokens that pass through the model, with T tokens a
    prompt, L layers, H heads a layer and a backward pass as two forward ones, exact effects cost ``T + L H / 2``,
    ``atp`` and ``lrp`` ``T + 3``, and ``ig`` ``T + 3 L m / 2`` with m steps, so that ``ig`` pays only beyond ``3 m``
    heads a layer.

    Screens give false negatives. ``atp`` sees the slope at z~ only: it misses a head behind an attention pattern that
    is saturated (a slope of nearly 0 and a large change further on), and a head whose direct effect and effect through
    the MLPs and layers behind it cancel at first order. ``ig`` follows the line to mean z and finds both; but it moves
    the heads of a layer together, and misses a head whose effect another one cancels. ``tests/test_screens.py`` builds
    one model for each. ``recheck`` then helps only if the head is among the ``recheck`` best of the screen.

    Args:
        model: the model.
        prompts: corrupted prompts, usually ``labels="permuted"``, about 25.
        means: task means of the head outputs from :func:`~fvlens.mean_head_activations`.
        method: ``"exact"``, every head patched in turn; ``"atp"``, ``"ig"`` or ``"lrp"``.
        recheck: with a screen, so many of its best heads are run again exactly, and ranked first by
            :meth:`IndirectEffects.top`.
        n_steps: points of ``"ig"``.
        positions: where heads are patched; by default where ``means`` were taken (``"last"`` in the paper). ``"lrp"``
            takes ``"last"`` only.
        answer: score the answer's ``"first"`` token, or the ``"whole"`` answer (teacher-forced; patched at the prompt).
            ``"lrp"`` takes ``"first"`` only.
        path: insist on ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest that is exact for the model. A
            screen runs suffixes by ``"kv"`` or whole prompts by ``"naive"``.
        max_memory: bytes for activations; by default 1 GiB on a CPU and 8 GiB on a GPU, or a quarter of what is free
            where that is less and fewer prompts must run together, with a warning. On a CPU the process may hold up to
            2.5 times as much, as the C library keeps what is given back (at most a tenth above the bound with
            ``MALLOC_MMAP_THRESHOLD_=65536`` in the environment). Where memory runs out all the same, fewer prompts
            (then fewer copies of each) go through together, with a warning.
        compute: precision of products, such as ``torch.bfloat16`` for a float32 model, whose residual stream and sums
            stay in float32 (exact effects by ``"weights"`` only): about twice as fast on some machines, and less exact;
            None for the model's own.
        progress: show a progress bar. Interrupting returns the prompts that are finished, with a warning.

    Returns:
        :class:`IndirectEffects`; effects are differences of probabilities, in [-1, 1], positive where patching helps
        (estimates may leave that range; ``lrp`` scores are logits of at least 0).

    Raises:
        ValueError: unknown method, positions, answer or path; a screen by ``path="weights"``; a recheck of exact
            effects or of more heads than there are; fewer than 1 step; ``lrp`` with other positions or answers, or on
            prompts without demonstrations; means of another model or of other positions; a memory bound too small for
            one prompt; ``compute`` with a screen, on another path, or for a model that is not float32.
        RuntimeError: a screen found that a layer's hook never ran, or that what it changes has no effect.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small")
        >>> pairs = fvlens.load_relation("antonym")
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, pairs, n_prompts=8, generator=g)
        >>> shuffled = fvlens.build_prompts(model, pairs, n_prompts=4, labels="permuted", generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> effects = fvlens.indirect_effects(model, shuffled, means, progress=False)
        >>> effects.path, len(effects.top(10))
        ('weights', 10)
        >>> screen = fvlens.indirect_effects(model, shuffled, means, method="atp", recheck=5, progress=False)
        >>> screen.path, len(screen.recheck.heads)
        ('kv', 5)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3, equations 4 and 5. Attribution patching and its failures:
        Kramar et al. 2024, arXiv:2403.00745. Integrated gradients: Sundararajan et al. 2017, arXiv:1703.01365, section
        3. AttnLRP: Achtibat et al. 2024, arXiv:2402.05602, section 3; relevance of heads: arXiv:2606.05079.
    """
    if method not in METHODS:
        raise ValueError(f"indirect_effects: method={method!r}; expected one of {', '.join(METHODS)}.")
    if answer not in ("first", "whole"):
        raise ValueError(f"indirect_effects: answer={answer!r}; expected 'first' or 'whole'.")
    positions = means.positions if positions is None else positions
    if positions != means.positions:
        raise ValueError(
            f"indirect_effects: positions={positions!r}, but the means were taken at {means.positions!r}; "
            f"call mean_head_activations(..., positions={positions!r})."
        )
    n_cells = model.cfg.n_layers * model.cfg.n_heads
    _check_screen(method, recheck, n_steps, n_cells, positions, answer, path)
    differences = fingerprint(model).differences(means.fingerprint)
    if differences:
        raise ValueError(f"indirect_effects: the means come from another model ({'; '.join(differences)}).")
    keys = _label_tokens(prompts) if method == "lrp" else None
    chosen, reason = choose_route(model, path)
    check_compute("indirect_effects", model, chosen, compute)
    if compute is not None and method != "exact":
        raise ValueError(f"indirect_effects: compute={compute} is for method='exact', but this is {method!r}.")
    if chosen == "naive" and path is None and (method == "exact" or recheck):
        warnings.warn(f"indirect_effects takes the naive path, one forward pass a head ({reason}).", stacklevel=2)

    work = _Work.of(prompts, means, positions, answer, max_memory, compute, progress)
    cells = [Head(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    screen_path, note = chosen, ""
    if method == "exact":
        effects, baseline, most = _gathered(work.exact(model, cells, chosen), len(prompts))
        effects = effects.unflatten(1, (model.cfg.n_layers, model.cfg.n_heads))
    else:
        screen_path = _gradient_path(model, path)
        notes: list[str] = []
        effects, baseline, most = _gathered(work.screen(model, method, screen_path, n_steps, keys, notes), len(prompts))
        note = notes[0] if notes else ""
    complete = len(effects) == len(prompts)
    found = IndirectEffects(
        cie=effects,
        baseline=baseline,
        path=screen_path,
        method=method,
        positions=positions,
        answer=answer,
        complete=complete,
        relation=prompts.relation,
        labels=prompts.labels,
        template=prompts.template,
        n_shots=prompts.n_shots,
        data_hash=prompts.data_hash,
        fingerprint=means.fingerprint,
        means_hash=means.data_hash,
        n_steps=n_steps if method == "ig" else None,
        note=note,
        batch_size=most,
        weights=work.weights[0] if work.weights else None,
        compute=None if compute is None else str(compute).removeprefix("torch."),
    )
    if not (recheck and complete):
        return found
    best = found.ranking[:recheck]
    in_order = sorted(best)
    exact, _, _ = _gathered(work.exact(model, in_order, chosen), len(prompts))
    if len(exact) < len(prompts):  # interrupted: a part of the recheck would not fit the screen
        return dataclasses.replace(found, complete=False)
    columns = [in_order.index(head) for head in best]
    return dataclasses.replace(found, recheck=Recheck(tuple(best), exact[:, columns], chosen))


def _check_screen(
    method: str, recheck: int, n_steps: int, n_cells: int, positions: Positions, answer: str, path: Route | None
) -> None:
    """Refuse settings that do not go with the method."""
    if method == "exact" and recheck:
        raise ValueError(
            f"indirect_effects: recheck={recheck} runs the best heads of a screen again; method='exact' needs none, "
            "leave it out."
        )
    if not 0 <= recheck <= n_cells:
        raise ValueError(
            f"indirect_effects: expected recheck between 0 and {n_cells} (all heads), got {recheck}; about twice the "
            "heads that are wanted is usual."
        )
    if n_steps < 1:
        raise ValueError(f"indirect_effects: expected n_steps >= 1, got {n_steps}; 8 is usual.")
    if method != "exact" and path == "weights":
        raise ValueError(
            f"indirect_effects: path='weights' has no hooks to take the gradients of method={method!r} at; use "
            "path=None, 'kv' or 'naive'."
        )
    if method == "lrp" and (positions, answer) != ("last", "first"):
        raise ValueError(
            "indirect_effects: method='lrp' scores attention from the last token by the logit of the answer's first "
            f"token; expected positions='last' and answer='first', got {positions!r} and {answer!r}."
        )


def _label_tokens(prompts: Prompts) -> Bool[Tensor, "prompt pos"]:
    """The demonstrations' label tokens."""
    keys = prompts.token_classes == int(TokenClass.DEMONSTRATION_LABEL)
    empty = int((~keys.any(dim=1)).sum())
    if empty:
        raise ValueError(
            f"indirect_effects: method='lrp' sums over the demonstrations' label tokens, but {empty} of {len(prompts)} "
            f"prompts have none (they have {prompts.n_shots} demonstrations); give prompts with demonstrations."
        )
    return keys


def _gradient_path(model: Any, path: Route | None) -> Route:
    """Gradients of suffixes where the model's own blocks can run them, else of whole prompts."""
    if path is not None:
        return path
    return "kv" if why_not_kv(model) is None else "naive"


def _gathered(batches: Iterable[tuple[Tensor, Tensor]], n_prompts: int) -> tuple[Tensor, Tensor, int]:
    """All batches, and the size of the largest; if interrupted, those that are finished."""
    found: list[tuple[Tensor, Tensor]] = []
    try:
        found.extend(batches)
    except KeyboardInterrupt:
        if not found:
            raise
        done = sum(len(baseline) for _, baseline in found)
        warnings.warn(f"indirect_effects was interrupted: {done} of {n_prompts} prompts are finished.", stacklevel=3)
    effects, baselines = zip(*found, strict=True)
    return torch.cat(effects), torch.cat(baselines), max(map(len, baselines))


def _with_answers(prompts: Prompts, answer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens to run, their mask, and the next token wanted at each position (-1: not scored)."""
    n_answer = prompts.answer_tokens.shape[1] if answer == "whole" else 1
    given = prompts.answer_tokens[:, : n_answer - 1]
    # padding behind a short answer: attended by nobody that is scored, so any token will do
    tokens = torch.cat([prompts.tokens, given.clamp(min=0)], dim=1)
    mask = torch.cat([prompts.attention_mask, torch.ones_like(given)], dim=1)
    targets = torch.full_like(tokens, -1)
    targets[:, prompts.tokens.shape[1] - 1 :] = prompts.answer_tokens[:, :n_answer]
    return tokens, mask, targets


@dataclass(frozen=True, slots=True)
class _Work:
    """Tokens to run, what is patched and scored in them; each method gives batches of effects and baselines."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor
    patched: Tensor
    means: HeadMeans
    max_memory: int | None
    compute: torch.dtype | None
    progress: bool
    weights: list[Weights] = dataclasses.field(default_factory=list)  # as the weights were held, once that is known

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        means: HeadMeans,
        positions: Positions,
        answer: str,
        max_memory: int | None,
        compute: torch.dtype | None,
        progress: bool,
    ) -> "_Work":
        tokens, mask, targets = _with_answers(prompts, answer)
        n_extra = tokens.shape[1] - prompts.tokens.shape[1]
        patched = torch.nn.functional.pad(position_mask(prompts, positions), (0, n_extra))
        return cls(tokens, mask, targets, patched, means, max_memory, compute, progress)

    def exact(self, model: Any, cells: Sequence[Head], path: Route) -> Iterator[tuple[Tensor, Tensor]]:
        """Effects ``[prompt cell]`` of these heads, sorted by layer, and baselines."""
        with self._bar(len(self.tokens) * len(cells)) as bar:
            run = _naive if path == "naive" else _fast
            yield from run(self, model, cells, path, bar)

    def screen(
        self, model: Any, method: str, path: Route, n_steps: int, keys: Tensor | None, notes: list[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores ``[prompt layer head]`` and baselines; ``notes`` gets what must be said about them."""
        z = self.means.z
        screening = Screening(model, self.tokens, self.mask, self.targets, self.patched, z, path)
        plan = screening.slices(n_steps if method == "ig" and path == "kv" else 1, self.max_memory)

        def run(rows: slice, at_once: int) -> tuple[Tensor, Tensor]:
            if method == "atp":
                return attribution_patching(screening, rows)
            if method == "ig":
                return integrated_gradients(screening, rows, n_steps=n_steps, at_once=at_once)
            assert keys is not None
            scores, baseline, missing = relevance(screening, rows, keys)
            text = "AttnLRP rules for norms, activation functions, gates and attention products"
            notes.append(text + (f"; plain gradient instead: {missing}" if missing else ""))
            return scores, baseline

        slices = plan.over_prompts(len(self.tokens))
        with self._bar(len(self.tokens)) as bar:
            for scores, baseline in halving(run, slices, variants=plan.variants, what="indirect_effects"):
                bar.update(len(baseline))
                yield scores, baseline

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, desc="indirect effects", disable=not self.progress, leave=False)


def _fast(work: _Work, model: Any, cells: Sequence[Head], path: Route, bar: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """CIE and baseline of the prompts, batch by batch, on the fast path."""
    device = model_device(model)
    n_pos = work.tokens.shape[1]
    n_suffix = n_pos - int(work.patched.any(dim=0).nonzero()[0])
    values = torch.stack([work.means.z[cell] for cell in cells]).to(device, model.cfg.dtype)
    targets, patched = work.targets[:, -n_suffix:].to(device), work.patched[:, -n_suffix:].to(device)
    plan = plan_slices(
        model, n_pos=n_pos, n_suffix=n_suffix, n_variants=len(cells), path=path, max_memory=work.max_memory,
        compute=work.compute, n_prompts=len(work.tokens),
    )  # fmt: skip
    if path == "weights":
        work.weights.append(plan.weights)
    options: dict[str, Any] = dict(n_suffix=n_suffix, path=path, copied=plan.copied, compute=work.compute)

    def run(rows: slice, at_once: int) -> tuple[Tensor, Tensor]:
        bar.n = rows.start * len(cells)  # a slice that did not fit begins anew
        with torch.inference_mode():
            kept = run_prefix(model, work.tokens[rows], work.mask[rows], **options)

            def probability(resid: Tensor) -> Tensor:
                return kept.log_probs(resid, targets[rows], at_once=plan.logits).sum(dim=-1).exp()

            base = probability(kept.resid_final[:, None])  # [prompt 1]
            found = []
            for part in dataclasses.replace(plan, variants=at_once).over_variants(len(cells)):
                found.append(probability(kept.patched(cells[part], values[part], patched[rows])))
                bar.update(len(base) * (part.stop - part.start))
            cie = torch.cat(found, dim=1) - base
        return cie.cpu().clone(), base[:, 0].cpu().clone()

    yield from halving(run, plan.over_prompts(len(work.tokens)), variants=plan.variants, what="indirect_effects")


def _naive(work: _Work, model: Any, cells: Sequence[Head], path: Route, bar: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """CIE and baseline by one hooked forward pass a head: slow, but it works for every model."""
    device = model_device(model)
    n_pos = work.tokens.shape[1]
    n_read = n_pos - int((work.targets >= 0).any(dim=0).nonzero()[0])
    size = plan_batch(model, n_pos=n_pos, n_read=n_read, max_memory=work.max_memory, n_prompts=len(work.tokens))
    values = work.means.z.to(device, model.cfg.dtype)

    def probability(rows: slice, cell: Head | None) -> Tensor:
        where = work.patched[rows].to(device)

        def replace(z: Tensor) -> Tensor:
            assert cell is not None
            z = z.clone()
            z[:, :, cell.head] = torch.where(
                where.to(z.device)[..., None], values[cell].to(z.device), z[:, :, cell.head]
            )
            return z

        with hooked(model, {} if cell is None else {z_hook(cell.layer): replace}):
            tokens, mask = work.tokens[rows].to(device), work.mask[rows].to(device)
            logits = open_reader(model, len(tokens), keep=False).read(tokens, mask, n_read=n_read)
        wanted = work.targets[rows, -n_read:].to(logits.device)
        logs = log_probability(logits, wanted.clamp(min=0))
        return torch.where(wanted < 0, torch.zeros_like(logs), logs).sum(dim=-1).exp()

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        bar.n = rows.start * len(cells)
        with torch.inference_mode():
            base = probability(rows, None)
            cie = torch.empty(len(base), len(cells))
            for i, cell in enumerate(cells):
                cie[:, i] = (probability(rows, cell) - base).cpu()
                bar.update(len(base))
        return cie.clone(), base.cpu().clone()

    yield from in_batches(run, len(work.tokens), size, what="indirect_effects")
