"""What a method does to a forward pass: nothing, demonstrations in front, a vector; others have files of their own.

All of them act through hooks on the frozen model or on the prompt's text, never on the model's weights, and alike on
both classes of model. Prompts are left-padded; tokens of an answer may follow for teacher forcing.
"""

import abc
import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.interventions import hooked
from fvlens.prompts import Prompts, build_prompts, render_prompts, with_answers
from fvlens.relations import Pair
from fvlens.showing import Shown
from fvlens.suffix import in_batches, open_reader, plan_batch
from fvlens.training._change import Change
from fvlens.types import Steering


class Adaptation(abc.ABC):
    """What a method does to a model's forward pass."""

    def on(self, model: Any, prompts: Prompts) -> Prompts:
        """The prompts as this method writes them."""
        return prompts

    @property
    def n_more(self) -> int:
        """Tokens that it adds to each prompt when it is applied."""
        return 0

    @contextlib.contextmanager
    def applied(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Iterator[tuple[Int[Tensor, "batch new_pos"], Int[Tensor, "batch new_pos"]]]:
        """The model under this method while open; yields the tokens and mask to give it.

        Of the last ``n_read`` tokens the first is the prompt's last one; the others are of the answer.
        """
        yield tokens, mask

    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits behind the last ``n_read`` tokens, of which the first is the prompt's last token."""
        with self.applied(model, tokens, mask, n_read=n_read) as (given, seen):
            return open_reader(model, len(given), keep=False).read(given, seen, n_read=n_read)

    @abc.abstractmethod
    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if this was made on another model."""


@dataclass(frozen=True, slots=True, repr=False)
class Unchanged(Adaptation, Shown):
    """The model as it is."""

    def check(self, model: Any) -> None:
        """Nothing to refuse: it fits every model."""

    def _line(self) -> str:
        return "the model as it is"


@dataclass(frozen=True, slots=True, repr=False)
class Demonstrations(Adaptation, Shown):
    """Demonstrations in front of whatever a prompt shows itself.

    Attributes:
        pairs: what they are drawn from, for each prompt anew and never with its own query's input.
        n_shots: how many.
        seed: of the draws, which are the same at each use.
    """

    pairs: tuple[Pair, ...]
    n_shots: int
    seed: int

    def on(self, model: Any, prompts: Prompts) -> Prompts:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = build_prompts(
            model,
            self.pairs,
            queries=prompts.queries,
            n_shots=self.n_shots,
            template=prompts.template,
            generator=generator,
        )
        shown = [(*first, *own) for first, own in zip(drawn.demonstrations, prompts.demonstrations, strict=True)]
        return render_prompts(
            model,
            prompts.queries,
            shown,
            template=prompts.template,
            labels=prompts.labels,
            n_shots=self.n_shots + prompts.n_shots,
            relation=prompts.relation,
        )

    def check(self, model: Any) -> None:
        """Nothing to refuse: words fit every model."""

    def _line(self) -> str:
        return f"{self.n_shots} of {len(self.pairs)} pairs in front, seed {self.seed}"


@dataclass(frozen=True, slots=True, repr=False)
class Steered(Adaptation, Shown):
    """A steering's tensors, added at the prompt's last token.

    Attributes:
        steering: a ``FunctionVector``, a ``DistributedVector`` or the like, without a batch axis.
    """

    steering: Steering

    @contextlib.contextmanager
    def applied(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Iterator[tuple[Int[Tensor, "batch new_pos"], Int[Tensor, "batch new_pos"]]]:
        column = tokens.shape[1] - n_read
        for name, value in self.steering.additions().items():
            if value.ndim > (2 if name.endswith("hook_z") else 1):
                raise ValueError(
                    f"the tensor for {name} has a batch axis: shape {list(value.shape)}; give one for all prompts."
                )
        edits = {
            name: functools.partial(added, where=(slice(None), column), value=value)
            for name, value in self.steering.additions().items()
        }
        with hooked(model, edits):
            yield tokens, mask

    def check(self, model: Any) -> None:
        self.steering.check(model)

    def _line(self) -> str:
        return repr(self.steering)


class AdaptationChange(Change):
    """Trains the numbers of an adaptation, by whole passes."""

    @abc.abstractmethod
    def adaptation(self) -> Adaptation:
        """The adaptation with the parameters as they are now."""

    def applied(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        prompts = self.prompts
        rows = rows.to(prompts.tokens.device)
        tokens, mask = prompts.tokens[rows], prompts.mask[rows]
        return self.adaptation().applied(self.model, tokens, mask, n_read=prompts.n_suffix)


def added(activation: Float[Tensor, "batch pos *axes"], *, where: Any, value: Tensor) -> Float[Tensor, "..."]:
    """A new activation with ``value`` added at some places; the sum is rounded once."""
    result = activation.clone()
    result[where] = (activation[where] + value.to(activation.device)).to(activation.dtype)
    return result


def read_prompts(
    model: Any, change: Adaptation, prompts: Prompts, *, n_answer: int, batch_size: int | None, what: str
) -> Iterator[tuple[slice, Float[Tensor, "batch read d_vocab"]]]:
    """Logits behind the prompts, and behind the next ``n_answer - 1`` tokens of their answers, in batches.

    Args:
        model: the model.
        change: what is done to it.
        prompts: the prompts, as :meth:`Adaptation.on` writes them.
        n_answer: answer tokens that are scored.
        batch_size: prompts run together; by default chosen from what memory is free, and halved where it runs out.
        what: the function that the user called, for messages.

    Raises:
        ValueError: ``batch_size`` is below 1.
        MemoryError: out of memory with a single prompt.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{what}: expected batch_size of at least 1, got {batch_size}.")
    device = next(model.parameters()).device
    tokens, mask, _ = with_answers(prompts, n_answer)
    size = batch_size or plan_batch(
        model, n_pos=tokens.shape[1] + change.n_more, n_read=n_answer, n_prompts=len(prompts)
    )

    def run(rows: slice) -> tuple[slice, Tensor]:
        width = int(mask[rows].sum(dim=1).max())  # without needless padding
        own, seen = tokens[rows, -width:].to(device), mask[rows, -width:].to(device)
        return rows, change.read(model, own, seen, n_read=n_answer)

    yield from in_batches(run, len(prompts), size, what=what)
