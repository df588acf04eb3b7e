"""Suffixes with a vector added, many times over weights that do not change: what a training step runs.

With few pairs most of a step is the reading of the weights and the fixed cost of its operations, not their arithmetic.
So nothing is made twice: the weights are the engine's laid-out ones, keys and values of all layers are one tensor,
masks and rotations are those of the run, and every operation works on two axes where it can.
"""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.suffix._attention import Keys, attend
from fvlens.suffix._run import SuffixRun

if TYPE_CHECKING:
    from fvlens.suffix._hooked import WeightsRun


class SteeredSuffix(abc.ABC):
    """Logits of kept prompts with a vector added after one layer, at the first suffix position; differentiable.

    Attributes:
        after: their residual stream after that layer.
    """

    after: Float[Tensor, "prompt suffix d_model"]

    @property
    @abc.abstractmethod
    def run(self) -> SuffixRun:
        """The prompts' run."""

    @abc.abstractmethod
    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        """Logits of some prompts (in this order) at each suffix position, with one vector for all or one for each."""


def _added(after: Tensor, vectors: Tensor) -> Tensor:
    """Residual streams ``[row suffix d_model]`` with the vectors added at the first position, rounded once."""
    if after.shape[1] == 1 and after.dtype == vectors.dtype:
        return after + vectors[..., None, :]
    first = (after[:, 0] + vectors).to(after.dtype)[:, None]
    return torch.cat([first, after[:, 1:]], dim=1)


def steered_resid(
    run: SuffixRun, layer: int, vector: Float[Tensor, "*prompt d_model"]
) -> Float[Tensor, "prompt 1 suffix d_model"]:
    """Final residual stream with a vector added after ``layer`` at the first suffix position (differentiable).

    Args:
        run: prompts that were run once.
        layer: the vector is added after this layer.
        vector: one vector for all prompts, or one for each.
    """
    return run.continue_from(layer + 1, _added(run.resid_after(layer), vector)[:, None])


class GeneralSteps(SteeredSuffix):
    """By the run's own blocks, whatever they are."""

    def __init__(self, run: SuffixRun, layer: int) -> None:
        self._run, self.layer = run, layer
        self.after = run.resid_after(layer)

    @property
    def run(self) -> SuffixRun:
        return self._run

    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        run = self.run.select(rows)
        return run.logits(steered_resid(run, self.layer, vectors)[:, 0])


class LaidOutSteps(SteeredSuffix):
    """By the laid-out weights of a HookedTransformer.

    Args:
        run: a run over the weights.
        layer: the vector is added after this layer.
    """

    def __init__(self, run: "WeightsRun", layer: int) -> None:
        self._run = run
        self.after = run.resid_after(layer)
        self.upper = range(layer + 1, run.model.cfg.n_layers)

    @property
    def run(self) -> "WeightsRun":
        return self._run

    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        final = packed([(self, rows, vectors)])
        return self.run.logits(final).view(len(rows), self.run.n_suffix, -1)


def packed(parts: "Sequence[tuple[LaidOutSteps, Tensor, Tensor]]") -> Float[Tensor, "token d_model"]:
    """Final residual streams of rows of several runs with suffixes of unlike length, part after part.

    Every product takes the tokens of all of them together; only attention goes run by run.

    Args:
        parts: a run's steps, some of its rows, and one vector for all of these or one for each.
    """
    first = parts[0][0]
    device = first.after.device
    layout, walk = first.run.layout, first.run.walk
    ready = []
    for steps, rows, vectors in parts:
        rows = rows.to(device)
        kept = steps.run.kept[rows, steps.upper.start - steps.run.from_layer :].unbind(1) if steps.upper else ()
        allowed = {window: None if mask is None else mask[rows] for window, mask in steps.run.walk.allowed.items()}
        ready.append((_added(steps.after[rows], vectors), kept, allowed, steps.run.walk, rows))
    resid = _flat([after for after, *_ in ready])  # most operations are cheaper on two axes
    rotations = [
        tuple(_flat([own.rotations[table][part][rows] for _, _, _, own, rows in ready]) for part in (0, 1))
        for table in range(len(layout.tables))
    ]
    shapes = [after.shape[:2] for after, *_ in ready]
    for layer in first.upper:
        block = layout.blocks[layer]
        heads = walk.heads(block, resid, (len(resid),), rotations)
        pieces = zip(*(x.split([n * s for n, s in shapes]) for x in heads), strict=True)
        zs = []
        for (q, k, v), (n, s), (_, kept, allowed, own, _) in zip(pieces, shapes, ready, strict=True):
            keys = Keys(kept[layer - first.upper.start], allowed[block.window], block.scale, own.cap)
            q, k, v = (x.view(n, 1, s, *x.shape[1:]) for x in (q, k, v))
            z = attend(q, k, v, keys)
            zs.append(z.reshape(n * s, -1))
        resid = walk.finish(block, resid, zs[0] if len(zs) == 1 else torch.cat(zs))
    return resid


def _flat(parts: Sequence[Float[Tensor, "_row _suffix ..."]]) -> Float[Tensor, "token ..."]:
    return parts[0].flatten(0, 1) if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])
