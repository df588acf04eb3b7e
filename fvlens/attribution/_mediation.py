"""Computing effects: exactly by the engine, by whole passes, or screened by gradients."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from fvlens.activations import HeadMeans, Positions, position_mask
from fvlens.arguments import check_arguments
from fvlens.attribution._effects import METHODS, IndirectEffects, Method, Recheck
from fvlens.interruption import keeping
from fvlens.interventions import hooked, z_hook
from fvlens.metrics import log_probability
from fvlens.models import fingerprint, model_device, told_apart
from fvlens.progress import tqdm
from fvlens.prompts import Prompts, TokenClass, warn_of_bos, with_answers
from fvlens.screens import SCREENS, Request, Screening
from fvlens.suffix import (
    Route,
    Weights,
    check_compute,
    choose_route,
    halving,
    in_batches,
    named_precision,
    open_reader,
    plan_batch,
    plan_slices,
    run_prefix,
    why_not_kv,
)
from fvlens.types import Head

if TYPE_CHECKING:
    pass


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
    the heads of a layer together, and misses a head whose effect another one cancels.
    ``tests/test_screens_by_hand.py`` builds one model for each. ``recheck`` then helps only if the head is among the
    ``recheck`` best of the screen.

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
    check_arguments(indirect_effects, locals(), runs=True)
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
    differences = told_apart(means.fingerprint, fingerprint(model), "the means of the heads")
    if differences:
        raise ValueError(f"indirect_effects: the means come from another model ({'; '.join(differences)}).")
    warn_of_bos(model, means.template, prompts.template, "the mean of the heads", stacklevel=2)
    screen = SCREENS.get(method)
    keys = _label_tokens(prompts, method) if screen is not None and screen.by_labels else None
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
        n_steps=n_steps if screen is not None and screen.by_steps else None,
        note=note,
        batch_size=most,
        weights=work.weights[0] if work.weights else None,
        compute=named_precision(compute),
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
    if method in SCREENS and SCREENS[method].by_labels and (positions, answer) != ("last", "first"):
        raise ValueError(
            f"indirect_effects: method={method!r} scores attention from the last token by the logit of the answer's "
            f"first token; expected positions='last' and answer='first', got {positions!r} and {answer!r}."
        )


def _label_tokens(prompts: Prompts, method: str) -> Bool[Tensor, "prompt pos"]:
    """The demonstrations' label tokens."""
    keys = prompts.token_classes == int(TokenClass.DEMONSTRATION_LABEL)
    empty = int((~keys.any(dim=1)).sum())
    if empty:
        raise ValueError(
            f"indirect_effects: method={method!r} sums over the demonstrations' label tokens, but {empty} of "
            f"{len(prompts)} prompts have none (they have {prompts.n_shots} demonstrations); give prompts with "
            "demonstrations."
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

    def n_done() -> int:
        return sum(len(baseline) for _, baseline in found)

    with keeping(n_done, n_prompts, "indirect_effects", "prompts are finished", stacklevel=3):
        found.extend(batches)
    effects, baselines = zip(*found, strict=True)
    return torch.cat(effects), torch.cat(baselines), max(map(len, baselines))


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
        tokens, mask, targets = with_answers(prompts, None if answer == "whole" else 1)
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
        screen = SCREENS[method]
        plan = screening.slices(n_steps if screen.by_steps and path == "kv" else 1, self.max_memory)

        def run(rows: slice, at_once: int) -> tuple[Tensor, Tensor]:
            scores, baseline, note = screen.score(screening, rows, Request(n_steps, at_once, keys))
            if note:
                notes.append(note)
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
