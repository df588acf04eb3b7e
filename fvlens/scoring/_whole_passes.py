"""One change after another, by whole passes under hooks: the oracle of the engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.metrics import best_token, is_best, log_probability, rank
from fvlens.models import model_device
from fvlens.prompts import Prompts
from fvlens.scoring._changes import changed
from fvlens.scoring._scores import Change, Part
from fvlens.suffix import Reader, halving, open_reader, plan_batch


def by_whole_passes(
    model: Any,
    prompts: Prompts,
    changes: Sequence[Change],
    scales: Sequence[float],
    batch_size: int | None,
    max_memory: int | None,
    check: bool,
    what: str,
) -> Iterator[Part]:
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

    def run(rows: slice, _: int) -> Part:
        found = [under(change, scale, rows) for change, scale in zip(changes, scales, strict=True)]
        return Part(
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
