""":func:`score`: one question, by the engine or by whole passes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fvlens.interruption import keeping
from fvlens.progress import tqdm
from fvlens.prompts import Prompts, Template, warn_of_bos
from fvlens.scoring._changes import as_edits
from fvlens.scoring._scores import Change, Part, Scores
from fvlens.scoring._suffix import by_suffix
from fvlens.scoring._whole_passes import by_whole_passes
from fvlens.suffix import Route, Weights, check_compute, choose_route


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
            work = by_whole_passes(model, prompts, changes, each, batch_size, max_memory, check, what)
        else:
            work = by_suffix(model, prompts, variants, chosen, batch_size, max_memory, compute, what)
        return _gathered(work, len(prompts), len(changes), chosen, bar, interruptible, what)


def note_other_bos(model: Any, prompts: Prompts, changes: Sequence[Any], *, stacklevel: int) -> None:
    """Warn of changes that were made on prompts with other tokens in front than these have; once a policy."""
    templates = [getattr(change, "template", None) for change in changes]
    policies = {template.bos: template for template in templates if isinstance(template, Template)}
    for template in policies.values():
        warn_of_bos(model, template, prompts.template, "a vector", stacklevel=stacklevel)


def _gathered(
    parts: Iterator[Part], n_prompts: int, n_changes: int, path: Route, bar: Any, interruptible: bool, what: str
) -> Scores:
    """The parts in the order of the prompts."""
    done: list[Part] = []

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
