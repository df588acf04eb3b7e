"""Suffixes with a vector added, many times over weights that do not change: what a training step runs.

With few pairs most of a step is the reading of the weights and the fixed cost of its operations, not their arithmetic.
So nothing is made twice: the weights are the engine's laid-out ones, keys and values of all layers are one tensor,
masks and rotations are those of the run, and every operation works on two axes where it can.
"""

import abc
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.suffix._attention import Keys, allowed_keys, attend
from fvlens.suffix._run import SuffixRun

if TYPE_CHECKING:
    from fvlens.suffix._hooked import WeightsRun


class SteeredSuffix(abc.ABC):
    """Logits of kept prompts with a vector added after one layer, at the first suffix position; differentiable."""

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
        self.run, self.layer = run, layer

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
        self.run = run
        self.after = run.resid_after(layer)
        self.upper = range(layer + 1, run.model.cfg.n_layers)
        blocks = run.walk.layout.blocks
        masks: dict[Any, Tensor | None] = {}
        for i in self.upper:
            window = blocks[i].window
            if window not in masks:
                masks[window] = allowed_keys(run.walk.mask.bool(), run.n_suffix, window)
        self.allowed = masks

    def logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row suffix d_vocab"]:
        run, walk = self.run, self.run.walk
        rows = rows.to(self.after.device)
        after = _added(self.after[rows], vectors)
        resid = after.flatten(0, 1)  # most operations are cheaper on two axes
        shape = (len(rows), 1, after.shape[1])
        kept = run.kept[rows, self.upper.start - run.from_layer :].unbind(1) if len(self.upper) else ()
        rotations = [(cos[rows][:, None], sin[rows][:, None]) for cos, sin in walk.rotations]
        allowed = {window: None if mask is None else mask[rows] for window, mask in self.allowed.items()}
        for layer, keys_values in zip(self.upper, kept, strict=True):
            block = walk.layout.blocks[layer]
            q, k, v = walk.heads(block, block.ln1(resid), shape, rotations)
            z = attend(q, k, v, Keys(keys_values, allowed[block.window], block.scale, walk.cap))
            resid = walk.finish(block, resid, z.reshape(len(resid), -1))
        return run.logits(resid).view(*after.shape[:2], -1)
