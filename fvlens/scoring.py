"""What does the model say to these prompts under these changes?

Every score in the package is an answer to this question: an evaluation asks it of one vector, a sweep of one vector at
many layers, a table of controls of thirty vectors, a composite of every basis vector. So there is one function,
:func:`score`, for all of them.

1. *Groups.* Prompts go in groups by the length of their answer, so that none is padded to the longest.
2. *Once.* Each group's prompts run once, in slices that fit the memory.
3. *Changes.* All changes of all prompts of a slice go up together, each from its first changed layer
   (:meth:`fvlens.suffix.SuffixRun.under`).
4. *Outcomes.* At the prompt's last token the rank and log-probability of the answer's first token and the best token;
   behind it the ranks and log-probabilities of the answer's other tokens, given those before.

Where that is not exact (hooks of the user's, an architecture without an exact route, a steering at a hook that the
engine has no site for), whole passes under hooks give the same numbers, one change after another; the result's ``path``
says so. These whole passes are the standing oracle of the engine: ``path="naive"`` asks for them.

One definition of right: the rank of an answer's token counts the tokens with a larger logit, and those with an equal
logit and a smaller id. Right means rank 0, so predictions, ranks and ``argmax`` never disagree. A whole answer is right
if each of its tokens is, given those before: then, and only then, the model writes it greedily.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.interruption import keeping
from fvlens.interventions import checked_additions, hooked, inject, resid_hook, resid_pre_hook, z_hook
from fvlens.metrics import best_token, is_best, log_probability, rank
from fvlens.models import model_device
from fvlens.progress import tqdm
from fvlens.prompts import Prompts, Template, warn_of_bos, with_answers
from fvlens.results import Result
from fvlens.showing import number
from fvlens.suffix import (
    Edit,
    Reader,
    Route,
    Site,
    Slices,
    Variant,
    Weights,
    check_compute,
    choose_route,
    halving,
    open_reader,
    plan_batch,
    plan_slices,
    rows_of,
    run_prefix,
)
from fvlens.types import HeadLike, Steering, as_heads

Change = Steering | Variant | None
"""What is done to the model: a steering, such as a ``FunctionVector``; edits of the prompt's last token; or nothing."""


@dataclass(frozen=True, slots=True, repr=False)
class Scores(Result):
    """What the model says to every prompt under every change.

    Attributes:
        ranks: how many tokens come before the answer's first token; 0 means right.
        first: log-probability of the answer's first token, in nats.
        rest: log-probability of its other tokens, given those before, in nats, summed; 0 for answers of one token.
        best: the most likely next token.
        exact: True where every token of the answer is the most likely one given those before, so that the model writes
            the whole answer greedily.
        prompts: the prompts that these columns belong to; all of them unless interrupted.
        path: ``"weights"``, ``"kv"`` or ``"naive"``: how they were computed.
        batch_size: prompts that ran together at most.
        weights: how they were held on the path ``"weights"``: ``"copied"``, or ``"laid out at each call"`` where a
            second copy does not fit the memory; None on other paths.
        complete: False if interrupted; ``prompts`` are those that were finished under every change.
    """

    FORMAT: ClassVar[str] = "fvlens-scores-1"

    ranks: Int[Tensor, "change prompt"]
    first: Float[Tensor, "change prompt"]
    rest: Float[Tensor, "change prompt"]
    best: Int[Tensor, "change prompt"]
    exact: Bool[Tensor, "change prompt"]
    prompts: Int[Tensor, " prompt"]
    path: Route
    batch_size: int
    weights: Weights | None = None
    complete: bool = True

    @property
    def whole(self) -> Float[Tensor, "change prompt"]:
        """Log-probability of the whole answer, in nats."""
        return self.first + self.rest

    def _line(self) -> str:
        right = ", ".join(number(share) for share in (self.ranks == 0).double().mean(dim=1).tolist()[:5])
        more = ", ..." if len(self.ranks) > 5 else ""
        return f"{self.ranks.shape[0]} changes of {self.ranks.shape[1]} prompts, top1: {right}{more}, path {self.path}"


def score(
    model: Any,
    prompts: Prompts,
    changes: Sequence[Change],
    *,
    scales: Sequence[float | int] | float | int = 1.0,
    path: Route | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    compute: torch.dtype | None = None,
    check: bool = True,
    progress: bool = False,
    interruptible: bool = False,
    what: str = "score",
) -> Scores:
    """Rank, probability and prediction of every prompt's answer under every change.

    ``first = log P(y_1 | prompt)``, ``rest = sum over i > 1 of log P(y_i | prompt, y_<i)``, ``exact = [every y_i has
    rank 0 given prompt, y_<i]``, under a change of the activations at the prompt's last token alone.

    Args:
        model: the model.
        prompts: the prompts, with their answers.
        changes: what is done to it, one row of the result each; None for the model as it is.
        scales: factor on each change's vectors, or one for all; changes given as edits take 1 only.
        path: insist on ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest that is exact for the model and
            the changes.
        batch_size: prompts that run together at most; by default from the memory plan.
        max_memory: bytes for activations; by default 1 GiB on a CPU and 8 GiB on a GPU, or a quarter of what is free
            where that is less and fewer prompts must run together, with a warning.
        compute: precision of the engine's products, such as ``torch.bfloat16`` for a float32 model, whose residual
            stream and sums stay in float32 (path ``"weights"`` only); None for the model's own.
        check: ask steerings whether they were made on this model.
        progress: show a progress bar.
        interruptible: an interruption returns the prompts that are finished under every change, with a warning.
        what: the function that the user called, for messages.

    Returns:
        :class:`Scores`, on the CPU.

    Raises:
        ValueError: no changes or no scale for each; a change that does not fit the model or the prompts, or was made on
            another model; unknown ``path``, or one that is not exact here; ``batch_size`` below 1; ``compute`` on
            another path or for a model that is not float32.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> pairs = fvlens.load_relation("antonym").pairs[:8]
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(model, pairs, n_shots=0, generator=g)
        >>> score(model, prompts, [None]).ranks.shape
        torch.Size([1, 8])

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (first token); the whole answer and the tie rule are ours.
    """
    if not changes:
        raise ValueError(f"{what}: expected at least one change (None for the model as it is), got none.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{what}: expected batch_size of at least 1, got {batch_size}.")
    each = [float(s) for s in scales] if isinstance(scales, Sequence) else [float(scales)] * len(changes)
    if len(each) != len(changes):
        raise ValueError(f"{what}: {len(each)} scales for {len(changes)} changes; give one each, or one for all.")
    chosen, _ = choose_route(model, path)
    note_other_bos(model, prompts, changes, stacklevel=4)
    variants = None
    if chosen != "naive":
        asked: set[int] = set()  # fingerprints that were compared already; vectors of one origin share theirs
        made = []
        with torch.no_grad():
            for change, scale in zip(changes, each, strict=True):
                mark = id(getattr(change, "fingerprint", None) or change)
                made.append(as_edits(model, change, scale, len(prompts), check=check and mark not in asked))
                asked.add(mark)
        variants = [variant for variant in made if variant is not None]
        if len(variants) < len(made):
            if path is not None:
                raise ValueError(
                    f"{what}: path={path!r} has no site for a hook that a change steers; use path=None or 'naive'."
                )
            chosen, variants = "naive", None
    check_compute(what, model, chosen, compute)
    with tqdm(total=len(prompts) * len(changes), desc=what, disable=not progress, leave=False) as bar:
        if variants is None:
            work = _by_whole_passes(model, prompts, changes, each, batch_size, max_memory, check, what)
        else:
            work = _by_suffix(model, prompts, variants, chosen, batch_size, max_memory, compute, what)
        return _gathered(work, len(prompts), len(changes), chosen, bar, interruptible, what)


def note_other_bos(model: Any, prompts: Prompts, changes: Sequence[Any], *, stacklevel: int) -> None:
    """Warn of changes that were made on prompts with other tokens in front than these have; once a policy."""
    templates = [getattr(change, "template", None) for change in changes]
    policies = {template.bos: template for template in templates if isinstance(template, Template)}
    for template in policies.values():
        warn_of_bos(model, template, prompts.template, "a vector", stacklevel=stacklevel)


@dataclass(frozen=True, slots=True)
class _Part:
    """Outcomes of some prompts under every change: ``[change prompt]`` each, in the order of the fields above."""

    weights: Weights | None
    prompts: Int[Tensor, " prompt"]
    ranks: Int[Tensor, "change prompt"]
    first: Float[Tensor, "change prompt"]
    rest: Float[Tensor, "change prompt"]
    best: Int[Tensor, "change prompt"]
    exact: Bool[Tensor, "change prompt"]


def _gathered(
    parts: Iterator[_Part], n_prompts: int, n_changes: int, path: Route, bar: Any, interruptible: bool, what: str
) -> Scores:
    """The parts in the order of the prompts."""
    done: list[_Part] = []

    def n_done() -> int:
        return sum(len(part.prompts) for part in done)

    least = 1 if interruptible else n_prompts + 1
    with (
        keeping(n_done, n_prompts, what, "queries are finished", stacklevel=4, least=least) as loop,
        torch.no_grad(),
    ):
        for part in parts:
            done.append(part)
            bar.update(len(part.prompts) * n_changes)
    places = torch.cat([part.prompts for part in done])
    order = places.argsort()
    ranks, first, rest, best, exact = (
        torch.cat([getattr(part, name) for part in done], dim=1)[:, order]
        for name in ("ranks", "first", "rest", "best", "exact")
    )
    largest = max(len(part.prompts) for part in done)
    held: list[Weights | None] = sorted({part.weights for part in done}, key=str)  # "copied" first
    return Scores(ranks, first, rest, best, exact, places[order], path, largest, held[-1], loop.complete)


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


# --- through the engine ---


def by_answer_length(prompts: Prompts) -> dict[int, Int[Tensor, " prompt"]]:
    """Number of answer tokens -> the prompts whose answers have so many."""
    lengths = prompts.answer_mask.sum(dim=1)
    return {n: (lengths == n).nonzero().flatten() for n in sorted(set(lengths.tolist()))}


def _by_suffix(
    model: Any,
    prompts: Prompts,
    variants: Sequence[Variant],
    path: Route,
    batch_size: int | None,
    max_memory: int | None,
    compute: torch.dtype | None,
    what: str,
) -> Iterator[_Part]:
    """All changes of a slice of prompts together, slice after slice."""
    n_layers = model.cfg.n_layers
    starts = [edit.layer + (edit.site == "resid_post") for variant in variants for edit in variant]
    kept: dict[str, Any] = dict(
        from_layer=min(starts, default=n_layers), keep_z=any(edit.site == "z" for own in variants for edit in own)
    )
    warn = True
    for n_answer, index in by_answer_length(prompts).items():
        group = prompts if len(index) == len(prompts) else prompts.select(index.tolist())
        asked = _Group.of(group, n_answer, [rows_of([variant], index)[0] for variant in variants])
        planned: dict[str, Any] = kept if path == "weights" else {}
        plan = plan_slices(
            model, n_pos=asked.tokens.shape[1], n_suffix=n_answer, n_variants=len(variants), path=path,
            max_memory=max_memory, compute=compute, n_prompts=len(index), warn=warn and batch_size is None, **planned,
        )  # fmt: skip
        warn = False  # once is enough
        plan = dataclasses.replace(plan, prompts=min(plan.prompts, batch_size or plan.prompts))
        options = dict(path=path, copied=plan.copied, compute=compute, **kept)
        work = functools.partial(asked.outcomes, model, plan, options)
        for rows, part in halving(work, plan.over_prompts(len(group)), variants=plan.variants, what=what):
            yield _Part(plan.weights if path == "weights" else None, index[rows], *part)


@dataclass(frozen=True, slots=True)
class _Group:
    """Prompts whose answers have the same length, without needless padding, and the changes of them."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Int[Tensor, "prompt pos"]
    targets: Int[Tensor, "prompt answer_pos"]
    variants: Sequence[Variant]

    @classmethod
    def of(cls, prompts: Prompts, n_answer: int, variants: Sequence[Variant]) -> "_Group":
        tokens, mask, _ = with_answers(prompts, n_answer)
        width = int(mask.sum(dim=1).max())
        return cls(tokens[:, -width:], mask[:, -width:], prompts.answer_tokens[:, :n_answer], variants)

    def outcomes(
        self, model: Any, plan: Slices, options: Mapping[str, Any], rows: slice, at_once: int
    ) -> tuple[slice, list[Tensor]]:
        """Of some prompts, under every change: ranks, first and rest, best token, exact, ``[change prompt]`` each."""
        n_answer = self.targets.shape[1]
        prefix = run_prefix(model, self.tokens[rows], self.mask[rows], n_suffix=n_answer, **options)
        variants = rows_of(self.variants, rows)
        parts = []
        for some in dataclasses.replace(plan, variants=at_once).over_variants(len(variants)):
            resid = prefix.under(variants[some])
            ranks, first, best = prefix.outcomes(resid[:, :, 0], self.targets[rows, 0], at_once=plan.logits)
            rest, exact = torch.zeros_like(first), ranks == 0
            for place in range(1, n_answer):
                later, logs, _ = prefix.outcomes(resid[:, :, place], self.targets[rows, place], at_once=plan.logits)
                rest, exact = rest + logs, exact & (later == 0)
            parts.append((ranks.T, first.T, rest.T, best.T, exact.T))
        return rows, [torch.cat(kind) for kind in zip(*parts, strict=True)]


# --- by whole passes ---


def _by_whole_passes(
    model: Any,
    prompts: Prompts,
    changes: Sequence[Change],
    scales: Sequence[float],
    batch_size: int | None,
    max_memory: int | None,
    check: bool,
    what: str,
) -> Iterator[_Part]:
    """One change after another, under hooks: the prompts, then the tokens of longer answers over what was kept."""
    lengths = prompts.answer_mask.sum(dim=1)

    def under(change: Change, scale: float, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n_answer = int(lengths[rows].max())
        batch = Batch.of(model, prompts, rows, keep=n_answer > 1)
        with changed(model, change, scale, rows, len(prompts), check=check):
            logits = batch.first()
        answers = prompts.answer_tokens[rows].to(logits.device)
        first = log_probability(logits, answers[:, 0])
        places = rank(logits, answers[:, 0])
        rest, exact = torch.zeros_like(first), places == 0
        if n_answer > 1:
            given, wanted = answers[:, : n_answer - 1], answers[:, 1:n_answer]
            counted = wanted >= 0
            # padding behind a short answer: masked, and read by nobody
            longer = batch.reader.read(given.clamp(min=0), (given >= 0).to(batch.mask.dtype), n_read=n_answer - 1)
            rest = (log_probability(longer, wanted.clamp(min=0)) * counted).sum(dim=1)
            exact = exact & (is_best(longer, wanted.clamp(min=0)) | ~counted).all(dim=1)
        return places.cpu(), first.cpu(), rest.cpu(), best_token(logits).cpu(), exact.cpu()

    def run(rows: slice, _: int) -> _Part:
        found = [under(change, scale, rows) for change, scale in zip(changes, scales, strict=True)]
        return _Part(
            None, torch.arange(rows.start, rows.stop), *(torch.stack(kind) for kind in zip(*found, strict=True))
        )

    yield from halving(run, context_batches(model, prompts, lengths - 1, batch_size, max_memory), what=what)


def context_batches(
    model: Any,
    prompts: Prompts,
    extra: Int[Tensor, " prompt"],
    batch_size: int | None,
    max_memory: int | None = None,
) -> list[slice]:
    """Slices of prompts that run whole, ``extra`` tokens behind each.

    One whose longest prompt and longest continuation do not fit the context together is halved.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}.")
    lengths = prompts.attention_mask.sum(dim=1)
    most = int(extra.max())
    if batch_size is None:
        n_pos = int(lengths.max()) + most
        batch_size = plan_batch(
            model, n_pos=n_pos, n_read=max(1, most), keep=most > 0, max_memory=max_memory, n_prompts=len(prompts)
        )
    waiting = [slice(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)][::-1]
    found: list[slice] = []
    while waiting:
        rows = waiting.pop()
        n = rows.stop - rows.start
        if n > 1 and int(lengths[rows].max() + extra[rows].max()) > model.cfg.n_ctx:
            middle = rows.start + n // 2
            waiting += [slice(middle, rows.stop), slice(rows.start, middle)]
        else:
            found.append(rows)
    return found


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that run together, without needless padding; if kept, later tokens can follow."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    reader: Reader

    @classmethod
    def of(cls, model: Any, prompts: Prompts, rows: slice, *, keep: bool) -> "Batch":
        """The prompts in ``rows``; ``keep`` their keys and values."""
        device = model_device(model)
        mask = prompts.attention_mask[rows]
        width = int(mask.sum(dim=1).max())
        tokens, mask = prompts.tokens[rows, -width:].to(device), mask[:, -width:].to(device)
        return cls(tokens, mask, open_reader(model, len(tokens), keep=keep))

    def first(self) -> Float[Tensor, "batch d_vocab"]:
        """Logits behind the prompts."""
        return self.reader.read(self.tokens, self.mask, n_read=1)[:, 0]


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
