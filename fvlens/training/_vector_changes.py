"""Vectors as changes: one of the residual stream for each relation, or numbers of their own for chosen heads."""

import abc
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.interventions import z_hook
from fvlens.models import fingerprint
from fvlens.suffix import Added, named_precision
from fvlens.suffix import Edit as SuffixEdit
from fvlens.training._change import Change, Readout, Wants, fill
from fvlens.training._prepared import Edit, SteerablePrompts
from fvlens.training._settings import Task
from fvlens.training._trainable import TrainableDistributedVector, TrainableVector
from fvlens.vectors import DistributedVector, FunctionVector


class SteeringChange(Change):
    """A vector for each row, made of whatever is trained, over kept prompts where a fast path is exact."""

    prompts: SteerablePrompts

    def __init__(self, prompts: SteerablePrompts) -> None:
        super().__init__(prompts)

    @abc.abstractmethod
    def vectors(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Added:
        """The vector of all rows, or of each; or edits of heads, for all rows."""

    def edits(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Mapping[str, Edit]:
        return self.prompts.edits(self.vectors(rows, relation))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"compute": named_precision(self.prompts.compute)}

    def read(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"], wants: Wants) -> Readout:
        if wants.hooks:  # what a hook sees is that of whole passes
            return super().read(rows, relation, wants)
        vectors = self.vectors(rows, relation)
        if wants.logits:
            return self.readout(rows, self.prompts.logits(rows, vectors), wants)
        targets = self.prompts.targets_of(rows)
        if wants.first:
            logs, first = self.prompts.scores(rows, vectors)
            return Readout(rows, targets, logs, self.prompts.last, first=first)
        return Readout(rows, targets, self.prompts.log_probs(rows, vectors), self.prompts.last)


class VectorChange(SteeringChange):
    """A vector of the residual stream a relation."""

    def __init__(self, prompts: SteerablePrompts, trainable: TrainableVector) -> None:
        super().__init__(prompts)
        self.trainable = trainable

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[row] for row in self.trainable.rows]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Root mean square of the residual stream at that place."""
        return self.prompts.size(rows)

    def vectors(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, "*row d_model"]:
        own = self.trainable.rows
        return own[0] if len(own) == 1 else self.trainable.matrix[relation.to(own[0].device)]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"layer": self.prompts.layer}

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> FunctionVector:
        """The vector, without a history of its own: heads and the hash of its data are for the caller to say."""
        return FunctionVector(
            vector=values,
            layer=self.prompts.layer,
            heads=(),
            relation=task.name,
            fingerprint=fingerprint(self.model),
            kind="fine-tuned",
            template=self.prompts.prompts.template,
            seed=task.seed,
        )


class DistributedChange(SteeringChange):
    """Numbers of their own for chosen heads.

    Args:
        prompts: the queries, kept below the first of the heads: ``layer=trainable.joins_after``.
        trainable: the numbers.

    Raises:
        ValueError: prompts that are kept further up.
    """

    def __init__(self, prompts: SteerablePrompts, trainable: TrainableDistributedVector) -> None:
        super().__init__(prompts)
        if prompts.layer > trainable.joins_after:
            raise ValueError(
                f"DistributedChange: the first head is in layer {trainable.joins_after + 1}, but the prompts are kept "
                f"up to layer {prompts.layer}; make them with layer={trainable.joins_after}."
            )
        self.trainable = trainable

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.trainable.values]]

    def vectors(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> tuple[SuffixEdit, ...]:
        """What is added to the heads' z, an edit a layer."""
        return tuple(SuffixEdit(layer, "z", value) for layer, value in self.trainable.by_layer().items())

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Root mean square of the heads' z."""
        by_layer: dict[int, list[int]] = {}
        for head in self.trainable.heads:
            by_layer.setdefault(head.layer, []).append(head.head)
        z = self.prompts.found_at([z_hook(layer) for layer in by_layer], rows)
        squares = [z[z_hook(layer)][:, own].float().square().flatten().cpu() for layer, own in by_layer.items()]
        return float(torch.cat(squares).mean().sqrt())

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"heads": [list(head) for head in self.trainable.heads]}

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> DistributedVector:
        trainable = copy.deepcopy(self.trainable)
        fill([trainable.values], values)
        vector = trainable.to_vector(self.model, relation=task.name)
        return dataclasses.replace(vector, template=self.prompts.prompts.template)
