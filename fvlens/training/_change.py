"""The first seam of training: a change of the model, with numbers in it that are trained."""

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.interventions import hooked
from fvlens.suffix import Route
from fvlens.training._prepared import Edit, PreparedPrompts
from fvlens.training._settings import Task


@dataclass(frozen=True, slots=True)
class Wants:
    """What an objective is to be told of the rows of a batch, beside the log-probabilities of their answers.

    Attributes:
        logits: the logits of all tokens at each answer position.
        first: the logits at the prompts' last tokens, which say what the model would answer.
        hooks: names of hooks whose activations it reads, such as ``blocks.3.hook_resid_post`` or
            ``blocks.3.attn.hook_pattern``. They are those of whole passes.
    """

    logits: bool = False
    first: bool = False
    hooks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Readout:
    """What the model says to some rows under a change, differentiable in its numbers.

    Attributes:
        rows: which of the training's prompts they are.
        targets: their answers' tokens, -1 behind their end.
        log_probs: log-probability of each answer token in nats, 0 behind the answer's end.
        last: position of the prompts' last token in activations, counted from the end.
        first: logits at the prompts' last tokens; None unless wanted.
        logits: logits at the last tokens and behind the answers' tokens; None unless wanted.
        activations: of each hook that was wanted, ``[row pos ...]`` as the hook gives it.
    """

    rows: Int[Tensor, " row"]
    targets: Int[Tensor, "row answer_pos"]
    log_probs: Float[Tensor, "row answer_pos"]
    last: int
    first: Float[Tensor, "row d_vocab"] | None = None
    logits: Float[Tensor, "row answer_pos d_vocab"] | None = None
    activations: Mapping[str, Tensor] = field(default_factory=dict)


class Change(abc.ABC):
    """What is trained: numbers for each relation, what they do to the model, and the value that they make in the end.

    A subclass says its :meth:`parameters` and :meth:`scale`, and what they do to a pass: :meth:`edits`, or
    :meth:`applied` where the prompts change too, or :meth:`read` where something faster than whole passes is exact.

    Args:
        prompts: the queries of all relations, as by :meth:`PreparedPrompts.of`.
    """

    relative_lr = 0.03
    """Default learning rate, as a share of :meth:`scale`."""

    def __init__(self, prompts: PreparedPrompts) -> None:
        self.prompts, self.model = prompts, prompts.model

    @property
    def path(self) -> Route:
        """How the prompts are run."""
        return self.prompts.path

    @abc.abstractmethod
    def parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each relation."""

    @abc.abstractmethod
    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Typical size of what the parameters stand beside, to which the default learning rate is relative."""

    def edits(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Mapping[str, Edit]:
        """What each row's own parameters do to a pass: hook name -> function of the activation there."""
        return {}

    def applied(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """The model under the change while open, and the tokens and mask ``[row pos]`` that it is to be given."""
        return self.prompts.under(self.edits(rows, relation), rows)

    def read(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"], wants: Wants) -> Readout:
        """What the model says to some rows, each under its own relation's parameters."""
        activations: dict[str, Tensor] = {}
        keep = {name: functools.partial(_keep, activations, name) for name in wants.hooks}
        # opened inside: an activation is kept as the change leaves it
        with self.applied(rows, relation) as (tokens, mask), hooked(self.model, keep):
            logits = self.prompts.read(tokens, mask)
        return self.readout(rows, logits, wants, activations)

    def readout(
        self,
        rows: Int[Tensor, " row"],
        logits: Float[Tensor, "row answer_pos d_vocab"],
        wants: Wants,
        activations: Mapping[str, Tensor] | None = None,
    ) -> Readout:
        """A readout from logits."""
        return Readout(
            rows,
            self.prompts.targets_of(rows),
            self.prompts.of_answers(logits, rows),
            self.prompts.last,
            first=logits[:, 0] if wants.first else None,
            logits=logits if wants.logits else None,
            activations=activations or {},
        )

    def penalty(
        self, step: Sequence[Int[Tensor, " _row"]], anchors: Sequence[Float[Tensor, " number"]] | None
    ) -> Float[Tensor, ""]:
        """What the weight ``l2`` multiplies: the squared distance of all parameters from ``anchors``, or from zero.

        Args:
            step: the rows of each relation that the step is over.
            anchors: the start of each relation's numbers, if the training is to stay near it.
        """
        values = torch.stack([flat(own) for own in self.parameters()])
        if anchors is not None:
            values = values - torch.stack(list(anchors))
        return values.square().sum()

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> Any:
        """What the numbers of the relation at ``place`` make: by default themselves. Parameters stay as they are."""
        return values

    def identity(self) -> dict[str, Any]:
        """What else a saved training must have in common with this one, as plain JSON values."""
        return {"method": type(self).__name__, "path": self.path}


def _keep(activations: dict[str, Tensor], name: str, activation: Float[Tensor, "..."]) -> None:
    activations[name] = activation


def flat(parameters: Sequence[nn.Parameter]) -> Float[Tensor, " number"]:
    """All numbers of the parameters, one after another; differentiable."""
    return torch.cat([parameter.reshape(-1) for parameter in parameters]) if parameters else torch.zeros(0)


def fill(parameters: Sequence[nn.Parameter], values: Float[Tensor, " number"]) -> None:
    """Give the parameters these numbers, which :func:`flat` gave."""
    with torch.no_grad():
        for parameter, part in zip(parameters, filled(parameters, values), strict=True):
            parameter.copy_(part)


def filled(parameters: Sequence[nn.Parameter], values: Float[Tensor, " number"]) -> Iterator[Float[Tensor, "..."]]:
    """The values in the shapes of the parameters."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, values.split(sizes), strict=True):
        yield part.view(parameter.shape)
